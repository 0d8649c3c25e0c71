"""Mask of the tokens that can be recalled from the context, but not from training.

The mean loss over these tokens shows recall, which the mean over all tokens hides. Zoology (Arora et al.
2023) introduced the slice for bigrams of subwords; for bytes, whose bigrams carry little information, 8-grams
are used.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BYTE_ORDER = 8
PIECE_ORDER = 2
SAMPLE_TOKENS = 4_000_000
PIECE_RARE = 1  # occurrences per million; Zoology allows 1250 in all, in a training text of billions


def recall_mask(
    windows: NDArray[np.int64],
    train: NDArray[Any],
    order: int = BYTE_ORDER,
    sample_tokens: int = SAMPLE_TOKENS,
    rare_per_million: int = 0,
) -> NDArray[np.bool_]:
    """Mask of the targets that complete an n-gram which occurs earlier in the window and is rare in training.

    An n-gram must fit 64 bits: 8 bytes, or 2 ids below 2^32.

    Args:
        windows: token ids [N, L + 1].
        train: training text [tokens].
        order: tokens per n-gram, 1 to 8.
        sample_tokens: the training text's first tokens that are searched.
        rare_per_million: greatest number of occurrences per million training tokens; 0 is none at all.

    Returns:
        Mask [N, L] of the targets.
    """
    sample = train[:sample_tokens]
    grams = _ngrams(windows, order)  # [N, L + 2 - order]
    places = np.argsort(grams, axis=1, kind="stable")
    ranked = np.take_along_axis(grams, places, axis=1)
    repeated = np.zeros(grams.shape, bool)
    np.put_along_axis(repeated, places[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    candidates = grams[repeated]
    known = np.sort(_ngrams(sample, order))  # this search is 3 times as fast as np.isin
    count = np.searchsorted(known, candidates, "right") - np.searchsorted(known, candidates, "left")
    repeated[repeated] = count <= rare_per_million * len(sample) // 1_000_000
    mask = np.zeros(windows.shape, bool)
    mask[:, order - 1 :] = repeated
    return mask[:, 1:]


def _ngrams(tokens: NDArray[Any], order: int) -> NDArray[np.uint64]:
    """The n-grams along the last axis, each packed into one integer; empty if the text is shorter."""
    if not 1 <= order <= 8 or tokens.max(initial=0) >> min(64 // order, 32):
        raise ValueError(
            f"order {order}, tokens up to {tokens.max(initial=0)}: an n-gram does not fit 64 bits"
        )
    count = max(tokens.shape[-1] - order + 1, 0)
    grams = np.zeros((*tokens.shape[:-1], count), np.uint64)
    bits = np.uint64(min(64 // order, 32))
    for offset in range(order):
        grams = grams << bits | tokens[..., offset : offset + count].astype(np.uint64)
    return grams
