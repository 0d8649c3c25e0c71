"""The command ``generate``."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.cli.options import Json, SubModelFolder
from search.cli.output import note, show, write_generated
from space.io.errors import InputError
from space.precision import model_file

if TYPE_CHECKING:
    from search.submodel.generation import DraftStatistics, StreamingTokenizer


def generate(
    folder: SubModelFolder,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with the text; - for standard input.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Maximum number of new tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="T", help="0 takes the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the most likely tokens that make up this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Random seed of the draws.")] = 0,
    precision: Annotated[
        str, typer.Option(metavar="NAME", help="Precision of the graph that runs.")
    ] = "fp32",
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="Threads of onnxruntime.")] = 1,
    draft: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Smaller sub-model for speculative decoding; greedy only."),
    ] = None,
    draft_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", max=64, help="Tokens that the draft proposes in each round.")
    ] = 4,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Continue after the end-of-document token.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Continue a text with an exported sub-model.

    Runs on onnxruntime, without torch.
    """
    check_decoding(top_p, temperature, draft)
    for given in (folder, *([draft] if draft else [])):
        if not given.is_dir():
            path = model_file(given, precision)
            raise InputError(f"{path}: not found; `formfit extract --format onnx` writes it")

    from search.submodel.generation import NEAR_TIE, DraftStatistics, Sampling, StreamingTokenizer, speculate
    from search.submodel.generation import generate as generate_tokens
    from search.submodel.loading import fit_new_tokens, open_draft, open_model, prompt_text

    if draft and precision not in NEAR_TIE:
        raise InputError(f"--draft: not with {precision}, whose ranges depend on the number of tokens read")
    model = open_model(folder, precision, threads)
    draft_model = open_draft(draft, model, precision, threads, draft_tokens) if draft else None
    text = StreamingTokenizer(model.tokenizer)
    prompt_tokens = text.encode(prompt_text(prompt, prompt_file))
    max_new_tokens = fit_new_tokens(model, len(prompt_tokens), tokens, note)
    eos_token_id = None if ignore_eos else text.separator
    statistics = None
    if draft_model:
        statistics = DraftStatistics(near=NEAR_TIE.get(precision, 0.0))
        new_tokens = speculate(
            model.decoder, draft_model, prompt_tokens, max_new_tokens, eos_token_id, draft_tokens, statistics
        )
    else:
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        new_tokens = generate_tokens(model.decoder, prompt_tokens, max_new_tokens, sampling, eos_token_id)
    streamed = stream(new_tokens, text, echo=not as_json)
    if as_json:
        show(streamed.to_json(len(prompt_tokens), statistics), as_json, list)
    else:
        note(streamed.describe(statistics))


def check_decoding(top_p: float, temperature: float, draft: Path | None) -> None:
    """Check the options that choose tokens.

    Args:
        top_p: probability of the tokens that are drawn from.
        temperature: 0 takes the most likely token.
        draft: folder of the draft model; None for none.

    Raises:
        InputError: one is out of its range, or two contradict each other.
    """
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p}: a share above 0, at most 1")
    if draft and temperature:
        raise InputError(f"--temperature {temperature}: --draft takes the most likely token, give 0")


@dataclass(frozen=True, kw_only=True)
class StreamedText:
    """New text with its timing.

    Attributes:
        text: without the prompt.
        tokens: number of new tokens.
        first_token_ms: until the first token, prompt included; None without tokens.
        tokens_per_second: after the first token; None below two tokens.
    """

    text: str
    tokens: int
    first_token_ms: float | None
    tokens_per_second: float | None

    def to_json(self, prompt_tokens: int, draft: "DraftStatistics | None") -> dict[str, Any]:
        """The JSON object that ``formfit generate --json`` prints.

        Args:
            prompt_tokens: length of the prompt.
            draft: counts of speculative decoding; None without a draft model.
        """
        acceptance = draft.accepted / max(1, draft.proposed) if draft else None
        return {
            **vars(self),
            "prompt_tokens": prompt_tokens,
            "draft": {**vars(draft), "acceptance": acceptance} if draft else None,
        }

    def describe(self, draft: "DraftStatistics | None") -> str:
        """The counts in one line.

        Args:
            draft: counts of speculative decoding; None without a draft model.
        """
        line = f"{self.tokens} tokens"
        if self.tokens_per_second is not None:
            line += f", {self.tokens_per_second:,.0f} tokens/s"
        if draft:
            line += f"; {draft.accepted} of {draft.proposed} proposals accepted"
        if draft and draft.near_ties:
            line += f"; {draft.near_ties} near ties (two logits within {draft.near:g})"
        return line


def stream(new_tokens: Iterator[int], text: "StreamingTokenizer", echo: bool) -> StreamedText:
    """Decode new tokens as they come.

    Args:
        new_tokens: token ids.
        text: decodes them.
        echo: write each piece of text to stdout at once.
    """
    began, first, pieces, count = time.perf_counter(), 0.0, [], 0
    for token in new_tokens:
        first = first or time.perf_counter()
        count += 1
        pieces.append(text.feed(token))
        if echo:
            write_generated(pieces[-1])
    ended = time.perf_counter()
    pieces.append(text.end())
    if echo:
        write_generated(f"{pieces[-1]}\n")
    return StreamedText(
        text="".join(pieces),
        tokens=count,
        first_token_ms=1e3 * (first - began) if count else None,
        tokens_per_second=(count - 1) / (ended - first) if count > 1 else None,
    )
