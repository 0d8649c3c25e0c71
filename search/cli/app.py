"""The command line: its options, the commands of a run, and exit codes.

Heavy libraries are imported inside the commands that need them, after everything given has been checked that
can be checked without them.
"""

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from search.cli.devices import devices, profile, verify
from search.cli.generation import generate
from search.cli.options import ConfigFile, Json, RunFolder
from search.cli.output import Bars, discard_output, make_table, note, prepare_streams, show
from search.cli.search import search
from search.cli.space import space
from search.cli.submodels import export, extract, finetune
from space.io.errors import FormfitError

if TYPE_CHECKING:
    from rich.table import Table

    from search.config import Run
    from search.pipeline import AuditResult, Summary

EXIT_BROKEN_PIPE, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143

app = typer.Typer(
    name="formfit",
    help="Find the transformer that fits your device: search, extract, export and verify, by measuring.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        sys.stdout.write(f"formfit {version('formfit')}\n")
        raise typer.Exit


@app.callback()
def settings(
    context: typer.Context,
    devices: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the device cards.")] = Path(
        "devices"
    ),
    _version_option: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of all commands."""
    context.obj = devices


@app.command()
def run(
    context: typer.Context,
    config: ConfigFile,
    out_dir: Annotated[
        Path | None, typer.Option("--out", metavar="RUN", help="Folder of the run. [default: runs/CONFIG]")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Run all stages in a small form, as a check.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the configuration, show what would be done, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train, profile, search, extract, verify and report. Resumes; skips completed stages."""
    from search.config import load_run_config
    from search.config import smoke as small

    loaded = load_run_config(config)
    if smoke:
        loaded = small(loaded)
    folder = out_dir or Path("runs") / (config.stem + ("-smoke" if smoke else ""))
    from search.config import Run

    devices = context.obj / "smoke" if smoke and out_dir is None else context.obj
    _execute(Run(folder, loaded, devices), dry_run=dry_run, as_json=as_json)


@app.command()
def adapt(
    context: typer.Context,
    parent: Annotated[
        Path,
        typer.Argument(metavar="PARENT", help="Trained model: a folder of transformers, or a GGUF file."),
    ],
    limit: Annotated[
        list[str],
        typer.Option(metavar="LIMIT", help="'decode@1024<=70%', 'prefill@512<=200ms', ... Repeatable."),
    ],
    out_dir: Annotated[
        Path | None, typer.Option("--out", metavar="RUN", help="Folder of the run. [default: runs/PARENT]")
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="Name of this machine's card.")] = "here",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            help="Text file or folder that blocks are fitted and evaluated on. [default: Python's library]",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens that blocks are fitted on. [default: 65536]"),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(
            "--context", min=2, metavar="N", help="Longest sequence. [default: the parent's, at most 1024]"
        ),
    ] = None,
    distill_top: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="K", help="Distil the K best from the parent before one is chosen. [default: 2]"
        ),
    ] = None,
    distill_steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Steps of each distillation. [default: 100]")
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Distil uniform cuts of the parent within the same limits too, to compare.")
    ] = True,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Run all stages in a small form, as a check.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the parent, show what would be done, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a trained model faster on this machine: fit blocks, search, distil, verify. Resumes."""
    from search.config import Run, run_config
    from search.config import smoke as small

    folder = out_dir or Path("runs") / parent.stem
    fitted = {"tokens": tokens} if tokens else {}
    value = {
        "parent": str(parent.absolute()),
        "device": device,
        "train": {"data": {"path": str(data.absolute())} if data else {}, "blockwise": fitted},
        "search": {"limits": limit},
        "finalists": {
            "baselines": baselines,
            **({} if distill_top is None else {"count": distill_top}),
            **({} if distill_steps is None else {"steps": distill_steps}),
        },
        **({} if context_length is None else {"context": context_length}),
    }
    config = run_config(value, Path(), "adapt")
    _execute(Run(folder, small(config) if smoke else config, context.obj), dry_run=dry_run, as_json=as_json)


def _execute(run: "Run", *, dry_run: bool, as_json: bool) -> None:
    """Run all stages and show the result, or check the configuration and show what would be done."""
    run.check()
    if dry_run:
        from search.cli.space import space_table, summarise_space

        size = summarise_space(run.space)
        value = asdict(size) | {"out": str(run.folder), "device": run.config.device}
        show(value, as_json, lambda: [space_table(size)])
        return
    from search import pipeline

    summary = pipeline.execute(run, Bars())
    show(summary.document(), as_json, lambda: summary_tables(summary))
    if not as_json:
        report = run.folder / "searches" / run.config.device / "report.html"
        tuned = (summary.distilled or {}).get("tuned")
        model = run.folder / (tuned["folder"] if tuned else Path("submodels") / summary.chosen.key)
        note(f"summary: {run.folder / 'summary.json'}   report: {report}   model: {model}")


app.command()(space)


@app.command()
def train(
    context: typer.Context,
    config: ConfigFile,
    out_dir: Annotated[Path, typer.Option("--out", metavar="RUN", help="Folder of the run.")],
    as_json: Json = False,
) -> None:
    """Train the supernet of a run's configuration. Resumes."""
    from search.config import load_run_config

    loaded = load_run_config(config)

    from search import pipeline
    from search.config import Run
    from supernet.data.corpus import load_corpus

    corpus = load_corpus(loaded.train.data)
    checkpoint = pipeline.trained(Run(out_dir, loaded, context.obj), Bars(), corpus)
    value = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step, "sha256": checkpoint.digest}
    show(value, as_json, lambda: [make_table("Supernet", list(value), [list(map(str, value.values()))])])


app.command()(profile)
app.command()(search)
app.command()(extract)
app.command()(export)
app.command()(verify)
app.command()(generate)
app.command()(finetune)


@app.command()
def audit(
    context: typer.Context,
    run: RunFolder,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Device of the equal predicted latencies. [default: the run's]"),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            metavar="WORKLOAD",
            help="Workload of the equal latencies. [default: the first prefill that was profiled]",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Steps of each training. [default: a quarter of the run's]"),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Rows of a step. [default: the run's]")
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Trainings of each architecture; two show how well they agree."
        ),
    ] = 2,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Trainings at a time. [default: one per core]")
    ] = None,
    size: Annotated[int, typer.Option(min=3, hidden=True)] = 12,
    as_json: Json = False,
) -> None:
    """Compare the supernet's ranking with stand-alone training. Resumes."""
    from search.config import trained_config

    trained_config(run)

    from search import pipeline
    from search.config import open_run

    config = pipeline.AuditConfig(
        size=size, seeds=seeds, steps=steps, batch=batch, workload=workload, workers=workers
    )
    found = pipeline.audit(open_run(run, context.obj), config, device, Bars())
    show(found.document(), as_json, lambda: [audit_table(found)])
    if not as_json:
        for result in found.sets.values():
            note(result.text)
        note(f"page: {run / 'audit' / 'audit.html'}")


@app.command()
def report(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write each figure as a PNG into this folder too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the HTML report of a finished run again."""
    from search.config import trained_config

    trained_config(folder)

    from search import pipeline

    files = pipeline.rewrite_report(folder, context.obj, png)
    value = {"report": str(files[0]), **({"images": [str(f) for f in files[1:]]} if png else {})}
    show(value, as_json, lambda: [make_table("Report", ["file"], [[str(f)] for f in files])])


app.command()(devices)


def summary_tables(summary: "Summary") -> "list[Table]":
    """The result of a run.

    Args:
        summary: of the run.
    """
    from search.cli.tables import distilled_table, front_tables, latency_table, limit_table

    text = summary.text
    values = (
        text.largest_bits_per_byte,
        text.chosen_bits_per_byte,
        text.order2_bits_per_byte,
        text.gzip_bits_per_byte,
    )
    bits = make_table(
        "Bits per byte, same held-out text",
        ["largest", "chosen", "order-2", "gzip -9"],
        [["-" if value is None else f"{value:.3f}" for value in values]],
    )
    return [
        *front_tables(summary.front, {pick: member.key for pick, member in summary.verified.items()}),
        latency_table(summary.chosen.latency),
        limit_table(summary.limits),
        *([distilled_table(summary.distilled)] if summary.distilled else []),
        bits,
    ]


def audit_table(result: "AuditResult") -> "Table":
    """The rank correlations of an audit.

    Args:
        result: of the audit.
    """
    from search.pipeline import CORRELATION_COLUMNS, correlation_rows

    title = "Rank correlation with stand-alone training"
    return make_table(title, CORRELATION_COLUMNS, correlation_rows(result))


def main() -> None:
    """Run the command line and exit with 0, or the code of the error that it reports in one line.

    An error of the operating system, such as a full disk, is one of the machine, so its code is 2.
    """
    prepare_streams()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    try:
        code = app(prog_name="formfit", standalone_mode=False)
        sys.stdout.flush()  # a full disk is reported here
        if code == EXIT_INTERRUPTED:  # as typer reports an interrupt
            raise KeyboardInterrupt
    except FormfitError as error:
        note(f"formfit: {error}")
        sys.exit(error.exit_code)
    except TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if message:  # empty where the help was shown because no command was given
            text = " ".join(message.split()).rstrip(".")
            note(f"formfit: {text}; `formfit --help` lists commands and options")
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:  # the reader of stdout has ended, which is no error of this program
        discard_output()
        sys.exit(EXIT_BROKEN_PIPE)
    except OSError as error:
        discard_output()
        note(f"formfit: {describe_os_error(error)}")
        sys.exit(EXIT_BAD_INPUT)
    except MemoryError:
        note("formfit: out of memory")
        sys.exit(EXIT_BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the clean-up
        note("formfit: stopped")
        if "ray" in sys.modules:  # its library may crash at exit, as its processes were interrupted too
            os._exit(EXIT_INTERRUPTED)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def describe_os_error(error: OSError) -> str:
    """An error of the operating system, in one line.

    Args:
        error: of the operating system.
    """
    where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{where}: {reason}" if where else reason
