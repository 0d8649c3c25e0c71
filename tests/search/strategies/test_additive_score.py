"""Scores of blocks: which are measured, and pair terms against leave-one-out refits."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import kendalltau

from search.strategies.additive_score import (
    SHARED_STRENGTH,
    STRENGTHS,
    Features,
    Measured,
    fit,
    rank_agreement,
    replacements,
)
from search.testing import contract_space
from space import Architecture, Layer, genome, variation
from space.slot_scores import SlotScores
from tests.contracts import TINY_SPACES, tiny_space

Array = NDArray[np.float64]
SPACE = contract_space(depth=[3, 4, 5], width=[32], mixer=["attention", "linear", "gated_deltanet", "none"])


@pytest.mark.parametrize("name", TINY_SPACES)
def test_every_block_is_replaced_once(name: str) -> None:
    """By all blocks that an architecture of the space can have there."""
    space = tiny_space(**TINY_SPACES[name])
    parent = genome.largest(space)
    expected = {replace(parent, width=width) for width in space.width}
    for slot, own in enumerate(parent.layers):
        mixers = [
            Layer(mixer=mixer, window=window, heads=heads, kv_heads=kv_heads, ffn=own.ffn)
            for mixer, window in space.mixer_options[1:]
            for heads, kv_heads in space.head_options
            if slot not in space.hybrid.full_layers or mixer == "attention"
        ]
        if "none" in space.layer.mixer and slot not in space.hybrid.full_layers and own.ffn:
            mixers.append(Layer(ffn=own.ffn))
        for layer in [*mixers, *(replace(own, ffn=ffn) for ffn in space.layer.ffn)]:
            if layer.present:
                layers = (*parent.layers[:slot], layer, *parent.layers[slot + 1 :])
                expected.add(Architecture(parent.width, layers))
    rows = replacements(space)
    found = genome.decode(space, rows)
    assert found[0] == parent
    assert set(found) == expected
    assert len(found) == len(expected)


def measured_scores(rng: np.random.Generator) -> SlotScores:
    """Scores of log-normal single replacements and removals."""
    measured = Measured(SPACE)
    parent = genome.encode(SPACE, [genome.largest(SPACE)])
    rows = replacements(SPACE)
    values = 0.1 * np.exp(rng.normal(size=len(rows)))
    measured.tell(rows, np.where((rows == parent).all(axis=1), 0.0, values))
    while len(rows := measured.removals()[1]):
        depth = (rows[:, 3::3] > 0).sum(axis=1)
        measured.tell(rows, (5 - depth) ** 2 * (0.2 + rng.random(len(rows))))
    scores = measured.scores()
    assert scores is not None
    return scores


def test_failed_replacements_score_as_the_worst() -> None:
    measured = Measured(SPACE)
    rows = replacements(SPACE)
    values = np.linspace(0, 1, len(rows))
    values[5] = np.nan
    measured.tell(rows, values)
    scores = measured.scores()
    assert scores is not None
    found = scores.additive(rows)
    np.testing.assert_allclose(np.delete(found, 5), np.delete(values, 5), atol=1e-12)
    assert found[5] == pytest.approx(1.0)
    measured.tell(rows[:1], np.array([np.inf]))
    assert measured.scores() is None


def test_conditional_removals_add_up_along_their_order() -> None:
    scores = measured_scores(np.random.default_rng(0))
    order = scores.removal_order
    assert order is not None
    assert len(order) == 2
    measured = Measured(SPACE)
    both = scores.additive(measured.removed(order)[None])[0]
    assert both == pytest.approx(scores.constant + scores.empty[list(order)].sum())


def plain_ridge(columns: Array, values: Array, ridge: Array) -> Array:
    return np.asarray(np.linalg.solve(columns.T @ columns + np.diag(ridge), columns.T @ values))


def test_pair_terms_equal_leave_one_out_refits() -> None:
    """On composites with pair terms and noise: each prediction is by a ridge regression without the row."""
    rng = np.random.default_rng(1)
    scores = measured_scores(rng)
    rows = np.unique(variation.sample(SPACE, rng, 400), axis=0)[:90]
    features = Features.of(scores)
    products, penalty = features(rows)
    coefficients = rng.normal(0.5, 0.5, products.shape[1])
    additive = scores.additive(rows) - scores.constant
    values = 0.3 + 1.2 * additive + products @ coefficients + 0.01 * rng.normal(size=len(rows))
    made = replace(scores, pairs=features.terms(coefficients))
    np.testing.assert_allclose(made(rows), scores.additive(rows) + products @ coefficients, rtol=1e-9)

    found = fit(scores, rows, values)
    columns = np.concatenate([np.ones((len(rows), 1)), additive[:, None], products], axis=1)
    unit = (products**2).mean() * len(rows)
    errors, predicted = [], []
    for strength in STRENGTHS:
        ridge = np.concatenate([[0, 0], strength * unit * penalty])
        left_out = np.array([
            columns[i] @ plain_ridge(np.delete(columns, i, 0), np.delete(values, i), ridge)
            for i in range(len(rows))
        ])  # fmt: skip
        errors.append(((left_out - values) ** 2).mean())
        predicted.append((left_out, plain_ridge(columns, values, ridge)))
    best = int(np.argmin(errors))
    np.testing.assert_allclose(found.left_out, predicted[best][0], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.scores(rows), columns @ predicted[best][1], rtol=1e-6, atol=1e-8)
    assert penalty[:4].tolist() == [SHARED_STRENGTH] * 3 + [1.0]
    before, after = (rank_agreement(one, values) for one in (found.sums, found.left_out))
    assert before == pytest.approx(kendalltau(found.sums, values).statistic)
    assert after > before + 0.02
    others = np.unique(variation.sample(SPACE, rng, 400), axis=0)
    truth = 0.3 + 1.2 * (scores.additive(others) - scores.constant) + features(others)[0] @ coefficients
    assert rank_agreement(found.scores(others), truth) > rank_agreement(scores(others), truth)


def test_pair_terms_are_left_out_where_they_do_not_help() -> None:
    rng = np.random.default_rng(2)
    scores = measured_scores(rng)
    rows = np.unique(variation.sample(SPACE, rng, 200), axis=0)
    exact = fit(scores, rows, 2 * scores.additive(rows) + 1)
    np.testing.assert_allclose(exact.scores(rows), 2 * scores.additive(rows) + 1, rtol=1e-6)
    assert fit(scores, rows[:10], np.ones(10)).scores is scores  # too few
    falling = fit(scores, rows, -scores.additive(rows))
    assert falling.scores is scores  # a sum that says the opposite is not turned around
    assert np.isnan(rank_agreement(np.ones(5), np.arange(5.0)))
