"""What any language model must beat, in bits per byte of held-out text.

gzip, which everyone knows, and a byte model of order 2, the best that counting
two bytes of context can do. The text may be one array, or the windows of an
evaluation [N, L + 1], which are then read as one text.
"""

import gzip
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from space.io.errors import InputError

CHUNK_BYTES = 1 << 23


def gzip_bits_per_byte(train: NDArray[Any], held_out: NDArray[Any]) -> float:
    """``gzip -9`` of the held-out text alone; ``train`` is there so that all baselines are called alike."""
    del train
    text = _text(held_out)
    return 8 * len(gzip.compress(text.tobytes(), 9, mtime=0)) / len(text)


def order2_bits_per_byte(train: NDArray[Any], held_out: NDArray[Any]) -> float:
    """An order-2 byte model counted on the training text; the held-out text starts a document (byte 0)."""
    model = count_order2(train)
    text = np.concatenate([np.zeros(2, np.uint8), _text(held_out)])
    bits = 0.0
    for start in range(2, len(text), CHUNK_BYTES):
        here = np.arange(start, min(start + CHUNK_BYTES, len(text)))
        chances = model.probability(text[here - 2], text[here - 1], text[here])
        bits -= float(np.log2(chances).sum())
    return bits / (len(text) - 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Order2:
    """Interpolated Witten-Bell: an order's counts weigh as many as they are against its distinct bytes.

    P(w | h) = (count(h w) + distinct(h) P(w | shorter h)) / (count(h) + distinct(h)), from order 2 down to
    order 0, whose shorter model is uniform over 256 bytes (Witten and Bell 1991).

    Attributes:
        counts: how often each byte followed each two [256, 256, 256].
        seen: how often each two came before a byte [256, 256].
        distinct: how many different bytes followed each two [256, 256].
        order1: P(byte | one byte before) [256, 256].
    """

    counts: NDArray[np.int32]
    seen: NDArray[np.int64]
    distinct: NDArray[np.int64]
    order1: NDArray[np.float64]

    def probability(
        self, before: NDArray[np.uint8], last: NDArray[np.uint8], following: NDArray[np.uint8]
    ) -> NDArray[np.float64]:
        """P(following | before, last), elementwise over arrays that broadcast."""
        distinct = self.distinct[before, last]
        shorter = self.order1[last, following]
        weight = np.maximum(self.seen[before, last] + distinct, 1)
        mixed: NDArray[np.float64] = (self.counts[before, last, following] + distinct * shorter) / weight
        return np.where(distinct > 0, mixed, shorter)


def count_order2(train: NDArray[Any]) -> Order2:
    """Count every three bytes in a row of the training text (64 MB of counts)."""
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
    """Witten-Bell along the last axis; where nothing was counted, the shorter model."""
    distinct = np.count_nonzero(counts, axis=-1, keepdims=True)
    weight = np.maximum(counts.sum(axis=-1, keepdims=True) + distinct, 1)
    return np.where(distinct > 0, (counts + distinct * shorter) / weight, shorter)


def _text(tokens: NDArray[Any]) -> NDArray[np.uint8]:
    if not tokens.size:
        raise InputError("data: the text of a baseline is empty; give some")
    if tokens.max() > 255:
        raise ValueError(f"tokens up to {tokens.max()}: the baselines are those of bytes")
    return tokens.astype(np.uint8).ravel()
