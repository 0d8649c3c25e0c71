"""Which tokens of a text can be recalled from its context, but not from training.

A mean over all tokens does not see what linear mixers lose; a mean over these does. The idea
of the slice is Zoology's (Arora et al. 2023), for bigrams of word pieces; for bytes, whose
bigrams say nothing, it is carried over to 8-grams.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BYTE_ORDER = 8
PIECE_ORDER = 2
SAMPLE_TOKENS = 4_000_000
PIECE_RARE = 1  # Zoology has 1250 occurrences, in a training text of billions


def recall_mask(
    windows: NDArray[np.int64],
    train: NDArray[Any],
    order: int = BYTE_ORDER,
    sample_tokens: int = SAMPLE_TOKENS,
    rare_per_million: int = 0,
) -> NDArray[np.bool_]:
    """Which targets end an n-gram seen earlier in the window and rare in training.

    A target counts when the n-gram of ``order`` (1 to 8) tokens that it completes ended earlier in
    its own window, and occurs at most ``rare_per_million`` times in a million tokens (0: never) of
    the training text's first ``sample_tokens``. Windows [N, L + 1] give a mask [N, L] of the
    targets. An n-gram must fit 64 bits: 8 bytes, or 2 ids below 2^32.
    """
    sample = train[:sample_tokens]
    grams = _ngrams(windows, order)  # [N, L + 2 - order]
    places = np.argsort(grams, axis=1, kind="stable")
    ranked = np.take_along_axis(grams, places, axis=1)
    repeated = np.zeros(grams.shape, bool)
    np.put_along_axis(repeated, places[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    wanted = grams[repeated]
    known = np.sort(_ngrams(sample, order))  # this search is 3 times as fast as np.isin
    count = np.searchsorted(known, wanted, "right") - np.searchsorted(known, wanted, "left")
    repeated[repeated] = count <= rare_per_million * len(sample) // 1_000_000
    mask = np.zeros(windows.shape, bool)
    mask[:, order - 1 :] = repeated
    return mask[:, 1:]


def _ngrams(tokens: NDArray[Any], order: int) -> NDArray[np.uint64]:
    """The n-grams along the last axis, each packed into one integer; none where the text is shorter."""
    if not 1 <= order <= 8 or tokens.max(initial=0) >> min(64 // order, 32):
        raise ValueError(f"order {order}, tokens up to {tokens.max(initial=0)}: more than one integer holds")
    count = max(tokens.shape[-1] - order + 1, 0)
    grams = np.zeros((*tokens.shape[:-1], count), np.uint64)
    bits = np.uint64(min(64 // order, 32))
    for offset in range(order):
        grams = grams << bits | tokens[..., offset : offset + count].astype(np.uint64)
    return grams
