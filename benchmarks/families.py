"""Models that a person would pick by hand, in every size that a latency allows; HAT's setting.

A family is a pattern of mixers. Its members are uniform, as hand-made models are: one width, one number of
heads and one FFN for all layers, in every combination that the space has. Against a model of some latency
stand those that take as long, or up to a tenth longer.
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
# Every how many-th layer is full attention; 0: none.
FULL = {"Transformer": 1, "3:1 GatedDeltaNet": 4, "6:1 GatedDeltaNet": 7, "all-linear": 0}
HEADROOM = 1.1  # a hand-made model may take so much longer than what it is held against
FEWEST = 4  # scalings that stand against a model, however much longer they take


def pattern(family: str, depth: int) -> list[str]:
    """The mixers of a family's member: the last of every group is full attention."""
    every = FULL[family]
    if not every:
        return ["gated_deltanet"] * depth
    full = {*range(every - 1, depth, every)}
    full |= {depth - 1} if len(full) < -(-depth // every) else set()  # n_full = ceil(m / (r + 1))
    return ["attention" if i in full else "gated_deltanet" for i in range(depth)]


def member(space: Space, family: str, width: int, depth: int, heads: int, ffn: int) -> Architecture:
    """A family's member, its layers spread evenly over the slots of the supernet."""
    kv = heads // space.kv_group if space.kv_group else heads
    layers = [Layer()] * space.slots
    places = np.linspace(0, space.slots - 1, depth).round().astype(int)
    for place, mixer in zip(places, pattern(family, depth), strict=True):
        layers[place] = Layer(mixer=mixer, heads=heads, kv_heads=kv, ffn=ffn)
    return Architecture(width, tuple(layers))


def uniform(space: Space, family: str) -> list[Architecture]:
    """All members of a family: each width, depth, number of heads and FFN of the space."""
    ffns = [size for size in space.layer.ffn if size]
    sizes = product(space.width, space.depth, space.layer.heads, ffns)
    return [member(space, family, *size) for size in sizes]


def scalings(members: list[Architecture], seconds: np.ndarray, least: float) -> list[Architecture]:
    """Of a family's members those that take at least so long and at most a tenth longer.

    Where these are fewer than four, the quickest four that take at least so long; where nothing takes so
    long, the four slowest.
    """
    order = np.argsort(seconds, kind="stable")
    slow = order[seconds[order] >= least]
    near = slow[seconds[slow] <= HEADROOM * least]
    if len(near) < FEWEST:
        near = slow[:FEWEST] if len(slow) >= FEWEST else order[-FEWEST:]
    return [members[i] for i in near]


def attention_space(space: Space) -> Space:
    """The part of a space that HAT searches: every mixer is full attention."""
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
    """The best of HAT's evolution (Wang et al. 2020) among members within a latency.

    ``more`` is asked before each generation, with the number of those that are done; ``pool`` are genomes to
    begin with, beside the smallest and the largest member.
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
