"""Pareto dominance, ranking, crowding distance and hypervolume; all objectives are minimised.

Constrained dominance as in NSGA-II (Deb et al. 2002): rows that keep the limits come before rows that break
them. The former are ranked by non-dominated fronts and crowding distance, the latter by their violation.

Shapes: N rows, M objectives.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def non_dominated(objectives: Array) -> NDArray[np.bool_]:
    """A mask [N] of the rows that no other row dominates; all of equal rows are kept.

    Args:
        objectives: [N, M].
    """
    left = np.lexsort(objectives.T[::-1])  # sorted, so that no row dominates one before it
    kept = np.zeros(len(objectives), bool)
    while len(left):
        best = objectives[left[0]]
        kept[left[0]] = True
        rows = objectives[left]
        beaten = (rows >= best).all(axis=1) & (rows > best).any(axis=1)
        beaten[0] = True
        left = left[~beaten]
    return kept


def ranks(objectives: Array, constraint_violation: Array, count: int | None = None) -> NDArray[np.int64]:
    """The rank [N] of each row: the number of its non-dominated front, 0 the best.

    Rows that break the limits are ranked after all others, by their violation.

    Args:
        objectives: [N, M].
        constraint_violation: [N]; 0 if the limits are kept.
        count: only the best so many are ranked exactly; the rest that keeps the limits shares one rank.
    """
    rank = np.zeros(len(objectives), np.int64)
    kept = np.flatnonzero(constraint_violation <= 0)
    wanted = len(kept) if count is None else min(count, len(kept))
    level, least = 0, len(kept) - wanted
    while len(kept) > least:
        best = non_dominated(objectives[kept])
        rank[kept[best]] = level
        kept = kept[~best]
        level += 1
    rank[kept] = level
    level += bool(len(kept))
    broken = constraint_violation > 0
    if broken.any():
        rank[broken] = level + np.unique(constraint_violation[broken], return_inverse=True)[1]
    return rank


def crowding(objectives: Array) -> Array:
    """The crowding distance [N] of each row of one front; infinite at the ends.

    Args:
        objectives: [N, M].
    """
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


def survivors(objectives: Array, constraint_violation: Array, count: int) -> NDArray[np.int64]:
    """The indices of the best rows, best first: by rank, then by crowding distance.

    Args:
        objectives: [N, M].
        constraint_violation: [N]; 0 if the limits are kept.
        count: the number of rows, if there are as many.
    """
    rank = ranks(objectives, constraint_violation, count)
    distance = np.zeros(len(rank))
    for level in np.unique(rank[np.argsort(rank, kind="stable")[:count]]):
        rows = np.flatnonzero(rank == level)
        distance[rows] = crowding(objectives[rows])
    return np.lexsort((np.arange(len(rank)), -distance, rank))[:count]


def best_evaluated(objectives: Array, count: int) -> NDArray[np.int64]:
    """The indices of the :func:`survivors` among the rows that are finite, best first.

    Args:
        objectives: [N, M]; not finite where an evaluation failed.
        count: the number of rows, if as many are finite.
    """
    failed = np.where(np.isfinite(objectives).all(axis=1), 0.0, np.inf)
    best = survivors(objectives, failed, count)
    finite: NDArray[np.int64] = best[failed[best] == 0]
    return finite


def hypervolume(objectives: Array, reference: Array) -> float:
    """The hypervolume that rows dominate below a reference point, by slicing objectives (HSO).

    Args:
        objectives: [N, M]; rows that are not below the reference in every objective add nothing.
        reference: [M].
    """
    inside = objectives[(objectives < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    front = np.unique(inside[non_dominated(inside)], axis=0)  # rising in the first objective
    if front.shape[1] == 1:
        return float(reference[0] - front[0, 0])
    if front.shape[1] == 2:
        rights = np.append(front[1:, 0], reference[0])
        return float(((rights - front[:, 0]) * (reference[1] - front[:, 1])).sum())
    front = front[np.argsort(front[:, -1], kind="stable")]
    tops = np.append(front[1:, -1], reference[-1])
    return float(
        sum(
            (top - row[-1]) * hypervolume(front[: i + 1, :-1], reference[:-1])
            for i, (row, top) in enumerate(zip(front, tops, strict=True))
            if top > row[-1]
        )
    )
