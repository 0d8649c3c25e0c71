"""Metrics: the built-in ones and registered ones, in limits, objectives and feasibility."""

import numpy as np
import pytest

from search.problem.feasibility import check_feasible
from search.problem.metric import METRICS, Metric, Unit, format_quantity, register_metric
from search.problem.problem import Problem
from search.testing import MetricContract, contract_space
from space import Architecture, InfeasibleError, InputError, ModelConfig, Space, Workload, genome
from space.cost import memory_cost, params_cost
from space.ops import Cost


class TestMemory(MetricContract):
    name = "memory"


class TestParams(MetricContract):
    name = "params"


@pytest.mark.parametrize("name", METRICS.names())
def test_base_unit_is_printed_without_a_factor(name: str) -> None:
    unit = METRICS.get(name).unit
    assert unit.format(unit.smallest) == f"1{unit.printed[0]}"
    assert format_quantity(name, 2.5 * unit.smallest * unit.step) == f"2.5{unit.printed[1]}"


@pytest.fixture
def storage_metric(monkeypatch: pytest.MonkeyPatch) -> str:
    """A metric as a plug-in registers it: memory in another unit."""

    def cost(space: Space, _predictor: object, workload: Workload | None, _confidence: object) -> Cost:
        assert workload is not None
        return memory_cost(space, workload)

    def count(architecture: Architecture, config: ModelConfig, workload: Workload | None) -> float:
        found = METRICS.get("memory").count(architecture, config, workload)
        assert found is not None
        return found

    monkeypatch.setattr(METRICS, "_values", dict(METRICS._values))
    unit = Unit(name="crates", parsed={"crate": 1.0, "kcrate": 1e3}, printed=(" crates", " kcrates"))
    register_metric(Metric(name="storage", unit=unit, phase="decode", cost=cost, count=count))
    return "storage"


def test_registered_metric_is_limit_and_objective(storage_metric: str) -> None:
    space = contract_space()
    problem = Problem(
        space, objectives=["loss", f"{storage_metric}:decode@32"], limits=[f"{storage_metric}@32<=50%"]
    )
    constraint = problem.constraints()[0]
    row = genome.encode(space, [genome.largest(space)])
    cost = problem.objective_cost(problem.objectives[1])
    assert cost is not None
    assert constraint.bound == pytest.approx(0.5 * float(cost(row)[0]))
    assert constraint.limit.metric.unit.name == "crates"
    assert "crates" in constraint.text
    check_feasible(space, problem.constraints())
    with pytest.raises(InfeasibleError, match=r"storage@32<=1crate cannot be met: the least is .* kcrates"):
        check_feasible(space, Problem(space, limits=["storage@32<=1crate"]).constraints())


def test_taken_name_is_refused() -> None:
    with pytest.raises(InputError, match="metric 'params' is registered already"):
        register_metric(Metric(name="params", unit=METRICS.get("params").unit, cost=lambda *_: Cost.zero()))


def test_device_metric_without_a_device_is_refused() -> None:
    space = contract_space()
    with pytest.raises(InputError, match="needs a device"):
        Problem(space, limits=["decode@32<=1ms"]).constraints()
    with pytest.raises(InputError, match="device"):
        Problem(space, objectives=["loss", "latency:decode@32"])
    assert np.isclose(
        Problem(space, limits=["params<=50%"]).constraints()[0].bound * 2,
        float(params_cost(space)(genome.encode(space, [genome.largest(space)]))[0]),
    )
