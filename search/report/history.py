"""How a search went: what it evaluated, and the hypervolume of it beside random search's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search.engine.evaluations import EVALUATIONS
from search.strategies.pareto import hypervolume, non_dominated
from space.io.parquet import read_table

POINTS = 60  # of a line: a hypervolume for each evaluation would take minutes, and show no more
SOLID_POINTS = 20  # of three objectives or more, where one of thousands of points takes a second
Array = NDArray[np.float64]


class Progress(NamedTuple):
    """Shares of the hypervolume of everything found, in percent, by how many were evaluated."""

    lines: dict[str, tuple[list[int], list[float]]]  # by search: evaluations, percent
    matched: (
        int | None
    )  # after so many the search had what random search ended with; None: never, or no rival


def evaluations(folder: Path) -> pd.DataFrame:
    """What a search evaluated on its own windows, a row each, in order; no rows where nothing is kept.

    Raises:
        InputError: a part is not whole.
    """
    parts = sorted((folder / "evaluations").glob("part-[0-9]*.parquet"))
    tables = [read_table(path, EVALUATIONS)[0] for path in parts]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"key": [], "failed": []})


def progress(tables: Mapping[str, pd.DataFrame], objectives: Sequence[str]) -> Progress:
    """The hypervolume over evaluations of each search: ``search``, and ``random`` where there is one.

    Objectives are scaled to [0, 1] over both; the reference point is the worst of each. What failed adds
    nothing, and an objective in which all are alike counts for nothing. There are no lines where nothing is
    better than the reference point.
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
    lines, points = {}, POINTS if len(objectives) < 3 else SOLID_POINTS
    for name, values in scaled.items():
        counts = np.unique(np.linspace(1, len(values), min(points, len(values))).round().astype(int))
        lines[name] = (counts.tolist(), [100 * v / total for v in volumes(values, counts)])
    matched = None
    if {"search", "random"} <= set(scaled):
        matched = first_to_reach(scaled["search"], volume(scaled["random"]))
    return Progress(lines, matched)


def volume(values: Array) -> float:
    """The hypervolume of rows [N, M] in [0, 1], up to 1 in each; rows that are not finite add nothing."""
    finite = values[np.isfinite(values).all(axis=1)]
    return hypervolume(finite, np.ones(values.shape[1]))


def volumes(values: Array, counts: NDArray[np.int64]) -> list[float]:
    """The hypervolumes of the first ``counts`` [K] rows of [N, M], rising; only a front is carried along."""
    found, front, before = [], values[:0], 0
    for count in counts:
        some = np.concatenate([front, values[before:count]])
        some = some[np.isfinite(some).all(axis=1)]
        front, before = some[non_dominated(some)], int(count)
        found.append(volume(front))
    return found


def first_to_reach(values: Array, wanted: float) -> int | None:
    """How many of the rows [N, M] it takes to a hypervolume; None where all of them do not reach it."""
    if volume(values) < wanted:
        return None
    low, high = 0, len(values)  # the volume rises with the rows: halve
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if volume(values[:middle]) >= wanted else (middle, high)
    return high
