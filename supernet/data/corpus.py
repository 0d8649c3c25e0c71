"""The training text and the held-out text of evaluations.

The default corpus needs no download: the standard library of the running interpreter, with bytes as tokens. A
tokenizer gives subword tokens instead, and a share of every batch's rows may be MQAR sequences
(:mod:`supernet.data.mqar`), which train recall. Documents are split by content (:mod:`supernet.data.split`);
loading a corpus checks that no held-out text is in the training text. A separator stands before and after
every document: byte 0, which no document contains, or the tokenizer's own. Footgun: a corpus is read-only,
windows are copies.
"""

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from space.io.artefact import canonical_json, digest
from space.io.errors import InputError
from supernet.data.documents import EXPECTED, Skipped, read_documents
from supernet.data.mqar import default_pairs, mqar, require_mqar, training_generator
from supernet.data.split import require_apart, split_documents
from supernet.data.tokenizer import Tokenizer, load_tokenizer

_log = logging.getLogger("formfit")
BYTE_VOCAB_SIZE = 256
MORE_TEXT = "give more text, a larger data.limit_mb or another data.held_out"

# Token ids: uint8 bytes, or uint16 or uint32 subwords.
TokenIds = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.uint32]


class DataConfig(BaseModel):
    """Source and split of the text, the key ``train.data`` of a run's configuration.

    Attributes:
        path: a text file, or a folder that is read recursively without hidden files; None is the standard
            library of the running interpreter. Files that are no text are left out with a warning. A single
            file is cut at line ends into documents of 16 KiB.
        held_out: share of documents that are held out, by content hash.
        limit_mb: take documents in hash order up to this size in MB (10**6 bytes); None takes all.
        tokenizer: a Hugging Face ``tokenizer.json``, or a GGUF file; None uses bytes as tokens.
        recall: share of a batch's rows that are MQAR sequences; at 1 no text is read.
        pairs: key-value pairs in an MQAR sequence; None is an eighth of its length.
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
    """Training and held-out text as token ids.

    Attributes:
        train: training text [tokens]; uint8 bytes, or uint16 or uint32 subwords.
        held_out: held-out text [tokens], used by evaluations only.
        digest: sha256 of everything that a batch depends on.
        documents: number of documents on both sides; a held-out one may be in several parts.
        source: name of the source, for messages.
        vocab_size: every token id is below it.
        held_out_bytes: bytes of text that each held-out token stands for [tokens]; None if unknown, or if the
            tokens are bytes.
        recall: share of a batch's rows that are MQAR sequences; at 1 both sides are empty.
        pairs: key-value pairs in such a sequence; None is an eighth of its length.
    """

    train: TokenIds
    held_out: TokenIds
    digest: str
    documents: int
    source: str
    vocab_size: int = BYTE_VOCAB_SIZE
    held_out_bytes: NDArray[np.uint32] | None = None
    recall: float = 0.0
    pairs: int | None = None

    @property
    def is_bytes(self) -> bool:
        """True if the tokens are bytes."""
        return self.train.dtype == np.uint8


def load_corpus(config: DataConfig) -> Corpus:
    """Read, deduplicate, order, split and tokenize the text.

    Args:
        config: source and split.

    Raises:
        InputError: a path is missing, unreadable or holds no text or no tokenizer, one side of the split is
            empty, or held-out text is in the training text.
    """
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    if config.recall == 1:
        return _mqar_corpus(config, tokenizer)
    source = str(config.path or f"standard library of Python {platform.python_version()}")
    limit = float("inf") if config.limit_mb is None else config.limit_mb * 1e6
    skipped = Skipped()
    train, held_out = split_documents(read_documents(config.path, skipped), config.held_out, limit)
    if line := skipped.describe():
        _log.warning("formfit: data.path: %s: %s", source, line)
    if not (train or held_out):
        raise InputError(f"data.path: {source}: no UTF-8 text in it; {EXPECTED}")
    if not (train and held_out):
        counts = f"{len(train)} documents to train on, {len(held_out)} held out"
        one_file = config.path and config.path.is_dir() and len(train) + len(held_out) == 1
        hint = ", or name the file itself, which is then cut into documents" if one_file else ""
        raise InputError(f"data: {source}: {counts}, each side needs one; {MORE_TEXT}{hint}")
    require_apart(train, held_out)
    sizes: NDArray[np.uint32] | None = None
    if tokenizer is None:
        sides: tuple[TokenIds, TokenIds] = joined_bytes(train), joined_bytes(held_out)
    else:
        held_out_ids, sizes = tokenizer.encode_measured(held_out)
        for warning in tokenizer.warnings(held_out):
            _log.warning("formfit: %s", warning)
        sides = tokenizer.encode(train), held_out_ids
    return _corpus(config, tokenizer, sides, len(train) + len(held_out), source, sizes)


def joined_bytes(texts: Sequence[bytes]) -> NDArray[np.uint8]:
    """Join texts into one array of bytes [n], with byte 0 before and after each.

    Args:
        texts: texts without byte 0.
    """
    return np.frombuffer(b"\0".join([b"", *texts, b""]), np.uint8)


def require_fits(corpus: Corpus, vocab_size: int, length: int) -> None:
    """Check that a corpus fits a vocabulary and a length.

    Args:
        corpus: the corpus.
        vocab_size: the space's vocabulary.
        length: tokens per sequence.

    Raises:
        InputError: a token outside the vocabulary, a tokenizer with more tokens, a side shorter than
            ``length`` tokens and a target, or MQAR sequences that do not fit the length.
    """
    where = f"data: {corpus.source}"
    if corpus.is_bytes and vocab_size < BYTE_VOCAB_SIZE:
        raise InputError(f"{where}: bytes are the tokens, the space's vocabulary is {vocab_size}; "
                         f"give vocab_size {BYTE_VOCAB_SIZE}, or a tokenizer of its size")  # fmt: skip
    if not corpus.is_bytes and vocab_size < corpus.vocab_size:
        raise InputError(f"{where}: the tokenizer has {corpus.vocab_size} tokens, the space's vocabulary is "
                         f"{vocab_size}; it has to be at least as large")  # fmt: skip
    if corpus.recall:
        require_mqar(corpus.vocab_size, length, corpus.pairs or default_pairs(length))
    for side, tokens in (("training", corpus.train), ("held-out", corpus.held_out)):
        if corpus.recall < 1 and len(tokens) <= length:
            unit = "bytes" if corpus.is_bytes else "tokens"
            found = f"the {side} side has {len(tokens)} {unit}, a length of {length} needs {length + 1}"
            raise InputError(f"{where}: {found}; {MORE_TEXT}")
        greatest = int(tokens.max(initial=0))
        if greatest >= vocab_size:
            found = f"token {greatest} on the {side} side"
            raise InputError(f"{where}: {found}; a vocabulary of {vocab_size} has 0 to {vocab_size - 1}")


def train_batch(
    corpus: Corpus, rng: np.random.Generator, batch: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw a training batch.

    Text rows are windows with uniformly drawn starts. The last rows are MQAR sequences, on average
    ``recall * batch`` of them, whose only targets are the labels.

    Args:
        corpus: the corpus.
        rng: source of randomness.
        batch: number of rows.
        length: tokens per row.

    Returns:
        Tokens and targets [batch, length]; -100 is ignored.

    Raises:
        InputError: the training text is shorter than a window.
    """
    expected = corpus.recall * batch
    # Stochastic rounding: a fractional number of rows is right on average.
    mqar_rows = int(expected) + int(expected % 1 > 0 and rng.random() < expected % 1)
    rows = train_windows(corpus.train, rng, batch - mqar_rows, length)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    if mqar_rows:
        pairs = corpus.pairs or default_pairs(length)
        sequences, labels = mqar(training_generator(rng), mqar_rows, corpus.vocab_size, length, pairs)
        tokens, targets = np.concatenate([tokens, sequences]), np.concatenate([targets, labels])
    return np.ascontiguousarray(tokens), np.ascontiguousarray(targets)


def train_windows(tokens: TokenIds, rng: np.random.Generator, count: int, length: int) -> NDArray[np.int64]:
    """Draw windows of a text [count, length + 1], with uniformly drawn starts.

    Args:
        tokens: the text [tokens].
        rng: source of randomness.
        count: number of windows.
        length: tokens per window, without the last target.

    Raises:
        InputError: the text is shorter than a window.
    """
    if not count:
        return np.empty((0, length + 1), np.int64)
    if len(tokens) <= length:
        raise InputError(f"data: {len(tokens)} tokens to train on, a window needs {length + 1}; {MORE_TEXT}")
    starts = rng.integers(len(tokens) - length, size=count)
    return np.asarray(tokens[starts[:, None] + np.arange(length + 1)], np.int64)


def held_out_windows(tokens: TokenIds, count: int, length: int) -> NDArray[np.int64]:
    """The fixed windows of an evaluation [count, length + 1], evenly spaced and disjoint.

    Args:
        tokens: the text [tokens].
        count: number of windows.
        length: tokens per window, without the last target.

    Raises:
        InputError: the text is too short for that many windows.
    """
    starts = window_starts(len(tokens), count, length)
    return np.asarray(tokens[starts[:, None] + np.arange(length + 1)], np.int64)


def window_starts(tokens: int, count: int, length: int) -> NDArray[np.int64]:
    """Start of each window of :func:`held_out_windows` [count].

    Args:
        tokens: length of the text in tokens.
        count: number of windows.
        length: tokens per window, without the last target.

    Raises:
        InputError: the text is too short for that many windows.
    """
    stride = tokens // count
    if stride <= length:
        found = f"{tokens} tokens held out, {count} windows of {length + 1} need {count * (length + 1)}"
        raise InputError(f"data: {found}; use fewer or shorter ones, or {MORE_TEXT}")
    return stride * np.arange(count)


def _mqar_corpus(config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    empty: TokenIds = np.zeros(0, np.uint8) if tokenizer is None else np.zeros(0, np.uint32)
    return _corpus(config, tokenizer, (empty, empty), 0, "MQAR sequences", None)


def _corpus(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    sides: tuple[TokenIds, TokenIds],
    documents: int,
    source: str,
    sizes: NDArray[np.uint32] | None,
) -> Corpus:
    vocab_size = tokenizer.vocab_size if tokenizer else BYTE_VOCAB_SIZE
    inputs = {
        "sides": [digest(side.tobytes()) for side in sides],
        "tokenizer": tokenizer and tokenizer.digest,
        "recall": config.recall,
        "pairs": config.pairs,
    }
    return Corpus(
        train=sides[0],
        held_out=sides[1],
        digest=digest(canonical_json(inputs)),
        documents=documents,
        source=source,
        vocab_size=vocab_size,
        held_out_bytes=sizes,
        recall=config.recall,
        pairs=config.pairs,
    )
