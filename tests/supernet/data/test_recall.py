"""The recall mask compared with a plain search of the text."""

from itertools import pairwise

import numpy as np
import pytest

from supernet.data.recall import PIECE_ORDER, recall_mask


def recall_by_hand(windows: np.ndarray, sample: np.ndarray, order: int) -> np.ndarray:
    mask = np.zeros(windows.shape, bool)
    for row, text in zip(mask, windows.astype(np.uint8), strict=True):
        for end in range(order, len(text) + 1):
            gram = text[end - order : end].tobytes()
            row[end - 1] = gram in text[: end - 1].tobytes() and gram not in sample.tobytes()
    return mask[:, 1:]


def test_recall_mask_of_sentence() -> None:
    text = b"the zebra42 sat; the zebra42 ran; def main(): def main():"
    windows = np.frombuffer(text, np.uint8)[None].astype(np.int64)
    mask = recall_mask(windows, np.frombuffer(b"  def main(): pass", np.uint8))
    # " the zeb" is new, "the zebr" was seen before, "def main" is known from training.
    second = text.rindex(b"the zebra42 ")
    assert set(np.flatnonzero(mask[0]) + 1) == set(range(second + 7, second + 12))


@pytest.mark.parametrize("order", range(1, 9))
@pytest.mark.parametrize(("low", "high"), [(0, 2), (253, 256), (0, 256)])
def test_recall_mask_equals_text_search(order: int, low: int, high: int) -> None:
    rng = np.random.default_rng(order)
    windows = rng.integers(low, high, (12, 90))
    windows[3:6, 50:80], windows[6], windows[7] = windows[3:6, 10:40], 0, 255
    sample = np.concatenate([rng.integers(low, high, 2 ** min(order, 6)), windows[4, 15:30]]).astype(np.uint8)
    expected = recall_by_hand(windows, sample, order)
    assert expected.any()
    np.testing.assert_array_equal(recall_mask(windows, sample, order), expected)


def test_recall_mask_uses_own_window_and_sample_only() -> None:
    half = np.random.default_rng(0).integers(0, 256, 30)
    both, empty = np.tile(half, (1, 2)), np.zeros(0, np.uint8)
    sample = np.concatenate([np.zeros(100), half]).astype(np.uint8)
    assert recall_mask(both, empty).sum() == 30 - 7
    assert not recall_mask(both.reshape(2, 30), empty).any()
    assert not recall_mask(both, sample).any()
    assert recall_mask(both, sample, sample_tokens=100).sum() == 30 - 7
    assert recall_mask(np.zeros((2, 5), np.int64), np.zeros(0, np.uint8)).shape == (2, 4)
    with pytest.raises(ValueError, match="order 9"):
        recall_mask(np.zeros((1, 20), np.int64), np.zeros(9, np.uint8), order=9)
    with pytest.raises(ValueError, match="tokens up to 256"):
        recall_mask(np.full((1, 20), 256), np.zeros(9, np.uint8))


def pieces_by_hand(windows: np.ndarray, sample: np.ndarray, rare_per_million: int) -> np.ndarray:
    mask = np.zeros((len(windows), windows.shape[1] - 1), bool)
    known = list(pairwise(sample.tolist()))
    for row, tokens in zip(mask, windows.tolist(), strict=True):
        for end in range(1, len(tokens)):
            bigram = (tokens[end - 1], tokens[end])
            seen = bigram in list(pairwise(tokens[:end]))
            row[end - 1] = seen and known.count(bigram) * 1_000_000 <= rare_per_million * len(sample)
    return mask


@pytest.mark.parametrize("rare_per_million", [0, 1250, 2500, 5000])
@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_recall_mask_of_subword_bigrams(kind: type[np.uint16], rare_per_million: int) -> None:
    rng = np.random.default_rng(0)
    high = int(np.iinfo(kind).max) + 1
    vocab_size = np.array([0, 1, high - 2, high - 1, *rng.integers(high, size=16)])
    windows = vocab_size[rng.integers(len(vocab_size), size=(16, 60))]
    sample = vocab_size[rng.integers(len(vocab_size), size=800)].astype(kind)
    expected = pieces_by_hand(windows, sample, rare_per_million)
    assert 0.002 < expected.mean() < 0.2
    found = recall_mask(windows, sample, PIECE_ORDER, rare_per_million=rare_per_million)
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(expected, pieces_by_hand(windows, sample, rare_per_million + 1250))
