"""Word pieces instead of bytes: a Hugging Face ``tokenizer.json``.

The library ``tokenizers`` (extra ``hf``) reads the file; it is imported only where one is
given. Beside the tokens it is kept how many bytes of the text each stands for, since a loss
per token says nothing to someone with another tokenizer, while bits per byte do.
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

# What tokenizers call the end of a text; the first one that a file has separates documents.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
BATCH = 64

Ids = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A tokenizer's file: its vocabulary's size, its separator, and the digest of its content."""

    path: Path
    library: Any  # tokenizers.Tokenizer, whose package is optional
    vocab_size: int
    separator: int
    digest: str

    def encode(self, texts: Sequence[bytes]) -> Ids:
        """The ids of texts [tokens], a separator before and after each."""
        return self._joined(found.ids for found in self._encodings(texts, "encode_batch_fast"))

    def encode_measured(self, texts: Sequence[bytes]) -> tuple[Ids, NDArray[np.uint32] | None]:
        """The ids of texts, and how many bytes each stands for: both [tokens].

        A separator stands for one byte, as byte 0 does where bytes are the tokens. The bytes are
        None where decoding does not give a text back: then the ids stand for some other text.
        """
        rows, sizes, faithful = [], [1], True
        for text, found in zip(texts, self._encodings(texts, "encode_batch"), strict=True):
            rows.append(found.ids)
            sizes += [*bytes_of_tokens(text.decode(), found.offsets), 1]
            faithful = faithful and self.library.decode(found.ids, skip_special_tokens=False) == text.decode()
        return self._joined(rows), np.array(sizes, np.uint32) if faithful else None

    def _encodings(self, texts: Sequence[bytes], method: str) -> Iterator[Any]:
        """The library's encodings, some texts at a time: one takes a hundred times its text's memory."""
        for start in range(0, len(texts), BATCH):
            decoded = [text.decode() for text in texts[start : start + BATCH]]
            yield from getattr(self.library, method)(decoded, add_special_tokens=False)

    def _joined(self, rows: Iterable[Sequence[int]]) -> Ids:
        kind = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        separator = np.array([self.separator], kind)
        parts = [part for row in rows for part in (np.array(row, kind), separator)]
        return np.concatenate([separator, *parts])


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``; its vocabulary reaches to the greatest id.

    Raises:
        InputError: the file is missing or broken, or the package ``tokenizers`` is not installed.
    """
    where = f"data.tokenizer: {path}"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{where}: not found; give a Hugging Face tokenizer.json") from None
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}; give a Hugging Face tokenizer.json") from None
    try:
        library = importlib.import_module("tokenizers")
    except ImportError:
        raise InputError(
            f"{where}: needs the package tokenizers; `pip install 'formfit[hf]'` installs it"
        ) from None
    try:
        json.loads(content)  # the library's own parser may panic on what is not even JSON
        found = library.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{where}: not a Hugging Face tokenizer.json ({reason})") from None
    ids = found.get_vocab(with_added_tokens=True)
    if not ids:
        raise InputError(f"{where}: a tokenizer without a vocabulary; give one that has tokens")
    found.no_padding()
    found.no_truncation()
    found.encode_special_tokens = True  # a text that spells a separator out has none
    known = [ids[name] for name in SEPARATORS if name in ids]
    return Tokenizer(
        path=path,
        library=found,
        vocab_size=max(ids.values()) + 1,
        separator=known[0] if known else 0,
        digest=digest(content),
    )


def bytes_of_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """How many bytes of a text each token stands for; they sum to the whole text.

    A token takes what lies between the end of those before it and its own end, so that skipped
    whitespace and the later parts of a split character are counted once. The last one takes the rest.
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
