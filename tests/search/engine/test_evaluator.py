"""Evaluators: failures are recorded, lost workers change nothing, registered objectives are evaluated."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from search.engine.config import SearchConfig
from search.engine.evaluations import EVALUATIONS, Record
from search.engine.evaluator import Failed, Machine, Outcome, attempt
from search.engine.optuna_study import open_projection
from search.engine.search import Search
from search.engine.supernet_evaluator import evaluator
from search.engine.workers import pool
from search.problem.objective import QUALITIES, register_objective
from search.problem.problem import Problem
from space import Architecture, InputError, genome, variation
from space.io.parquet import read_table
from supernet.evaluate import Quality
from supernet.training import checkpoint
from tests.contracts import tiny_space
from tests.synthetic import Synthetic

SPACE = tiny_space(width=[16, 32], depth=[1, 2], ffn=[0, 16])
SOME = genome.decode(SPACE, np.unique(variation.sample(SPACE, np.random.default_rng(0), 200), axis=0)[:12])


def outcomes(marks: dict[str, str], workers: int) -> list[Outcome]:
    with pool(Synthetic, (marks,), workers) as evaluate:
        return list(evaluate(SOME, "search"))


def losses(found: Sequence[Outcome]) -> list[float | None]:
    return [None if isinstance(outcome, Failed) else outcome.loss_nats for outcome in found]


def test_raising_evaluation_is_tried_three_times_and_recorded() -> None:
    one = Synthetic({SOME[0].key: "raises", SOME[1].key: "diverges"})
    assert attempt(one, SOME[0], "search") == Failed(f"ValueError: no weights for {SOME[0].key}")
    assert one.tries == 3
    assert attempt(one, SOME[1], "search") == Failed("the loss is nan")
    assert attempt(one, SOME[2], "search") == Quality(
        loss_nats=int(SOME[2].key, 16) % 1000 / 1000, recall_loss_nats=int(SOME[2].key, 16) % 1000 / 1000 + 6
    )


def test_dying_workers_change_no_other_outcome() -> None:
    marks = {SOME[2].key: "raises", SOME[7].key: "diverges"}
    here = outcomes(marks, 0)
    there = outcomes({**marks, SOME[5].key: "dies"}, 2)
    assert isinstance(there[5], Failed)
    assert "died 3 times" in there[5].reason
    assert here[:5] + here[6:] == there[:5] + there[6:]


def test_search_continues_after_a_failed_evaluation(tmp_path: Path) -> None:
    """In the record, the study and the front; where all of the front fails, one line says so."""
    import optuna

    space = SPACE
    problem = Problem(space, objectives=("loss", "params"))
    config = SearchConfig(generations=3, population=6, workers=0)
    bad = {a.key: "raises" for a in genome.decode(space, genome.encode(space, [genome.largest(space)]))}

    def evaluate(architectures: Sequence[Architecture], stage: str) -> Iterator[Outcome]:
        return (attempt(Synthetic(bad), a, stage) for a in architectures)

    front = Search(problem, config, tmp_path, {}).run(evaluate)
    assert [item.key for item in front.failed] == [genome.largest(space).key]
    assert front.failed[0].reason.startswith("ValueError: no weights")
    assert front.evaluations == 18
    study = open_projection(tmp_path / "study.log", tmp_path.name, ["loss", "params"], space.hash).study
    states = [trial.state for trial in study.get_trials()]
    assert states.count(optuna.trial.TrialState.FAIL) == 1
    assert len(states) == 18

    def none(architectures: Sequence[Architecture], stage: str) -> Iterator[Outcome]:
        return (
            Failed("lost") if stage == "front" else attempt(Synthetic({}), a, stage) for a in architectures
        )

    with pytest.raises(InputError, match="every re-evaluation failed: lost"):
        Search(problem, config, tmp_path / "again", {}).run(none)


def test_search_that_continues_on_another_machine_gives_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(SPACE, objectives=("loss", "params"))
    config = SearchConfig(generations=3, population=4, workers=0)
    warnings: list[str] = []

    def front() -> bytes:
        with pool(Synthetic, ({},), 0) as evaluate:
            Search(problem, config, tmp_path, {}, warn=warnings.append).run(evaluate)
        return (tmp_path / "front.json").read_bytes()

    first = front()
    (tmp_path / "evaluations" / "part-front.parquet").unlink()
    assert front() == first
    assert warnings == []
    (tmp_path / "evaluations" / "part-front.parquet").unlink()
    monkeypatch.setattr(Machine, "here", lambda: Machine("Other CPU", "9.9"))
    assert front() == first
    assert len(warnings) == 1
    assert (
        "continued on Other CPU with torch 9.9: an uninterrupted search may give another front" in warnings[0]
    )


def test_folder_is_locked_during_the_re_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LOCK_TIMEOUT_S", 0.0)
    refused: list[str] = []

    def evaluate(architectures: Sequence[Architecture], stage: str) -> Iterator[Outcome]:
        with pytest.raises(InputError, match="another process writes here"), checkpoint.sole_writer(tmp_path):
            pass
        refused.append(stage)
        return (attempt(Synthetic({}), a, stage) for a in architectures)

    problem = Problem(SPACE, objectives=("loss", "params"))
    Search(problem, SearchConfig(generations=1, population=4, workers=0), tmp_path, {}).run(evaluate)
    assert refused == ["search", "middle", "front"]
    with checkpoint.sole_writer(tmp_path):
        pass


def test_study_of_a_refused_record_is_not_opened(tmp_path: Path) -> None:
    problem = Problem(SPACE, objectives=("loss", "params"))
    config = SearchConfig(generations=1, population=4, workers=0)
    with pool(Synthetic, ({},), 0) as evaluate:
        Search(problem, config, tmp_path, {}).run(evaluate)
        (tmp_path / "study.log").unlink()
        with pytest.raises(InputError, match="made for search"):
            Search(problem, config.model_copy(update={"seed": 1}), tmp_path, {}).run(evaluate)
    assert not (tmp_path / "study.log").exists()


def test_unreachable_cluster_is_refused() -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match="nothing answers"):
        pool(Synthetic, ({},), 1, "127.0.0.1:1").__enter__()
    with pytest.raises(InputError, match="expected HOST:PORT"):
        pool(Synthetic, ({},), 1, "nowhere").__enter__()
    assert time.monotonic() - began < 30


def test_worker_that_cannot_start_ends_the_search() -> None:
    with pytest.raises(InputError, match="a worker cannot be made"), pool(Synthetic, (), 1) as evaluate:
        list(evaluate(SOME, "search"))


def test_registered_objective_is_evaluated_on_the_supernet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its values are columns of the record, qualities of the members and an objective of the front."""
    import torch

    from supernet.evaluate import EvaluationSet
    from supernet.supernet import Supernet

    monkeypatch.setattr(QUALITIES, "_values", dict(QUALITIES._values))

    def error_rate(model: Callable[[torch.Tensor], torch.Tensor], data: EvaluationSet) -> float:
        wrong = model(torch.from_numpy(data.tokens)).argmax(-1).numpy() != data.targets
        return float(wrong.mean())

    register_objective("error_rate", error_rate)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SPACE.config.vocab_size, (4, 17))
    data = EvaluationSet(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], recallable=np.ones((4, 16), bool), text_bytes=None
    )
    torch.manual_seed(0)
    supernet = Supernet(SPACE)
    problem = Problem(SPACE, objectives=["error_rate", "params"])
    config = SearchConfig(generations=2, population=4, workers=0)
    sets = dict.fromkeys(config.windows_by_stage(), data)
    with evaluator(supernet, sets, 0, objectives=problem.registered_qualities) as evaluate:
        front = Search(problem, config, tmp_path, {}).run(evaluate)
    assert front.ranking_quality == "error_rate"
    for member in front.members:
        assert 0 < member.quality("error_rate") <= 1
        assert member.loss_nats > 0
    table = Record(tmp_path, {}).path("front")
    assert set(read_table(table, EVALUATIONS)[0]["error_rate"]) >= {
        member.quality("error_rate") for member in front.members
    }
    register_objective("given_only")
    with pytest.raises(InputError, match="no function that evaluates"):
        evaluator(supernet, sets, 0, objectives=["given_only"])
