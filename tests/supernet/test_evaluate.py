"""Evaluation against a slow, obvious loop."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from space import InputError, genome
from supernet.data.corpus import Corpus, DataConfig, load_corpus
from supernet.evaluate import EvaluationSet, Quality, evaluate, evaluation_set, recall_set
from supernet.supernet import Supernet
from tests.contracts import scatter, tiny_space


def text_set(windows: np.ndarray, recallable: np.ndarray) -> EvaluationSet:
    return EvaluationSet(
        tokens=windows[:, :-1], targets=windows[:, 1:], recallable=recallable, text_bytes=recallable.size
    )


def test_losses_are_means_over_all_and_over_recallable_targets() -> None:
    space = tiny_space()
    supernet = Supernet(space)
    scatter(supernet)
    rng = np.random.default_rng(0)
    windows = rng.integers(0, space.vocab_size, (6, 21))
    targets = np.where(rng.random((6, 20)) < 0.4, -100, windows[:, 1:])
    recallable = (rng.random((6, 20)) < 0.3) & (targets != -100)
    architecture = genome.largest(space)
    weights = supernet.weights(architecture)
    losses = np.zeros((6, 20))
    for row, sequence in enumerate(windows):
        with torch.no_grad():
            logits = supernet(torch.from_numpy(sequence[None, :-1]), architecture)[0][0].double().numpy()
        for place, target in enumerate(sequence[1:]):
            shifted = logits[place] - logits[place].max()
            losses[row, place] = math.log(np.exp(shifted).sum()) - shifted[target]
    found = evaluate(weights, architecture, space.config, text_set(windows, recallable), batch=4)
    assert abs(found.loss_nats - losses.mean()) < 1e-6
    assert abs(found.recall_loss_nats - losses[recallable].mean()) < 1e-6
    assert found.bits_per_byte == pytest.approx(losses.mean() / math.log(2), abs=1e-5)
    # Where only some targets are asked, and stand for more bytes than there are tokens.
    some = replace(text_set(windows, recallable), targets=targets, text_bytes=300)
    found = evaluate(weights, architecture, space.config, some, batch=4)
    asked = losses[targets != -100]
    assert abs(found.loss_nats - asked.mean()) < 1e-6
    assert abs(found.recall_loss_nats - losses[recallable].mean()) < 1e-6
    assert found.bits_per_byte is not None
    assert abs(found.bits_per_byte - asked.sum() / math.log(2) / 300) < 1e-5
    assert some.recall_share == recallable.sum() / asked.size


def test_no_recallable_target_gives_no_recall_loss() -> None:
    space = tiny_space()
    supernet = Supernet(space)
    data = text_set(np.ones((4, 9), np.int64), np.zeros((4, 8), bool))
    architecture = genome.smallest(space)
    found = evaluate(supernet.weights(architecture), architecture, space.config, data)
    assert math.isnan(found.recall_loss_nats)
    assert data.recall_share == 0


def test_bits_per_byte_are_unknown_where_the_bytes_are() -> None:
    space = tiny_space()
    supernet = Supernet(space)
    architecture = genome.smallest(space)
    data = recall_set(space.vocab_size, 4, 16)
    found = evaluate(supernet.weights(architecture), architecture, space.config, data)
    assert found.bits_per_byte is None
    assert found.loss_nats == found.recall_loss_nats
    assert abs(found.loss_nats - math.log(space.vocab_size)) < 2
    assert Quality(loss_nats=1.0, recall_loss_nats=2.0).to_json() == {
        "loss_nats": 1.0, "recall_loss_nats": 2.0, "bits_per_byte": None,
    }  # fmt: skip


def corpus(**changes: object) -> Corpus:
    text = np.frombuffer(b"the cat sat on the cat; " * 40, np.uint8)
    fields = {
        "train": np.zeros(9, np.uint8),
        "held_out": text,
        "digest": "",
        "documents": 2,
        "source": "cats",
    }
    return Corpus(**(fields | changes))


def test_an_evaluation_takes_held_out_text_and_nothing_else() -> None:
    data = evaluation_set(corpus(), 5, 40)
    again = evaluation_set(corpus(recall=0.5), 5, 40)  # the mixture is for training
    for found in (data, again):
        places = [960 // 5 * i for i in range(5)]
        expected = [corpus().held_out[i : i + 41] for i in places]
        np.testing.assert_array_equal(found.windows, expected)
        np.testing.assert_array_equal(found.tokens[:, 1:], found.targets[:, :-1])
        assert found.recallable.any()
        assert not found.recallable.all()
        assert found.text_bytes == found.count == 5 * 40
    with pytest.raises(InputError, match="960 tokens held out, 20 windows of 61 need 1220"):
        evaluation_set(corpus(), 20, 60)


def test_mqar_alone_is_evaluated_on_mqar() -> None:
    found = evaluation_set(load_corpus(DataConfig(recall=1.0, pairs=3)), 6, 32)
    expected = recall_set(256, 6, 32, 3)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.targets, expected.targets)
    assert found.count == 6 * 3
