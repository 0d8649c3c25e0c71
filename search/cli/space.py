"""The command ``space``."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from search.cli.options import Json, SpaceFile
from search.cli.output import make_table, show

if TYPE_CHECKING:
    from rich.table import Table

    from space import Space

MODEL_SECONDS = 0.3  # to measure a small model in one workload
MODELS = 128  # whole models that a profile measures


@dataclass(frozen=True, kw_only=True)
class End:
    """The smallest or the largest architecture of a space.

    Attributes:
        key: of the architecture.
        params: number of parameters.
        architecture: in words.
    """

    key: str
    params: int
    architecture: str


@dataclass(frozen=True, kw_only=True)
class SpaceSummary:
    """The size of a space and the cost of profiling it; its fields are the JSON object that is printed.

    Attributes:
        name: of the space.
        architectures: their number.
        mixers: in use, by name.
        ops_to_measure: ops of the space.
        expected_profiling_seconds: for prefill and decode at the space's ``max_seq_len``.
        smallest: architecture.
        largest: architecture.
    """

    name: str
    architectures: int
    mixers: list[str]
    ops_to_measure: int
    expected_profiling_seconds: int
    smallest: End
    largest: End


def space(file: SpaceFile, as_json: Json = False) -> None:
    """Show the size of a space and what profiling it takes."""
    from space import load_space

    summary = summarise_space(load_space(file))
    show(asdict(summary), as_json, lambda: [space_table(summary)])


def summarise_space(space: "Space") -> SpaceSummary:
    """Size, ends and expected profiling time of a space.

    Args:
        space: the space.
    """
    from space import Workload, genome
    from space.cost import params
    from space.ops import space_ops
    from space.workload import PHASES

    ops = space_ops(space)
    workloads = [Workload(phase=phase, length=space.max_seq_len) for phase in PHASES]
    seconds = MODELS * len(workloads) * MODEL_SECONDS
    smallest, largest = (
        End(key=a.key, params=params(a, space.config), architecture=a.describe())
        for a in (genome.smallest(space), genome.largest(space))
    )
    return SpaceSummary(
        name=space.name,
        architectures=genome.size(space),
        mixers=sorted({mixer for mixer, _ in space.mixer_options[1:]}),
        ops_to_measure=len(ops),
        expected_profiling_seconds=round(seconds),
        smallest=smallest,
        largest=largest,
    )


def space_table(summary: SpaceSummary) -> "Table":
    """The table of a space.

    Args:
        summary: of the space.
    """
    ends = {"smallest": summary.smallest, "largest": summary.largest}
    rows = [
        ["architectures", f"{summary.architectures:.3e}"],
        ["mixers", ", ".join(summary.mixers)],
        *([name, f"{end.params:,} parameters: {end.architecture}"] for name, end in ends.items()),
        ["ops to measure", str(summary.ops_to_measure)],
        ["expected profiling", f"{summary.expected_profiling_seconds} s for two workloads"],
    ]
    return make_table(f"Space {summary.name}", ["property", "value"], rows)
