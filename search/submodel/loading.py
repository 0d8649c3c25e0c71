"""Opening a sub-model's folder for text generation: its graph, its tokenizer, and its limits on length.

Only the graph and the tokenizer beside it are read; torch is not imported.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from search.submodel.decoder import Decoder
from space import InputError
from space.io.artefact import file_digest
from space.io.filesystem import read_file
from space.io.machine import check_threads
from space.precision import PRECISIONS, model_file
from supernet.data.documents import text_of
from supernet.data.tokenizer import Tokenizer, load_tokenizer

BYTES = "bytes"
MAX_PROMPT_BYTES = 64 * 2**20


@dataclass(frozen=True)
class LoadedModel:
    """A graph that is ready to run, with its tokenizer.

    Attributes:
        decoder: runs the graph.
        tokenizer: None if bytes are the tokens.
        folder: the sub-model's.
    """

    decoder: Decoder
    tokenizer: Tokenizer | None
    folder: Path

    @property
    def vocabulary(self) -> str:
        """Identity of the tokens: ``bytes``, or the sha256 of a tokenizer."""
        return self.decoder.metadata.get("formfit.tokenizer", BYTES)


def open_model(folder: Path, precision: str, threads: int, num_kept_states: int = 1) -> LoadedModel:
    """Open a sub-model's graph of a precision, and its tokenizer.

    Args:
        folder: the sub-model's.
        precision: of the graph.
        threads: of the session.
        num_kept_states: see :class:`search.submodel.decoder.Decoder`.

    Raises:
        InputError: there are more threads than cores; the folder has no such graph, or it was not exported by
            formfit; or its tokenizer is missing or another.
    """
    check_threads("--threads", threads)
    if precision not in PRECISIONS:
        raise InputError(f"--precision {precision}: not one of {', '.join(PRECISIONS)}")
    path = model_file(folder, precision)
    if not path.exists():
        option = "" if precision == "fp32" else f" --precision {precision}"
        command = f"formfit export {folder} --format onnx{option}"
        if not (folder / "architecture.json").exists():
            command = "formfit extract --format onnx"
        raise InputError(f"{path}: not found; `{command}` writes it")
    decoder = Decoder(path, threads, num_kept_states)
    model = LoadedModel(decoder, None, folder)
    if model.vocabulary == BYTES:
        return model
    file = folder / "tokenizer.json"
    if not file.exists():
        raise InputError(
            f"{file}: missing, and the model cannot read text without it; `formfit extract` writes it"
        )
    if file_digest(file) != model.vocabulary:
        raise InputError(
            f"{file}: not the tokenizer that the model was trained with; `formfit extract` writes it"
        )
    return LoadedModel(decoder, load_tokenizer(file), folder)


def open_draft(
    folder: Path, model: LoadedModel, precision: str, threads: int, num_draft_tokens: int
) -> Decoder:
    """Open the graph of a draft model for speculative decoding.

    Args:
        folder: the draft's.
        model: the model that checks the proposals.
        precision: of the draft's graph.
        threads: of its session.
        num_draft_tokens: proposals in each round.

    Raises:
        InputError: it cannot be opened, or its vocabulary is not the model's; names both.
    """
    draft = open_model(folder, precision, threads, num_kept_states=num_draft_tokens + 1)
    size, expected = draft.decoder.model_config.vocab_size, model.decoder.model_config.vocab_size
    if size != expected:
        raise InputError(f"--draft {folder}: a vocabulary of {size}, that of {model.folder} is {expected}")
    if draft.vocabulary != model.vocabulary:
        raise InputError(f"--draft {folder}: its tokenizer is not that of {model.folder}")
    return draft.decoder


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """The prompt, given directly or in a file.

    Args:
        prompt: the text; None if ``file`` is given.
        file: a file with the text, ``-`` for standard input; None if ``prompt`` is given.

    Raises:
        InputError: none or both are given, or the text is not UTF-8.
    """
    if (prompt is None) == (file is None):
        raise InputError("give one of --prompt TEXT and --prompt-file FILE")
    if file is None:
        try:
            return str(prompt).encode().decode()
        except UnicodeEncodeError:  # a shell passes on bytes that are not text
            raise InputError("--prompt: not UTF-8 text") from None
    try:
        if str(file) != "-":
            content = read_file(file, MAX_PROMPT_BYTES)
        elif len(content := sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)) > MAX_PROMPT_BYTES:
            raise InputError(f"--prompt-file -: more than {MAX_PROMPT_BYTES:,} bytes")
        return text_of(content).decode()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--prompt-file {file}: cannot be read as UTF-8 text ({reason})") from None


def fit_new_tokens(
    model: LoadedModel, prompt_tokens: int, max_new_tokens: int, warn: Callable[[str], None]
) -> int:
    """The number of new tokens that fit into the model's context after a prompt, at most those asked for.

    Args:
        model: the model.
        prompt_tokens: length of the prompt.
        max_new_tokens: those asked for.
        warn: called with one line if fewer fit, or if the text may exceed the trained length.

    Raises:
        InputError: the prompt alone is longer than the model's context.
    """
    max_seq_len = model.decoder.model_config.max_seq_len
    text = model.decoder.metadata.get("formfit.trained_length", "")
    trained_length = int(text) if text.isdecimal() and len(text) < 10 else max_seq_len
    if prompt_tokens > max_seq_len:
        raise InputError(
            f"a prompt of {prompt_tokens} tokens is longer than "
            f"the model's context of {max_seq_len}; shorten it"
        )
    fitting = min(max_new_tokens, max_seq_len - prompt_tokens + 1)
    if fitting < max_new_tokens:
        warn(
            f"{max_new_tokens} new tokens do not fit: context {max_seq_len}, prompt {prompt_tokens}; "
            f"at most {fitting}"
        )
    if prompt_tokens + fitting > trained_length:
        warn(
            f"trained on sequences of {trained_length} tokens, and this one may have "
            f"{prompt_tokens + fitting}: expect poor text after that"
        )
    return fitting
