"""Split of a text into training and held-out documents, without overlap.

Documents are assigned to a side by the hash of their content, so that equal ones are on the same side. This
is not enough: files share licences, tables and copied functions, and a long file may contain a page twice. So
held-out text is searched in blocks of 128 bytes, and every block that occurs anywhere in the training text is
cut out of its document. The remaining text shares no passage of 255 bytes or more with the training text, and
no whole document.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from space.io.errors import InputError
from supernet.data.documents import character_start

BLOCK_BYTES = 128
_CHUNK_BYTES = 1 << 20  # of training text hashed at a time; the arrays stay in the cache
_HASH_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_TABLE_BITS = 22


def split_documents(
    texts: Iterable[bytes], held_out: float, limit_bytes: float
) -> tuple[list[bytes], list[bytes]]:
    """Deduplicate, order and split texts by their content.

    The same texts under other names or in another order give the same sides.

    Args:
        texts: the texts; empty ones are dropped.
        held_out: share of the texts to hold out, by a part of their sha256.
        limit_bytes: take texts in the order of their sha256 up to this size.

    Returns:
        Training documents and held-out documents. Of two or more texts, each side gets one, but blocks that
        are in the training text too are cut out of held-out ones.
    """
    contents = {hashlib.sha256(text).digest(): text for text in texts if text.strip()}
    taken: dict[bytes, float] = {}
    left = limit_bytes
    for key, text in sorted(contents.items()):
        if left <= 0:
            break
        left -= len(text)
        # The hash's first bytes order, its last ones split; the same ones would fill one side first.
        taken[text] = int.from_bytes(key[-8:], "big") / 2**64
    threshold = _threshold(list(taken.values()), held_out)
    train = [text for text, share in taken.items() if share >= threshold]
    candidates = [text for text, share in taken.items() if share < threshold]
    known = set(train)
    apart = without_blocks(candidates, shared_blocks(train, candidates))
    return train, [text for text in apart if text not in known]


def _threshold(shares: Sequence[float], held_out: float) -> float:
    """The share below which a document is held out: ``held_out``, unless by chance one side were empty."""
    ordered = sorted(shares)
    if len(ordered) < 2:
        return held_out
    return min(max(held_out, math.nextafter(ordered[0], 1)), ordered[-1])


def require_apart(train: Sequence[bytes], held_out: Sequence[bytes]) -> None:
    """Check that no held-out document or block of one is in the training text.

    Args:
        train: training documents.
        held_out: held-out documents.

    Raises:
        InputError: text is on both sides; the message quotes its start.
    """
    both = set(train) & set(held_out) or shared_blocks(train, held_out)
    if both:
        start = min(both)[:40].decode(errors="replace")
        raise InputError(f"data: held-out text is in the training text too, such as {start!r}")


def shared_blocks(train: Sequence[bytes], held_out: Sequence[bytes]) -> set[bytes]:
    """The blocks of held-out documents that occur anywhere in a training document.

    A document's blocks are its bytes 0 to 128, 128 to 256 and so on; a shorter rest is no block.

    Args:
        train: training documents.
        held_out: held-out documents.
    """
    blocks = {text[place : place + BLOCK_BYTES] for text in held_out for place in _places(text)}
    if not blocks:
        return set()
    hashes = _hashes(np.frombuffer(b"".join(blocks), np.uint8))[::BLOCK_BYTES]
    # A table by the top bits of the hash filters positions (a Bloom filter with one hash function).
    table = np.zeros(1 << _TABLE_BITS, bool)
    table[_slot(hashes)] = True
    text = b"\0".join(train)
    tokens = np.frombuffer(text, np.uint8)
    shared: set[bytes] = set()
    for start in range(0, len(tokens) - BLOCK_BYTES + 1, _CHUNK_BYTES):
        chunk = _hashes(tokens[start : start + _CHUNK_BYTES + BLOCK_BYTES - 1])
        places = np.flatnonzero(table[_slot(chunk)])
        places = (
            start + places[np.unique(chunk[places], return_index=True)[1]]
        )  # equal hashes once, such as a run of spaces
        for place in places.tolist():
            block = text[place : place + BLOCK_BYTES]
            if block in blocks:
                shared.add(block)
    return shared


def without_blocks(texts: Iterable[bytes], unwanted: set[bytes]) -> list[bytes]:
    """Cut blocks out of texts; the passages between them become texts of their own.

    A passage starts at a block's boundary, so that its blocks are blocks of the original text.

    Args:
        texts: UTF-8 texts.
        unwanted: the blocks to cut out.
    """
    kept: list[bytes] = []
    for text in texts:
        start = 0
        for place in _places(text):
            # A passage must not start inside a character: drop that block too, so that texts stay UTF-8.
            inside = place == start > 0 and character_start(text, place) < place
            if inside or text[place : place + BLOCK_BYTES] in unwanted:
                kept.append(text[start : character_start(text, place)])
                start = place + BLOCK_BYTES
        if start == 0 or character_start(text, min(start, len(text) - 1)) == start:
            kept.append(text[start:])
    return [text for text in kept if text.strip()]


def _places(text: bytes) -> range:
    return range(0, len(text) - BLOCK_BYTES + 1, BLOCK_BYTES)


def _hashes(tokens: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Polynomial hash modulo 2^64 of the 128 bytes at every position [n] -> [n - 127].

    A block's hash is a difference of two prefix sums, divided by a power of the base.
    """
    powers = _powers(_HASH_BASE, len(tokens))
    sums = np.zeros(len(tokens) + 1, np.uint64)
    np.cumsum(powers * (tokens.astype(np.uint64) + np.uint64(1)), out=sums[1:])
    inverse = _powers(pow(_HASH_BASE, -1, 2**64), len(tokens) - BLOCK_BYTES + 1)
    shifted: NDArray[np.uint64] = (sums[BLOCK_BYTES:] - sums[:-BLOCK_BYTES]) * inverse
    return shifted


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _slot(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
