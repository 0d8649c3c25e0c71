"""The command ``space``."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.cli.options import Json
from search.cli.output import make_table, note, show

if TYPE_CHECKING:
    from rich.table import Table

    from space import Space

MODELS = 128  # whole models that a profile measures
MODEL_SECONDS, MODEL_RUNS = (
    0.2,
    40,
)  # for one in one workload, as in latency/predictor/design.py, which loads slowly
FLOPS_PER_SECOND, BYTES_PER_SECOND = 1e11, 1e10  # of a CPU, roughly


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


def space(
    file: Annotated[Path | None, typer.Argument(metavar="SPACE", help="YAML file of a space.")] = None,
    parent: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="PARENT",
            help="Write a space around a trained model: a folder of transformers, or a GGUF file.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of the space of --from. [default: stdout]")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Context of the space of --from. [default: the parent's]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the size of a space and what profiling it takes, or write one around a trained model."""
    from space import InputError, load_space

    if (file is None) == (parent is None):
        raise InputError("give either the file of a space, or --from with a trained model")
    if parent is not None:
        _write_space(parent, out, context, as_json)
        return
    if file is None or out is not None or context is not None:
        raise InputError("--out and --context belong to --from")
    summary = summarise_space(load_space(file))
    show(asdict(summary), as_json, lambda: [space_table(summary)])


def _write_space(path: Path, out: Path | None, context: int | None, as_json: bool) -> None:
    """Write a space around a parent, to a file or to stdout, and show what the parent is."""
    import yaml

    from space import Space
    from space.cost import params
    from space.io.artefact import write_text
    from space.io.config import parse
    from supernet.parent import read_parent
    from supernet.parent.space_file import space_text

    parent = read_parent(path)
    text = space_text(parent, context)
    made = parse(Space, yaml.safe_load(text), "the space of --from")  # what was written can be read
    value = {
        "name": made.name,
        "family": parent.family,
        "parameters": params(parent.architecture, parent.model_config),
        "layers": len(parent.architecture.layers),
        "width": parent.architecture.width,
        "context": made.max_seq_len,
        **({} if out is None else {"file": str(out)}),
    }
    if out is not None:
        write_text(out, text)
    elif not as_json:
        sys.stdout.write(text)
    if as_json:
        show(value if out is not None else value | {"space": text}, True, lambda: [])
        return
    where = "" if out is None else f"; space: {out}"
    note(
        f"parent: {parent.family}, {value['parameters']:,} parameters, {value['layers']} layers of width "
        f"{value['width']}, context {parent.model_config.max_seq_len}{where}"
    )


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
    smallest, largest = (
        End(key=a.key, params=params(a, space.config), architecture=a.describe())
        for a in (genome.smallest(space), genome.largest(space))
    )
    mean = (smallest.params + largest.params) / 2
    runs = [max(2 * mean * w.tokens / FLOPS_PER_SECOND, 4 * mean / BYTES_PER_SECOND) for w in workloads]
    seconds = MODELS * sum(MODEL_SECONDS + MODEL_RUNS * run for run in runs)
    return SpaceSummary(
        name=space.name,
        architectures=genome.size(space),
        mixers=sorted({mixer for mixer, _ in space.mixer_options[1:]}),
        ops_to_measure=len(ops),
        expected_profiling_seconds=round(seconds),
        smallest=smallest,
        largest=largest,
    )


def _duration(seconds: float) -> str:
    """A rough duration for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def space_table(summary: SpaceSummary) -> "Table":
    """The table of a space.

    Args:
        summary: of the space.
    """
    from search.cli.tables import counted_runs

    ends = {"smallest": summary.smallest, "largest": summary.largest}
    rows = [
        ["architectures", f"{summary.architectures:.3e}"],
        ["mixers", ", ".join(summary.mixers)],
        *(
            [name, f"{end.params:,} parameters: {counted_runs(end.architecture.split())}"]
            for name, end in ends.items()
        ),
        ["ops to measure", str(summary.ops_to_measure)],
        ["expected profiling", f"{_duration(summary.expected_profiling_seconds)} for two workloads"],
    ]
    return make_table(f"Space {summary.name}", ["property", "value"], rows)
