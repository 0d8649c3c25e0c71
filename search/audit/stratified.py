"""Stratified sets of architectures, on which a supernet's ranking is audited.

A set is chosen greedily from a pool of sampled genomes. Genomes with the values that were chosen least often
along the axes (depth, hybrid ratio, width, linear kind, FFN size) come first, so that a large enough set has
every value; among equals, the genome farthest from the chosen ones is taken (maximin). The set of equal
latency is chosen in the same way from the genomes in a band around one predicted latency.
"""

import numpy as np
from numpy.typing import NDArray

from space import InputError, Space, genome, variation
from space.genome import Genomes
from space.ops import Cost, depths

POOL_SIZE = 20_000  # sampled genomes that a set is chosen from
MIN_ARCHITECTURES = 3  # of a set: two can only be ranked right or wrong
Array = NDArray[np.float64]


def sample_pool(space: Space, seed: int, count: int = POOL_SIZE) -> Genomes:
    """Distinct sampled genomes [N, G], N <= count, in random order.

    Args:
        space: the search space.
        seed: determines genomes and order.
        count: genomes sampled.
    """
    rng = np.random.default_rng([seed, 5])
    return rng.permutation(np.unique(variation.sample(space, rng, count), axis=0))


def axis_levels(space: Space, genomes: Genomes) -> dict[str, NDArray[np.int64]]:
    """Index of the value [N] of each genome along each axis.

    An architecture that several ratios allow counts for the first of full, linear, 1, 2, ..., any; its kind
    is the most frequent one; its FFN size is the mean, in thirds of the largest.

    Args:
        space: the search space.
        genomes: [N, G].
    """
    kinds = genome.kinds_used(space, genomes)
    kind = np.where(kinds.sum(axis=1) > 0, kinds.argmax(axis=1) if kinds.shape[1] else 0, -1)
    return {
        "depth": depths(genomes),
        "ratio": _ratios(space, genomes),
        "width": genomes[:, 0].astype(np.int64),
        "linear kind": np.asarray(kind, np.int64),
        "ffn": np.digitize(_means(space, genomes)[0], [1 / 3, 2 / 3]).astype(np.int64),
    }


def _ratios(space: Space, genomes: Genomes) -> NDArray[np.int64]:
    """Index into full, linear, 1, 2, ..., any of each genome's ratio [N]."""
    ratios = sorted(space.hybrid.ratios, key=lambda r: (r == "any", isinstance(r, int), r))
    patterns = genome.pattern_counts(genome.slot_classes(space, genomes))
    found, which = np.unique(patterns, axis=0, return_inverse=True)
    first = [
        next(i for i, r in enumerate(ratios) if tuple(row) in space.patterns.get((int(row.sum()), r), ()))
        for row in found
    ]
    return np.asarray(np.array(first)[which.ravel()], np.int64)


def _means(space: Space, genomes: Genomes) -> tuple[Array, Array]:
    """Mean FFN size over layers and mean heads over layers with heads, as shares of the largest: [N] each."""
    _, mixer, heads, ffn = genome.split(genomes)
    sizes = np.array(space.ffn_options)[ffn].sum(axis=1) / depths(genomes)
    headed = ~genome.encoding(space).headless[mixer]
    counts = np.where(headed, np.array([h for h, _ in space.head_options])[heads], 0).sum(axis=1)
    counts = counts / np.maximum(headed.sum(axis=1), 1)
    max_heads = max(h for h, _ in space.head_options)
    return sizes / max(*space.ffn_options, 1), counts / max_heads


def features(space: Space, genomes: Genomes) -> Array:
    """Features [N, F] for distances of genomes, each between 0 and 1.

    They are depth, width, mean FFN size, mean heads, and the share of layers with each mixer.

    Args:
        space: the search space.
        genomes: [N, G].
    """
    depth = depths(genomes)
    mixer = genome.split(genomes)[1]
    options = range(1, len(space.mixer_options))
    shares = [(mixer == option).sum(axis=1) / depth for option in options]
    width = np.array(space.width)[genomes[:, 0]] / max(space.width)
    return np.column_stack([depth / space.slots, width, *_means(space, genomes), *shares])


def choose_diverse(space: Space, pool: Genomes, count: int) -> Genomes:
    """A diverse subset [count, G] of a pool; all of a smaller pool.

    Args:
        space: the search space.
        pool: genomes [N, G].
        count: size of the subset.

    Raises:
        InputError: the pool has fewer than three.
    """
    if len(pool) < MIN_ARCHITECTURES:
        raise InputError(
            f"space {space.name}: {len(pool)} architectures to compare, "
            f"at least {MIN_ARCHITECTURES} are needed"
        )
    levels = [np.unique(level, return_inverse=True)[1] for level in axis_levels(space, pool).values()]
    sizes = [int(level.max()) + 1 for level in levels]
    uses_by_axis = [np.zeros(size) for size in sizes]
    points = features(space, pool)
    distance = np.full(len(pool), np.inf)  # to the nearest chosen genome
    free = np.ones(len(pool), bool)
    chosen: list[int] = []
    while len(chosen) < min(count, len(pool)):
        uses = np.stack([n[level] for n, level in zip(uses_by_axis, levels, strict=True)])  # [axes, N]
        balance = np.array(sizes) @ uses  # a value of an axis with few values is chosen more often
        # Free genomes first, by the number of values not chosen yet, then by balance, then by distance.
        order = np.lexsort((-distance, balance, -(uses == 0).sum(axis=0), ~free))
        best = int(order[0])
        chosen.append(best)
        distance = np.minimum(distance, np.linalg.norm(points - points[best], axis=1))
        free[best] = False
        for n, level in zip(uses_by_axis, levels, strict=True):
            n[level[best]] += 1
    return pool[chosen]


def crowded_level(seconds: Array, within: float) -> float:
    """The latency that has the most others within a relative distance; the smallest of equals.

    Args:
        seconds: latencies [N].
        within: relative distance.
    """
    ordered = np.sort(seconds)
    first = np.searchsorted(ordered, ordered * (1 - within), "left")
    past = np.searchsorted(ordered, ordered * (1 + within), "right")
    return float(ordered[np.argmax(past - first)])


def choose_equal(
    space: Space, pool: Genomes, latency: Cost, within: float, count: int
) -> tuple[Genomes, float]:
    """A diverse subset of a pool at about equal latency, that of most of the pool.

    Args:
        space: the search space.
        pool: genomes [N, G].
        latency: in seconds.
        within: largest relative difference to the common latency.
        count: size of the subset.

    Returns:
        Genomes [count, G], and the common latency in seconds.

    Raises:
        InputError: fewer than three have about that latency.
    """
    seconds = latency(pool)
    level = crowded_level(seconds, within)
    return choose_diverse(space, pool[np.abs(seconds / level - 1) <= within], count), level
