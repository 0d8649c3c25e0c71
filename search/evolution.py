"""NSGA-II under constraint domination (Deb et al. 2002), on arrays of genomes.

Survivors are chosen from everything evaluated so far, so that the state of the search is a
function of its record alone. Limits bear on predicted costs, which cost nothing to know:
children that break one are dropped before they are evaluated.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from space import Space
from space.genome import Genomes, crossover, mutate, sample

Array = NDArray[np.float64]
OVERSAMPLE = 16  # candidates drawn for each one evaluated


def dominates(a: Array, b: Array) -> NDArray[np.bool_]:
    """Whether rows of ``a`` [N, M] dominate rows of ``b`` [K, M], all to be minimised: [N, K]."""
    no_worse = (a[:, None] <= b[None]).all(axis=2)
    better = (a[:, None] < b[None]).any(axis=2)
    return np.asarray(no_worse & better)


def non_dominated(objectives: Array) -> NDArray[np.bool_]:
    """Which rows [N] no other row dominates."""
    return np.asarray(~dominates(objectives, objectives).any(axis=0))


def ranks(objectives: Array, violations: Array) -> NDArray[np.int64]:
    """The front that each row belongs to, 0 the best.

    A row that keeps the limits goes before every one that breaks them; those that break them
    are ordered by their violation alone.
    """
    rank = np.zeros(len(objectives), np.int64)
    kept = np.flatnonzero(violations <= 0)
    level = 0
    while len(kept):
        best = non_dominated(objectives[kept])
        rank[kept[best]] = level
        kept = kept[~best]
        level += 1
    broken = violations > 0
    if broken.any():
        rank[broken] = level + np.unique(violations[broken], return_inverse=True)[1]
    return rank


def crowding(objectives: Array) -> Array:
    """Crowding distance of each row within its front: [N]; infinite at the ends."""
    count, dimensions = objectives.shape
    distance = np.zeros(count)
    for m in range(dimensions):
        order = np.argsort(objectives[:, m], kind="stable")
        values = objectives[order, m]
        span = values[-1] - values[0]
        distance[order[[0, -1]]] = np.inf
        if span > 0 and count > 2:
            distance[order[1:-1]] += (values[2:] - values[:-2]) / span
    return distance


def survivors(objectives: Array, violations: Array, count: int) -> NDArray[np.int64]:
    """The indices of the best ``count`` rows, best first: by rank, then by crowding."""
    rank = ranks(objectives, violations)
    distance = np.zeros(len(rank))
    for level in np.unique(rank):
        rows = np.flatnonzero(rank == level)
        distance[rows] = crowding(objectives[rows])
    return np.lexsort((np.arange(len(rank)), -distance, rank))[:count]


def first_generation(
    space: Space,
    rng: np.random.Generator,
    count: int,
    violation_of: Callable[[Genomes], Array],
    seeds: Genomes,
) -> Genomes:
    """Architectures to begin with: the seeds, then samples, those that keep the limits first.

    Where samples do not keep the limits, mutants of the seeds (which do) fill the generation.
    """
    drawn = sample(space, rng, OVERSAMPLE * count)
    near = mutate(space, seeds[rng.integers(0, len(seeds), OVERSAMPLE * count)], rng)
    kept = [rows[violation_of(rows) <= 0] for rows in (seeds, drawn, near)]
    return _unseen(np.concatenate([*kept, drawn]), set(), count)


def next_generation(
    space: Space,
    rng: np.random.Generator,
    parents: Genomes,
    count: int,
    violation_of: Callable[[Genomes], Array],
    seen: set[bytes],
) -> Genomes:
    """Children of parents that stand best first, none of them evaluated before.

    Parents meet by binary tournament, cross, and mutate; fresh samples fill up where too few
    children are new and keep the limits.
    """
    draws = OVERSAMPLE * count
    picks = rng.integers(0, len(parents), (4, draws))
    first, second = np.minimum(picks[0], picks[1]), np.minimum(picks[2], picks[3])
    children = mutate(space, crossover(space, parents[first], parents[second], rng), rng)
    fresh = sample(space, rng, draws)
    violations = violation_of(children)
    kept = children[violations <= 0]
    kept_fresh = fresh[violation_of(fresh) <= 0]
    nearest = children[np.argsort(violations, kind="stable")]
    return _unseen(np.concatenate([kept, kept_fresh, nearest]), seen, count)


def _unseen(genomes: Genomes, seen: set[bytes], count: int) -> Genomes:
    """The first ``count`` distinct rows that are not in ``seen``."""
    chosen, taken = [], set(seen)
    for row in genomes:
        key = row.tobytes()
        if key not in taken:
            taken.add(key)
            chosen.append(row)
            if len(chosen) == count:
                break
    return np.array(chosen, dtype=np.int16).reshape(len(chosen), genomes.shape[1])
