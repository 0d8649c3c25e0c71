"""Choice of the models to measure, and the budget."""

from pathlib import Path

import numpy as np
import pytest

from latency import ProfileConfig, load_card
from latency.config import minutes
from latency.predictor.design import ModelCounts, ModelDesign, model_design
from latency.predictor.op_latencies import TimedModel, fit_op_latencies
from latency.predictor.terms import terms
from latency.profiling import profile
from space import InputError, Space, Workload, load_space, variation
from tests.contracts import tiny_space

SMALL = load_space(Path(__file__).parents[3] / "configs" / "spaces" / "small.yaml")
WORKLOADS = (Workload.parse("decode@512"), Workload.parse("prefill@64"))
COUNTS = ModelCounts(optimal=24, random=10, held_out=8, repeated=3, seed=0)


@pytest.fixture(scope="module")
def design() -> ModelDesign:
    return model_design(SMALL, WORKLOADS, COUNTS)


def test_every_kind_of_op_is_in_the_first_choice(design: ModelDesign) -> None:
    chosen = design.choose(design.expected(), 16)
    assert len({a.key for a in chosen}) == 16
    for workload in WORKLOADS:
        kinds = {op.kind for a in design.population for op in terms(a, workload, SMALL)}
        known = {op.kind for a in chosen for op in terms(a, workload, SMALL)}
        assert {kind for kind in kinds if not kind.startswith("cache.")} <= known


def test_every_mixer_is_measured_however_few_models_are_asked_for(design: ModelDesign) -> None:
    few = design.choose(design.expected(), 1)
    mixers = {x.mixer for a in design.population for x in a.layers}
    assert mixers == {x.mixer for a in few for x in a.layers} | {"none"}
    assert len(few) < 8


def test_chosen_models_tell_more_than_random_ones(design: ModelDesign) -> None:
    """On latencies by the expected rates, the uncertainty after the choice is below that after a drawing."""
    expected = design.expected()

    def left(chosen: list[int]) -> float:
        timed = []
        for workload in WORKLOADS:
            seconds, _ = expected.covariance(design.population, workload)
            timed += [TimedModel(design.population[i], workload, seconds[i], 0.003) for i in chosen]
        return design.expected_error(fit_op_latencies(SMALL, timed))

    keys = [a.key for a in design.population]
    best = left([keys.index(a.key) for a in design.choose(expected, 24)])
    rng = np.random.default_rng(0)
    drawn = [left(list(rng.choice(len(keys), 24, replace=False))) for _ in range(4)]
    assert best < min(drawn)


def test_measured_models_are_not_chosen_again(design: ModelDesign) -> None:
    first = design.choose(design.expected(), 5)
    second = design.choose(design.expected(), 5, first)
    assert not {a.key for a in first} & {a.key for a in second}


def many_shapes() -> Space:
    return tiny_space(
        mixer=["attention", "linear"], width=[16, 32, 48, 64], heads=[1, 2, 4], ffn=[0, 16, 32, 48, 64, 80]
    )


def test_budget_ends_the_choice_and_progress_tells_its_accuracy(tmp_path: Path) -> None:
    config = ProfileConfig(
        workloads=("decode@16",), block_ms=0.2, min_rounds=2, max_rounds=2, optimal_models=200,
        random_models=2, held_out_models=3, repeated_models=1, max_noise=None, max_error=None, error=1e-6,
        group=8, budget_minutes=4 / 60, rss=False,
    )  # fmt: skip
    said: list[str] = []
    predictor = profile(many_shapes(), tmp_path, "here", config, lambda what, _: said.append(what))
    table = load_card(tmp_path, "here").table("models")
    assert 16 <= (table["role"] == "optimal").sum() < 200
    assert any("ops known to" in what and "of at most 200" in what for what in said)
    rows = variation.sample(many_shapes(), np.random.default_rng(0), 50)
    assert (predictor.predict(rows, Workload.parse("decode@16")) > 0).all()


@pytest.mark.parametrize(("text", "expected"), [("90s", 1.5), ("10m", 10.0), ("1.5h", 90.0)])
def test_budget_is_parsed_as_minutes(text: str, expected: float) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "10", "m", "-1m", "0s", "1d", "1m30s", "nan m"])
def test_malformed_budget_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a time above 0 such as 90s, 10m"):
        minutes(text)
