"""Multi-query associative recall (Zoology, Arora et al. 2023): can a mixer look things up?

A sequence names pairs of a key and a value, then shows every key once more; at that place the
model is to answer with the key's value. Nothing but the context tells the answer, so the task
separates mixers that keep what they read from those that forget it. Training and evaluation
draw from generators of their own: no sequence that is scored was trained on by design.
"""

import numpy as np
from numpy.typing import NDArray

from space.io.errors import InputError

IGNORED = -100  # the target of a token from which nothing is learned, as torch has it
POWER = 0.01  # Zoology's exponent for the gap between a pair and its query
_TRAIN, _HELD_OUT = 1, 2  # first words of the two generators' seeds

Tokens = NDArray[np.int64]


def default_pairs(length: int) -> int:
    """As many pairs as Zoology's setting has at a length: one for every eight tokens."""
    return max(1, length // 8)


def require_mqar(vocab_size: int, length: int, pairs: int) -> None:
    """Refuse (InputError) sizes in which there is no such sequence."""
    if pairs < 1 or 4 * pairs > length:
        allowed = f"a length of {length} holds at most {length // 4}"
        raise InputError(f"data.pairs: {pairs} pairs of key and value; {allowed}")
    if pairs > vocab_size // 2 - 1:
        allowed = f"a vocabulary of {vocab_size} has {max(0, vocab_size // 2 - 1)} keys"
        raise InputError(f"data.pairs: {pairs} pairs of key and value; {allowed}")


def mqar(
    rng: np.random.Generator, batch: int, vocab_size: int, length: int, pairs: int
) -> tuple[Tokens, Tokens]:
    """Draw sequences: tokens [batch, length] and labels of the same shape, -100 where none is asked.

    ``pairs`` distinct keys from [1, V/2) and values from [V/2, V) alternate at the start. Each key
    comes once more at position 2 * pairs + 2 * gap; the gaps are drawn one after the other without
    replacement from range((length - 2 * pairs) / 2), gap i - 1 with probability proportional to
    i^-0.99, and the label there is the key's value. Everything else is uniformly random.

    Raises:
        InputError: the pairs do not fit the length or the vocabulary.
    """
    require_mqar(vocab_size, length, pairs)
    half = vocab_size // 2
    keys = 1 + _distinct(rng, np.ones(half - 1), batch, pairs)
    values = half + _distinct(rng, np.ones(vocab_size - half), batch, pairs)
    places = (length - 2 * pairs) // 2
    weights = POWER * np.arange(1.0, places + 1) ** (POWER - 1)
    queries = 2 * pairs + 2 * _distinct(rng, weights, batch, pairs)
    tokens = rng.integers(vocab_size, size=(batch, length))
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    np.put_along_axis(tokens, queries, keys, axis=1)
    labels = np.full((batch, length), IGNORED, np.int64)
    np.put_along_axis(labels, queries, values, axis=1)
    return tokens, labels


def training_generator(rng: np.random.Generator) -> np.random.Generator:
    """The generator of a batch's sequences, itself drawn from the batch's."""
    return np.random.default_rng([_TRAIN, int(rng.integers(2**63))])


def evaluation_generator(seed: int) -> np.random.Generator:
    """The generator of the sequences that are only ever scored."""
    return np.random.default_rng([_HELD_OUT, seed])


def _distinct(rng: np.random.Generator, weights: NDArray[np.float64], batch: int, count: int) -> Tokens:
    """Rows of distinct indices [batch, count], each drawn by weight from those still left.

    The order in which exponential clocks of those rates ring is such a draw (Efraimidis and
    Spirakis 2006), which needs no loop over draws.
    """
    clocks = rng.standard_exponential((batch, len(weights))) / weights
    return np.argsort(clocks, axis=1)[:, :count]
