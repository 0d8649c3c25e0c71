"""A search in Python with the caller's evaluator: no supernet, no device."""

from pathlib import Path

import pytest

from search.engine.entry import run_search
from search.engine.front import Front
from search.problem.metric import METRICS, Metric, Unit, register_metric
from search.problem.objective import QUALITIES, register_objective
from search.problem.problem import Problem
from search.testing import contract_space
from space import Architecture, InfeasibleError, InputError, Space, Workload
from space.cost import memory_cost, params
from space.ops import Cost
from tests.synthetic import loss

SPACE = contract_space()


def problem(**changes: list[str]) -> Problem:
    return Problem(SPACE, **{"objectives": ["loss", "params"], "limits": ["params<=60%"], **changes})


def test_search_without_a_device_keeps_the_limits(tmp_path: Path) -> None:
    front = run_search(problem(), loss, tmp_path, population=8, generations=3)
    assert front.evaluations == 24
    bound = front.limits[0].bound
    for member in front.members:
        assert member.loss_nats == loss(member.architecture)
        assert member.predicted.params == params(member.architecture, SPACE.config) <= bound
        assert member.predicted.latency == {}
    assert front.member("best").loss_nats == min(member.loss_nats for member in front.members)
    assert Front.read(tmp_path / "front.json") == front


def test_finished_search_is_read_and_an_interrupted_one_continues(tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(architecture: Architecture) -> float:
        calls.append(architecture.key)
        return loss(architecture)

    first = run_search(problem(), counted, tmp_path / "a", population=8, generations=3)
    assert len(calls) == len(set(calls)) == 24
    assert run_search(problem(), counted, tmp_path / "a", population=8, generations=3) == first
    assert len(calls) == 24
    for path in (tmp_path / "a" / "front.json", tmp_path / "a" / "evaluations" / "part-0002.parquet"):
        path.unlink()
    assert run_search(problem(), counted, tmp_path / "a", population=8, generations=3) == first
    assert len(calls) == 32


def test_workers_change_nothing(tmp_path: Path) -> None:
    here = run_search(problem(), loss, tmp_path / "here", population=6, generations=2)
    there = run_search(problem(), loss, tmp_path / "there", population=6, generations=2, workers=1)
    assert here == there


def test_registered_quality_of_the_evaluator_is_minimised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QUALITIES, "_values", dict(QUALITIES._values))
    register_objective("error_rate")
    asked = problem(objectives=["error_rate", "params"])
    front = run_search(
        asked,
        lambda a: {"error_rate": loss(a) - 3, "loss": 1.0},
        tmp_path / "two",
        population=10,
        generations=4,
    )
    assert front.ranking_quality == "error_rate"
    assert front.members[0].quality("error_rate") == loss(front.members[0].architecture) - 3
    assert front.members[0].loss_nats == 1.0
    alone = run_search(asked, lambda a: loss(a) - 3, tmp_path / "one", population=10, generations=4)
    assert alone.members[0].qualities["loss"] is None
    assert [m.key for m in alone.members] == [m.key for m in front.members]
    assert Front.read(tmp_path / "one" / "front.json") == alone


def test_failures_are_recorded(tmp_path: Path) -> None:
    def sometimes(architecture: Architecture) -> float:
        if architecture.width == 48:
            raise ValueError("too wide")
        return loss(architecture)

    front = run_search(problem(limits=[]), sometimes, tmp_path, population=8, generations=2)
    assert front.failed
    assert {item.reason for item in front.failed} == {"ValueError: too wide"}
    with pytest.raises(InputError, match=r"every evaluation failed; the first with .* no recall_loss"):
        run_search(
            problem(objectives=["loss", "recall_loss"]),
            lambda a: {"loss": 1.0},
            tmp_path / "no",
            population=4,
        )


def test_bad_problems_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match=r"cannot be met"):
        run_search(problem(limits=["params<=1"]), loss, tmp_path)
    with pytest.raises(InputError, match="must be among params"):
        run_search(problem(objectives=["params"]), loss, tmp_path)
    with pytest.raises(InputError, match="strategy hat: it has one objective"):
        run_search(problem(), loss, tmp_path, strategy="hat")
    with pytest.raises(InputError, match="strategy 'climb': not one of nsga2, mip-nsga2, hat, random"):
        run_search(problem(), loss, tmp_path, strategy="climb")
    assert not (tmp_path / "front.json").exists()


def test_folder_of_another_search_is_refused(tmp_path: Path) -> None:
    run_search(problem(), loss, tmp_path, population=4, generations=1)
    with pytest.raises(InputError, match="made for search"):
        run_search(problem(), loss, tmp_path, population=4, generations=1, seed=1)
    with pytest.raises(InputError, match="made for model"):
        run_search(problem(), loss, tmp_path, population=4, generations=1, inputs={"model": "b" * 64})


def test_registered_metric_is_limited_minimised_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METRICS, "_values", dict(METRICS._values))
    unit = Unit(name="joules", parsed={"J": 1.0}, printed=(" uJ", " mJ", " J"), smallest=1e-6)

    def energy(space: Space, _predictor: object, workload: Workload | None, _confidence: object) -> Cost:
        assert workload is not None
        return memory_cost(space, workload)

    register_metric(Metric(name="energy", unit=unit, phase="decode", cost=energy))
    asked = problem(objectives=["loss", "energy@32"], limits=["energy@32<=60%", "energy@16<=90%"])
    front = run_search(asked, loss, tmp_path, population=8, generations=2)
    assert front.limits[0].unit == "joules"
    for member in front.members:
        assert member.predicted.costs["energy@32"] <= front.limits[0].bound
        assert member.predicted.costs["energy@16"] <= front.limits[1].bound
    fastest = front.member("fastest").predicted.costs["energy@32"]
    assert fastest == min(member.predicted.costs["energy@32"] for member in front.members)
    assert Front.read(tmp_path / "front.json") == front
