"""Subword tokens from a Hugging Face ``tokenizer.json``.

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

# End-of-text tokens of common tokenizers; the first one in a tokenizer's vocabulary separates documents.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
BATCH_TEXTS = 64

Ids = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A tokenizer.

    Attributes:
        path: its file.
        library: the ``tokenizers.Tokenizer``.
        vocab_size: number of ids.
        separator: id that separates documents.
        digest: sha256 of the file.
    """

    path: Path
    library: Any  # the type's package is optional
    vocab_size: int
    separator: int
    digest: str

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


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``; the size of its vocabulary is its greatest id plus 1.

    Args:
        path: the file.

    Raises:
        InputError: the file is missing or invalid, or the package ``tokenizers`` is not installed.
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
