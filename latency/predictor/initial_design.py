"""The first points to measure: a D-optimal choice of ops and workloads.

This module needs numpy only: the cost of profiling a space is known without the libraries of the predictor.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from space import Workload
from space.ops import Op

Array = NDArray[np.float64]
Point = tuple[Op, Workload]
RIDGE = 100.0  # prior variance of the coefficients of a D-optimal design
EXTRA_POINTS = 3  # of an initial design beyond one for each size that varies


def features(points: Sequence[Point]) -> Array:
    """Sizes of ops and workloads, as logarithms to base 2.

    Args:
        points: N ops and workloads.

    Returns:
        Width, heads, kv heads, window, FFN width, length and batch; a size that an op does not have counts
        as 1: [N, 7].
    """
    sizes = [
        (op.width, op.heads, op.kv_heads, op.window, op.ffn, workload.length, workload.batch)
        for op, workload in points
    ]
    return np.asarray(np.log2(np.maximum(np.array(sizes, dtype=np.float64), 1.0)))


def grouped(points: Sequence[Point]) -> dict[tuple[str, str], list[int]]:
    """Indices of points by kind of op and phase.

    Args:
        points: ops and workloads.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for i, (op, workload) in enumerate(points):
        found.setdefault((op.kind, workload.phase), []).append(i)
    return found


def initial_design(points: Sequence[Point], extra: int = EXTRA_POINTS) -> list[Point]:
    """A D-optimal choice of points for each op kind and phase.

    Args:
        points: points to choose from.
        extra: points per kind and phase beyond one for each size that varies.
    """
    found = []
    for places in grouped(points).values():
        group = [points[i] for i in places]
        sizes = features(group)
        varying = sizes[:, np.ptp(sizes, axis=0) > 0]
        scaled = (varying - varying.mean(axis=0)) / np.maximum(np.ptp(varying, axis=0), 1e-9)
        design = np.column_stack([np.ones(len(group)), scaled, scaled**2])
        found += [group[i] for i in d_optimal([design], varying.shape[1] + extra)]
    return found


def d_optimal(designs: Sequence[NDArray[np.float64]], count: int) -> list[int]:
    """Choose rows greedily that maximise the information of several designs.

    Each choice maximises the sum over designs of log det(I/100 + X^T X), by the matrix determinant lemma. The
    criterion is D-optimality (Fedorov 1972).

    Args:
        designs: design matrices over the same rows: [N, P] each.
        count: maximum number of rows.

    Returns:
        Indices of the rows.
    """
    inverses = [np.eye(design.shape[1]) * RIDGE for design in designs]
    chosen: list[int] = []
    for _ in range(min(count, len(designs[0]))):
        gain = sum(
            np.log1p(np.einsum("ij,jk,ik->i", design, inverse, design))
            for design, inverse in zip(designs, inverses, strict=True)
        )
        gain = np.asarray(gain)
        gain[chosen] = -np.inf
        best = int(np.argmax(gain))
        chosen.append(best)
        # Sherman-Morrison update of each inverse information matrix.
        for i, design in enumerate(designs):
            v = inverses[i] @ design[best]
            inverses[i] = inverses[i] - np.outer(v, v) / (1 + design[best] @ v)
    return chosen
