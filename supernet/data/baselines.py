"""Baselines of language modelling, in bits per byte of held-out text.

gzip, and a byte model of order 2, which counts bytes after two bytes of context. Texts may be one array, or
the windows of an evaluation [N, L + 1], which are read as one text.
"""

import gzip
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from space.io.errors import InputError

TokenIds = NDArray[np.integer[Any]]
CHUNK_BYTES = 1 << 23  # processed at a time, to bound memory


def gzip_bits_per_byte(train: TokenIds, held_out: TokenIds) -> float:
    """Size of the held-out text under ``gzip -9``, in bits per byte.

    Args:
        train: unused; all baselines have the same signature.
        held_out: the text to compress.
    """
    del train
    text = _text(held_out)
    return 8 * len(gzip.compress(text.tobytes(), 9, mtime=0)) / len(text)


def order2_bits_per_byte(train: TokenIds, held_out: TokenIds) -> float:
    """Cross-entropy of an order-2 byte model, in bits per byte.

    Args:
        train: text whose bytes are counted.
        held_out: text to predict; it starts a document (byte 0).
    """
    model = count_order2(train)
    text = np.concatenate([np.zeros(2, np.uint8), _text(held_out)])
    bits = 0.0
    for start in range(2, len(text), CHUNK_BYTES):
        here = np.arange(start, min(start + CHUNK_BYTES, len(text)))
        probabilities = model.probability(text[here - 2], text[here - 1], text[here])
        bits -= float(np.log2(probabilities).sum())
    return bits / (len(text) - 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Order2:
    """Byte model with interpolated Witten-Bell smoothing.

    P(w | h) = (count(h w) + distinct(h) P(w | shorter h)) / (count(h) + distinct(h)), from order 2 down to
    order 0, whose shorter model is uniform over 256 bytes (Witten and Bell 1991).

    Attributes:
        counts: occurrences of each three bytes [256, 256, 256].
        seen: occurrences of each two bytes before another byte [256, 256].
        distinct: number of different bytes after each two bytes [256, 256].
        order1: P(byte | previous byte) [256, 256].
    """

    counts: NDArray[np.int32]
    seen: NDArray[np.int64]
    distinct: NDArray[np.int64]
    order1: NDArray[np.float64]

    def probability(
        self, before: NDArray[np.uint8], last: NDArray[np.uint8], following: NDArray[np.uint8]
    ) -> NDArray[np.float64]:
        """P(following | before, last), elementwise.

        Args:
            before: the byte before ``last``.
            last: the previous byte.
            following: the predicted byte; all three broadcast.
        """
        distinct = self.distinct[before, last]
        shorter = self.order1[last, following]
        weight = np.maximum(self.seen[before, last] + distinct, 1)
        mixed: NDArray[np.float64] = (self.counts[before, last, following] + distinct * shorter) / weight
        return np.where(distinct > 0, mixed, shorter)


def count_order2(train: TokenIds) -> Order2:
    """Count every three consecutive bytes of a text (64 MB of counts).

    Args:
        train: the text.
    """
    text = _text(train)
    counts = np.zeros(256**3, np.int32)
    for start in range(0, len(text) - 2, CHUNK_BYTES):
        chunk = text[start : start + CHUNK_BYTES + 2].astype(np.int32)
        packed = chunk[:-2] << 16 | chunk[1:-1] << 8 | chunk[2:]
        counts += np.bincount(packed, minlength=256**3).astype(np.int32)
    triples = counts.reshape(256, 256, 256)
    pairs = triples.sum(axis=0, dtype=np.int64)
    order0 = _interpolate(pairs.sum(axis=0), np.full(256, 1 / 256))
    return Order2(
        counts=triples,
        seen=triples.sum(axis=2, dtype=np.int64),
        distinct=np.count_nonzero(triples, axis=2),
        order1=_interpolate(pairs, order0),
    )


def _interpolate(counts: NDArray[np.int64], shorter: NDArray[np.float64]) -> NDArray[np.float64]:
    """Witten-Bell smoothing along the last axis; the shorter model where nothing was counted."""
    distinct = np.count_nonzero(counts, axis=-1, keepdims=True)
    weight = np.maximum(counts.sum(axis=-1, keepdims=True) + distinct, 1)
    return np.where(distinct > 0, (counts + distinct * shorter) / weight, shorter)


def _text(tokens: TokenIds) -> NDArray[np.uint8]:
    if not tokens.size:
        raise InputError("data: the text of a baseline is empty")
    if tokens.max() > 255:
        raise ValueError(f"tokens up to {tokens.max()}: the baselines are defined on bytes")
    return tokens.astype(np.uint8).ravel()
