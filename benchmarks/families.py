"""Baselines: uniform models of known families at a given latency, and HAT's search.

A family is a pattern of mixers. Its members are uniform: one width, one number of heads and one FFN size for
all layers, in every combination of the space. A model is compared with the members whose latency is from its
own up to a tenth more (docs/adr/0013).
"""

from collections.abc import Callable
from itertools import product

import numpy as np

from search.strategies.hat import Hat
from search.strategies.strategy import Task
from space import Architecture, Layer, Space, genome
from space.genome import Genomes
from space.io.config import parse
from space.ops import Cost

Seconds = Callable[[list[Architecture]], np.ndarray]
Losses = Callable[[list[Architecture]], np.ndarray]
# Period of full-attention layers; 0: none.
FULL = {"Transformer": 1, "3:1 GatedDeltaNet": 4, "6:1 GatedDeltaNet": 7, "all-linear": 0}
HEADROOM = 1.1  # largest latency of a baseline relative to the model that it is compared with
MIN_CANDIDATES = 4  # regardless of their latency


def pattern(family: str, depth: int) -> list[str]:
    """Return the mixers of a family's member; the last of every period is full attention."""
    every = FULL[family]
    if not every:
        return ["gated_deltanet"] * depth
    full = {*range(every - 1, depth, every)}
    full |= {depth - 1} if len(full) < -(-depth // every) else set()  # n_full = ceil(m / (r + 1))
    return ["attention" if i in full else "gated_deltanet" for i in range(depth)]


def member(space: Space, family: str, width: int, depth: int, heads: int, ffn: int) -> Architecture:
    """Return a family's member, with its layers spread evenly over the slots of the supernet."""
    kv = heads // space.kv_group if space.kv_group else heads
    layers = [Layer()] * space.slots
    places = np.linspace(0, space.slots - 1, depth).round().astype(int)
    for place, mixer in zip(places, pattern(family, depth), strict=True):
        layers[place] = Layer(mixer=mixer, heads=heads, kv_heads=kv, ffn=ffn)
    return Architecture(width, tuple(layers))


def uniform(space: Space, family: str) -> list[Architecture]:
    """Return all members of a family: each width, depth, number of heads and FFN size of the space."""
    ffns = [size for size in space.layer.ffn if size]
    sizes = product(space.width, space.depth, space.layer.heads, ffns)
    return [member(space, family, *size) for size in sizes]


def scalings(members: list[Architecture], seconds: np.ndarray, least: float) -> list[Architecture]:
    """Return the members with a latency from ``least`` to a tenth more.

    If these are fewer than four, the quickest four of at least that latency; if there are none, the four
    slowest.

    Args:
        members: of one family.
        seconds: their predicted latencies.
        least: latency of the model that they are compared with, in seconds.
    """
    order = np.argsort(seconds, kind="stable")
    slow = order[seconds[order] >= least]
    near = slow[seconds[slow] <= HEADROOM * least]
    if len(near) < MIN_CANDIDATES:
        near = slow[:MIN_CANDIDATES] if len(slow) >= MIN_CANDIDATES else order[-MIN_CANDIDATES:]
    return [members[i] for i in near]


def attention_space(space: Space) -> Space:
    """Return the part of a space that HAT searches: every mixer is full attention."""
    value = space.model_dump(mode="json")
    value["name"] += "-attention"
    value["layer"] |= {"mixer": ["attention", "none"], "window": []}
    value["hybrid"] = {"ratios": ["full"]}
    return parse(Space, value, "attention")


def hat(
    space: Space,
    seconds: Seconds,
    losses: Losses,
    most: float,
    population: int,
    more: Callable[[int], bool],
    pool: Genomes | None = None,
    seed: int = 0,
) -> Architecture:
    """Return the best model of HAT's evolution (Wang et al. 2020) within a latency.

    Args:
        space: the search space.
        seconds: predicts the latency of architectures, in seconds.
        losses: evaluates the loss of architectures, in nats.
        most: the limit, in seconds.
        population: architectures of a generation.
        more: called before each generation with the number of completed ones; False ends the search.
        pool: initial genomes in addition to the smallest and the largest member.
        seed: of the random numbers.
    """

    def constraint_violation(rows: Genomes) -> np.ndarray:
        return np.maximum(0.0, seconds(genome.decode(space, rows)) / most - 1)

    ends = genome.encode(space, [genome.smallest(space), genome.largest(space)])
    ends = ends if pool is None else np.concatenate([ends, pool])
    costs: tuple[Cost | None, ...] = (None,)
    strategy = Hat(Task(space, costs, constraint_violation, ends, population, seed))
    best, least, done = None, np.inf, 0
    while more(done) and len(rows := strategy.ask()):
        members = genome.decode(space, rows)
        found = losses(members)
        strategy.tell(rows, found[:, None])
        done += 1
        if found.min() < least:
            best, least = members[int(found.argmin())], float(found.min())
    if best is None:
        raise RuntimeError(f"no member of {space.name} takes at most {1e3 * most:.3f} ms")
    return best
