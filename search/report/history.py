"""History of a search: its evaluations, and their hypervolume beside that of random search."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search.engine.evaluations import EVALUATIONS
from search.strategies.pareto import hypervolume, non_dominated
from space.io.parquet import read_table

POINTS = 60  # of a line: a hypervolume for each evaluation would take minutes without showing more
POINTS_3D = 20  # with three objectives or more, where a hypervolume of thousands of points takes a second
Array = NDArray[np.float64]


class Progress(NamedTuple):
    """Hypervolume over evaluations.

    Attributes:
        lines: by search, numbers of evaluations and the percentage of the hypervolume of all evaluations.
        matched: evaluations after which the search reached the final hypervolume of random search; None if it
            did not, or without random search.
    """

    lines: dict[str, tuple[list[int], list[float]]]
    matched: int | None


def evaluations(folder: Path) -> pd.DataFrame:
    """Evaluations of a search, a row each, in order; without rows if the folder has none.

    Args:
        folder: the search's.

    Raises:
        InputError: a file cannot be read.
    """
    parts = sorted((folder / "evaluations").glob("part-[0-9]*.parquet"))
    tables = [read_table(path, EVALUATIONS)[0] for path in parts]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"key": [], "failed": []})


def progress(tables: Mapping[str, pd.DataFrame], objectives: Sequence[str]) -> Progress:
    """Hypervolume over evaluations of each search: ``search``, and ``random`` if there is one.

    Objectives are scaled to [0, 1] over both; the reference point is the worst value of each. Failed
    evaluations add nothing, and an objective without variation is ignored. There are no lines if nothing is
    better than the reference point.

    Args:
        tables: evaluations by search.
        objectives: columns of the tables.
    """
    raw = {
        name: table[list(objectives)].to_numpy(float)
        for name, table in tables.items()
        if len(table) and set(objectives) <= set(table)
    }
    every = np.concatenate([v[np.isfinite(v).all(axis=1)] for v in raw.values()]) if raw else np.zeros((0, 1))
    if not len(every):
        return Progress({}, None)
    low, span = every.min(axis=0), np.ptp(every, axis=0)
    scaled = {name: (v - low) / np.where(span > 0, span, 1.0) for name, v in raw.items()}
    total = volume(np.concatenate(list(scaled.values())))
    if total == 0:
        return Progress({}, None)
    lines, points = {}, POINTS if len(objectives) < 3 else POINTS_3D
    for name, values in scaled.items():
        counts = np.unique(np.linspace(1, len(values), min(points, len(values))).round().astype(int))
        lines[name] = (counts.tolist(), [100 * v / total for v in volumes(values, counts)])
    matched = None
    if {"search", "random"} <= set(scaled):
        matched = first_to_reach(scaled["search"], volume(scaled["random"]))
    return Progress(lines, matched)


def volume(values: Array) -> float:
    """Hypervolume to the reference point 1; rows that are not finite add nothing.

    Args:
        values: [N, M] in [0, 1].
    """
    finite = values[np.isfinite(values).all(axis=1)]
    return hypervolume(finite, np.ones(values.shape[1]))


def volumes(values: Array, counts: NDArray[np.int64]) -> list[float]:
    """Hypervolumes of the first rows, for several numbers of rows.

    Args:
        values: [N, M] in [0, 1].
        counts: numbers of rows [K], increasing.
    """
    results, front, before = [], values[:0], 0
    for count in counts:
        candidates = np.concatenate(
            [front, values[before:count]]
        )  # dominated rows add no volume later either
        candidates = candidates[np.isfinite(candidates).all(axis=1)]
        front, before = candidates[non_dominated(candidates)], int(count)
        results.append(volume(front))
    return results


def first_to_reach(values: Array, wanted: float) -> int | None:
    """The number of rows after which a hypervolume is reached; None if it never is.

    Args:
        values: [N, M] in [0, 1].
        wanted: the hypervolume.
    """
    if volume(values) < wanted:
        return None
    low, high = 0, len(values)  # bisection: the volume does not decrease with the rows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if volume(values[:middle]) >= wanted else (middle, high)
    return high
