"""Evaluation against a slow, obvious loop."""

import math

import numpy as np
import torch

from space import genome
from supernet import Supernet, evaluate
from supernet.evaluate import EvaluationSet
from tests.contracts import scatter, tiny_space


def test_losses_are_means_over_all_and_over_recallable_targets() -> None:
    space = tiny_space()
    supernet = Supernet(space)
    scatter(supernet)
    rng = np.random.default_rng(0)
    windows = rng.integers(0, space.vocabulary, (6, 21))
    recallable = rng.random((6, 20)) < 0.3
    architecture = genome.largest(space)
    found = evaluate(
        supernet.weights(architecture), architecture, space.frame, EvaluationSet(windows, recallable), batch=4
    )
    losses = []
    for row in windows:
        with torch.no_grad():
            logits = supernet(torch.from_numpy(row[None, :-1]), architecture)[0][0].double().numpy()
        for place, target in enumerate(row[1:]):
            shifted = logits[place] - logits[place].max()
            losses.append(math.log(np.exp(shifted).sum()) - shifted[target])
    table = np.array(losses).reshape(6, 20)
    assert abs(found.loss_nats - table.mean()) < 1e-6
    assert abs(found.recall_loss_nats - table[recallable].mean()) < 1e-6
    assert abs(found.bits_per_token - table.mean() / math.log(2)) < 1e-5


def test_no_recallable_target_gives_no_recall_loss() -> None:
    space = tiny_space()
    supernet = Supernet(space)
    data = EvaluationSet(np.ones((4, 9), np.int64), np.zeros((4, 8), bool))
    architecture = genome.smallest(space)
    assert math.isnan(
        evaluate(supernet.weights(architecture), architecture, space.frame, data).recall_loss_nats
    )
