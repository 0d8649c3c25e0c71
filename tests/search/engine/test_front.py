"""The records of a front: ``front.json`` and back."""

from dataclasses import replace
from pathlib import Path

import pytest

from search.engine.choice import BoundedLimit, Choice, FamilyPick, LatencyPrediction, Prediction
from search.engine.front import FailedEvaluation, Front, Member, SurrogateAgreement
from space import Architecture, InputError, Layer

PREDICTED = Prediction(
    params=1000, latency={"desk": {"decode@64": LatencyPrediction(latency_ms=1.5, upper_ms=1.75)}}
)


def member(width: int, loss: float, recall: float | None) -> Member:
    layer = Layer(mixer="attention", heads=1, kv_heads=1, ffn=32)
    return Member(
        architecture=Architecture(width=width, layers=(layer,)),
        qualities={"loss": loss, "recall_loss": recall},
        predicted=PREDICTED,
    )


def front() -> Front:
    best, fastest = member(64, 2.5, None), member(32, 3.0, 1.25)
    return Front(
        space="small",
        objectives=("loss", "latency:decode@64"),
        strategy="random",
        confidence=0.975,
        seed=1,
        evaluations=3,
        failed=(FailedEvaluation(key="abc", reason="ValueError: no"),),
        surrogate={"loss": SurrogateAgreement(evaluations=3, spearman=0.5)},
        limits=(BoundedLimit(text="decode@64<=2ms", bound=0.002, unit="seconds"),),
        picks={"best": best.key, "knee": best.key, "fastest": fastest.key},
        members=(best, fastest),
        inputs={"space": "0" * 64},
    )


def test_front_written_and_read_is_equal(tmp_path: Path) -> None:
    front().write(tmp_path / "front.json")
    assert Front.read(tmp_path / "front.json") == front()


def test_json_of_a_member_names_the_qualities() -> None:
    value = member(64, 2.5, None).to_json()
    assert list(value) == ["key", "architecture", "loss_nats", "recall_loss_nats", "predicted"]
    assert value["recall_loss_nats"] is None
    assert Member.from_json(value) == member(64, 2.5, None)


def test_member_is_found_by_pick_and_by_key() -> None:
    value = front()
    assert value.member("fastest") == value.members[1]
    assert value.member(value.members[0].key) == value.members[0]
    with pytest.raises(InputError, match="pick 'worst': not one of best, knee, fastest, nor a key"):
        value.member("worst")


def test_first_quality_among_the_objectives_ranks() -> None:
    value = replace(front(), objectives=("params", "recall_loss", "loss"))
    assert value.ranking_quality == "recall_loss"
    assert value.members[1].quality(value.ranking_quality) == 1.25
    with pytest.raises(InputError, match="recall_loss was not evaluated"):
        value.members[0].quality(value.ranking_quality)


@pytest.mark.parametrize(
    "choice",
    [
        Choice(),
        front().choice(front().members[0]),
        Choice(predicted=PREDICTED, picked=FamilyPick(how="mix'n'match", base="abc", family=5)),
    ],
)
def test_choice_to_json_and_back_is_equal(choice: Choice) -> None:
    assert Choice.from_json(choice.to_json()) == choice


def test_predicted_workloads_of_a_device() -> None:
    choice = Choice(predicted=PREDICTED)
    assert choice.workloads("desk") == PREDICTED.latency["desk"]
    assert choice.workloads("phone") == Choice().workloads("desk") == {}
