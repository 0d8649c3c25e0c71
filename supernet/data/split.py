"""A split that training text does not leak through.

Documents fall on a side by the hash of their content, so that equal ones fall on the same
side. That is not enough: files share licences, tables and copied functions, and a long file
may hold a page twice. So held-out text is looked through in blocks of 128 bytes, and a block
that training text has too, at whatever place, is cut out of its document. What is left
shares no passage of 255 bytes or more with the training text, and no whole document.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from space.io.errors import InputError
from supernet.data.documents import character_start

BLOCK_BYTES = 128
_CHUNK_BYTES = 1 << 20  # of training text hashed at a time: the arrays stay in the cache
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_TABLE_BITS = 22


def split_documents(
    texts: Iterable[bytes], held_out: float, limit_bytes: float
) -> tuple[list[bytes], list[bytes]]:
    """Deduplicate, order and split texts: (training documents, held-out documents).

    Texts come in the order of their sha256 until there are ``limit_bytes``; a share ``held_out``
    of them, by another part of the same hash, is held out. The same texts under other names, or
    in another order, give the same sides. Either side may be empty.
    """
    contents = {hashlib.sha256(text).digest(): text for text in texts if text.strip()}
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    left = limit_bytes
    for key, text in sorted(contents.items()):
        if left <= 0:
            break
        left -= len(text)
        # The first bytes order, the last ones split; with the same ones, a limit would take one side first.
        share = int.from_bytes(key[-8:], "big") / 2**64
        sides[share < held_out].append(text)
    train, kept = sides
    known = set(train)
    return train, [text for text in without_blocks(kept, shared_blocks(train, kept)) if text not in known]


def require_apart(train: Sequence[bytes], held_out: Sequence[bytes]) -> None:
    """Check that no held-out document or block of one is in the training text.

    Raises:
        InputError: names the start of what is on both sides.
    """
    both = set(train) & set(held_out) or shared_blocks(train, held_out)
    if both:
        start = min(both)[:40].decode(errors="replace")
        raise InputError(f"data: held-out text is in the training text too, such as {start!r}")


def shared_blocks(train: Sequence[bytes], held_out: Sequence[bytes]) -> set[bytes]:
    """The blocks of held-out documents that occur anywhere in a training document.

    A document's blocks are its bytes from 0 to 128, from 128 to 256 and so on; what is shorter is none.
    """
    blocks = {text[place : place + BLOCK_BYTES] for text in held_out for place in _places(text)}
    if not blocks:
        return set()
    hashes = _hashes(np.frombuffer(b"".join(blocks), np.uint8))[::BLOCK_BYTES]
    # One bit of a hash's table says that a block may be there; only those places are looked at.
    table = np.zeros(1 << _TABLE_BITS, bool)
    table[_slot(hashes)] = True
    text = b"\0".join(train)
    tokens = np.frombuffer(text, np.uint8)
    shared: set[bytes] = set()
    for start in range(0, len(tokens) - BLOCK_BYTES + 1, _CHUNK_BYTES):
        chunk = _hashes(tokens[start : start + _CHUNK_BYTES + BLOCK_BYTES - 1])
        places = np.flatnonzero(table[_slot(chunk)])
        places = start + places[np.unique(chunk[places], return_index=True)[1]]  # a run of spaces has many
        for place in places.tolist():
            block = text[place : place + BLOCK_BYTES]
            if block in blocks:
                shared.add(block)
    return shared


def without_blocks(texts: Iterable[bytes], unwanted: set[bytes]) -> list[bytes]:
    """The texts without some of their blocks; what stood between two of them is a text of its own.

    Such a text starts where a block started, so its blocks are some of those that were looked at.
    """
    kept: list[bytes] = []
    for text in texts:
        start = 0
        for place in _places(text):
            # A block that would start a text inside a character goes too; its text stays UTF-8.
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
    """A polynomial hash modulo 2^64 of every block [n] -> [n - 127], from differences of one running sum."""
    powers = _powers(_BASE, len(tokens))
    sums = np.zeros(len(tokens) + 1, np.uint64)
    np.cumsum(powers * (tokens.astype(np.uint64) + np.uint64(1)), out=sums[1:])
    inverse = _powers(pow(_BASE, -1, 2**64), len(tokens) - BLOCK_BYTES + 1)
    shifted: NDArray[np.uint64] = (sums[BLOCK_BYTES:] - sums[:-BLOCK_BYTES]) * inverse
    return shifted


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _slot(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
