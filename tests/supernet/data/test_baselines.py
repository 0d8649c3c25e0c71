import gzip
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from space.io.errors import InputError
from supernet.data import baselines
from supernet.data.baselines import count_order2, gzip_bits_per_byte, order2_bits_per_byte

TRAIN = (b"\0for item in items:\n    total += item\n" * 9 + b"\0while left: left -= 1\n" * 5) * 3
HELD_OUT = b"\0for left in items:\n    item += 1\xff~\n"


def tokens(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


class SlowOrder2:
    """Interpolated Witten-Bell over dictionaries, written from its recursion."""

    def __init__(self, train: bytes) -> None:
        self.counts: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
        for end in range(2, len(train)):
            for order in range(3):
                self.counts[train[end - order : end]][train[end]] += 1

    def probability(self, max_seq_len: bytes, byte: int) -> float:
        shorter = self.probability(max_seq_len[1:], byte) if max_seq_len else 1 / 256
        counts = self.counts.get(max_seq_len, Counter())
        if not counts:
            return shorter
        return (counts[byte] + len(counts) * shorter) / (counts.total() + len(counts))

    def bits_per_byte(self, text: bytes) -> float:
        padded = b"\0\0" + text
        chances = [self.probability(padded[end - 2 : end], padded[end]) for end in range(2, len(padded))]
        return -sum(map(math.log2, chances)) / len(text)


@pytest.mark.parametrize("chunk", [7, 100, 1 << 23])
@pytest.mark.parametrize("train", [TRAIN, b"\0", b"\0a\0"])
def test_order2_equals_slow_reference(train: bytes, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train = train[:400]
    monkeypatch.setattr(baselines, "CHUNK_BYTES", chunk)
    expected = SlowOrder2(train).bits_per_byte(HELD_OUT)
    assert order2_bits_per_byte(tokens(train), tokens(HELD_OUT)) == pytest.approx(expected, rel=1e-12)


def test_order2_probabilities_sum_to_one() -> None:
    model = count_order2(tokens(TRAIN))
    rng = np.random.default_rng(0)
    # Pairs seen, pairs of bytes seen, and any pairs.
    text = tokens(TRAIN)
    before = np.concatenate([text[:400], rng.choice(text, 100), rng.integers(0, 256, 100)]).astype(np.uint8)
    last = np.concatenate([text[1:401], rng.choice(text, 100), rng.integers(0, 256, 100)]).astype(np.uint8)
    chances = model.probability(before[:, None], last[:, None], np.arange(256, dtype=np.uint8))
    assert chances.min() > 0
    np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-12)


def test_order2_bits_on_known_texts() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8)
    assert 8 < order2_bits_per_byte(noise[:10_000], noise[10_000:]) < 9
    assert order2_bits_per_byte(noise[:1], noise) == pytest.approx(8)  # nothing counted: uniform
    assert order2_bits_per_byte(tokens(TRAIN), tokens(TRAIN)) < 1


def test_gzip_compresses_held_out_text_only() -> None:
    text = TRAIN[:300]
    expected = 8 * len(gzip.compress(text, 9, mtime=0)) / 300
    assert gzip_bits_per_byte(tokens(HELD_OUT), tokens(text)) == expected


@pytest.mark.parametrize("baseline", [gzip_bits_per_byte, order2_bits_per_byte])
def test_windows_equal_joined_text(baseline) -> None:
    text = tokens(TRAIN[:320])
    windows = text.reshape(4, 80).astype(np.int64)
    assert baseline(tokens(TRAIN), windows) == baseline(tokens(TRAIN), text)
    with pytest.raises(InputError, match="empty"):
        baseline(text, text[:0])
    with pytest.raises(ValueError, match="tokens up to 256"):
        baseline(text, windows + 256 - windows.max())
