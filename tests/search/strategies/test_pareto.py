"""Fronts, crowding and hypervolumes against definitions by brute force, ties and infinities included."""

import numpy as np
import pytest

from search.strategies.pareto import best_evaluated, crowding, hypervolume, non_dominated, ranks, survivors

GRIDS = [
    np.random.default_rng(seed).integers(0, high, (count, dimensions)).astype(float)
    for seed, (high, count, dimensions) in enumerate(
        [(3, 20, 2), (5, 40, 2), (4, 30, 3), (2, 12, 1), (10, 25, 4)]
    )
]
GRIDS.append(np.where(GRIDS[1] == 4, np.inf, GRIDS[1]))


def better(a: np.ndarray, b: np.ndarray, va: float, vb: float) -> bool:
    """Constraint domination, by its definition."""
    if va > 0 or vb > 0:
        return va < vb if (va > 0 and vb > 0) else va <= 0 < vb
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def test_failed_evaluations_are_not_among_the_best() -> None:
    values = np.array([[2.0, 1.0], [np.nan, 0.0], [1.0, 2.0], [3.0, 3.0], [0.0, np.inf]])
    assert sorted(best_evaluated(values, 2)) == [0, 2]
    assert sorted(best_evaluated(values, 9)) == [0, 2, 3]
    assert not len(best_evaluated(values[[1, 4]], 2))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("broken", [False, True])
def test_ranks_equal_peeled_fronts(grid: np.ndarray, broken: bool) -> None:
    rng = np.random.default_rng(0)
    constraint_violation = rng.integers(0, 3, len(grid)).astype(float) if broken else np.zeros(len(grid))
    expected = np.full(len(grid), -1)
    left, level = set(range(len(grid))), 0
    while left:
        best = {
            i
            for i in left
            if not any(
                better(grid[j], grid[i], constraint_violation[j], constraint_violation[i]) for j in left
            )
        }
        for i in best:
            expected[i] = level
        left -= best
        level += 1
    assert (ranks(grid, constraint_violation) == expected).all()
    assert (non_dominated(grid) == (ranks(grid, np.zeros(len(grid))) == 0)).all()


def test_crowding_equals_values_by_hand() -> None:
    points = np.array([[0.0, 4.0], [1.0, 2.0], [3.0, 1.0], [4.0, 0.0]])
    found = crowding(points)
    assert np.isinf(found[[0, 3]]).all()
    assert found[1] == pytest.approx(3 / 4 + 3 / 4)
    assert found[2] == pytest.approx(3 / 4 + 2 / 4)


def test_survivors_have_the_best_ranks_then_the_largest_crowding_distances() -> None:
    rng = np.random.default_rng(3)
    points, constraint_violation = rng.random((60, 2)), np.where(rng.random(60) < 0.3, rng.random(60), 0.0)
    rank = ranks(points, constraint_violation)
    chosen = survivors(points, constraint_violation, 20)
    assert len(set(chosen.tolist())) == 20
    assert sorted(rank[chosen]) == sorted(rank)[:20]
    assert (np.diff(rank[chosen]) >= 0).all()


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_hypervolume_equals_counted_cells(dimensions: int) -> None:
    """Points on a grid of whole numbers dominate whole cells."""
    rng = np.random.default_rng(dimensions)
    for count in (1, 4, 12):
        points = rng.integers(0, 6, (count, dimensions)).astype(float)
        cells = np.indices((5,) * dimensions).reshape(dimensions, -1).T  # lower corners below the reference
        dominated = (points[:, None] <= cells[None]).all(axis=2).any(axis=0).sum()
        assert hypervolume(points, np.full(dimensions, 5.0)) == pytest.approx(dominated)


def test_ranks_stop_after_the_wanted_rows() -> None:
    points = np.random.default_rng(1).random((200, 2))
    full = ranks(points, np.zeros(200))
    some = ranks(points, np.zeros(200), 20)
    exact = some < some.max()
    assert exact.sum() >= 20
    assert (some[exact] == full[exact]).all()
    assert (survivors(points, np.zeros(200), 20) == survivors(points, np.zeros(200), 200)[:20]).all()
