"""Sampling, repair, mutation and crossover of genomes, vectorised over arrays [N, G].

Every function draws from the generator that it is given. Constraints are met by construction, not by
rejection. Shape suffixes: N genomes, G genes, L slots, P patterns (layer counts).
"""

from functools import lru_cache
from math import comb

import numpy as np
from numpy.typing import NDArray

from space.genome import (
    EMPTY,
    FFN_ONLY,
    FULL,
    LINEAR,
    LOCAL,
    Genomes,
    canonical,
    encoding,
    pattern_counts,
    slot_classes,
    split,
)
from space.space import LayerCounts, Ratio, Space


def _top(keys: NDArray[np.float64], count: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mask of the ``count`` greatest keys of each row; -inf is never marked."""
    rank = np.argsort(np.argsort(-keys, axis=1, kind="stable"), axis=1, kind="stable")
    return (rank < count[:, None]) & np.isfinite(keys)


def _place(
    space: Space,
    genomes: Genomes,
    patterns: NDArray[np.int64],
    kinds: NDArray[np.int64],
    rng: np.random.Generator,
) -> Genomes:
    """Change as few slots as possible to reach given layer counts and numbers of linear mixers.

    Slots that already have a wanted class keep it first; ties are drawn at random.

    Args:
        space: the space.
        genomes: genomes [N, G].
        patterns: wanted layer counts [N, 4].
        kinds: greatest number of distinct linear mixers [N].
        rng: source of randomness.
    """
    enc = encoding(space)
    genomes = genomes.copy()
    _, mixer, heads, ffn = split(genomes)
    rows, slots = mixer.shape
    classes = slot_classes(space, genomes)
    wanted = np.full((rows, slots), EMPTY)
    free = np.ones((rows, slots), bool)
    # First slots keep their class; then the remaining counts are filled from other layers, then empty slots.
    for stay in (True, False):
        for kind, column in ((FULL, 1), (FFN_ONLY, 0), (LOCAL, 3), (LINEAR, 2)):
            must_be_full = enc.must_be_full & (kind == FULL)
            allowed = free & ((classes == kind) | must_be_full) if stay else free
            keys = np.where(
                allowed, (classes != EMPTY) + 2.0 * must_be_full + rng.random((rows, slots)), -np.inf
            )
            chosen = _top(keys, patterns[:, column] - (wanted == kind).sum(axis=1))
            wanted[chosen] = kind
            free &= ~chosen

    had_heads = ~enc.headless[mixer]
    for kind in (FULL, LOCAL, LINEAR):
        options = np.flatnonzero(enc.classes == kind)
        change = (wanted == kind) & (classes != kind)
        if change.any():
            mixer[change] = rng.choice(options, change.sum())
    mixer[np.asarray(wanted <= FFN_ONLY)] = 0
    _limit_kinds(space, mixer, wanted, kinds, rng)

    gained = ~enc.headless[mixer] & ~had_heads
    heads[gained] = rng.integers(0, len(space.head_options), gained.sum())
    least = np.where(wanted == FFN_ONLY, 1, enc.least_ffn)
    lacking = (wanted != EMPTY) & (ffn < least)
    ffn[lacking] = rng.integers(1, len(space.ffn_options), lacking.sum()) if lacking.any() else 0
    ffn[wanted == EMPTY] = 0
    return canonical(space, genomes)


def _limit_kinds(
    space: Space,
    mixer: Genomes,
    classes: NDArray[np.int64],
    kinds: NDArray[np.int64],
    rng: np.random.Generator,
) -> None:
    """In rows with too many linear mixers, keep the most used ones and redraw the slots of the others."""
    enc = encoding(space)
    if enc.kind_count == 0:
        return
    kind_of = enc.linear_kinds[mixer]
    used = np.stack([(kind_of == k).sum(axis=1) for k in range(enc.kind_count)], axis=1)
    keys = np.where(used > 0, used + rng.random(used.shape), -np.inf)
    kept = _top(keys, kinds)  # [N, kinds]
    option_kept = np.zeros((len(mixer), len(enc.linear_kinds)), bool)
    linear = enc.linear_kinds >= 0
    option_kept[:, linear] = kept[:, enc.linear_kinds[linear]]
    draws = rng.random((*mixer.shape, len(enc.linear_kinds)))
    drawn = np.argmax(np.where(option_kept[:, None, :], draws, -1.0), axis=2)
    redraw = (classes == LINEAR) & ~np.take_along_axis(option_kept, mixer.astype(np.int64), axis=1)
    mixer[redraw] = drawn[redraw]


def sample(space: Space, rng: np.random.Generator, count: int) -> Genomes:
    """Draw genomes [count, G].

    Depth, ratio and number of linear mixers are drawn first, each uniformly, so that the extremes are as
    likely as the middle; then the layers' slots, mixers and sizes.

    Args:
        space: the space.
        rng: source of randomness.
        count: number of genomes.
    """
    enc = encoding(space)
    raw = rng.integers(0, enc.cardinalities, (count, enc.genes)).astype(np.int16)
    raw[:, 1::3] = rng.integers(1, len(space.mixer_options), (count, enc.slots))
    raw[:, 3::3] = rng.integers(enc.least_ffn, len(space.ffn_options), (count, enc.slots))
    cells = list(space.patterns)
    depths = sorted({depth for depth, _ in cells})
    depth = np.array(depths)[rng.integers(0, len(depths), count)]
    patterns = np.empty((count, 4), np.int64)
    u_ratio, u_pattern = rng.random(count), rng.random(count)
    for d in depths:
        rows = np.flatnonzero(depth == d)
        ratios = [r for depth_, r in cells if depth_ == d]
        picked = (u_ratio[rows] * len(ratios)).astype(int)
        for i, ratio in enumerate(ratios):
            chosen = rows[picked == i]
            choices = space.patterns[d, ratio]
            weights = _pattern_weights(space, choices, ratio)
            at = np.searchsorted(weights / weights[-1], u_pattern[chosen], side="right")
            patterns[chosen] = np.array(choices)[np.minimum(at, len(choices) - 1)]
    kinds = rng.integers(1, space.max_linear_kinds + 1, count)
    return _place(space, raw, patterns, kinds, rng)


@lru_cache(maxsize=1024)
def _pattern_weights(space: Space, patterns: tuple[LayerCounts, ...], ratio: Ratio) -> NDArray[np.float64]:
    """Cumulative weights of patterns; ``any`` has several with so many mixers, which are equally likely."""
    counts = [len(space.full_counts(ratio, p.full + p.linear)) for p in patterns]
    weights = [_pattern_weight(space, p) / n for p, n in zip(patterns, counts, strict=True)]
    return np.array(weights).cumsum()


def _pattern_weight(space: Space, pattern: LayerCounts) -> float:
    """The number of mixer sequences with this many FFN-only and local layers, for uniformly drawn mixers."""
    options = len(space.layer.mixer)
    local = sum(space.mixer_class(m) == "local" for m in space.layer.mixer if m != "none")
    ffn_only = 1 if "none" in space.layer.mixer else 0
    rest = max(options - local - ffn_only, 1)
    depth = pattern.depth
    ways = comb(depth, pattern.ffn_only) * comb(depth - pattern.ffn_only, pattern.local)
    mixers = ffn_only**pattern.ffn_only * local**pattern.local * rest ** (pattern.full + pattern.linear)
    return float(ways * mixers)


def repair(space: Space, genomes: Genomes, rng: np.random.Generator) -> Genomes:
    """Canonical genomes of the space nearest to any integers; ties are broken at random.

    Args:
        space: the space.
        genomes: any integers [N, G].
        rng: source of randomness.
    """
    enc = encoding(space)
    clipped = np.clip(genomes, 0, enc.cardinalities - 1).astype(np.int16)
    classes = np.where(enc.must_be_full, FULL, slot_classes(space, clipped))
    difference = pattern_counts(classes)[:, None, :] - enc.patterns[None]  # [N, P, 4]
    distance = np.abs(difference).sum(axis=2) + np.abs(difference.sum(axis=2))  # twice the changes
    nearest = np.argmin(distance + 0.5 * rng.random(distance.shape), axis=1)
    kinds = np.full(len(clipped), space.max_linear_kinds)
    return _place(space, clipped, enc.patterns[nearest], kinds, rng)


def mutate(space: Space, genomes: Genomes, rng: np.random.Generator, rate: float | None = None) -> Genomes:
    """Mutate genomes: redraw each gene with a probability, and repair.

    Half of the rows, at random, also make a move that changes several genes together: exchange two slots,
    move a layer with a full mixer, or take the layer counts of a fresh sample.

    Args:
        space: the space.
        genomes: canonical genomes [N, G].
        rng: source of randomness.
        rate: probability per gene; None is 2 / G.
    """
    enc = encoding(space)
    rate = 2.0 / enc.genes if rate is None else rate
    fresh = rng.integers(0, enc.cardinalities, genomes.shape)
    mutated = np.where(rng.random(genomes.shape) < rate, fresh, genomes).astype(np.int16)
    move = rng.integers(0, 6, len(genomes))
    mutated[move == 0] = _exchange_slots(space, mutated[move == 0], rng)
    mutated[move == 1] = _move_full(space, mutated[move == 1], rng)
    repaired = repair(space, mutated, rng)
    other = move == 2
    if other.any():
        targets = pattern_counts(slot_classes(space, sample(space, rng, int(other.sum()))))
        kinds = np.full(len(targets), space.max_linear_kinds)
        repaired[other] = _place(space, repaired[other], targets, kinds, rng)
    return repaired


def _exchange_slots(space: Space, genomes: Genomes, rng: np.random.Generator) -> Genomes:
    """Copies with two random slots exchanged."""
    order = np.tile(np.arange(encoding(space).slots), (len(genomes), 1))
    row, (a, b) = np.arange(len(genomes)), rng.integers(0, order.shape[1], (2, len(genomes)))
    order[row, a], order[row, b] = b, a
    return _with_slots(genomes, _slots(genomes)[row[:, None], order])


def _move_full(space: Space, genomes: Genomes, rng: np.random.Generator) -> Genomes:
    """Copies in which a random full layer and another layer have exchanged mixer and heads."""
    enc = encoding(space)
    classes = slot_classes(space, genomes)
    full = (classes == FULL) & ~enc.must_be_full
    other = (classes != FULL) & (classes != EMPTY)
    draws = rng.random((2, *classes.shape))
    a = np.where(full, draws[0], -1).argmax(axis=1)
    b = np.where(other, draws[1], -1).argmax(axis=1)
    movable = np.flatnonzero(full.any(axis=1) & other.any(axis=1))
    slots = _slots(genomes).copy()
    a, b = a[movable], b[movable]
    slots[movable, a, :2], slots[movable, b, :2] = slots[movable, b, :2], slots[movable, a, :2]
    return _with_slots(genomes, slots)


def _slots(genomes: Genomes) -> Genomes:
    """The mixer, head and FFN gene of every slot [N, L, 3]."""
    return genomes[:, 1:].reshape(len(genomes), genomes.shape[1] // 3, 3)


def _with_slots(genomes: Genomes, slots: Genomes) -> Genomes:
    """Copies of genomes [N, G] with other genes of slots [N, L, 3]."""
    return np.concatenate([genomes[:, :1], slots.reshape(len(genomes), genomes.shape[1] - 1)], axis=1)


def crossover(space: Space, first: Genomes, second: Genomes, rng: np.random.Generator) -> Genomes:
    """Uniform crossover by slots, and repair: children take the width and every slot from either parent.

    Args:
        space: the space.
        first: parents [N, G].
        second: other parents [N, G].
        rng: source of randomness.
    """
    return repair(space, mix(first, second, rng), rng)


def mix(first: Genomes, second: Genomes, rng: np.random.Generator) -> Genomes:
    """:func:`crossover` without the repair, for children that :func:`mutate` repairs.

    Args:
        first: parents [N, G].
        second: other parents [N, G].
        rng: source of randomness.
    """
    choice = rng.random((len(first), 1 + first.shape[1] // 3)) < 0.5
    mask = np.concatenate([choice[:, :1], np.repeat(choice[:, 1:], 3, axis=1)], axis=1)
    return np.where(mask, first, second).astype(np.int16)
