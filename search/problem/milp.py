"""Exact minima and feasible architectures under bounds, by dynamic and integer programming."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from space import Architecture, Space
from space.genome import FFN_ONLY, FULL, LINEAR, LOCAL, Genomes, decode, encode, encoding, smallest
from space.ops import Cost

Floats = NDArray[np.float64]


Ints = NDArray[np.int64]


ROUNDING_TOLERANCE = 1e-9  # relative: the order in which a sum is taken changes its last digits


_SCALE = 1e4  # of costs over bounds: what the solver's tolerances of 1e-6 are small against


_HALVED = 1e-6  # relative: how near the least greatest of sums is come


_INFEASIBLE = 2  # milp's status


def within(value: float, bound: float) -> bool:
    """Whether a cost keeps a bound (above 0), but for rounding."""
    return value <= bound * (1 + ROUNDING_TOLERANCE)


@dataclass(frozen=True)
class _Options:
    """The distinct (mixer, heads) options of a space: four arrays [O]."""

    mixer: Ints
    heads: Ints
    classes: Ints
    kinds: Ints


@lru_cache(maxsize=64)
def _options(space: Space) -> _Options:
    enc = encoding(space)
    heads = [1 if enc.headless[m] else len(space.head_options) for m in range(len(enc.max_linear_kinds))]
    mixer, head = np.array([(m, h) for m in range(1, len(enc.max_linear_kinds)) for h in range(heads[m])]).T
    return _Options(mixer, head, enc.classes[mixer], enc.max_linear_kinds[mixer])


@dataclass(frozen=True)
class _Prices:
    """One cost at one width: of the ends, of a layer, of each mixer option [O] and FFN option [F]."""

    fixed: float
    per_layer: float
    attention_constant: float
    mixer: Floats
    ffn: Floats
    mixer_peak: Floats
    ffn_peak: Floats


def _prices(space: Space, cost: Cost, width: int) -> _Prices:
    """Prices; a peak below that of the ends is theirs, and without a peak all are 0."""
    at = _options(space)
    table, peak = cost.table, cost.max_op
    mixer, ffn = table.mixer[width, at.mixer, at.heads], table.ffn[width]
    fixed = cost.constant + float(table.ends[width].sum())
    if peak is None:
        zero = np.zeros_like(mixer), np.zeros_like(ffn)
        return _Prices(fixed, cost.per_layer, cost.attention_constant, mixer, ffn, *zero)
    ends = peak.ends[width].max()
    mixer_peak = np.maximum(ends, peak.mixer[width, at.mixer, at.heads])
    ffn_peak = np.maximum(ends, peak.ffn[width])
    return _Prices(fixed, cost.per_layer, cost.attention_constant, mixer, ffn, mixer_peak, ffn_peak)


def _cheapest(space: Space, prices: _Prices) -> tuple[Floats, Ints, Ints]:
    """The least totals [T, P] by level of the peak and pattern, and the options that have them.

    A level T allows only options whose peak is at most it, and charges it in full: the least
    over the levels is the least total with the peak at its own value. The options are [T, 4]
    indices by class: of mixers (without meaning for FFN_ONLY) and of FFNs.
    """
    enc, at = encoding(space), _options(space)
    levels = np.unique(np.concatenate([prices.mixer_peak, prices.ffn_peak]))
    mixer = np.where(prices.mixer_peak <= levels[:, None], prices.mixer, np.inf)  # [T, O]
    ffn = np.where(prices.ffn_peak <= levels[:, None], prices.ffn, np.inf)  # [T, F]
    place = np.arange(len(prices.ffn))
    apart = prices.per_layer * enc.patterns.sum(axis=1) + prices.attention_constant * (enc.patterns[:, 1] > 0)
    totals = prices.fixed + apart + levels[:, None]  # [T, P]
    chosen = np.zeros((2, len(levels), 4), np.int64)
    for column, kind in enumerate((FFN_ONLY, FULL, LINEAR, LOCAL)):
        beside = np.where(place >= (1 if kind == FFN_ONLY else enc.least_ffn), ffn, np.inf)
        chosen[1, :, column] = beside.argmin(axis=1)
        layer = beside.min(axis=1)
        if kind != FFN_ONLY:
            of_kind = np.where(at.classes == kind, mixer, np.inf)
            chosen[0, :, column] = of_kind.argmin(axis=1)
            layer = layer + of_kind.min(axis=1)
        count = enc.patterns[:, column]
        with np.errstate(invalid="ignore"):  # 0 layers of infinite cost
            totals += np.where(count == 0, 0.0, count * layer[:, None])
    return totals, chosen[0], chosen[1]


def _assemble(space: Space, width: int, mixers: Ints, ffns: Ints) -> Genomes:
    """A genome [1, G] with so many of each mixer option [O] and FFN option [F]."""
    enc, at = encoding(space), _options(space)
    options = np.repeat(np.arange(len(mixers)), mixers)
    options = options[
        np.argsort(at.classes[options] != FULL, kind="stable")
    ]  # full ones to the must_be_full slots
    sizes = np.repeat(np.arange(len(ffns)), ffns)  # rising: the layers without a mixer get the last ones
    slots = np.concatenate([np.flatnonzero(enc.must_be_full), np.flatnonzero(~enc.must_be_full)])[
        : len(sizes)
    ]
    genome = np.zeros((1, enc.genes), np.int16)
    genome[0, 0] = width
    genome[0, 1 + 3 * slots[: len(options)]] = at.mixer[options]
    genome[0, 2 + 3 * slots[: len(options)]] = at.heads[options]
    genome[0, 3 + 3 * slots] = sizes
    return genome


def least(space: Space, cost: Cost) -> tuple[float, Architecture]:
    """The least value of a cost in a space, and an architecture that has it.

    The value is exact for a sum, and within 1e-6 for the greatest of several sums. It is infinite where
    every architecture has an op of infinite cost (then all are least).
    """
    found = [_least_greatest(space, way) for (way,) in alternatives([cost])]
    return min(found, key=lambda pair: pair[0])


def _least_greatest(space: Space, cost: Cost) -> tuple[float, Architecture]:
    """The least of a sum, or of the greatest of several."""
    value, architecture = _least_sum(space, replace(cost, max_with=()))
    if not cost.max_with or not np.isfinite(value):
        return value, architecture
    best = lowered(space, cost, encode(space, [architecture]), [], [])
    return float(cost(best)[0]), decode(space, best)[0]


def alternatives(costs: Sequence[Cost]) -> Iterator[tuple[Cost, ...]]:
    """The costs, of each that is the lesser of two the one or the other: every combination."""
    options = [
        (cost,) if cost.min_with is None else (replace(cost, min_with=None), cost.min_with) for cost in costs
    ]
    return product(*options)


def lowered(
    space: Space, cost: Cost, best: Genomes, others: Sequence[Cost], bounds: Sequence[float]
) -> Genomes:
    """The genome [1, G] of the least greatest of sums, by halving; ``best`` has the least first sum."""
    low, high = float(replace(cost, max_with=())(best)[0]), float(cost(best)[0])
    while high > low * (1 + _HALVED):
        middle = (low + high) / 2
        costs, limits = split_maxima([cost, *others], [middle, *bounds])
        found = optimum(space, costs, limits, [1.0] + [0.0] * (len(costs) - 1))
        if found is None:
            low = middle
        else:
            best, high = found, float(cost(found)[0])
    return best


def split_maxima(costs: Sequence[Cost], bounds: Sequence[float]) -> tuple[list[Cost], list[float]]:
    """The sums that each cost is the greatest of, the cost's own first, each with the cost's bound."""
    pairs = [
        (part, bound)
        for cost, bound in zip(costs, bounds, strict=True)
        for part in (replace(cost, max_with=()), *cost.max_with)
    ]
    return [part for part, _ in pairs], [bound for _, bound in pairs]


def _least_sum(space: Space, cost: Cost) -> tuple[float, Architecture]:
    """The least value of a sum in a space, exactly, and an architecture that has it."""
    tables = [_cheapest(space, _prices(space, cost, width)) for width in range(len(space.width))]
    width = int(np.argmin([totals.min() for totals, _, _ in tables]))
    totals, mixer_at, ffn_at = tables[width]
    level, row = np.unravel_index(np.argmin(totals), totals.shape)
    if not np.isfinite(totals[level, row]):
        return np.inf, smallest(space)
    pattern = encoding(space).patterns[row]
    mixers = np.zeros(len(_options(space).mixer), np.int64)
    np.add.at(mixers, mixer_at[level, 1:], pattern[1:])
    ffns = np.zeros(len(space.ffn_options), np.int64)
    np.add.at(ffns, ffn_at[level], pattern)
    genome = _assemble(space, width, mixers, ffns)
    return float(cost(genome)[0]), decode(space, genome)[0]


def _undominated(values: Floats, groups: Ints) -> Ints:
    """The rows of finite values [N, D] that no other row of their group [N] matches or betters everywhere."""
    better = (values[None] <= values[:, None]).all(axis=2) & (groups[None] == groups[:, None])  # [row, by]
    order = np.arange(len(values))
    better &= ~better.T | (order[None] < order[:, None])  # of equal rows the first stays
    return np.flatnonzero(np.isfinite(values).all(axis=1) & ~better.any(axis=1))


@dataclass(frozen=True)
class _Program:
    """An integer programme over the counts of one width; the first columns are mixers, then FFNs."""

    objective: Floats  # [columns]
    rows: LinearConstraint
    highest: Floats  # [columns]
    mixers: Ints  # the mixer option of each of the first columns
    ffns: Ints  # the FFN option of each of the following


def _program(
    space: Space, prices: list[_Prices], bounds: Floats, weights: Floats, patterns: Ints
) -> _Program:
    """The programme: least weighted sum of costs, each at most its bound; one of the patterns [P, 4].

    Columns: counts of mixers and FFNs, then 0 or 1 for each pattern, for each linear kind where
    their number is limited, and for each level of each cost's peak.
    """
    enc, at = encoding(space), _options(space)
    few = space.max_linear_kinds < enc.kind_count
    values = [np.stack([p.mixer, p.mixer_peak], axis=1) for p in prices]
    groups = np.where(few & (at.classes == LINEAR), LOCAL + 1 + at.kinds, at.classes)
    mixers = _undominated(np.concatenate(values, axis=1), groups)
    values = [np.stack([p.ffn, p.ffn_peak], axis=1) for p in prices]
    ffns = _undominated(np.concatenate(values, axis=1), (np.arange(len(space.ffn_options)) > 0).astype(int))
    ffns = ffns[ffns >= enc.least_ffn]
    peaks = [np.concatenate([p.mixer_peak[mixers], p.ffn_peak[ffns]]) for p in prices]
    levels = [np.unique(peak) for peak in peaks]

    sizes = [len(mixers), len(ffns), len(patterns), enc.kind_count * few, *map(len, levels)]
    ends = np.cumsum(sizes)
    x, u, p, k, *t = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    counts = slice(0, u.stop)
    highest = np.ones(ends[-1])
    highest[counts] = space.slots
    rows: list[tuple[Floats, float, float]] = []  # factors, least and greatest sum

    def add(low: float, high: float, *terms: tuple[slice, NDArray[np.generic] | int]) -> None:
        row = np.zeros(ends[-1])
        for part, factors in terms:
            row[part] = factors
        rows.append((row, low, high))

    add(1, 1, (p, 1))
    for column, kind in ((1, FULL), (2, LINEAR), (3, LOCAL)):
        add(0, 0, (x, at.classes[mixers] == kind), (p, -patterns[:, column]))
    add(0, 0, (u, 1), (p, -patterns.sum(axis=1)))
    add(-np.inf, 0, (u, ffns == 0), (p, -patterns[:, 1:].sum(axis=1)))  # layers with an FFN only have one
    if few:
        add(0, space.max_linear_kinds, (k, 1))
        for kind, one in enumerate(np.eye(enc.kind_count)):
            add(-np.inf, 0, (x, at.kinds[mixers] == kind), (k, -space.slots * one))
    objective = np.zeros(ends[-1])
    for price, peak, level, part, bound, weight in zip(
        prices, peaks, levels, t, bounds, weights, strict=True
    ):
        add(1, 1, (part, 1))
        for value in level[:-1]:  # what peaks above a level needs a higher one
            add(-np.inf, 0, (counts, peak > value), (part, -2 * space.slots * (level > value)))
        cost = np.zeros(ends[-1])
        cost[x], cost[u] = price.mixer[mixers], price.ffn[ffns]
        cost[p] = price.per_layer * patterns.sum(axis=1) + price.attention_constant * (patterns[:, 1] > 0)
        cost[part] = level
        objective += _SCALE * weight * cost
        if np.isfinite(bound):
            rows.append(
                (
                    _SCALE * cost / bound,
                    -np.inf,
                    _SCALE * ((bound - price.fixed) / bound + ROUNDING_TOLERANCE),
                )
            )
    matrix, lows, highs = zip(*rows, strict=True)
    return _Program(objective, LinearConstraint(np.stack(matrix), lows, highs), highest, mixers, ffns)


def _solve(
    space: Space, width: int, program: _Program, costs: Sequence[Cost], bounds: Floats, weights: Floats
) -> tuple[float, Genomes] | None:
    """The optimum of a programme, priced exactly; None where there is none within the bounds."""
    best: tuple[float, Genomes] | None = None
    boxes = [(np.zeros_like(program.highest), program.highest)]
    while boxes:
        low, high = boxes.pop()
        result = milp(
            program.objective,
            integrality=np.ones(len(program.objective), int),
            bounds=Bounds(low, high),
            constraints=program.rows,
            # Presolve gains nothing here, and with it HiGHS prints a line on stdout now and then.
            options={"mip_rel_gap": 0.0, "presolve": False},
        )
        if result.status == _INFEASIBLE:
            continue
        if result.x is None:
            raise RuntimeError(f"the integer programme was not solved: {result.message}")
        found = np.rint(result.x)
        mixers = np.zeros(len(_options(space).mixer), np.int64)
        mixers[program.mixers] = found[: len(program.mixers)]
        ffns = np.zeros(len(space.ffn_options), np.int64)
        ffns[program.ffns] = found[len(program.mixers) :][: len(program.ffns)]
        genome = _assemble(space, width, mixers, ffns)
        values = np.array([cost(genome)[0] for cost in costs])
        if all(within(value, bound) for value, bound in zip(values, bounds, strict=True)):
            total = float(weights @ values)
            if best is None or total < best[0]:
                best = total, genome
            continue
        # Passed a bound by less than the solver sees: the boxes around these counts cover all others.
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
    """The genome [1, G] of the least weighted sum of costs, each at most its bound; None if there is none."""
    limits, factors = np.array(bounds, float), np.array(weights, float)
    best: tuple[float, Genomes] | None = None
    ready = []
    for width in range(len(space.width)):
        prices = [_prices(space, cost, width) for cost in costs]
        floors = np.stack([_cheapest(space, price)[0].min(axis=0) for price in prices])  # [costs, P]
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
    """An architecture of the space that keeps every bound, or None where there is none.

    It is the one with the least sum of cost over bound, and so not at the edge of what is
    allowed. Bounds are above 0; an infinite one asks only that the cost be finite.
    """
    if min(bounds, default=0) <= 0:
        raise ValueError(f"bounds must be given and above 0, not {list(bounds)}")
    genome = most_room(space, costs, bounds, bounds)
    return None if genome is None else decode(space, genome)[0]


def most_room(
    space: Space, costs: Sequence[Cost], bounds: Sequence[float], scales: Sequence[float]
) -> Genomes | None:
    """The genome [1, G] of the least sum of cost over scale within the bounds; None if there is none."""
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
