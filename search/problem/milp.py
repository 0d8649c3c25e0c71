"""Exact minima and feasible architectures under several bounds, by integer programming.

Several costs together are one integer programme a width, see :mod:`search.problem.integer_program`. Each
solution is priced again, exactly. The programme has lines below each footprint: where a solution costs more
than by its line, the range of the footprint's sums is split at the ends of the piece that the solution is on,
until each range is one piece. A solution that breaks a bound by less than the solver sees is cut away. Both
leave parts that together hold all other architectures. The part whose lower bound is the least is searched
first, and the search ends when no part can hold a lesser value.

Shapes: P patterns; see :mod:`search.problem.dynamic_program`.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, pairwise

import numpy as np
from numpy.typing import NDArray

from search.problem.dynamic_program import Floats, Ints, Prices, cheapest, least_sum, prices_at
from search.problem.integer_program import IntegerProgram, Range, Rise, Term, line_at
from search.problem.limit import ROUNDING_TOLERANCE, within
from space import Architecture, Space
from space.genome import Genomes, decode, encoding, smallest
from space.ops import Cost, Footprint

EXACT = 1e-9  # relative: a footprint this close above its line is on it


def least(space: Space, cost: Cost) -> tuple[float, Architecture]:
    """The exact minimum of a cost over a space, and an architecture that has it.

    Args:
        space: the search space.
        cost: to be minimised.

    Returns:
        An infinite value and the smallest architecture if every architecture has an op of infinite cost.
    """
    if cost.footprint is None:
        return least_sum(space, cost)
    genome = optimum(space, [cost], [np.inf], [1.0])
    if genome is None:
        return np.inf, smallest(space)
    return float(cost(genome)[0]), decode(space, genome)[0]


def _floor(space: Space, prices: Prices) -> Floats:
    """The least cost by pattern [P]."""
    floor: Floats = cheapest(space, prices)[0].min(axis=0)
    return floor


def _times(prices: Prices, factor: float) -> Prices:
    """Prices without peaks, times a factor."""
    zero = np.zeros(4)
    return replace(
        prices, fixed=factor * prices.fixed, shared=zero, mixer=factor * prices.mixer, ffn=factor * prices.ffn
    )


def _furthest(footprint: Footprint, cost: float) -> float:
    """The greatest sum at which a footprint costs at most so much."""
    piece = int(np.searchsorted(footprint.heights, cost, side="right")) - 1
    if piece < 0:
        return 0.0
    slope, rest = footprint.slopes[piece], cost - footprint.heights[piece]
    return footprint.starts[piece] + rest / slope if slope > 0 else np.inf


class Width:
    """The costs at one width.

    Args:
        space: the search space.
        width: index of the width.
        costs: of its architectures.
        bounds: of the costs.
        weights: of the costs in the objective.

    Attributes:
        terms: the costs, with what is asked of them.
        patterns: the layer counts with which each cost alone keeps its bound [P, 4].
        floor: no weighted sum of the costs is less; infinite: the width is out.
    """

    def __init__(
        self, space: Space, width: int, costs: Sequence[Cost], bounds: Floats, weights: Floats
    ) -> None:
        self._space, self._index = space, width
        every = encoding(space).patterns
        keep = np.ones(len(every), bool)
        floors = np.zeros((len(costs), len(every)))
        self.terms: list[Term] = []
        for i, (cost, bound, weight) in enumerate(zip(costs, bounds, weights, strict=True)):
            prices = prices_at(space, cost, width)
            floor, rise = _floor(space, prices), None
            if cost.footprint and keep.any() and (np.isfinite(bound) or weight):
                floor, rise = self._risen(cost.footprint, prices, floor, keep, bound)
            floors[i] = floor
            keep &= np.isfinite(floor) & (floor <= bound * (1 + ROUNDING_TOLERANCE))
            unit = bound if np.isfinite(bound) else float(np.abs(floor[keep]).min(initial=np.inf))
            self.terms.append(Term(prices, rise, bound, weight, unit if 0 < unit < np.inf else 1.0))
        self.patterns = every[keep]
        self.floor = float((weights @ floors[:, keep]).min(initial=np.inf))

    def _risen(
        self, footprint: Footprint, prices: Prices, floor: Floats, keep: NDArray[np.bool_], bound: float
    ) -> tuple[Floats, Rise]:
        """The least cost by pattern [P] with a footprint, and the footprint at the width."""
        sums = prices_at(self._space, Cost(footprint.sums), self._index)
        lows, highs = _floor(self._space, sums), -_floor(self._space, _times(sums, -1.0))
        least_rise = footprint(np.where(np.isfinite(lows), lows, 0.0))
        least_rest, floor = floor, floor + least_rise
        keep = keep & np.isfinite(floor)
        if not keep.any():
            return floor, Rise(footprint, sums, (0.0, 0.0), 0.0)
        low, high = float(lows[keep].min()), float(highs[keep].max())
        if np.isfinite(bound):
            room = bound * (1 + 2 * ROUNDING_TOLERANCE) - float(least_rest[keep].min())
            high = min(high, _furthest(footprint, room))
        high = max(low, high)
        ends = [low, *(start for start in footprint.starts if low < start < high), high]
        best, near = -np.inf, low
        for middle in [(one + other) / 2 for one, other in pairwise(ends)]:
            slope, start = line_at(footprint, low, high, middle)
            line = replace(
                prices,
                fixed=prices.fixed + start + slope * sums.fixed,
                mixer=prices.mixer + slope * sums.mixer,
                ffn=prices.ffn + slope * sums.ffn,
            )
            line_floor = _floor(self._space, line)
            floor = np.maximum(floor, line_floor)
            if line_floor[keep].min() > best:
                best, near = float(line_floor[keep].min()), middle
        return floor, Rise(footprint, sums, (low, high), near)

    @property
    def unit(self) -> float:
        """A weighted sum of costs of the size of those that are searched for."""
        return sum(term.weight * term.unit for term in self.terms)

    def whole(self) -> "_Part":
        """All architectures of the width."""
        rises = [term.rise for term in self.terms if term.rise]
        ranges, near = tuple(rise.range for rise in rises), tuple(rise.near for rise in rises)
        return _Part(self, ranges, near, np.zeros_like(self.program.highest), self.program.highest)

    @cached_property
    def program(self) -> IntegerProgram:
        """The programme over the counts."""
        return IntegerProgram(self._space, self._index, self.terms, self.patterns)


def split_range(sums: Range, starts: Sequence[float], at: float) -> list[Range]:
    """The parts of a range of sums below, on and above one linear piece of a footprint.

    Args:
        sums: the range.
        starts: of the footprint's pieces.
        at: a sum on the piece.
    """
    low, high = sums
    piece = int(np.searchsorted(starts, min(max(at, low), high), side="right")) - 1
    ends = [low, starts[piece], starts[piece + 1] if piece + 1 < len(starts) else np.inf, high]
    return [one for one in pairwise(np.clip(ends, low, high).tolist()) if one[0] < one[1]]


def is_one_piece(sums: Range, starts: Sequence[float]) -> bool:
    """True if no piece of a footprint starts inside a range of sums.

    Args:
        sums: the range.
        starts: of the footprint's pieces.
    """
    return not any(sums[0] < start < sums[1] for start in starts)


@dataclass(frozen=True)
class _Part:
    """Some of the architectures of one width.

    Attributes:
        width: the width.
        ranges: of the sums of each footprint.
        near: a sum of each footprint; the objective has the line that is the greatest there.
        low: least value of each column of the programme [C].
        high: greatest value of each column [C].
    """

    width: Width
    ranges: tuple[Range, ...]
    near: tuple[float, ...]
    low: Floats
    high: Floats

    def split(self, place: int, at: float) -> Iterator["_Part"]:
        """The parts below, on and above the piece of a footprint.

        Args:
            place: of the footprint's range.
            at: a sum on the piece.
        """
        for one in split_range(self.ranges[place], self._starts[place], at):
            ranges = (*self.ranges[:place], one, *self.ranges[place + 1 :])
            closest = min(max(at, one[0]), one[1])
            near = (*self.near[:place], closest, *self.near[place + 1 :])
            yield replace(self, ranges=ranges, near=near)

    def is_one_piece(self, place: int) -> bool:
        """True if the range of a footprint's sums has no start of a piece inside.

        Args:
            place: of the footprint's range.
        """
        return is_one_piece(self.ranges[place], self._starts[place])

    @property
    def _starts(self) -> list[tuple[float, ...]]:
        return [term.rise.footprint.starts for term in self.width.terms if term.rise]

    def without(self, counts: Ints) -> Iterator["_Part"]:
        """The boxes below and above counts in each dimension, which cover all other counts.

        Args:
            counts: of the programme's first columns.
        """
        low, high = self.low.copy(), self.high.copy()
        for i, number in enumerate(counts):
            for end, start in ((number - 1, low[i]), (high[i], number + 1)):
                if start <= end:
                    box = low.copy(), high.copy()
                    box[0][i], box[1][i] = start, end
                    yield replace(self, low=box[0], high=box[1])
            low[i] = high[i] = number


def optimum(
    space: Space, costs: Sequence[Cost], bounds: Sequence[float], weights: Sequence[float]
) -> Genomes | None:
    """The genome [1, G] with the least weighted sum of costs, each at most its bound; None if there is none.

    Args:
        space: the search space.
        costs: to be bounded.
        bounds: of the costs; infinite: the cost need only be finite.
        weights: of the costs in the objective.
    """
    limits, factors = np.array(bounds, float), np.array(weights, float)
    best: tuple[float, Genomes | None] = np.inf, None
    order = count()
    widths = [Width(space, index, costs, limits, factors) for index in range(len(space.width))]
    parts: list[tuple[float, int, _Part | Width]] = [(one.floor, next(order), one) for one in widths]
    heapq.heapify(parts)
    while parts:
        floor, _, part = heapq.heappop(parts)
        if floor >= best[0]:
            break
        if isinstance(part, Width):
            part = part.whole()
        solved = part.width.program.solve(part.ranges, part.near, part.low, part.high)
        if solved is None:
            continue
        counts, genome = solved
        values = np.array([cost(genome)[0] for cost in costs])
        kept = bool((values <= limits * (1 + ROUNDING_TOLERANCE)).all())
        total = float(factors @ values)
        if kept and total < best[0]:
            best = total, genome
        missed, widest = _missed(part, values, genome)
        if kept and factors @ missed <= EXACT * part.width.unit:
            continue
        rest = part.without(counts) if widest is None else part.split(*widest)
        floor = max(floor, total - float(factors @ missed))
        for one in rest:
            heapq.heappush(parts, (floor, next(order), one))
    return best[1]


def _missed(part: _Part, values: Floats, genome: Genomes) -> tuple[Floats, tuple[int, float] | None]:
    """The costs of footprints of a genome [1, G] beyond the lines in the objective.

    Args:
        part: of a search.
        values: the costs of the genome [costs].
        genome: the genome.

    Returns:
        The missed cost [costs]; and the place of the footprint to split and its sum, None if no
        footprint that matters lies above its line on more than one piece.
    """
    missed = np.zeros(len(values))
    worst, widest, place = 0.0, None, 0
    for i, (term, value) in enumerate(zip(part.width.terms, values, strict=True)):
        if term.rise is None:
            continue
        footprint = term.rise.footprint
        sums = footprint.sums.totals(genome)
        slope, start = line_at(footprint, *part.ranges[place], part.near[place])
        missed[i] = float((footprint(sums) - slope * sums - start)[0])
        matters = missed[i] > EXACT * term.unit and (term.weight > 0 or not within(value, term.bound))
        if matters and missed[i] / term.unit > worst and not part.is_one_piece(place):
            worst, widest = missed[i] / term.unit, (place, float(sums[0]))
        place += 1
    return missed, widest


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
    return optimum(space, costs, bounds, [1 / scale for scale in scales])
