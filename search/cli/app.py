"""The command line. Heavy libraries are imported inside the commands that need them."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from search.cli.devices import devices, profile, verify
from search.cli.options import ConfigFile, Json, RunFolder, SpaceFile
from search.cli.output import (
    Bars,
    describe_space,
    err,
    make_table,
    search_tables,
    show,
    space_table,
    summary_tables,
)
from search.cli.submodels import export, extract, finetune, generate
from space.io.errors import FormfitError

app = typer.Typer(
    help="Find the transformer that fits your device: search, extract, export and verify, by measuring.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (profile, verify, devices, extract, export, finetune, generate):
    app.command()(command)


@app.callback()
def settings(
    context: typer.Context,
    devices: Annotated[Path, typer.Option(metavar="DIR", help="Where device cards are kept.")] = Path(
        "devices"
    ),
) -> None:
    """Options that every command has."""
    context.obj = devices


@app.command()
def run(
    context: typer.Context,
    config: ConfigFile,
    out_dir: Annotated[
        Path | None, typer.Option("--out", metavar="RUN", help="The run's folder [default: runs/CONFIG].")
    ] = None,
    smoke: Annotated[bool, typer.Option(help="The same stages, small: a check, not a result.")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Check the configuration, say what would be done, stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train, profile, search, extract, verify, report. Resumes; skips what is done."""
    from search import pipeline as stages
    from search.config import load_run_config
    from search.config import smoke as small
    from search.workspace import Run

    loaded = load_run_config(config)
    if smoke:
        loaded = small(loaded)
    folder = out_dir or Path("runs") / (config.stem + ("-smoke" if smoke else ""))
    the_run = Run(folder, loaded, context.obj / "smoke" if smoke and out_dir is None else context.obj)
    if dry_run:
        value = describe_space(the_run.space) | {"out": str(folder), "device": loaded.device}
        show(value, as_json, lambda: [space_table(value)])
        return
    summary = stages.execute(the_run, Bars())
    show(summary, as_json, lambda: [*summary_tables(summary)])
    if not as_json:
        report = folder / "searches" / loaded.device / "report.html"
        err.print(f"summary: {folder / 'summary.json'}   report: {report}", highlight=False)


@app.command()
def space(file: SpaceFile, as_json: Json = False) -> None:
    """Say how large a space is, its ends, and what profiling it would take."""
    from space import load_space

    value = describe_space(load_space(file))
    show(value, as_json, lambda: [space_table(value)])


@app.command()
def train(
    context: typer.Context,
    config: ConfigFile,
    out_dir: Annotated[Path, typer.Option("--out", metavar="RUN", help="The run's folder.")],
    as_json: Json = False,
) -> None:
    """Train the supernet of a run's configuration. Resumes."""
    from search import pipeline as stages
    from search.config import load_run_config
    from search.workspace import Run
    from supernet.data.corpus import load_corpus

    the_run = Run(out_dir, load_run_config(config), context.obj)
    found = stages.trained(the_run, Bars(), load_corpus(the_run.config.train.data))
    value = {"checkpoint": str(found.folder), "step": found.step, "sha256": found.digest}
    show(value, as_json, lambda: [make_table("Supernet", list(value), [[str(v) for v in value.values()]])])


@app.command()
def search(
    context: typer.Context,
    supernet: RunFolder,
    device: Annotated[
        list[str],
        typer.Option(help="A device card; several may have limits, the first is the default."),
    ],
    limit: Annotated[
        list[str] | None,
        typer.Option(help="Such as 'decode@256<=2ms', 'prefill@256<=60%' or 'phone:decode@256<=9ms'."),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(help="loss, recall_loss, latency:WORKLOAD, memory:WORKLOAD, rss:WORKLOAD or params."),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="evolution, hat, random, optuna-nsga2 or optuna-tpe.")
    ] = None,
    surrogate: Annotated[
        bool | None, typer.Option(help="Screen evolution's children by predicted quality.")
    ] = None,
    generations: Annotated[int | None, typer.Option(min=1)] = None,
    population: Annotated[int | None, typer.Option(min=2)] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Ray workers; 0 evaluates in this process.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="A running Ray cluster, HOST:PORT or auto; else one of this machine.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    confidence: Annotated[float | None, typer.Option(help="With which latency limits are kept.")] = None,
    compare: Annotated[
        bool | None, typer.Option(help="Random search at equal evaluations too, for the report.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Measure the finalists, learn from misses, search again.")
    ] = False,
    finalists: Annotated[
        int, typer.Option(min=0, help="Distil so many of the best for a while before one is chosen.")
    ] = 0,
    noise: Annotated[
        float | None,
        typer.Option(min=0.01, help="Percent that timings of the same work may differ, with --verify."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The search's name [default: the first device's].")] = None,
    as_json: Json = False,
) -> None:
    """Search a trained supernet for the front under limits. Resumes."""
    from search.config import trained_config
    from search.engine.devices import open_targets
    from search.problem.problem import SearchConfig
    from space.io.config import parse

    run_config = trained_config(supernet)
    given = {
        "limits": limit and tuple(limit),
        "objectives": objective and tuple(objective),
        "strategy": strategy,
        "surrogate": surrogate,
        "generations": generations,
        "population": population,
        "workers": workers,
        "ray_address": ray_address,
        "seed": seed,
        "confidence": confidence,
        "compare": compare,
    }
    base = run_config.search.model_dump()
    config = parse(SearchConfig, base | {k: v for k, v in given.items() if v is not None}, "search")
    if noise is not None:
        measuring = run_config.verify.model_copy(update={"max_noise": noise / 100})
        run_config = run_config.model_copy(update={"verify": measuring})
    bars = Bars()
    cards, predictors = open_targets(context.obj, device, run_config, config, bars)

    # What cannot be met is refused before torch is loaded, which takes seconds.
    from search.select.measured_search import require_kept
    from search.select.searched import require_tuned, search_run
    from search.workspace import Run

    the_run = Run(supernet, run_config, context.obj)
    found = search_run(
        the_run, cards, predictors, config, name or device[0], bars, verify=verify, finalists=finalists
    )
    show(found, as_json, lambda: search_tables(found))
    if "tuned" in found and not as_json:
        err.print(f"tuned sub-model: {found['tuned']['folder']}", highlight=False, soft_wrap=True)
    if verify:
        require_kept(found["measured_search"])
    require_tuned(found)


@app.command()
def audit(
    context: typer.Context,
    supernet: RunFolder,
    device: Annotated[
        str | None, typer.Option(help="Whose predicted latencies are to be equal (default: the run's).")
    ] = None,
    workload: Annotated[
        str | None, typer.Option(help="At which they are (default: the first prefill that was measured).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of each training (default: a quarter of the run's).")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of a step (default: the run's).")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each; two show how well two agree.")] = 2,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Trainings at a time (default: one a core).")
    ] = None,
    size: Annotated[int, typer.Option(min=3, hidden=True)] = 12,
    as_json: Json = False,
) -> None:
    """Ask whether the supernet ranks architectures as training each alone does. Resumes."""
    from search.audit.audit import AuditConfig
    from search.audit.audit import audit as carry_out
    from search.cli.output import audit_table
    from search.workspace import open_run

    config = AuditConfig(size=size, seeds=seeds, steps=steps, batch=batch, workload=workload, workers=workers)
    found = carry_out(open_run(supernet, context.obj), config, device, Bars())
    show(found, as_json, lambda: [audit_table(found)])
    if not as_json:
        for judged in found["sets"].values():
            err.print(judged["text"], highlight=False)
        err.print(f"page: {supernet / 'audit' / 'audit.html'}", highlight=False)


@app.command()
def report(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write each figure as a PNG into this folder too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the HTML report of a finished run again, and say where it is."""
    from latency import load_card
    from search import pipeline as stages
    from search.audit.page import audit_section
    from search.engine.front import FRONT
    from search.report.images import write_images
    from search.report.page import figures, write_report
    from search.workspace import open_run

    the_run = open_run(folder, context.obj)
    summary = stages.SUMMARY.read(folder / "summary.json")
    name = summary["device"]["name"]
    front = FRONT.read(folder / "searches" / name / "front.json")
    path = folder / "searches" / name / "report.html"
    audited = audit_section(folder, summary["header"]["inputs"]["supernet"])
    write_report(path, the_run.space, front, summary, load_card(context.obj, name), audited, path.parent)
    files = [path]
    if png:
        files += write_images(png, figures(the_run.space, front, summary, path.parent))
    value = {"report": str(path), **({"images": [str(f) for f in files[1:]]} if png else {})}
    show(value, as_json, lambda: [make_table("Report", ["file"], [[str(f)] for f in files])])


def main() -> None:
    """Run the command line and turn what happened into an exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = app(standalone_mode=False)
    except FormfitError as error:
        sys.stderr.write(f"formfit: {error}\n")
        sys.exit(error.exit_code)
    except TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if message:  # none where the help was shown, for want of a command
            text = " ".join(message.split()).rstrip(".")
            sys.stderr.write(f"formfit: {text}; `formfit --help` says what there is\n")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("formfit: stopped\n")
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
