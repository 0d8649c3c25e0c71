"""The commands that make and use sub-models: extract, export, finetune, generate."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from search.cli.options import Json, RunFolder
from search.cli.output import Bars, err, make_table, show
from space.io.errors import InputError

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A sub-model's folder.")]
Formats = Annotated[
    list[str] | None,
    typer.Option("--format", help="onnx or hf, beside the weights; both may be given."),
]
Precisions = Annotated[
    list[str] | None,
    typer.Option("--precision", help="int8 or int8-dynamic: a graph of that precision too."),
]


def extract(
    context: typer.Context,
    supernet: RunFolder,
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the sub-model's folder goes.")],
    search: Annotated[str | None, typer.Option(metavar="NAME", help="A search of the run.")] = None,
    pick: Annotated[
        str | None,
        typer.Option(
            help="chosen (after --verify), best, knee, fastest, a key; or a limit such as 'decode@256<=2ms' "
            "or 'params<=1M': FFN sizes are then mixed to meet it, without a search."
        ),
    ] = None,
    architecture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An architecture in JSON, instead of a search's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Whose latency a limit given to --pick is of [default: the run's].")
    ] = None,
    format_: Formats = None,
    precision: Precisions = None,
    as_json: Json = False,
) -> None:
    """Take a sub-network out of the supernet as a plain model in a folder of its own."""
    from search.select.picks import chosen_architecture
    from search.submodel.export import check_formats, export
    from search.workspace import open_run, open_supernet
    from space import Workload
    from supernet.data.corpus import load_corpus
    from supernet.extract import write_submodel
    from supernet.training.train import load_supernet

    check_formats(format_ or (), precision or ())
    the_run = open_run(supernet, context.obj)
    if architecture and pick:
        raise InputError("--pick: an architecture is given already, by --architecture")
    mixing = bool(set(pick or "") & set("<=>≤≥"))  # of a key or a name none is part
    if (architecture is not None) == (search is not None or mixing):
        raise InputError("give one of --search NAME, --architecture FILE and --pick LIMIT")
    if mixing:
        from search.select.mix_n_match import mixed

        chosen, found = mixed(the_run, search, str(pick), device, Bars())
    else:
        chosen, found = chosen_architecture(the_run, search, pick, architecture)
    checkpoint = open_supernet(the_run, load_corpus(the_run.config.train.data))
    inputs = {"supernet": checkpoint.digest}
    weights = load_supernet(the_run.space, checkpoint)
    submodel = write_submodel(out_dir, weights, found, inputs, chosen, the_run.text)
    files = ["architecture.json", "model.safetensors", "README.md"]
    latency = chosen.get("predicted", {}).get("latency", {}).values()
    verified = {Workload.parse(text).precision for predicted in latency for text in predicted}
    precisions = [*(precision or ()), *sorted(verified)] if "onnx" in (format_ or ()) else []
    files += export(submodel, format_ or (), precisions)
    _show_files({"key": found.key, "folder": str(out_dir), "files": files}, as_json)


def export(
    folder: Folder, format_: Formats = None, precision: Precisions = None, as_json: Json = False
) -> None:
    """Write a sub-model's folder in further formats: an ONNX graph, a Hugging Face folder, int8."""
    from search.submodel.export import export as write
    from supernet.extract import read_submodel

    if not format_:
        raise InputError("give --format onnx, --format hf or both")
    submodel = read_submodel(folder)
    files = write(submodel, format_, precision or ())
    _show_files({"key": submodel.architecture.key, "folder": str(folder), "files": files}, as_json)


def finetune(
    context: typer.Context,
    folder: Folder,
    data: Annotated[Path, typer.Option(metavar="PATH", help="A text file, or a folder of them.")],
    teacher: Annotated[
        Path, typer.Option(metavar="RUN", help="A run's folder; the largest of its supernet teaches.")
    ],
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the tuned sub-model goes.")],
    steps: Annotated[int, typer.Option(min=1)] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 8,
    rate: Annotated[float, typer.Option(help="The greatest learning rate.")] = 1e-3,
    distillation: Annotated[float, typer.Option(help="The teacher's weight against the text, 0 to 1.")] = 0.5,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a row [default: as the sub-model was trained].")
    ] = None,
    held_out: Annotated[float, typer.Option(help="The share of the text that is only judged on.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="[default: all cores]")] = None,
    format_: Formats = None,
    precision: Precisions = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a sub-model on your own text, taught by its supernet's largest too. Resumes."""
    from search.submodel.export import check_formats
    from search.submodel.export import export as write
    from search.submodel.finetune import FINETUNING, FinetuneConfig
    from search.submodel.finetune import finetune as carry_out
    from search.workspace import open_run
    from space.io.config import parse
    from supernet.data.corpus import DataConfig
    from supernet.extract import read_submodel

    check_formats(format_ or (), precision or ())
    given = {"steps": steps, "batch": batch, "learning_rate": rate, "distillation": distillation,
             "length": length, "threads": threads, "seed": seed}  # fmt: skip
    config = parse(FinetuneConfig, given, "finetune")
    # An absolute path: the tuned folder names it, and is read from elsewhere.
    text = parse(DataConfig, {"path": str(data.resolve()), "held_out": held_out}, "data")
    tuned = carry_out(read_submodel(folder), open_run(teacher, context.obj), text, out_dir, config, Bars())
    files = write(tuned, format_ or (), precision or ())
    found = FINETUNING.read(out_dir / "finetune.json")
    value = {name: found[name] for name in ("key", "steps", "before", "after")}
    value |= {"folder": str(out_dir), "files": files}

    def table() -> list[Any]:
        rows = [
            [
                name,
                *(
                    "-" if found[when][name] is None else f"{found[when][name]:.4f}"
                    for when in ("before", "after")
                ),
            ]
            for name in found["before"]
        ]
        return [make_table(f"Held-out text, {steps} steps", ["", "before", "after"], rows)]

    show(value, as_json, table)


def _show_files(value: dict[str, Any], as_json: bool) -> None:
    rows = [[value["key"], value["folder"], "\n".join(value["files"])]]
    show(value, as_json, lambda: [make_table("Sub-model", ["key", "folder", "files"], rows)])


def generate(
    folder: Folder,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with the text, instead; - for standard input.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that make up this share.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    precision: Annotated[str, typer.Option(help="Which of the folder's graphs runs.")] = "fp32",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    draft: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A smaller sub-model that runs ahead; greedy only.")
    ] = None,
    draft_tokens: Annotated[int, typer.Option(min=1, max=64, help="How far the draft runs ahead.")] = 4,
    ignore_end: Annotated[bool, typer.Option(help="Go on where the model would end the document.")] = False,
    as_json: Json = False,
) -> None:
    """Go on from a text with an exported sub-model, on onnxruntime alone."""
    from search.submodel.generation import NEAR_TIE, DraftStatistics, Sampling, StreamingTokenizer, speculate
    from search.submodel.generation import generate as plain
    from search.submodel.loading import fit_new_tokens, open_draft, open_model, prompt_text

    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p}: a share above 0, at most 1")
    if draft and temperature:
        raise InputError(f"--temperature {temperature}: with --draft the likeliest token is taken, give 0")
    if draft and precision not in NEAR_TIE:
        raise InputError(f"--draft: not with {precision}, whose ranges depend on how many tokens are read")
    speaker = open_model(folder, precision, threads)
    small = open_draft(draft, speaker, precision, threads, draft_tokens) if draft else None
    text = StreamingTokenizer(speaker.tokenizer)
    asked = text.encode(prompt_text(prompt, prompt_file))
    most = fit_new_tokens(speaker, len(asked), tokens, warn)
    stop = None if ignore_end else text.separator
    counts = DraftStatistics(near=NEAR_TIE.get(precision, 0.0))
    if small:
        found = speculate(speaker.decoder, small, asked, most, stop, draft_tokens, counts)
    else:
        found = plain(
            speaker.decoder, asked, most, Sampling(temperature=temperature, top_p=top_p, seed=seed), stop
        )
    began, first, pieces, count = time.perf_counter(), 0.0, [], 0
    for token in found:
        first = first or time.perf_counter()
        count += 1
        pieces.append(text.feed(token))
        if not as_json:
            sys.stdout.write(pieces[-1])
            sys.stdout.flush()
    ended = time.perf_counter()
    pieces.append(text.end())
    pace = (count - 1) / (ended - first) if count > 1 else None
    value: dict[str, Any] = {
        "text": "".join(pieces),
        "prompt_tokens": len(asked),
        "tokens": count,
        "first_token_ms": 1e3 * (first - began) if count else None,
        "tokens_per_second": pace,
        "draft": None,
    }
    said = f"{count} tokens" + (f", {pace:,.0f} a second" if pace else "")
    if small:
        value["draft"] = {**vars(counts), "acceptance": counts.accepted / max(1, counts.proposed)}
        said += f"; {counts.accepted} of {counts.proposed} proposals accepted"
        if counts.near_ties:
            said += f"; at {counts.near_ties} tokens the likeliest two were within {counts.near:g}"
    if as_json:
        show(value, as_json, list)
    else:
        sys.stdout.write(f"{pieces[-1]}\n")
        err.print(said, highlight=False)


def warn(text: str) -> None:
    """Tell a person on stderr."""
    err.print(text, highlight=False, soft_wrap=True, markup=False)
