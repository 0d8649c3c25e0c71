"""Multi-query associative recall (MQAR; Zoology, Arora et al. 2023).

A sequence lists pairs of a key and a value, then shows every key once more; there the model has to predict
the key's value. Only the context determines the answer, so accuracy measures a mixer's recall. Training and
evaluation draw from different generators, so no evaluated sequence is trained on by design.
"""

import numpy as np
from numpy.typing import NDArray

from space.io.errors import InputError

IGNORED = -100  # target that a loss ignores, as torch's ignore_index
GAP_EXPONENT = 0.01  # Zoology's exponent for the gap between a pair and its query
_TRAIN_SEED, _EVALUATION_SEED = 1, 2  # first words of the generators' seeds

Tokens = NDArray[np.int64]


def default_pairs(length: int) -> int:
    """Number of pairs in Zoology's setting: one for every eight tokens.

    Args:
        length: tokens per sequence.
    """
    return max(1, length // 8)


def require_mqar(vocab_size: int, length: int, pairs: int) -> None:
    """Check the sizes of sequences.

    Args:
        vocab_size: number of distinct tokens.
        length: tokens per sequence.
        pairs: key-value pairs per sequence.

    Raises:
        InputError: the pairs do not fit the length or the vocabulary.
    """
    if pairs < 1 or 4 * pairs > length:
        allowed = f"a length of {length} holds at most {length // 4}"
        raise InputError(f"data.pairs: {pairs} key-value pairs; {allowed}")
    if pairs > vocab_size // 2 - 1:
        allowed = f"a vocabulary of {vocab_size} has {max(0, vocab_size // 2 - 1)} keys"
        raise InputError(f"data.pairs: {pairs} key-value pairs; {allowed}")


def mqar(
    rng: np.random.Generator, batch: int, vocab_size: int, length: int, pairs: int
) -> tuple[Tokens, Tokens]:
    """Draw sequences.

    ``pairs`` distinct keys from [1, V/2) and values from [V/2, V) alternate at the start. Each key
    occurs again at position 2 * pairs + 2 * gap; the gaps are drawn one after the other without
    replacement from range((length - 2 * pairs) / 2), gap i - 1 with probability proportional to
    i^-0.99, and the label there is the key's value. All other tokens are uniformly random.

    Args:
        rng: source of randomness.
        batch: number of sequences.
        vocab_size: number of distinct tokens V.
        length: tokens per sequence.
        pairs: key-value pairs per sequence.

    Returns:
        Tokens and labels [batch, length]; labels are -100 except at queries.

    Raises:
        InputError: the pairs do not fit the length or the vocabulary.
    """
    require_mqar(vocab_size, length, pairs)
    half = vocab_size // 2
    keys = 1 + _distinct(rng, np.ones(half - 1), batch, pairs)
    values = half + _distinct(rng, np.ones(vocab_size - half), batch, pairs)
    places = (length - 2 * pairs) // 2
    weights = GAP_EXPONENT * np.arange(1.0, places + 1) ** (GAP_EXPONENT - 1)
    queries = 2 * pairs + 2 * _distinct(rng, weights, batch, pairs)
    tokens = rng.integers(vocab_size, size=(batch, length))
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    np.put_along_axis(tokens, queries, keys, axis=1)
    labels = np.full((batch, length), IGNORED, np.int64)
    np.put_along_axis(labels, queries, values, axis=1)
    return tokens, labels


def training_generator(rng: np.random.Generator) -> np.random.Generator:
    """A generator for a training batch's sequences, seeded by the batch's own generator.

    Args:
        rng: the batch's generator.
    """
    return np.random.default_rng([_TRAIN_SEED, int(rng.integers(2**63))])


def evaluation_generator(seed: int) -> np.random.Generator:
    """A generator for sequences that training never draws.

    Args:
        seed: of the sequences.
    """
    return np.random.default_rng([_EVALUATION_SEED, seed])


def _distinct(rng: np.random.Generator, weights: NDArray[np.float64], batch: int, count: int) -> Tokens:
    """Weighted draws without replacement: indices [batch, count].

    Sorting exponential variables of these rates gives such a draw without a loop (Efraimidis and Spirakis
    2006).
    """
    clocks = rng.standard_exponential((batch, len(weights))) / weights
    return np.argsort(clocks, axis=1)[:, :count]
