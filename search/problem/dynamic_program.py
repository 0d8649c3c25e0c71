"""The exact minimum of one cost without a footprint over a space, by a dynamic programme over slots.

All slots of a space have the same options at the same costs, so the cost of an architecture is a function of
its counts: the layers with each mixer and heads, and those with each FFN. For each width, number of layers of
each class (a row of ``encoding(space).patterns``) and level of the largest op, the programme collapses to the
cheapest option of each class. The limit on linear kinds cannot bind there: the cheapest layer is of one kind.

Shapes: O mixer options (mixer with heads), F FFN options, P patterns, T levels of the largest op. The columns
of a pattern [4] are the classes FFN_ONLY, FULL, LINEAR, LOCAL. An infinite cost marks an op that the device
lacks.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from space import Architecture, Space
from space.genome import FFN_ONLY, FULL, LINEAR, LOCAL, Genomes, decode, encoding, smallest
from space.ops import Cost

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """The distinct pairs of mixer and heads of a space, as arrays [O].

    Attributes:
        mixer: index of the mixer option.
        heads: index of the head option.
        classes: FULL, LINEAR or LOCAL.
        kinds: index of the linear kind.
    """

    mixer: Ints
    heads: Ints
    classes: Ints
    kinds: Ints


@lru_cache(maxsize=64)
def options_of(space: Space) -> Options:
    """The distinct pairs of mixer and heads of a space.

    Args:
        space: its options.
    """
    enc = encoding(space)
    heads = [1 if enc.headless[m] else len(space.head_options) for m in range(len(enc.linear_kinds))]
    mixer, head = np.array([(m, h) for m in range(1, len(enc.linear_kinds)) for h in range(heads[m])]).T
    return Options(mixer, head, enc.classes[mixer], enc.linear_kinds[mixer])


@dataclass(frozen=True)
class Prices:
    """One cost at one width, in parts.

    Attributes:
        fixed: embedding, head and the cost's constant.
        per_layer: of every layer.
        shared: by all layers of a class, once [4]; 0 for FFN_ONLY.
        mixer: of a layer's mixer [O].
        ffn: of a layer's FFN [F].
        mixer_peak: contribution of a mixer to the largest op [O].
        ffn_peak: contribution of an FFN to the largest op [F].
    """

    fixed: float
    per_layer: float
    shared: Floats
    mixer: Floats
    ffn: Floats
    mixer_peak: Floats
    ffn_peak: Floats

    def of_patterns(self, patterns: Ints) -> Floats:
        """The part that depends on nothing but the number of layers of each class [P].

        Args:
            patterns: numbers of layers [P, 4].
        """
        parts: Floats = self.per_layer * patterns.sum(axis=1) + (patterns > 0) @ self.shared
        return parts


def prices_at(space: Space, cost: Cost, width: int) -> Prices:
    """A cost at one width, in parts.

    A footprint is left out. Peaks below those of embedding and head are raised to them; they are 0 for a cost
    without a largest op.

    Args:
        space: the search space.
        cost: a cost.
        width: index of the width.
    """
    at = options_of(space)
    table, peak = cost.table, cost.max_op
    mixer, ffn = table.mixer[width, at.mixer, at.heads], table.ffn[width]
    fixed = cost.constant + float(table.ends[width].sum())
    shared = np.array([0.0, *cost.shared])
    if peak is None:
        zero = np.zeros_like(mixer), np.zeros_like(ffn)
        return Prices(fixed, cost.per_layer, shared, mixer, ffn, *zero)
    ends = peak.ends[width].max()
    mixer_peak = np.maximum(ends, peak.mixer[width, at.mixer, at.heads])
    ffn_peak = np.maximum(ends, peak.ffn[width])
    return Prices(fixed, cost.per_layer, shared, mixer, ffn, mixer_peak, ffn_peak)


def cheapest(space: Space, prices: Prices) -> tuple[Floats, Ints, Ints]:
    """The least totals [T, P] by level of the largest op and by pattern, and the options that have them.

    A level allows only options whose peak is at most it, and charges the level in full. The minimum over the
    levels is therefore the least total with the largest op at its own value.

    Args:
        space: the search space.
        prices: of one cost at one width.

    Returns:
        The totals, then indices of mixers [T, 4] (without meaning for FFN_ONLY) and of FFNs [T, 4], by class.
    """
    enc, at = encoding(space), options_of(space)
    levels = np.unique(np.concatenate([prices.mixer_peak, prices.ffn_peak]))
    mixer = np.where(prices.mixer_peak <= levels[:, None], prices.mixer, np.inf)  # [T, O]
    ffn = np.where(prices.ffn_peak <= levels[:, None], prices.ffn, np.inf)  # [T, F]
    place = np.arange(len(prices.ffn))
    totals = prices.fixed + prices.of_patterns(enc.patterns) + levels[:, None]  # [T, P]
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
        with np.errstate(invalid="ignore"):  # 0 layers times an infinite cost
            totals += np.where(count == 0, 0.0, count * layer[:, None])
    return totals, chosen[0], chosen[1]


def assemble(space: Space, width: int, mixers: Ints, ffns: Ints) -> Genomes:
    """A genome [1, G] with the given counts.

    Args:
        space: the search space.
        width: index of the width.
        mixers: number of layers with each mixer option [O].
        ffns: number of layers with each FFN option [F].
    """
    enc, at = encoding(space), options_of(space)
    options = np.repeat(np.arange(len(mixers)), mixers)
    options = options[
        np.argsort(at.classes[options] != FULL, kind="stable")
    ]  # full attention first, for the slots that must be full
    sizes = np.repeat(np.arange(len(ffns)), ffns)  # ascending: layers without a mixer get the largest
    slots = np.concatenate([np.flatnonzero(enc.must_be_full), np.flatnonzero(~enc.must_be_full)])[
        : len(sizes)
    ]
    genome = np.zeros((1, enc.genes), np.int16)
    genome[0, 0] = width
    genome[0, 1 + 3 * slots[: len(options)]] = at.mixer[options]
    genome[0, 2 + 3 * slots[: len(options)]] = at.heads[options]
    genome[0, 3 + 3 * slots] = sizes
    return genome


def least_sum(space: Space, cost: Cost) -> tuple[float, Architecture]:
    """The exact minimum of a cost without a footprint, and an architecture that has it.

    Args:
        space: the search space.
        cost: without a footprint.

    Returns:
        An infinite value and the smallest architecture if every architecture has an op of infinite cost.
    """
    tables = [cheapest(space, prices_at(space, cost, width)) for width in range(len(space.width))]
    width = int(np.argmin([totals.min() for totals, _, _ in tables]))
    totals, mixer_at, ffn_at = tables[width]
    level, row = np.unravel_index(np.argmin(totals), totals.shape)
    if not np.isfinite(totals[level, row]):
        return np.inf, smallest(space)
    pattern = encoding(space).patterns[row]
    mixers = np.zeros(len(options_of(space).mixer), np.int64)
    np.add.at(mixers, mixer_at[level, 1:], pattern[1:])
    ffns = np.zeros(len(space.ffn_options), np.int64)
    np.add.at(ffns, ffn_at[level], pattern)
    genome = assemble(space, width, mixers, ffns)
    return float(cost(genome)[0]), decode(space, genome)[0]
