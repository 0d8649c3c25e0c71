"""The commands that make sub-models: extract, export, finetune."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.cli.options import Formats, Json, Precisions, RunFolder, SubModelFolder, check_submodel
from search.cli.output import Bars, make_table, show
from space.io.errors import InputError

if TYPE_CHECKING:
    pass

LIMIT_CHARACTERS = "<=>≤≥"  # of which a pick's name or key has none


def extract(
    context: typer.Context,
    run: RunFolder,
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the new sub-model.")],
    search: Annotated[str | None, typer.Option(metavar="NAME", help="Name of a search of the run.")] = None,
    pick: Annotated[
        str | None,
        typer.Option(
            metavar="PICK",
            help="chosen (after --verify), best, knee, fastest, or a key of the front or its beginning; "
            "or a limit such as 'params<=1M', which mixes FFN sizes to meet it, without a search.",
        ),
    ] = None,
    architecture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON file of an architecture, instead of a search's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Device of a limit in --pick. [default: the run's]")
    ] = None,
    format_: Formats = None,
    precision: Precisions = None,
    as_json: Json = False,
) -> None:
    """Copy a sub-network of the supernet into a plain model."""
    from search.config import trained_config
    from search.engine.config import SearchConfig, check_search
    from search.submodel.formats import check_formats

    check_formats(format_ or (), precision or ())
    limit = limit_of_pick(pick, search, architecture)
    trained_config(run)
    if limit:
        check_search(SearchConfig(limits=(limit,)), [])

    from search.config import open_run, open_supernet
    from search.select.picks import read_architecture, select_member
    from search.submodel.export import export
    from supernet.extract import write_submodel
    from supernet.training.train import load_supernet

    opened = open_run(run, context.obj)
    if limit:
        from search.select.mix_n_match import select_by_limit

        selection = select_by_limit(opened, search, limit, device, Bars())
    elif architecture:
        selection = read_architecture(opened, architecture)
    else:
        selection = select_member(opened, str(search), pick)
    checkpoint = open_supernet(opened, None)
    inputs = {"supernet": checkpoint.digest}
    weights = load_supernet(opened.space, checkpoint)
    found = selection.architecture
    submodel = write_submodel(out_dir, weights, found, inputs, selection.chosen, opened.text)
    files = ["architecture.json", "model.safetensors", "README.md"]
    precisions = [*(precision or ()), *selection.precisions()] if "onnx" in (format_ or ()) else []
    files += export(submodel, format_ or (), precisions)
    _show_files(found.key, out_dir, files, as_json)


def limit_of_pick(pick: str | None, search: str | None, architecture: Path | None) -> str | None:
    """The limit that ``--pick`` gives; None for a member of a search, or an architecture from a file.

    Args:
        pick: a limit, or the name or key of a member.
        search: name of a search.
        architecture: file of an architecture.

    Raises:
        InputError: there is not exactly one source of the architecture.
    """
    if architecture and pick:
        raise InputError("--pick: an architecture is given already, by --architecture")
    limit = pick if pick and set(pick) & set(LIMIT_CHARACTERS) else None
    if (architecture is not None) == (search is not None or limit is not None):
        raise InputError("give one of --search NAME, --architecture FILE and --pick LIMIT")
    return limit


def export(
    folder: SubModelFolder, format_: Formats = None, precision: Precisions = None, as_json: Json = False
) -> None:
    """Write a sub-model as ONNX, int8 ONNX or Hugging Face."""
    from search.submodel.formats import check_formats

    if not format_:
        raise InputError("give --format onnx, --format hf or both")
    check_formats(format_, precision or ())
    check_submodel(folder)

    from search.submodel.export import export as write
    from supernet.extract import read_submodel

    submodel = read_submodel(folder)
    files = write(submodel, format_, precision or ())
    _show_files(submodel.architecture.key, folder, files, as_json)


def finetune(
    context: typer.Context,
    folder: SubModelFolder,
    data: Annotated[Path, typer.Option(metavar="PATH", help="A text file, or a folder of text files.")],
    teacher: Annotated[
        Path, typer.Option(metavar="RUN", help="Folder of the run whose largest sub-network is the teacher.")
    ],
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the tuned sub-model.")],
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Training steps.")] = 200,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Rows of a step.")] = 8,
    rate: Annotated[float, typer.Option(metavar="RATE", help="Largest learning rate.")] = 1e-3,
    distillation: Annotated[
        float, typer.Option(metavar="WEIGHT", help="Weight of the teacher's loss, 0 to 1.")
    ] = 0.5,
    length: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Tokens of a row. [default: as in the sub-model's training]"),
    ] = None,
    held_out: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the text that is only evaluated on.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Random seed.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads of torch. [default: all cores]")
    ] = None,
    format_: Formats = None,
    precision: Precisions = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a sub-model on your own text. Resumes.

    The largest sub-network of its supernet is the teacher.
    """
    from search.config import trained_config
    from search.submodel.formats import check_formats

    check_formats(format_ or (), precision or ())
    check_submodel(folder)
    trained_config(teacher)

    from search.config import open_run, open_trained
    from search.submodel.export import export as write
    from search.submodel.finetune import FinetuneConfig, FineTuning
    from search.submodel.finetune import finetune as carry_out
    from space.io.config import parse
    from supernet.data.corpus import DataConfig
    from supernet.extract import read_submodel

    given = {"steps": steps, "batch": batch, "learning_rate": rate, "distillation": distillation,
             "length": length, "threads": threads, "seed": seed}  # fmt: skip
    config = parse(FinetuneConfig, given, "finetune")
    # An absolute path: the tuned folder names it, and is read from other working directories.
    text = parse(DataConfig, {"path": str(data.resolve()), "held_out": held_out}, "data")
    trained = open_trained(open_run(teacher, context.obj))
    tuned = carry_out(read_submodel(folder), trained, teacher, text, out_dir, config, Bars())
    files = write(tuned, format_ or (), precision or ())
    record = FineTuning.read(out_dir / "finetune.json")
    value = {"key": record.key, "steps": record.steps, "before": record.before, "after": record.after}
    value |= {"folder": str(out_dir), "files": files}
    rows = [
        [name, *("-" if losses[name] is None else f"{losses[name]:.4f}" for losses in (before, after))]
        for before, after in [(record.before, record.after or {})]
        for name in before
    ]
    columns = ["quality", "before", "after"]
    show(value, as_json, lambda: [make_table(f"Held-out text, {steps} steps", columns, rows)])


def _show_files(key: str, folder: Path, files: list[str], as_json: bool) -> None:
    value = {"key": key, "folder": str(folder), "files": files}
    rows = [[key, str(folder), "\n".join(files)]]
    show(value, as_json, lambda: [make_table("Sub-model", ["key", "folder", "files"], rows)])
