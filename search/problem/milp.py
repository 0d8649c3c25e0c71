"""Exact minima and feasible architectures under several bounds, by integer programming.

Several costs together are one integer programme a width over the counts of
:mod:`search.problem.dynamic_program`. The solver (HiGHS, by scipy) works to 1e-6 of its numbers, so rows are
scaled, and each solution is priced again, exactly. A solution that breaks a bound after all is cut away, and
the rest is searched on. A maximum of sums is bounded by bounding each sum; a minimum of two costs is bounded
if either is, so both are tried.

Shapes: O mixer options, F FFN options, P patterns; see :mod:`search.problem.dynamic_program`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from search.problem.dynamic_program import (
    Floats,
    Ints,
    Prices,
    assemble,
    cheapest,
    least_sum,
    options_of,
    prices_at,
)
from search.problem.limit import ROUNDING_TOLERANCE, within
from space import Architecture, Space
from space.genome import FULL, LINEAR, LOCAL, Genomes, decode, encode, encoding
from space.ops import Cost

SCALE = 1e4  # of costs over bounds, so that the solver's tolerances of 1e-6 are small beside them
BISECTION_TOLERANCE = 1e-6  # relative: distance from the least maximum of sums at which the search stops
INFEASIBLE = 2  # milp's status


def least(space: Space, cost: Cost) -> tuple[float, Architecture]:
    """The minimum of a cost over a space, and an architecture that has it.

    The value is exact for a sum, and within 1e-6 for a maximum of sums. It is infinite if every architecture
    has an op of infinite cost.

    Args:
        space: the search space.
        cost: a sum, a maximum of sums, or the minimum of two of these.
    """
    found = [_least_greatest(space, way) for (way,) in alternatives([cost])]
    return min(found, key=lambda pair: pair[0])


def _least_greatest(space: Space, cost: Cost) -> tuple[float, Architecture]:
    """The minimum of a sum, or of a maximum of sums."""
    value, architecture = least_sum(space, replace(cost, max_with=()))
    if not cost.max_with or not np.isfinite(value):
        return value, architecture
    best = lowered(space, cost, encode(space, [architecture]), [], [])
    return float(cost(best)[0]), decode(space, best)[0]


def alternatives(costs: Sequence[Cost]) -> Iterator[tuple[Cost, ...]]:
    """All combinations of costs in which every minimum of two costs is replaced by one of them.

    Args:
        costs: with or without minima.
    """
    options = [
        (cost,) if cost.min_with is None else (replace(cost, min_with=None), cost.min_with) for cost in costs
    ]
    return product(*options)


def lowered(
    space: Space, cost: Cost, best: Genomes, others: Sequence[Cost], bounds: Sequence[float]
) -> Genomes:
    """The genome [1, G] with the least maximum of sums, by bisection.

    Args:
        space: the search space.
        cost: a maximum of sums.
        best: a genome [1, G] with the least first sum.
        others: further costs.
        bounds: of the further costs.
    """
    low, high = float(replace(cost, max_with=())(best)[0]), float(cost(best)[0])
    while high > low * (1 + BISECTION_TOLERANCE):
        middle = (low + high) / 2
        costs, limits = split_maxima([cost, *others], [middle, *bounds])
        found = optimum(space, costs, limits, [1.0] + [0.0] * (len(costs) - 1))
        if found is None:
            low = middle
        else:
            best, high = found, float(cost(found)[0])
    return best


def split_maxima(costs: Sequence[Cost], bounds: Sequence[float]) -> tuple[list[Cost], list[float]]:
    """The sums of which each cost is the maximum, its own first, each with the bound of the cost.

    Args:
        costs: maxima of sums.
        bounds: of the costs.
    """
    pairs = [
        (part, bound)
        for cost, bound in zip(costs, bounds, strict=True)
        for part in (replace(cost, max_with=()), *cost.max_with)
    ]
    return [part for part, _ in pairs], [bound for _, bound in pairs]


def _undominated(values: Floats, groups: Ints) -> Ints:
    """The finite rows of values [N, D] that no other row of their group [N] equals or beats everywhere."""
    better = (values[None] <= values[:, None]).all(axis=2) & (groups[None] == groups[:, None])  # [row, by]
    order = np.arange(len(values))
    better &= ~better.T | (order[None] < order[:, None])  # of equal rows the first stays
    return np.flatnonzero(np.isfinite(values).all(axis=1) & ~better.any(axis=1))


@dataclass(frozen=True)
class _Program:
    """An integer programme over the counts of one width; C columns: mixers, FFNs, then indicators.

    Attributes:
        objective: [C].
        rows: the constraints.
        highest: upper bound of each column [C]; the lower bounds are 0.
        mixers: the mixer option of each of the first columns.
        ffns: the FFN option of each of the following columns.
    """

    objective: Floats
    rows: LinearConstraint
    highest: Floats
    mixers: Ints
    ffns: Ints


def _program(space: Space, prices: list[Prices], bounds: Floats, weights: Floats, patterns: Ints) -> _Program:
    """The programme that minimises a weighted sum of costs, each at most its bound, over patterns [P, 4].

    Columns: counts of mixers and FFNs, then indicators of the pattern, of the linear kinds in use if their
    number is limited, and of the level of each cost's largest op.
    """
    enc, at = encoding(space), options_of(space)
    few = space.max_linear_kinds < enc.kind_count  # otherwise the number of kinds needs no rows
    values = [np.stack([p.mixer, p.mixer_peak], axis=1) for p in prices]
    # Dominated options are left out, but only beside options that may take their place: of the same class,
    # and of the same linear kind if the number of kinds is limited.
    groups = np.where(few & (at.classes == LINEAR), LOCAL + 1 + at.kinds, at.classes)
    mixers = _undominated(np.concatenate(values, axis=1), groups)
    values = [np.stack([p.ffn, p.ffn_peak], axis=1) for p in prices]
    ffns = _undominated(np.concatenate(values, axis=1), (np.arange(len(space.ffn_options)) > 0).astype(int))
    ffns = ffns[ffns >= enc.least_ffn]
    peaks = [np.concatenate([p.mixer_peak[mixers], p.ffn_peak[ffns]]) for p in prices]
    levels = [np.unique(peak) for peak in peaks]

    sizes = [len(mixers), len(ffns), len(patterns), enc.kind_count * few, *map(len, levels)]
    ends = np.cumsum(sizes)
    mixer_part, ffn_part, pattern_part, kind_part, *level_parts = [
        slice(end - size, end) for size, end in zip(sizes, ends, strict=True)
    ]
    counts = slice(0, ffn_part.stop)
    highest = np.ones(ends[-1])
    highest[counts] = space.slots
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
    objective = np.zeros(ends[-1])
    for price, peak, level, part, bound, weight in zip(
        prices, peaks, levels, level_parts, bounds, weights, strict=True
    ):
        add(1, 1, (part, 1))  # exactly one level of the largest op
        for value in level[:-1]:  # an option whose peak is above a level needs a higher level
            add(-np.inf, 0, (counts, peak > value), (part, -2 * space.slots * (level > value)))
        cost = np.zeros(ends[-1])
        cost[mixer_part], cost[ffn_part] = price.mixer[mixers], price.ffn[ffns]
        has_full = patterns[:, 1] > 0
        cost[pattern_part] = price.per_layer * patterns.sum(axis=1) + price.attention_constant * has_full
        cost[part] = level
        objective += SCALE * weight * cost
        if np.isfinite(bound):
            rows.append(
                (
                    SCALE * cost / bound,
                    -np.inf,
                    SCALE * ((bound - price.fixed) / bound + ROUNDING_TOLERANCE),
                )
            )
    matrix, lows, highs = zip(*rows, strict=True)
    return _Program(objective, LinearConstraint(np.stack(matrix), lows, highs), highest, mixers, ffns)


def _solve(
    space: Space, width: int, program: _Program, costs: Sequence[Cost], bounds: Floats, weights: Floats
) -> tuple[float, Genomes] | None:
    """The optimum of a programme by exact costs, with its genome [1, G]; None if none keeps the bounds."""
    best: tuple[float, Genomes] | None = None
    boxes = [(np.zeros_like(program.highest), program.highest)]
    while boxes:
        low, high = boxes.pop()
        result = milp(
            program.objective,
            integrality=np.ones(len(program.objective), int),
            bounds=Bounds(low, high),
            constraints=program.rows,
            # Presolve saves no time here, and makes HiGHS print to stdout now and then.
            options={"mip_rel_gap": 0.0, "presolve": False},
        )
        if result.status == INFEASIBLE:
            continue
        if result.x is None:
            raise RuntimeError(f"the integer programme was not solved: {result.message}")
        found = np.rint(result.x)
        mixers = np.zeros(len(options_of(space).mixer), np.int64)
        mixers[program.mixers] = found[: len(program.mixers)]
        ffns = np.zeros(len(space.ffn_options), np.int64)
        ffns[program.ffns] = found[len(program.mixers) :][: len(program.ffns)]
        genome = assemble(space, width, mixers, ffns)
        values = np.array([cost(genome)[0] for cost in costs])
        if all(within(value, bound) for value, bound in zip(values, bounds, strict=True)):
            total = float(weights @ values)
            if best is None or total < best[0]:
                best = total, genome
            continue
        # A bound is exceeded by less than the solver's tolerance. Cut these counts away: the boxes below and
        # above them in each dimension cover all other counts.
        low, high = low.copy(), high.copy()
        for i in range(len(program.mixers) + len(program.ffns)):
            for end, start in ((found[i] - 1, low[i]), (high[i], found[i] + 1)):
                if start <= end:
                    box = low.copy(), high.copy()
                    box[0][i], box[1][i] = start, end
                    boxes.append(box)
            low[i] = high[i] = found[i]
    return best


def optimum(
    space: Space, costs: Sequence[Cost], bounds: Sequence[float], weights: Sequence[float]
) -> Genomes | None:
    """The genome [1, G] with the least weighted sum of costs, each at most its bound; None if there is none.

    Args:
        space: the search space.
        costs: sums, without maxima and minima.
        bounds: of the costs; infinite: the cost need only be finite.
        weights: of the costs in the objective.
    """
    limits, factors = np.array(bounds, float), np.array(weights, float)
    best: tuple[float, Genomes] | None = None
    ready = []
    for width in range(len(space.width)):
        prices = [prices_at(space, cost, width) for cost in costs]
        floors = np.stack([cheapest(space, price)[0].min(axis=0) for price in prices])  # [costs, P]
        keep = ((floors <= limits[:, None] * (1 + ROUNDING_TOLERANCE)) & np.isfinite(floors)).all(axis=0)
        if keep.any():
            floor = float((factors @ floors[:, keep]).min())
            ready.append((floor, width, prices, encoding(space).patterns[keep]))
    for floor, width, prices, patterns in sorted(ready, key=lambda entry: entry[:2]):
        if best is None or floor < best[0]:
            program = _program(space, prices, limits, factors, patterns)
            found = _solve(space, width, program, costs, limits, factors)
            if found is not None and (best is None or found[0] < best[0]):
                best = found
    return None if best is None else best[1]


def feasible(space: Space, costs: Sequence[Cost], bounds: Sequence[float]) -> Architecture | None:
    """An architecture that keeps every bound; None if there is none.

    It has the least sum of cost over bound, so it is not just below one of the bounds.

    Args:
        space: the search space.
        costs: to be bounded.
        bounds: above 0; infinite: the cost need only be finite.
    """
    if min(bounds, default=0) <= 0:
        raise ValueError(f"bounds must be given and above 0, not {list(bounds)}")
    genome = most_room(space, costs, bounds, bounds)
    return None if genome is None else decode(space, genome)[0]


def most_room(
    space: Space, costs: Sequence[Cost], bounds: Sequence[float], scales: Sequence[float]
) -> Genomes | None:
    """The genome [1, G] with the least sum of cost over scale within the bounds; None if there is none.

    Args:
        space: the search space.
        costs: to be bounded.
        bounds: of the costs.
        scales: of the costs in the sum; infinite: the cost has no weight.
    """
    best: tuple[float, Genomes] | None = None
    for way in alternatives(costs):
        sums, limits = split_maxima(way, bounds)
        weights = [1 / scale for _, scale in zip(*split_maxima(way, scales), strict=True)]
        genome = optimum(space, sums, limits, weights)
        if genome is not None:
            total = sum(w * float(cost(genome)[0]) for w, cost in zip(weights, sums, strict=True))
            if best is None or total < best[0]:
                best = total, genome
    return None if best is None else best[1]
