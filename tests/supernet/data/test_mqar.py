"""MQAR sequences checked by a slow reader that implements their definition."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch

from space import Architecture, InputError, Layer, ModelConfig
from space.blocks import Model, forward
from supernet.data.corpus import DataConfig, load_corpus, train_batch
from supernet.data.mqar import evaluation_generator, mqar, training_generator
from supernet.evaluate import mqar_accuracy, recall_set
from tests.contracts import scatter


def read(tokens: list[int], labels: list[int], vocab_size: int, pairs: int) -> list[int]:
    """The gap of each pair, in order; asserts every rule of the task."""
    keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert all(1 <= key < vocab_size // 2 for key in keys)
    assert all(vocab_size // 2 <= value < vocab_size for value in values)
    assert all(0 <= token < vocab_size for token in tokens)
    answers = dict(zip(keys, values, strict=True))
    places = {}
    for place, label in enumerate(labels):
        if label != -100:
            assert place >= 2 * pairs
            assert (place - 2 * pairs) % 2 == 0
            assert answers[tokens[place]] == label
            places[tokens[place]] = place
    assert sorted(places) == sorted(keys)
    return [(places[key] - 2 * pairs) // 2 for key in keys]


@pytest.mark.parametrize(
    ("vocab_size", "length", "pairs"),
    [(256, 64, 8), (256, 64, 16), (18, 32, 8), (17, 31, 7), (4, 4, 1), (5, 9, 1)],
)
def test_sequences_satisfy_definition(vocab_size: int, length: int, pairs: int) -> None:
    tokens, labels = mqar(np.random.default_rng(0), 200, vocab_size, length, pairs)
    assert tokens.shape == labels.shape == (200, length)
    assert tokens.dtype == labels.dtype == np.int64
    gaps = [read(t, la, vocab_size, pairs) for t, la in zip(tokens.tolist(), labels.tolist(), strict=True)]
    assert {gap for row in gaps for gap in row} == set(range((length - 2 * pairs) // 2))
    # Keys, values and what is in between come from everywhere they may.
    assert set(tokens[:, 0 : 2 * pairs : 2].ravel()) == set(range(1, vocab_size // 2))
    assert set(tokens[:, 1 : 2 * pairs : 2].ravel()) == set(range(vocab_size // 2, vocab_size))
    rest = tokens[:, 2 * pairs :][labels[:, 2 * pairs :] == -100]
    assert set(rest.tolist()) == set(range(vocab_size))


def test_gap_frequencies_match_probabilities() -> None:
    """Two of five positions, compared with the product of the probabilities of the two draws."""
    rows, places = 40_000, 5
    tokens, labels = mqar(np.random.default_rng(1), rows, 40, 2 * 2 + 2 * places, 2)
    drawn = Counter(tuple(read(t, la, 40, 2)) for t, la in zip(tokens.tolist(), labels.tolist(), strict=True))
    weight = [0.01 * i**-0.99 for i in range(1, places + 1)]
    for first, second in permutations(range(places), 2):
        exact = weight[first] / sum(weight) * weight[second] / (sum(weight) - weight[first])
        spread = math.sqrt(rows * exact * (1 - exact))
        assert abs(drawn[first, second] - rows * exact) < 4.5 * spread, (first, second)


def test_keys_and_values_are_uniform_and_independent() -> None:
    tokens, _ = mqar(np.random.default_rng(2), 30_000, 10, 8, 2)
    counts = Counter(map(tuple, tokens[:, :4].tolist()))
    ordered = [
        (k, v, m, w) for k, m in permutations(range(1, 5), 2) for v, w in permutations(range(5, 10), 2)
    ]
    assert set(counts) == set(ordered)
    expected = 30_000 / len(ordered)
    squares = sum((counts[row] - expected) ** 2 / expected for row in ordered)
    freedom = len(ordered) - 1
    assert abs(squares - freedom) < 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("vocab_size", "length", "pairs", "message"),
    [
        (256, 64, 17, "17 key-value pairs; a length of 64 holds at most 16"),
        (256, 64, 0, "0 key-value pairs"),
        (16, 64, 8, "8 key-value pairs; a vocabulary of 16 has 7 keys"),
        (1, 64, 1, "a vocabulary of 1 has 0 keys"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(vocab_size: int, length: int, pairs: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mqar(np.random.default_rng(0), 2, vocab_size, length, pairs)


def test_training_and_evaluation_share_no_sequence() -> None:
    """For any seeds, equal ones included."""
    corpus = load_corpus(DataConfig(recall=1.0, pairs=2))
    trained = {
        tuple(row)
        for seed in range(4)
        for step in range(40)
        for row in train_batch(corpus, np.random.default_rng([seed, step, 0]), 64, 16)[0].tolist()
    }
    scored = {tuple(row) for seed in range(20) for row in recall_set(256, 64, 16, 2, seed).tokens.tolist()}
    assert len(trained) == 4 * 40 * 64
    assert len(scored) == 20 * 64
    assert not trained & scored
    twin = training_generator(np.random.default_rng(0)).integers(2**63, size=64)
    assert not set(twin) & set(evaluation_generator(0).integers(2**63, size=64))


def test_evaluation_sequences_are_fixed() -> None:
    first, again, other = (recall_set(256, 8, 32, 4, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.targets, again.targets)
    assert (first.tokens != other.tokens).any()
    assert first.count == 8 * 4
    assert first.recall_share == 1
    np.testing.assert_array_equal(first.recallable, first.targets != -100)
    assert first.text_bytes is None


def small_model() -> tuple[dict[str, torch.Tensor], Architecture, ModelConfig]:
    model_config = ModelConfig(vocab_size=16, max_seq_len=32, head_dim=16, tie_embeddings=False)
    architecture = Architecture(16, (Layer(mixer="attention", heads=1, kv_heads=1),))
    model = Model(architecture, model_config)
    scatter(model)
    return {k: v.detach() for k, v in model.named_parameters()}, architecture, model_config


def test_accuracy_equals_share_of_argmax_labels() -> None:
    weights, architecture, model_config = small_model()
    found = mqar_accuracy(
        weights, architecture, model_config, length=16, pairs=3, sequences=50, seed=7, batch=8
    )
    tokens, labels = mqar(evaluation_generator(7), 50, 16, 16, 3)
    right = asked = 0
    for row, wanted in zip(tokens, labels, strict=True):
        model = Model(architecture, model_config)
        model.load_state_dict(weights)
        with torch.no_grad():
            logits = model(torch.from_numpy(row[None]))[0][0]
        for place in np.flatnonzero(wanted != -100):
            asked += 1
            right += int(logits[place].argmax()) == wanted[place]
    assert asked == 150
    assert found == right / asked
    assert found == mqar_accuracy(
        weights, architecture, model_config, length=16, pairs=3, sequences=50, seed=7
    )


def test_accuracy_with_other_vocabulary_and_default_pairs() -> None:
    weights, architecture, model_config = small_model()
    found = mqar_accuracy(weights, architecture, model_config, length=24, vocab_size=12, sequences=100)
    data = recall_set(12, 100, 24, 3)
    with torch.no_grad():
        likeliest = (
            forward(weights, architecture, model_config, torch.from_numpy(data.tokens))[0].argmax(-1).numpy()
        )
    assert 0 < found == (likeliest == data.targets).sum() / (100 * 3)
