"""The metric ``energy@N``: the energy of the arithmetic of one token after N others, 1 pJ a FLOP."""

from typing import TYPE_CHECKING

from search.problem.metric import Metric, Unit, register_metric
from space import Architecture, ModelConfig, Space, Workload
from space.cost import flops, op_flops
from space.ops import Cost, OpTables

if TYPE_CHECKING:
    from latency import Predictor

PJ_PER_FLOP = 1.0
JOULES = Unit(
    name="picojoules",
    parsed={"pJ": 1.0, "nJ": 1e3, "uJ": 1e6},
    printed=(" pJ", " nJ", " uJ", " mJ"),
)


def cost(
    space: Space, predictor: "Predictor | None", workload: Workload | None, confidence: float | None
) -> Cost:
    """The energy of a space's architectures."""
    assert workload is not None
    return Cost(OpTables(space, lambda op: PJ_PER_FLOP * op_flops(op, workload, space.config)))


def count(architecture: Architecture, model_config: ModelConfig, workload: Workload | None) -> float:
    """The energy of one architecture, in picojoules."""
    assert workload is not None
    return PJ_PER_FLOP * flops(architecture, workload, model_config)


register_metric(
    Metric(name="energy", unit=JOULES, phase="decode", options=("batch",), cost=cost, count=count)
)
