"""What the supernet trains on, and the fixed tokens it is judged by.

The default corpus needs no download: the standard library of the running interpreter, bytes as
tokens. A tokenizer gives word pieces instead, and a share of every batch's rows may be MQAR
sequences (:mod:`supernet.data.mqar`), so that recall is trained. Documents are split by content
(:mod:`supernet.data.split`), and that nothing held out is trained on is checked whenever a corpus
is loaded. A separator stands before and after every document: byte 0, which no document has,
or the tokenizer's own. Footgun: a corpus is read-only, windows are copies.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from space.io.artefact import canonical_json, digest
from space.io.errors import InputError
from supernet.data.documents import EXPECTED, read_documents
from supernet.data.mqar import default_pairs, mqar, require_mqar, training_generator
from supernet.data.split import require_apart, split_documents
from supernet.data.tokenizer import Tokenizer, load_tokenizer

BYTES = 256  # the vocabulary where bytes are the tokens
MORE = "give more text, a larger data.limit_mb or another data.held_out"


class DataConfig(BaseModel):
    """Where the text comes from and how it is split.

    Attributes:
        path: a text file, or a folder of them, read recursively without hidden ones; None is the standard
            library of the running interpreter. A file named directly is cut at line ends into documents of
            16 KiB, because one document alone cannot be split.
        held_out: the share of documents held out, by content hash.
        limit_mb: take documents in hash order until there are this many MB (10**6 bytes).
        tokenizer: a Hugging Face ``tokenizer.json``; None makes bytes the tokens.
        recall: the share of a batch's rows that are MQAR sequences; at 1 no text is read.
        pairs: of key and value in an MQAR sequence; None is an eighth of its length.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: Path | None = None
    held_out: float = Field(default=0.05, gt=0, lt=1)
    limit_mb: float | None = Field(default=None, gt=0)
    tokenizer: Path | None = None
    recall: float = Field(default=0.0, ge=0, le=1)
    pairs: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if self.pairs and not self.recall:
            raise ValueError("pairs: recall 0 has no MQAR sequences; give a recall above 0")
        if self.path and self.recall == 1:
            raise ValueError("path: with recall 1 no text is read; give a recall below 1, or no path")
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Two sides of one text, as tokens.

    Attributes:
        train: what may be trained on [tokens]; uint8 bytes, or uint16 or uint32 word pieces.
        held_out: what is only ever scored [tokens].
        digest: a sha256 over all that a batch depends on.
        documents: how many there are on both sides; a held-out one may be in several parts.
        source: where they come from, for a person.
        vocab_size: every token is below it.
        held_out_bytes: how many bytes of text each held-out token stands for; None: unknown, or one each.
        recall: the share of a batch's rows that are MQAR sequences; at 1 both sides are empty.
        pairs: of key and value in such a sequence; None is an eighth of its length.
    """

    train: NDArray[Any]
    held_out: NDArray[Any]
    digest: str
    documents: int
    source: str
    vocab_size: int = BYTES
    held_out_bytes: NDArray[np.uint32] | None = None
    recall: float = 0.0
    pairs: int | None = None

    @property
    def is_bytes(self) -> bool:
        """Whether bytes are the tokens."""
        return self.train.dtype == np.uint8


def load_corpus(config: DataConfig) -> Corpus:
    """Read, deduplicate, order, split and tokenize the text.

    Raises:
        InputError: a path is missing, unreadable or holds no text or no tokenizer, one side of the split
            is empty, or text of one side is on the other.
    """
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    if config.recall == 1:
        return _recall_alone(config, tokenizer)
    source = str(config.path or f"standard library of Python {platform.python_version()}")
    limit = float("inf") if config.limit_mb is None else config.limit_mb * 1e6
    train, held_out = split_documents(read_documents(config.path), config.held_out, limit)
    if not (train or held_out):
        raise InputError(f"data.path: {source}: no UTF-8 text in it; {EXPECTED}")
    if not (train and held_out):
        found = f"{len(train)} documents to train on, {len(held_out)} held out"
        alone = config.path and config.path.is_dir() and len(train) + len(held_out) == 1
        hint = ", or name the file itself, which is then cut into documents" if alone else ""
        raise InputError(f"data: {source}: {found}, each side needs one; {MORE}{hint}")
    require_apart(train, held_out)
    sizes: NDArray[np.uint32] | None = None
    if tokenizer is None:
        sides: tuple[NDArray[Any], NDArray[Any]] = joined_bytes(train), joined_bytes(held_out)
    else:
        kept, sizes = tokenizer.encode_measured(held_out)
        sides = tokenizer.encode(train), kept
    return _corpus(config, tokenizer, sides, len(train) + len(held_out), source, sizes)


def joined_bytes(texts: Sequence[bytes]) -> NDArray[np.uint8]:
    """Texts as one array of bytes, byte 0 before and after each."""
    return np.frombuffer(b"\0".join([b"", *texts, b""]), np.uint8)


def require_fits(corpus: Corpus, vocab_size: int, length: int) -> None:
    """Refuse a corpus that a space's vocabulary and a context length cannot take.

    Raises:
        InputError: tokens that the vocabulary has not, or a tokenizer of another size; a side shorter
            than ``length`` tokens and a target; MQAR sequences that do not fit the length.
    """
    where = f"data: {corpus.source}"
    if corpus.is_bytes and vocab_size < BYTES:
        raise InputError(f"{where}: bytes are the tokens, the space's vocabulary is {vocab_size}; "
                         f"give it {BYTES} or more, or a tokenizer of its size")  # fmt: skip
    if not corpus.is_bytes and vocab_size != corpus.vocab_size:
        raise InputError(f"{where}: the tokenizer has {corpus.vocab_size} tokens, the space's vocabulary is "
                         f"{vocab_size}; they have to be equal")  # fmt: skip
    if corpus.recall:
        require_mqar(corpus.vocab_size, length, corpus.pairs or default_pairs(length))
    for side, tokens in (("training", corpus.train), ("held-out", corpus.held_out)):
        if corpus.recall < 1 and len(tokens) <= length:
            unit = "bytes" if corpus.is_bytes else "tokens"
            found = f"the {side} side has {len(tokens)} {unit}, a context of {length} needs {length + 1}"
            raise InputError(f"{where}: {found}; {MORE}")
        greatest = int(tokens.max(initial=0))
        if greatest >= vocab_size:
            found = f"token {greatest} on the {side} side"
            raise InputError(f"{where}: {found}; a vocabulary of {vocab_size} has 0 to {vocab_size - 1}")


def train_batch(
    corpus: Corpus, rng: np.random.Generator, batch: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A batch to train on: tokens [batch, length] and their targets, -100 where nothing is learned.

    Rows of text are windows, every start as likely as any other; the last rows are MQAR
    sequences, ``recall * batch`` of them on average, of which only the labels are learned.

    Raises:
        InputError: the training side is shorter than a window.
    """
    exact = corpus.recall * batch
    # A share that gives no whole number of rows is met by now one row more, now one less.
    asked = int(exact) + int(exact % 1 > 0 and rng.random() < exact % 1)
    rows = train_windows(corpus.train, rng, batch - asked, length)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    if asked:
        pairs = corpus.pairs or default_pairs(length)
        sequences, labels = mqar(training_generator(rng), asked, corpus.vocab_size, length, pairs)
        tokens, targets = np.concatenate([tokens, sequences]), np.concatenate([targets, labels])
    return np.ascontiguousarray(tokens), np.ascontiguousarray(targets)


def train_windows(
    tokens: NDArray[Any], rng: np.random.Generator, count: int, length: int
) -> NDArray[np.int64]:
    """Random windows of a text [count, length + 1]."""
    if not count:
        return np.empty((0, length + 1), np.int64)
    if len(tokens) <= length:
        raise InputError(f"data: {len(tokens)} tokens to train on, a window needs {length + 1}; {MORE}")
    starts = rng.integers(len(tokens) - length, size=count)
    return np.asarray(tokens[starts[:, None] + np.arange(length + 1)], np.int64)


def held_out_windows(tokens: NDArray[Any], count: int, length: int) -> NDArray[np.int64]:
    """The fixed windows of an evaluation [count, length + 1]: evenly spaced, none overlapping another."""
    starts = window_starts(len(tokens), count, length)
    return np.asarray(tokens[starts[:, None] + np.arange(length + 1)], np.int64)


def window_starts(tokens: int, count: int, length: int) -> NDArray[np.int64]:
    """Where the windows of :func:`held_out_windows` start in a text of so many tokens [count].

    Raises:
        InputError: the text is too short for so many.
    """
    stride = tokens // count
    if stride <= length:
        found = f"{tokens} tokens held out, {count} windows of {length + 1} need {count * (length + 1)}"
        raise InputError(f"data: {found}; ask for fewer or shorter ones, or {MORE}")
    return stride * np.arange(count)


def _recall_alone(config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    kind = np.uint8 if tokenizer is None else np.uint32
    empty: NDArray[Any] = np.zeros(0, kind)
    return _corpus(config, tokenizer, (empty, empty), 0, "MQAR sequences", None)


def _corpus(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    sides: tuple[NDArray[Any], NDArray[Any]],
    documents: int,
    source: str,
    sizes: NDArray[np.uint32] | None,
) -> Corpus:
    vocab_size = tokenizer.vocab_size if tokenizer else BYTES
    made_of = {
        "sides": [digest(side.tobytes()) for side in sides],
        "tokenizer": tokenizer and tokenizer.digest,
        "recall": config.recall,
        "pairs": config.pairs,
    }
    return Corpus(
        train=sides[0],
        held_out=sides[1],
        digest=digest(canonical_json(made_of)),
        documents=documents,
        source=source,
        vocab_size=vocab_size,
        held_out_bytes=sizes,
        recall=config.recall,
        pairs=config.pairs,
    )
