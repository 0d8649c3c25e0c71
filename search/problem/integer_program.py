"""The integer programme of one width: counts of layers under bounds on several costs.

Columns are the counts of :mod:`search.problem.dynamic_program`. A footprint is replaced by the greatest
convex function below it on a range of sums: a few lines, which on a range of a single piece are one, the
footprint itself. A bound holds for each line; the objective has one of them. A column for the greatest of
the lines would not be a count, and with such columns HiGHS (the solver, by scipy) gives up on a few
programmes and prints to stdout on others. It works to 1e-6 of its numbers, so rows are scaled.

Shapes: C columns, O mixer options, F FFN options, P patterns; see :mod:`search.problem.dynamic_program`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from search.problem.dynamic_program import Floats, Ints, Prices, assemble, options_of
from search.problem.limit import ROUNDING_TOLERANCE
from space import Space
from space.genome import FULL, LINEAR, LOCAL, Genomes, encoding
from space.ops import Footprint

SCALE = 1e4  # of costs over bounds, so that the solver's tolerances of 1e-6 are small beside them
INFEASIBLE = 2  # milp's status
Range = tuple[float, float]


@dataclass(frozen=True)
class Rise:
    """A footprint at one width.

    Attributes:
        footprint: the footprint.
        sums: the prices that it sums.
        range: the least and the greatest sum of the architectures to consider.
        near: a sum whose line gives the highest lower bound of the cost.
    """

    footprint: Footprint
    sums: Prices
    range: Range
    near: float


@dataclass(frozen=True)
class Term:
    """One cost at one width, and what is asked of it.

    Attributes:
        prices: of the cost without its footprint.
        rise: its footprint; None if it has none, or if it has neither a bound nor a weight.
        bound: of the cost; infinite: the cost need only be finite.
        weight: of the cost in the objective.
        unit: a cost of the size of those that are searched for.
    """

    prices: Prices
    rise: Rise | None
    bound: float
    weight: float
    unit: float


def lines_below(footprint: Footprint, low: float, high: float) -> Floats:
    """The greatest convex function below a footprint on a range, as slopes and values at 0 [lines, 2].

    Args:
        footprint: the footprint.
        low: least sum.
        high: greatest sum.
    """
    starts, slopes = np.array(footprint.starts), np.array(footprint.slopes)
    sums = np.array([low, *starts[(starts > low) & (starts < high)], high])
    values = footprint(sums)
    hull: list[int] = []
    for i in range(len(sums)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (values[b] - values[a]) * (sums[i] - sums[a]) < (values[i] - values[a]) * (sums[b] - sums[a]):
                break
            hull.pop()
        hull.append(i)
    pieces = np.searchsorted(starts, sums, side="right") - 1
    lines = []
    for a, b in pairwise(hull):
        # That of a piece is not taken from a difference, which rounding spoils on a short range.
        slope = slopes[pieces[a]] if b == a + 1 else (values[b] - values[a]) / (sums[b] - sums[a])
        lines.append((slope, values[a] - slope * sums[a]))
    return np.array(lines)


def line_at(footprint: Footprint, low: float, high: float, at: float) -> tuple[float, float]:
    """The line of :func:`lines_below` that is the greatest at a sum: its slope and its value at 0.

    Args:
        footprint: the footprint.
        low: least sum.
        high: greatest sum.
        at: a sum.
    """
    lines = lines_below(footprint, low, high)
    slope, start = lines[int(np.argmax(lines[:, 0] * at + lines[:, 1]))]
    return float(slope), float(start)


def _undominated(values: Floats, groups: Ints) -> Ints:
    """The finite rows of values [N, D] that no other row of their group [N] equals or beats everywhere."""
    better = (values[None] <= values[:, None]).all(axis=2) & (groups[None] == groups[:, None])  # [row, by]
    order = np.arange(len(values))
    better &= ~better.T | (order[None] < order[:, None])  # of equal rows the first stays
    return np.flatnonzero(np.isfinite(values).all(axis=1) & ~better.any(axis=1))


def _scaled(row: Floats, low: float, high: float, size: float) -> tuple[Floats, float, float]:
    """A row in units of a size, scaled for the solver."""
    return SCALE * row / size, SCALE * low / size, SCALE * high / size


def _candidates(space: Space, terms: Sequence[Term], few: bool) -> tuple[Ints, Ints]:
    """The mixer options and the FFN options that no other may replace at no more of any cost.

    Another may replace an option if it is of the same class, and of the same linear kind if the number of
    kinds is limited. The sums of a footprint count apart from the rest of its cost: an option with less of
    both may lie on an earlier piece, whose slope is another, yet costs no more, because a footprint never
    falls.
    """
    enc, at = encoding(space), options_of(space)
    kinds = np.where(few & (at.classes == LINEAR), LOCAL + 1 + at.kinds, at.classes)
    present = (np.arange(len(space.ffn_options)) > 0).astype(int)
    mixer_values = [one for t in terms for one in (t.prices.mixer, t.prices.mixer_peak)]
    ffn_values = [one for t in terms for one in (t.prices.ffn, t.prices.ffn_peak)]
    for rise in [term.rise for term in terms if term.rise]:
        mixer_values.append(rise.sums.mixer)
        ffn_values.append(rise.sums.ffn)
    ffns = _undominated(np.stack(ffn_values, axis=1), present)
    return _undominated(np.stack(mixer_values, axis=1), kinds), ffns[ffns >= enc.least_ffn]


class IntegerProgram:
    """The programme that minimises a weighted sum of costs, each at most its bound, at one width.

    Columns: counts of mixers and FFNs, then indicators of the pattern, of the linear kinds in use if their
    number is limited, and of the level of each cost's largest op.

    Attributes:
        highest: upper bound of each column [C]; the lower bounds are 0.

    Args:
        space: the search space.
        width: index of the width.
        terms: the costs.
        patterns: the layer counts to consider [P, 4].
    """

    def __init__(self, space: Space, width: int, terms: Sequence[Term], patterns: Ints) -> None:
        self._space, self._width, self._terms = space, width, terms
        enc, at = encoding(space), options_of(space)
        few = space.max_linear_kinds < enc.kind_count  # otherwise the number of kinds needs no rows
        mixers, ffns = _candidates(space, terms, few)
        peaks = [np.concatenate([t.prices.mixer_peak[mixers], t.prices.ffn_peak[ffns]]) for t in terms]
        levels = [np.unique(peak) for peak in peaks]

        sizes = [len(mixers), len(ffns), len(patterns), enc.kind_count * few, *map(len, levels)]
        ends = np.cumsum(sizes)
        mixer_part, ffn_part, pattern_part, kind_part, *level_parts = [
            slice(end - size, end) for size, end in zip(sizes, ends, strict=True)
        ]
        counts = slice(0, ffn_part.stop)
        self._counted, self._mixers, self._ffns = ffn_part.stop, mixers, ffns
        self.highest = np.ones(ends[-1])
        self.highest[counts] = space.slots
        rows: list[tuple[Floats, float, float]] = []  # coefficients [C], least and greatest sum

        def add(low: float, high: float, *terms: tuple[slice, NDArray[np.generic] | int]) -> None:
            row = np.zeros(ends[-1])
            for part, factors in terms:
                row[part] = factors
            rows.append((row, low, high))

        add(1, 1, (pattern_part, 1))  # exactly one pattern, with its number of layers of each class
        for column, kind in ((1, FULL), (2, LINEAR), (3, LOCAL)):
            add(0, 0, (mixer_part, at.classes[mixers] == kind), (pattern_part, -patterns[:, column]))
        add(0, 0, (ffn_part, 1), (pattern_part, -patterns.sum(axis=1)))
        # A layer without a mixer has an FFN.
        add(-np.inf, 0, (ffn_part, ffns == 0), (pattern_part, -patterns[:, 1:].sum(axis=1)))
        if few:
            add(0, space.max_linear_kinds, (kind_part, 1))
            for kind, one in enumerate(np.eye(enc.kind_count)):
                # A kind in use is marked.
                add(-np.inf, 0, (mixer_part, at.kinds[mixers] == kind), (kind_part, -space.slots * one))
        whole = sum(term.weight * term.unit for term in terms) or 1.0
        self._weights = [SCALE * term.weight / whole for term in terms]
        self._costs: list[Floats] = []  # of each cost, without the fixed ones and the footprint [C]
        self._sums: list[Floats] = []  # of each footprint, without the fixed ones [C]
        for term, peak, level, part in zip(terms, peaks, levels, level_parts, strict=True):
            add(1, 1, (part, 1))  # exactly one level of the largest op
            for value in level[:-1]:  # an option whose peak is above a level needs a higher level
                add(-np.inf, 0, (counts, peak > value), (part, -2 * space.slots * (level > value)))
            cost = np.zeros(ends[-1])
            cost[mixer_part], cost[ffn_part] = term.prices.mixer[mixers], term.prices.ffn[ffns]
            cost[pattern_part], cost[part] = term.prices.of_patterns(patterns), level
            if term.rise:
                sums = np.zeros(ends[-1])
                sums[mixer_part], sums[ffn_part] = term.rise.sums.mixer[mixers], term.rise.sums.ffn[ffns]
                self._sums.append(sums)
            self._costs.append(cost)
        self._rows = rows

    def _limited(self, ranges: Sequence[Range], near: Sequence[float]) -> tuple[Floats, LinearConstraint]:
        """The objective [C] and all rows, with the sums of footprints in ranges."""
        rows, objective, place = list(self._rows), np.zeros_like(self.highest), 0
        for term, weight, plain in zip(self._terms, self._weights, self._costs, strict=True):
            objective += weight * plain
            high = term.bound * (1 + ROUNDING_TOLERANCE) - term.prices.fixed
            if term.rise is None:
                lines = [(plain, high, term.bound)]
            else:
                footprint, sums, held = term.rise.footprint, self._sums[place], term.rise.sums.fixed
                most, (first, last) = term.rise.range[1] or 1.0, ranges[place]
                rows.append(_scaled(sums, first - held, last - held, most))
                objective += weight * line_at(footprint, first, last, near[place])[0] * sums
                lines = [
                    (plain + slope * sums, high - start - slope * held, max(term.bound, slope * most))
                    for slope, start in lines_below(footprint, first, last)
                ]
                place += 1
            if np.isfinite(term.bound):
                rows += [_scaled(cost, -np.inf, most, size) for cost, most, size in lines]
        matrix, lows, highs = zip(*rows, strict=True)
        return objective, LinearConstraint(np.stack(matrix), lows, highs)

    def solve(
        self, ranges: Sequence[Range], near: Sequence[float], low: Floats, high: Floats
    ) -> tuple[Ints, Genomes] | None:
        """The counts [mixers + FFNs] of the optimum and a genome [1, G] that has them; None if there is none.

        Args:
            ranges: of the sums of each footprint.
            near: a sum of each footprint; the objective has the line that is the greatest there.
            low: lower bounds of the columns [C].
            high: upper bounds of the columns [C].
        """
        objective, rows = self._limited(ranges, near)
        result = milp(
            objective,
            integrality=np.ones(len(objective), int),
            bounds=Bounds(low, high),
            constraints=rows,
            # Presolve saves no time here, and makes HiGHS print to stdout now and then.
            options={"mip_rel_gap": 0.0, "presolve": False},
        )
        if result.status == INFEASIBLE:
            return None
        if result.x is None:
            raise RuntimeError(f"the integer programme was not solved: {result.message}")
        found = np.rint(result.x[: self._counted]).astype(np.int64)
        mixers = np.zeros(len(options_of(self._space).mixer), np.int64)
        mixers[self._mixers] = found[: len(self._mixers)]
        ffns = np.zeros(len(self._space.ffn_options), np.int64)
        ffns[self._ffns] = found[len(self._mixers) :]
        return found, assemble(self._space, self._width, mixers, ffns)
