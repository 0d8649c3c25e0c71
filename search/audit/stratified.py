"""Architectures that differ: the sets on which a supernet's ranking is judged.

A set is chosen greedily from a pool of sampled genomes. Along every axis (depth, hybrid ratio,
width, linear kind, FFN size) the values taken least so far come first, so that each value is met
where the set is large enough; among equals the genome farthest from those chosen is taken
(maximin). At equal latency the same is done within a band around one predicted latency.
"""

import numpy as np
from numpy.typing import NDArray

from space import InputError, Space, genome, variation
from space.genome import Genomes
from space.ops import Cost, depths

POOL = 20_000  # sampled genomes that a set is chosen from
LEAST = 3  # architectures; two of them have nothing but one order
Array = NDArray[np.float64]


def sample_pool(space: Space, seed: int, count: int = POOL) -> Genomes:
    """Distinct sampled genomes [N, G], N <= count, in an order that depends on the seed alone."""
    rng = np.random.default_rng([seed, 5])
    return rng.permutation(np.unique(variation.sample(space, rng, count), axis=0))


def axis_levels(space: Space, genomes: Genomes) -> dict[str, NDArray[np.int64]]:
    """Which value [N] each genome has along each axis, as an index.

    An architecture that several ratios allow counts for the first of full, linear, 1, 2, ...;
    its linear kind is the one that most layers have; its FFN size is the mean, in thirds of the greatest.
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
    """The index into full, linear, 1, 2, ... of each genome's ratio [N]."""
    ratios = sorted(space.hybrid.ratios, key=lambda r: (isinstance(r, int), r))
    patterns = genome.pattern_counts(genome.slot_classes(space, genomes))
    found, which = np.unique(patterns, axis=0, return_inverse=True)
    first = [
        next(i for i, r in enumerate(ratios) if tuple(row) in space.patterns.get((int(row.sum()), r), ()))
        for row in found
    ]
    return np.asarray(np.array(first)[which.ravel()], np.int64)


def _means(space: Space, genomes: Genomes) -> tuple[Array, Array]:
    """The mean FFN size over the layers and the mean heads over the layers with heads, as shares: [N]."""
    _, mixer, heads, ffn = genome.split(genomes)
    sizes = np.array(space.ffn_options)[ffn].sum(axis=1) / depths(genomes)
    headed = ~genome.encoding(space).headless[mixer]
    counts = np.where(headed, np.array([h for h, _ in space.head_options])[heads], 0).sum(axis=1)
    counts = counts / np.maximum(headed.sum(axis=1), 1)
    most = max(h for h, _ in space.head_options)
    return sizes / max(*space.ffn_options, 1), counts / most


def features(space: Space, genomes: Genomes) -> Array:
    """What genomes are made of, for their distances [N, F], each between 0 and 1.

    Depth, width, mean FFN size, mean heads, and the share of the layers that each mixer has.
    """
    depth = depths(genomes)
    mixer = genome.split(genomes)[1]
    options = range(1, len(space.mixer_options))
    shares = [(mixer == option).sum(axis=1) / depth for option in options]
    width = np.array(space.width)[genomes[:, 0]] / max(space.width)
    return np.column_stack([depth / space.slots, width, *_means(space, genomes), *shares])


def choose_spread(space: Space, pool: Genomes, count: int) -> Genomes:
    """The genomes [count, G] of a pool that differ most; all of a smaller pool.

    Raises:
        InputError: the pool has fewer than three.
    """
    if len(pool) < LEAST:
        raise InputError(
            f"space {space.name}: {len(pool)} architectures to compare, at least {LEAST} are needed"
        )
    levels = [np.unique(level, return_inverse=True)[1] for level in axis_levels(space, pool).values()]
    sizes = [int(level.max()) + 1 for level in levels]
    taken = [np.zeros(size) for size in sizes]
    points = features(space, pool)
    distance = np.full(len(pool), np.inf)  # to the nearest of those chosen
    free = np.ones(len(pool), bool)
    chosen: list[int] = []
    while len(chosen) < min(count, len(pool)):
        uses = np.stack([n[level] for n, level in zip(taken, levels, strict=True)])  # [axes, N]
        balance = np.array(sizes) @ uses  # a value of an axis with few of them is due more often
        order = np.lexsort((-distance, balance, -(uses == 0).sum(axis=0), ~free))
        best = int(order[0])
        chosen.append(best)
        distance = np.minimum(distance, np.linalg.norm(points - points[best], axis=1))
        free[best] = False
        for n, level in zip(taken, levels, strict=True):
            n[level[best]] += 1
    return pool[chosen]


def crowded_level(seconds: Array, within: float) -> float:
    """The latency with the most of the given ones [N] within a share of it; the least of equals."""
    ordered = np.sort(seconds)
    first = np.searchsorted(ordered, ordered * (1 - within), "left")
    past = np.searchsorted(ordered, ordered * (1 + within), "right")
    return float(ordered[np.argmax(past - first)])


def choose_equal(
    space: Space, pool: Genomes, latency: Cost, within: float, count: int
) -> tuple[Genomes, float]:
    """Genomes [count, G] within a share of one latency, and that latency in seconds.

    It is the one around which most of the pool lies.

    Raises:
        InputError: fewer than three lie there.
    """
    seconds = latency(pool)
    level = crowded_level(seconds, within)
    return choose_spread(space, pool[np.abs(seconds / level - 1) <= within], count), level
