"""Opening a sub-model's folder to generate text with: its graph, its tokenizer, what it can take.

Read from the graph and the tokenizer beside it, without torch.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from search.submodel.decoder import Decoder
from space import InputError
from space.io.artefact import file_digest
from space.precision import PRECISIONS, model_file
from supernet.data.tokenizer import Tokenizer, load_tokenizer

BYTES = "bytes"


@dataclass(frozen=True)
class Speaker:
    """A graph that is ready to run, and what makes tokens of text."""

    decoder: Decoder
    tokenizer: Tokenizer | None  # None: bytes are the tokens
    folder: Path

    @property
    def reads(self) -> str:
        """What its tokens are: ``bytes``, or the sha256 of a tokenizer."""
        return self.decoder.metadata.get("formfit.tokenizer", BYTES)


def open_speaker(folder: Path, precision: str, threads: int, kept: int = 1) -> Speaker:
    """Open a sub-model's graph of a precision, and its tokenizer.

    Args:
        folder: the sub-model's.
        precision: of the graph.
        threads: of the session.
        kept: see :class:`search.submodel.decoder.Decoder`.

    Raises:
        InputError: more threads than cores; the folder has no such graph, it is not ours, or its tokenizer is
            missing or another.
    """
    cores = os.cpu_count() or 1
    if threads > cores:
        raise InputError(f"--threads {threads}: this machine has {cores} cores")
    if precision not in PRECISIONS:
        raise InputError(f"--precision {precision}: not one of {', '.join(PRECISIONS)}")
    path = model_file(folder, precision)
    if not path.exists():
        option = "" if precision == "fp32" else f" --precision {precision}"
        command = f"formfit export {folder} --format onnx{option}"
        if not (folder / "architecture.json").exists():
            command = "formfit extract --format onnx"
        raise InputError(f"{path}: not found; `{command}` writes it")
    decoder = Decoder(path, threads, kept)
    speaker = Speaker(decoder, None, folder)
    if speaker.reads == BYTES:
        return speaker
    beside = folder / "tokenizer.json"
    if not beside.exists():
        raise InputError(
            f"{beside}: missing, and the model cannot read text without it; `formfit extract` writes it"
        )
    if file_digest(beside) != speaker.reads:
        raise InputError(
            f"{beside}: not the tokenizer that the model was trained with; `formfit extract` writes it"
        )
    return Speaker(decoder, load_tokenizer(beside), folder)


def open_draft(folder: Path, speaker: Speaker, precision: str, threads: int, ahead: int) -> Decoder:
    """The graph of a draft for a model.

    Raises:
        InputError: it cannot be opened, or its tokens are not the model's; names both.
    """
    draft = open_speaker(folder, precision, threads, kept=ahead + 1)
    theirs, ours = draft.decoder.model_config.vocab_size, speaker.decoder.model_config.vocab_size
    if theirs != ours:
        raise InputError(f"--draft {folder}: a vocabulary of {theirs}, that of {speaker.folder} is {ours}")
    if draft.reads != speaker.reads:
        raise InputError(f"--draft {folder}: its tokenizer is not that of {speaker.folder}")
    return draft.decoder


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """The text to go on from, given as it is or in a file.

    Raises:
        InputError: none or both are given, or the file cannot be read.
    """
    if (prompt is None) == (file is None):
        raise InputError("give one of --prompt TEXT and --prompt-file FILE")
    if file is None:
        try:
            return str(prompt).encode().decode()
        except UnicodeEncodeError:  # a shell passes on bytes that are no text
            raise InputError("--prompt: not UTF-8 text") from None
    try:
        return (sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt-file {file}: cannot be read as UTF-8 text ({error})") from None


def room_for(speaker: Speaker, prompt: int, asked: int, warn: Callable[[str], None]) -> int:
    """How many new tokens a prompt of so many leaves room for, at most those asked.

    Raises:
        InputError: the prompt alone is longer than the model's context.
    """
    max_seq_len = speaker.decoder.model_config.max_seq_len
    trained = int(speaker.decoder.metadata.get("formfit.trained_length", max_seq_len))
    if prompt > max_seq_len:
        raise InputError(
            f"a prompt of {prompt} tokens is longer than the model's context of {max_seq_len}; shorten it"
        )
    most = min(asked, max_seq_len - prompt + 1)
    if most < asked:
        warn(f"{asked} new tokens do not fit: context {max_seq_len}, prompt {prompt}; at most {most}")
    if prompt + most > trained:
        warn(
            f"trained on sequences of {trained} tokens, and this one may have {prompt + most}: "
            "what comes after that is not to be trusted"
        )
    return most
