"""Evolution against definitions by brute force, ties and infinities included."""

import numpy as np
import pytest

from search.evolution import crowding, first_generation, next_generation, non_dominated, ranks, survivors
from space import genome
from tests.contracts import tiny_space

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


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("broken", [False, True])
def test_ranks_by_peeling(grid: np.ndarray, broken: bool) -> None:
    rng = np.random.default_rng(0)
    violations = rng.integers(0, 3, len(grid)).astype(float) if broken else np.zeros(len(grid))
    expected = np.full(len(grid), -1)
    left, level = set(range(len(grid))), 0
    while left:
        best = {
            i for i in left if not any(better(grid[j], grid[i], violations[j], violations[i]) for j in left)
        }
        for i in best:
            expected[i] = level
        left -= best
        level += 1
    assert (ranks(grid, violations) == expected).all()
    assert (non_dominated(grid) == (ranks(grid, np.zeros(len(grid))) == 0)).all()


def test_crowding_by_hand() -> None:
    points = np.array([[0.0, 4.0], [1.0, 2.0], [3.0, 1.0], [4.0, 0.0]])
    found = crowding(points)
    assert np.isinf(found[[0, 3]]).all()
    assert found[1] == pytest.approx(3 / 4 + 3 / 4)
    assert found[2] == pytest.approx(3 / 4 + 2 / 4)


def test_survivors_are_the_best_ranks_and_then_the_least_crowded() -> None:
    rng = np.random.default_rng(3)
    points, violations = rng.random((60, 2)), np.where(rng.random(60) < 0.3, rng.random(60), 0.0)
    rank = ranks(points, violations)
    chosen = survivors(points, violations, 20)
    assert len(set(chosen.tolist())) == 20
    assert sorted(rank[chosen]) == sorted(rank)[:20]
    assert (np.diff(rank[chosen]) >= 0).all()


def test_generations_are_new_members_within_the_limits() -> None:
    space = tiny_space(depth=[1, 2, 3], ffn=[0, 16, 32], width=[16, 32, 48])
    rng = np.random.default_rng(0)

    def violation(genomes: genome.Genomes) -> np.ndarray:
        return np.maximum(0.0, genomes[:, 0] - 1.0)  # the greatest width is not allowed

    seeds = genome.encode(space, [genome.smallest(space), genome.largest(space)])
    first = first_generation(space, rng, 30, violation, seeds)
    assert len(first) == 30
    assert (violation(first) == 0).all()
    seen = {row.tobytes() for row in first}
    second = next_generation(space, rng, first, 30, violation, seen)
    assert genome.contains(space, second).all()
    assert (violation(second) == 0).all()
    assert not seen & {row.tobytes() for row in second}


def test_a_space_that_is_used_up_gives_what_is_left() -> None:
    space = tiny_space(
        width=[16], depth=[1], heads=[1], ffn=[16], mixer=["attention", "linear"], ratios=["full", "linear"]
    )
    rng = np.random.default_rng(0)
    seeds = genome.encode(space, [genome.smallest(space)])
    every = first_generation(space, rng, 10, lambda g: np.zeros(len(g)), seeds)
    assert len(every) == genome.size(space) == 2
    assert (
        len(next_generation(space, rng, every, 5, lambda g: np.zeros(len(g)), {r.tobytes() for r in every}))
        == 0
    )
