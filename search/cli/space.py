"""The command ``space``."""

from typing import TYPE_CHECKING, Any

from search.cli.options import Json, SpaceFile
from search.cli.output import make_table, show

if TYPE_CHECKING:
    from rich.table import Table

    from space import Space

OP_SECONDS = 1.0  # to measure an op in one workload: fifty rounds of two stacks
MODEL_SECONDS = 0.6  # to measure a whole model in one workload
MODELS = 58  # whole models that a profile measures


def space(file: SpaceFile, as_json: Json = False) -> None:
    """Show the size of a space and what profiling it takes."""
    from space import load_space

    value = describe_space(load_space(file))
    show(value, as_json, lambda: [space_table(value)])


def describe_space(space: "Space") -> dict[str, Any]:
    """Size, ends and expected profiling time of a space, as a JSON object.

    Args:
        space: the space.
    """
    from latency.predictor.initial_design import initial_design
    from space import Workload, genome
    from space.cost import params
    from space.ops import space_ops
    from space.workload import PHASES

    ends = {"smallest": genome.smallest(space), "largest": genome.largest(space)}
    ops = space_ops(space)
    workloads = [Workload(phase=phase, length=space.max_seq_len) for phase in PHASES]
    points = [(op, workload) for op in ops for workload in workloads]
    measured_points = min(len(points), 2 * len(initial_design(points)))
    seconds = OP_SECONDS * measured_points + MODELS * len(workloads) * MODEL_SECONDS
    return {
        "name": space.name,
        "architectures": genome.size(space),
        "mixers": sorted({mixer for mixer, _ in space.mixer_options[1:]}),
        "ops_to_measure": len(ops),
        "expected_profiling_seconds": round(seconds),
        **{
            name: {"key": a.key, "params": params(a, space.config), "architecture": a.describe()}
            for name, a in ends.items()
        },
    }


def space_table(value: dict[str, Any]) -> "Table":
    """The table that shows the object of :func:`describe_space`.

    Args:
        value: the object.
    """
    ends = {name: value[name] for name in ("smallest", "largest")}
    rows = [
        ["architectures", f"{value['architectures']:.3e}"],
        ["mixers", ", ".join(value["mixers"])],
        *([name, f"{end['params']:,} parameters: {end['architecture']}"] for name, end in ends.items()),
        ["ops to measure", str(value["ops_to_measure"])],
        ["expected profiling", f"{value['expected_profiling_seconds']} s for two workloads"],
    ]
    return make_table(f"Space {value['name']}", ["property", "value"], rows)
