"""Evaluation compared with a slow, plain loop."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from space import Architecture, InputError, genome, variation
from supernet.data.corpus import Corpus, DataConfig, load_corpus
from supernet.evaluate import (
    EvaluationSet,
    Quality,
    evaluate,
    evaluation_set,
    losses,
    mqar_accuracy,
    recall_set,
    run_parent,
)
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
    expected = np.zeros((6, 20))
    for row, sequence in enumerate(windows):
        with torch.no_grad():
            logits = supernet(torch.from_numpy(sequence[None, :-1]), architecture)[0][0].double().numpy()
        for place, target in enumerate(sequence[1:]):
            shifted = logits[place] - logits[place].max()
            expected[row, place] = math.log(np.exp(shifted).sum()) - shifted[target]
    found = evaluate(weights, architecture, space.config, text_set(windows, recallable), batch=4)
    assert abs(found.loss_nats - expected.mean()) < 1e-6
    assert abs(found.recall_loss_nats - expected[recallable].mean()) < 1e-6
    assert found.bits_per_byte == pytest.approx(expected.mean() / math.log(2), abs=1e-5)
    # Some targets are ignored, and the others stand for more bytes than there are tokens.
    some = replace(text_set(windows, recallable), targets=targets, text_bytes=300)
    found = evaluate(weights, architecture, space.config, some, batch=4)
    asked = expected[targets != -100]
    assert abs(found.loss_nats - asked.mean()) < 1e-6
    assert abs(found.recall_loss_nats - expected[recallable].mean()) < 1e-6
    assert found.bits_per_byte is not None
    assert abs(found.bits_per_byte - asked.sum() / math.log(2) / 300) < 1e-5
    assert some.recall_share == recallable.sum() / asked.size


def naive_kl(supernet: Supernet, child: Architecture, parent: Architecture, data: EvaluationSet) -> float:
    """The mean KL over the targets, from the logits of an fp64 copy, token by token."""
    double = copy.deepcopy(supernet).double()
    total = 0.0
    for tokens, targets in zip(data.tokens, data.targets, strict=True):
        with torch.no_grad():
            both = [double(torch.from_numpy(tokens[None]), a)[0][0].numpy() for a in (parent, child)]
        for of_parent, of_child, target in zip(*both, targets, strict=True):
            if target != -100:
                log_p, log_q = (one - math.log(np.exp(one).sum()) for one in (of_parent, of_child))
                total += float((np.exp(log_p) * (log_p - log_q)).sum())
    return total / data.count


@pytest.mark.parametrize("tie", [True, False])
def test_kl_equals_naive_loop_in_fp64(tie: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    space = tiny_space(tie_embeddings=tie)
    supernet = Supernet(space)
    scatter(supernet)
    rng = np.random.default_rng(0)
    windows = rng.integers(0, space.vocab_size, (6, 21))
    data = text_set(windows, rng.random((6, 20)) < 0.3)
    data = replace(data, targets=np.where(rng.random((6, 20)) < 0.4, -100, data.targets))
    largest = genome.largest(space)
    parent = run_parent(supernet.weights(largest), largest, space.config, data)
    samples = genome.decode(space, variation.sample(space, rng, 3))
    for child in (genome.smallest(space), *samples):
        weights = supernet.weights(child)
        plain = evaluate(weights, child, space.config, data)
        found = evaluate(weights, child, space.config, data, parent=parent)
        expected = naive_kl(supernet, child, largest, data)
        assert found.extra["kl"] == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert child == largest or expected > 1e-3
        assert replace(found, extra={}) == plain
        with monkeypatch.context() as patch:  # seven tokens at once
            patch.setattr("supernet.evaluate.MAX_LOGITS", 7 * space.vocab_size + 5)
            parts = evaluate(weights, child, space.config, data, parent=parent)
        assert parts.extra["kl"] == pytest.approx(found.extra["kl"], rel=1e-5)
        assert parts.loss_nats == pytest.approx(found.loss_nats, rel=1e-6)
        assert parts.recall_loss_nats == pytest.approx(found.recall_loss_nats, rel=1e-6)
    own = evaluate(supernet.weights(largest), largest, space.config, data, parent=parent)
    assert own.extra["kl"] == 0.0


def test_no_recallable_target_gives_no_recall_loss() -> None:
    space = tiny_space()
    supernet = Supernet(space)
    data = text_set(np.ones((4, 9), np.int64), np.zeros((4, 8), bool))
    architecture = genome.smallest(space)
    found = evaluate(supernet.weights(architecture), architecture, space.config, data)
    assert math.isnan(found.recall_loss_nats)
    assert data.recall_share == 0


def test_extra_qualities_are_evaluated_beside_the_losses() -> None:
    space = tiny_space()
    supernet = Supernet(space)
    scatter(supernet)
    architecture = genome.largest(space)
    weights = supernet.weights(architecture)
    data = recall_set(space.vocab_size, 4, 16)

    def error_rate(model: Callable[[torch.Tensor], torch.Tensor], data: EvaluationSet) -> float:
        logits = model(torch.from_numpy(data.tokens))
        assert logits.shape == (*data.tokens.shape, space.vocab_size)
        assert not logits.requires_grad
        wrong = (logits.argmax(-1).numpy() != data.targets) & (data.targets != -100)
        return wrong.sum() / data.count

    extra = {"error_rate": error_rate, "unknown": lambda _model, _data: math.nan}
    plain = evaluate(weights, architecture, space.config, data)
    found = evaluate(weights, architecture, space.config, data, extra)
    assert plain.extra == {}
    assert replace(found, extra={}) == plain
    accuracy = mqar_accuracy(weights, architecture, space.config, length=16, sequences=4)
    assert found.extra["error_rate"] == pytest.approx(1 - accuracy)
    assert type(found.extra["error_rate"]) is float
    assert losses(found) == {**losses(plain), "error_rate": found.extra["error_rate"], "unknown": None}


def test_bits_per_byte_of_unknown_bytes_are_none() -> None:
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


def test_evaluation_set_holds_only_held_out_text() -> None:
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


def test_evaluation_set_of_mqar_corpus_is_mqar() -> None:
    found = evaluation_set(load_corpus(DataConfig(recall=1.0, pairs=3)), 6, 32)
    expected = recall_set(256, 6, 32, 3)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.targets, expected.targets)
    assert found.count == 6 * 3
