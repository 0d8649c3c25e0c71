"""Text as bytes: what the supernet trains on, and the fixed tokens it is judged by.

The default corpus needs no download: the standard library of the running
interpreter. Documents are known by the sha256 of their content, which removes
exact duplicates, orders them alike on every filesystem and decides which side
of the split they fall on. Byte 0 stands before and after every document and
nowhere else: it is BOS and EOS. Footgun: a corpus is read-only, windows are copies.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from space.errors import InputError
from space.files import digest

PIECE_BYTES = 16_384
EXPECTED = "give a UTF-8 text file or a folder of them"
MORE = "give more text, a larger data.limit_mb or another data.held_out"


class DataConfig(BaseModel):
    """Where the text comes from and how it is split.

    Attributes:
        path: a text file, or a folder of them, read recursively without hidden ones; None is the standard
            library of the running interpreter. A file named directly is cut at line ends into documents of
            16 KiB, because one document alone cannot be split.
        held_out: the share of documents held out, by content hash.
        limit_mb: take documents in hash order until there are this many MB (10**6 bytes).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: Path | None = None
    held_out: float = Field(default=0.05, gt=0, lt=1)
    limit_mb: float | None = Field(default=None, gt=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Two sides of one text, as bytes [tokens]; ``digest`` is a sha256 over both."""

    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]
    digest: str
    documents: int
    source: str


def load_corpus(config: DataConfig) -> Corpus:
    """Read, deduplicate, order and split the text.

    Raises:
        InputError: the path is missing, unreadable or holds no text, or one side of the split is empty.
    """
    source = str(config.path or f"standard library of Python {platform.python_version()}")
    contents = {hashlib.sha256(text).digest(): text for text in _documents(config.path) if text.strip()}
    if not contents:
        raise InputError(f"data.path: {source}: no UTF-8 text in it; {EXPECTED}")
    train: list[bytes] = []
    held_out: list[bytes] = []
    left = float("inf") if config.limit_mb is None else config.limit_mb * 1e6
    for key, text in sorted(contents.items()):
        if left <= 0:
            break
        left -= len(text)
        # The first bytes order, the last ones split; with the same ones, a limit would take one side first.
        share = int.from_bytes(key[-8:], "big") / 2**64
        (held_out if share < config.held_out else train).append(text)
    if not (train and held_out):
        found = f"{len(train)} documents to train on, {len(held_out)} held out"
        raise InputError(f"data: {source}: {found}, each side needs one; {MORE}")
    sides = [b"\0".join([b"", *texts, b""]) for texts in (train, held_out)]
    return Corpus(
        train=np.frombuffer(sides[0], np.uint8),
        held_out=np.frombuffer(sides[1], np.uint8),
        digest=digest("".join(digest(side) for side in sides)),
        documents=len(train) + len(held_out),
        source=source,
    )


def require_length(corpus: Corpus, context: int) -> None:
    """Refuse (InputError) a corpus with a side shorter than ``context`` tokens and a target."""
    for side, tokens in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(tokens) <= context:
            found = f"the {side} side has {len(tokens)} bytes, a context of {context} needs {context + 1}"
            raise InputError(f"data: {corpus.source}: {found}; {MORE}")


def train_batch(
    tokens: NDArray[np.uint8], rng: np.random.Generator, batch: int, length: int
) -> NDArray[np.int64]:
    """Random windows [batch, length + 1], every start as likely as any other."""
    if len(tokens) <= length:
        raise InputError(f"data: {len(tokens)} bytes to train on, a window needs {length + 1}; {MORE}")
    starts = rng.integers(len(tokens) - length, size=batch)
    return np.asarray(tokens[starts[:, None] + np.arange(length + 1)], np.int64)


def held_out_windows(tokens: NDArray[np.uint8], count: int, length: int, seed: int = 0) -> NDArray[np.int64]:
    """The fixed windows of an evaluation [count, length + 1]: evenly spaced, none overlapping another.

    The seed shifts them all alike; by arithmetic, since a generator may change with numpy's version.
    """
    stride = len(tokens) // count
    if stride <= length:
        found = f"{len(tokens)} bytes held out, {count} windows of {length + 1} need {count * (length + 1)}"
        raise InputError(f"data: {found}; ask for fewer or shorter ones, or {MORE}")
    starts = seed * 7919 % (stride - length) + stride * np.arange(count)
    return np.asarray(tokens[starts[:, None] + np.arange(length + 1)], np.int64)


def recall_mask(
    windows: NDArray[np.int64], train_sample: NDArray[np.uint8], order: int = 8, sample_bytes: int = 4_000_000
) -> NDArray[np.bool_]:
    """Which targets can be recalled from the context, but hardly from the training text.

    A target counts when the n-gram of ``order`` (1 to 8) bytes that it completes ended earlier in its own
    window, and does not occur in the first ``sample_bytes`` of the training text. The idea of the slice is
    Zoology's (Arora et al. 2023), for word bigrams. Windows [N, L + 1] give a mask [N, L] of the targets.
    """
    grams = _ngrams(windows, order)  # [N, L + 2 - order]
    places = np.argsort(grams, axis=1, kind="stable")
    ranked = np.take_along_axis(grams, places, axis=1)
    repeated = np.zeros(grams.shape, bool)
    np.put_along_axis(repeated, places[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    wanted = grams[repeated]
    known = np.sort(_ngrams(train_sample[:sample_bytes], order))  # this search is 3 times as fast as np.isin
    repeated[repeated] = np.searchsorted(known, wanted, "left") == np.searchsorted(known, wanted, "right")
    mask = np.zeros(windows.shape, bool)
    mask[:, order - 1 :] = repeated
    return mask[:, 1:]


def _ngrams(tokens: NDArray[np.int64] | NDArray[np.uint8], order: int) -> NDArray[np.uint64]:
    """The n-grams along the last axis, each packed into one integer; none where the text is shorter."""
    if not 1 <= order <= 8 or tokens.max(initial=0) > 255:
        raise ValueError(f"order {order}, tokens up to {tokens.max()}: at most 8 bytes fit in one integer")
    count = max(tokens.shape[-1] - order + 1, 0)
    grams = np.zeros((*tokens.shape[:-1], count), np.uint64)
    for offset in range(order):
        grams = grams << np.uint64(8) | tokens[..., offset : offset + count].astype(np.uint64)
    return grams


def _documents(path: Path | None) -> Iterator[bytes]:
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        return (_read(file) for file in _files(library) if file.suffix == ".py")
    if path.is_dir():
        return map(_read, _files(path))
    if path.is_file():
        return _pieces(_read(path))
    raise InputError(f"data.path: {path}: not found; {EXPECTED}")


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, without hidden ones, caches and installed packages."""
    skipped = {"__pycache__", "site-packages", "dist-packages"}
    for root, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        files = (Path(root, name) for name in names if not name.startswith("."))
        yield from filter(Path.is_file, files)


def _read(file: Path) -> bytes:
    """A file's text without its zero bytes; nothing where it is not UTF-8."""
    try:
        content = file.read_bytes()
        content.decode()
    except UnicodeDecodeError:
        return b""
    except OSError as error:
        _refuse(error)
    return content.replace(b"\0", b"")


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"data.path: {error.filename}: {error.strerror}; {EXPECTED}") from None


def _pieces(text: bytes) -> Iterator[bytes]:
    """Cut one long text into documents, at line ends where there are any."""
    start = 0
    while start < len(text):
        stop = start + PIECE_BYTES
        line_end = text.rfind(b"\n", start, stop) + 1 if stop < len(text) else 0
        yield text[start : line_end or stop]
        start = line_end or stop
