"""Models that a person would pick by hand, in every depth and width that a latency allows; HAT's setting.

A family is a pattern of mixers. Of each width it has one member: the shallowest whose predicted latency is no
lower than that of the model it is held against, heads and FFN being what is usual for the width.
"""

from collections.abc import Callable

import numpy as np

from search.evolution import Hat
from search.strategies import Task
from space import Architecture, Layer, Space, genome
from space.config import parse
from space.genome import Genomes
from space.ops import Cost

Seconds = Callable[[list[Architecture]], np.ndarray]
Loss = Callable[[Architecture], float]
FULL = {
    "Transformer": 1,
    "3:1 GatedDeltaNet": 4,
    "6:1 GatedDeltaNet": 7,
    "all-linear": 0,
}  # every how many-th
FFN = 8 / 3  # of the width, as in Llama (Touvron et al. 2023)


def pattern(family: str, depth: int) -> list[str]:
    """The mixers of a family's member: the last of every group is full attention."""
    every = FULL[family]
    if not every:
        return ["gated_deltanet"] * depth
    full = {*range(every - 1, depth, every)}
    full |= {depth - 1} if len(full) < -(-depth // every) else set()  # n_full = ceil(m / (r + 1))
    return ["attention" if i in full else "gated_deltanet" for i in range(depth)]


def nearest(options: tuple[int, ...], wanted: float) -> int:
    """The option that is nearest to what is wanted; 0 does not count."""
    return min((option for option in options if option), key=lambda option: abs(option - wanted))


def member(space: Space, family: str, width: int, depth: int) -> Architecture:
    """A family's member, its layers spread evenly over the slots of the supernet."""
    heads = nearest(space.layer.heads, width / space.head_dim)
    kv = heads // space.kv_group if space.kv_group else heads
    hidden = nearest(space.layer.ffn, FFN * width)
    layers = [Layer()] * space.slots
    places = np.linspace(0, space.slots - 1, depth).round().astype(int)
    for place, mixer in zip(places, pattern(family, depth), strict=True):
        layers[place] = Layer(mixer=mixer, heads=heads, kv_heads=kv, ffn=hidden)
    return Architecture(width, tuple(layers))


def scalings(space: Space, family: str, seconds: Seconds, least: float) -> list[Architecture]:
    """Of each width the shallowest member that takes at least so long, or the deepest that there is."""
    found = []
    for width in space.width:
        members = [member(space, family, width, depth) for depth in space.depth]
        slow = np.flatnonzero(seconds(members) >= least)
        found.append(members[slow[0]] if len(slow) else members[-1])
    return found


def attention_space(space: Space) -> Space:
    """The part of a space that HAT searches: every mixer is full attention."""
    value = space.model_dump(mode="json")
    value["name"] += "-attention"
    value["layer"] |= {"mixer": ["attention", "none"], "window": []}
    value["hybrid"] = {"ratios": ["full"]}
    return parse(Space, value, "attention")


def hat(
    space: Space, seconds: Seconds, loss: Loss, most: float, population: int, generations: int, seed: int = 0
) -> Architecture:
    """The best of HAT's evolution (Wang et al. 2020) among attention-only members within a latency."""
    part = attention_space(space)

    def violations(rows: Genomes) -> np.ndarray:
        return np.maximum(0.0, seconds(genome.decode(part, rows)) / most - 1)

    ends = genome.encode(part, [genome.smallest(part), genome.largest(part)])
    costs: tuple[Cost | None, ...] = (None,)
    strategy = Hat(Task(part, costs, violations, ends, population, seed))
    best, least = None, np.inf
    for _ in range(generations):
        rows = strategy.ask()
        if not len(rows):
            break
        members = genome.decode(part, rows)
        losses = np.array([loss(a) for a in members])
        strategy.tell(rows, losses[:, None])
        if losses.min() < least:
            best, least = members[int(losses.argmin())], float(losses.min())
    if best is None:
        raise RuntimeError(f"no attention-only member of {space.name} takes at most {1e3 * most:.3f} ms")
    return best
