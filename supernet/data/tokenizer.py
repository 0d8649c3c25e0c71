"""Subword tokens from a Hugging Face ``tokenizer.json``, or from a GGUF file.

The optional library ``tokenizers`` (extra ``hf``) reads the file and is imported on use. The number of bytes
that each token stands for is kept: unlike a loss per token, bits per byte can be compared across tokenizers.
"""

import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from space.io.artefact import digest
from space.io.errors import InputError
from space.io.filesystem import read_file

BYTE_SEPARATOR = 0  # if bytes are the tokens; no text contains it
WARN_UNKNOWN, MAX_UNKNOWN = 0.001, 0.2  # shares of the characters of a text that a tokenizer does not know
# End-of-text tokens of common tokenizers; the first one in a tokenizer's vocabulary separates documents.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
GGUF_SUFFIX = ".gguf"
BATCH_TEXTS = 64
SAMPLE_TEXTS, SAMPLE_BYTES = 256, 1 << 16  # that unknown characters are counted in

Ids = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A tokenizer.

    Attributes:
        path: its file.
        library: the ``tokenizers.Tokenizer``.
        vocab_size: number of ids.
        separator: id that separates documents.
        digest: sha256 of its ``tokenizer.json``.
    """

    path: Path
    library: Any  # the type's package is optional
    vocab_size: int
    separator: int
    digest: str

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that begins a document: as in training, only a separator stands before it.

        Args:
            text: the text.
        """
        return [self.separator, *self.library.encode(text, add_special_tokens=False).ids]

    def warnings(self, texts: Sequence[bytes]) -> list[str]:
        """Reasons for poor text, one line each.

        Args:
            texts: UTF-8 texts.

        Raises:
            InputError: the tokenizer does not know more than ``MAX_UNKNOWN`` of the texts.
        """
        where, found = f"data.tokenizer: {self.path}", []
        some = texts[:: max(1, len(texts) // SAMPLE_TEXTS)]
        share = self.unknown_share([text[:SAMPLE_BYTES].decode(errors="ignore").encode() for text in some])
        line = f"{where}: knows no token for {share:.1%} of the characters"
        if share > MAX_UNKNOWN:
            raise InputError(f"{line}, at most {MAX_UNKNOWN:.0%} are allowed; give another tokenizer")
        if share > WARN_UNKNOWN:
            found.append(f"{line}; they are lost")
        if self.library.decoder is None:
            found.append(f"{where}: has no decoder; generated text is its tokens with spaces between them")
        name = self.library.id_to_token(self.separator)
        if name not in SEPARATORS:
            found.append(
                f"{where}: knows none of {', '.join(SEPARATORS)}; token {self.separator} ({name!r}) "
                "separates documents"
            )
        return found

    def unknown_share(self, texts: Sequence[bytes]) -> float:
        """Share of the characters, without white space, that stand in an unknown token or in none.

        Args:
            texts: UTF-8 texts.
        """
        unknown_id = self._unknown_id()
        lost = total = 0
        for text, encoding in zip(texts, self._encodings(texts, "encode_batch"), strict=True):
            decoded = text.decode()
            known = np.zeros(len(decoded) + 1, np.int64)
            ids, spans = np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2)
            spans = spans[ids != unknown_id]
            np.add.at(known, spans[:, 0], 1)
            np.add.at(known, spans[:, 1], -1)
            is_text = np.array([not character.isspace() for character in decoded], bool)
            total += int(is_text.sum())
            lost += int((is_text & (np.cumsum(known)[:-1] <= 0)).sum())
        return lost / total if total else 0.0

    def _unknown_id(self) -> int:
        model = json.loads(self.library.to_str())["model"]
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        name = model.get("unk_token")
        found = self.library.token_to_id(name) if name else None
        return -1 if found is None else int(found)

    def encode(self, texts: Sequence[bytes]) -> Ids:
        """Encode texts, with a separator before and after each.

        Args:
            texts: UTF-8 texts.

        Returns:
            Ids [tokens].
        """
        return self._joined(encoding.ids for encoding in self._encodings(texts, "encode_batch_fast"))

    def encode_measured(self, texts: Sequence[bytes]) -> tuple[Ids, NDArray[np.uint32] | None]:
        """Encode texts and measure the bytes that each token stands for.

        A separator counts as one byte, as byte 0 does in a corpus of bytes.

        Args:
            texts: UTF-8 texts.

        Returns:
            Ids [tokens] and bytes [tokens]; the latter is None if decoding does not give the texts back.
        """
        rows, sizes, faithful = [], [1], True
        for text, encoding in zip(texts, self._encodings(texts, "encode_batch"), strict=True):
            rows.append(encoding.ids)
            sizes += [*bytes_of_tokens(text.decode(), encoding.offsets), 1]
            decoded = self.library.decode(encoding.ids, skip_special_tokens=False)
            faithful = faithful and decoded == text.decode()
        return self._joined(rows), np.array(sizes, np.uint32) if faithful else None

    def _encodings(self, texts: Sequence[bytes], method: str) -> Iterator[Any]:
        """The library's encodings, in batches: an encoding takes a hundred times its text's memory."""
        for start in range(0, len(texts), BATCH_TEXTS):
            decoded = [text.decode() for text in texts[start : start + BATCH_TEXTS]]
            yield from getattr(self.library, method)(decoded, add_special_tokens=False)

    def _joined(self, rows: Iterable[Sequence[int]]) -> Ids:
        kind = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        separator = np.array([self.separator], kind)
        parts = [part for row in rows for part in (np.array(row, kind), separator)]
        return np.concatenate([separator, *parts])


def tokenizer_json(path: Path) -> bytes:
    """The content of a ``tokenizer.json``; the tokenizer of a GGUF file is converted by transformers.

    Args:
        path: the file.

    Raises:
        InputError: the file cannot be read or converted, or transformers is not installed.
    """
    where = f"data.tokenizer: {path}"
    if path.suffix == GGUF_SUFFIX:
        return _converted(path, where)
    try:
        return read_file(path)
    except FileNotFoundError:
        raise InputError(f"{where}: not found; give a Hugging Face tokenizer.json or a GGUF file") from None
    except OSError as error:
        raise InputError(
            f"{where}: {error.strerror}; give a Hugging Face tokenizer.json or a GGUF file"
        ) from None


def _converted(path: Path, where: str) -> bytes:
    """The tokenizer of a GGUF file as a ``tokenizer.json``."""
    if not path.is_file():
        raise InputError(f"{where}: not found; give a Hugging Face tokenizer.json or a GGUF file")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise InputError(f"{where}: needs transformers; `pip install 'formfit[hf]'` installs it") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        text: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # of transformers, gguf and tokenizers, which have no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{where}: transformers cannot convert its tokenizer ({reason[:120]})") from None
    return text.encode()


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer; the size of its vocabulary is its greatest id plus 1.

    Args:
        path: a ``tokenizer.json`` or a GGUF file.

    Raises:
        InputError: the file is missing or invalid, or a package that reads it is not installed.
    """
    where = f"data.tokenizer: {path}"
    content = tokenizer_json(path)
    try:
        library = importlib.import_module("tokenizers")
    except ImportError:
        raise InputError(
            f"{where}: needs the package tokenizers; `pip install 'formfit[hf]'` installs it"
        ) from None
    try:
        json.loads(content)  # the library's parser may panic on invalid JSON
        tokenizer = library.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{where}: not a Hugging Face tokenizer.json ({reason})") from None
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if not ids:
        raise InputError(f"{where}: a tokenizer without a vocabulary")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # a separator's name in a text is plain text
    known = [ids[name] for name in SEPARATORS if name in ids]
    return Tokenizer(
        path=path,
        library=tokenizer,
        vocab_size=max(ids.values()) + 1,
        separator=known[0] if known else 0,
        digest=digest(content),
    )


def prompt_template(name: str, token_id: int) -> dict[str, Any]:
    """The post-processor of a ``tokenizer.json`` that encodes as :meth:`Tokenizer.encode_prompt` does.

    Args:
        name: of the separator.
        token_id: of the separator.
    """
    start = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": sequence, "type_id": 0}} for sequence in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, start, second],
        "special_tokens": {name: {"id": name, "ids": [token_id], "tokens": [name]}},
    }


def bytes_of_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Bytes of a text that each token stands for; they sum to the whole text.

    A token covers the text from the greatest end of its predecessors to its own end, so that skipped
    whitespace and a character split over several tokens count once. The last token covers the rest.

    Args:
        text: the text.
        offsets: start and end of each token, in characters.
    """
    if not offsets:
        return []
    widths = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    starts = np.zeros(len(text) + 1, np.int64)  # of each character, in bytes
    np.cumsum(1 + (widths > 0x7F) + (widths > 0x7FF) + (widths > 0xFFFF), out=starts[1:])
    ends = np.maximum.accumulate(starts[[end for _, end in offsets]])
    ends[-1] = starts[-1]
    sizes: list[int] = np.diff(ends, prepend=0).tolist()
    return sizes
