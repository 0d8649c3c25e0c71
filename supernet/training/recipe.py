"""The training recipe: which architectures a step trains, and how fast it learns.

The sandwich rule (Yu and Huang 2019) trains the maximal-size member, the smallest and a few
sampled ones in every step. Every second step the maximal-size member is ``largest()``; on the
others its mixers are drawn by a cycle over all (ratio, linear kind) pairs, so that linear
mixers train at full size as often as each other (the fairness of FairNAS, Chu et al. 2021); the
sampled ones may be drawn fairly too. Axes may be opened one at a time (Once-for-All, Cai et al. 2020);
or depth grows: shallow architectures come first, which cost little, and matrices that write to the
residual stream start at zero, so that a new layer changes nothing at first.

Each part has a switch, and ``benchmarks/recipe.py`` measures what it is worth. Everything random
in step n is drawn from a generator seeded with (seed, n), so that a run that was killed and
resumed takes the very same steps as one that was not.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from space import Architecture, Space, genome, variation
from space.genome import Genomes
from space.ops import depths
from supernet.data.corpus import DataConfig

CANDIDATES = 32  # genomes drawn for each member that is chosen
AXES = ("mixer", "ffn", "heads", "depth", "width")  # in the order in which they are opened


class TrainConfig(BaseModel):
    """How the supernet is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    data: DataConfig = DataConfig()
    init: Path | None = None  # a LlamaForCausalLM folder to start from
    steps: Annotated[int, Field(gt=0)] = 2000
    batch: Annotated[int, Field(gt=0)] = 4  # rows that a member sees in a step
    length: Annotated[int, Field(gt=1)] | None = None  # None: the space's context
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.02  # share of steps in which the rate rises
    rule: Literal["sandwich", "random"] = "sandwich"  # random: the sampled members alone
    sampled: Annotated[int, Field(ge=0)] = 7
    fair: bool = True  # sampled members of a step have every mixer about equally often
    # Each member of a step has rows of its own and changes the weights at once; or all share the rows
    # and one update, as in the papers.
    members: Literal["in turn", "together"] = "in turn"
    largest_only: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of steps before the rule starts
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0  # weight of the teacher against the text
    teacher: Literal["same-step", "largest"] = "same-step"  # the step's maximal-size member, or largest()
    open_axes: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of steps, after those, until all are open
    # Share of steps in which the members' depth rises to the space's; 0 where nothing else is said and the
    # training starts from a trained model or with its largest members.
    grow: Annotated[float, Field(ge=0, lt=1)] = 0.4
    maximal_mixers: bool = True  # every second maximal-size member has linear mixers
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    threads: Annotated[int, Field(gt=0)] | None = None  # None: all cores
    workers: Annotated[int, Field(ge=0)] = 0  # data-parallel processes; 0 trains in this one
    checkpoint_every: Annotated[int, Field(gt=0)] = 100
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="before")
    @classmethod
    def _grow_from_nothing(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and any(value.get(k) for k in ("init", "largest_only", "open_axes")):
            return {"grow": 0.0, **value}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.largest_only + self.open_axes >= 1:
            raise ValueError("largest_only and open_axes leave no step that trains the whole space")
        if self.grow and self.largest_only + self.open_axes:
            raise ValueError("largest_only and open_axes begin with deep members: set grow: 0 with them")
        if self.rule == "random" and self.distillation:
            raise ValueError("rule: random has no teacher, so distillation must be 0")
        return self


def member_count(config: TrainConfig, step: int) -> int:
    """How many members a step of the supernet's training has."""
    if step < config.largest_only * config.steps:
        return 1
    return max(1, config.sampled) if config.rule == "random" else 2 + config.sampled


def members(space: Space, config: TrainConfig, step: int) -> list[Architecture]:
    """The architectures of a step: the maximal-size one first, then the smallest and the sampled.

    While depth grows, the first is the largest of those that were drawn.
    """
    if step < config.largest_only * config.steps:
        return [genome.largest(space)]
    rng = np.random.default_rng([config.seed, step, 1])
    opened = narrowed(space, open_axes(config, step))
    deepest = deepest_member(opened, config, step)
    count = member_count(config, step)
    if config.rule == "random":
        return genome.decode(opened, draw_members(opened, rng, count, config.fair, deepest))
    if deepest < allowed_depths(opened)[-1]:  # no member has the maximal size yet
        drawn = genome.decode(opened, draw_members(opened, rng, count - 1, config.fair, deepest))
        first, *sampled = sorted(drawn, key=lambda a: (a.depth, a.width), reverse=True)
        return [first, genome.smallest(opened), *sampled]
    sampled = genome.decode(opened, draw_members(opened, rng, count - 2, config.fair, deepest))
    first = genome.largest(space)
    if config.maximal_mixers and step % 2:
        first = _maximal(space, config.seed, step // 2, rng)
    return [first, genome.smallest(opened), *sampled]


def draw_members(space: Space, rng: np.random.Generator, count: int, fair: bool, deepest: int) -> Genomes:
    """Draw genomes [count, G] of at most so many layers, their depths evenly.

    Drawn evenly over ratios, attention has several times the layers of any linear mixer, and what is
    trained more looks better. If ``fair``, of many drawn genomes of a depth the one is taken that leaves
    the mixers' shares of all layers most alike.
    """
    if not count or (deepest == allowed_depths(space)[-1] and not fair):
        return variation.sample(space, rng, count)
    pool = variation.sample(space, rng, CANDIDATES * count)
    pool = pool[depths(pool) <= deepest]
    while len(pool) < count:
        more = variation.sample(space, rng, CANDIDATES * count)
        pool = np.concatenate([pool, more[depths(more) <= deepest]])
    if not fair:
        return pool[:count]
    depth, mixer = depths(pool), genome.split(pool)[1]
    options = [i for i, (name, _) in enumerate(space.mixer_options) if i and name != "none"]
    layers = np.stack([(mixer == option).sum(axis=1) for option in options], axis=1).astype(np.float64)
    used, chosen = np.zeros(len(options)), []
    for wanted in depth[:count]:
        total = used + layers  # [N, options]
        unevenness = (total**2).sum(axis=1) / np.maximum(total.sum(axis=1), 1) ** 2
        chosen.append(int(np.where(depth == wanted, unevenness, np.inf).argmin()))
        used = total[chosen[-1]]
    return pool[chosen]


def allowed_depths(space: Space) -> list[int]:
    """The depths that some architecture of a space has, in rising order."""
    return sorted({depth for depth, _ in space.patterns})


def deepest_member(space: Space, config: TrainConfig, step: int) -> int:
    """How many layers the sampled members of a step have at most."""
    allowed = allowed_depths(space)
    if step >= config.grow * config.steps:
        return allowed[-1]
    return allowed[int(step / (config.grow * config.steps) * len(allowed))]


def open_axes(config: TrainConfig, step: int) -> tuple[str, ...]:
    """The axes along which the members of a step differ from ``largest()``."""
    begin = config.largest_only * config.steps
    until = config.open_axes * config.steps
    if step >= begin + until:
        return AXES
    return AXES[: 1 + int((step - begin) / until * len(AXES))]


@lru_cache(maxsize=32)
def narrowed(space: Space, axes: tuple[str, ...]) -> Space:
    """The part of a space that differs from its largest architecture along some axes only."""
    if set(axes) == set(AXES):
        return space
    value = space.model_dump(mode="json")
    layer = value["layer"]
    closed = set(AXES) - set(axes)
    if "width" in closed:
        value["width"] = value["width"][-1:]
    if "depth" in closed:
        value["depth"] = value["depth"][-1:]
        layer["mixer"] = [m for m in layer["mixer"] if m != "none"]
    if "heads" in closed:
        heads, kv_heads = space.head_options[-1]
        layer["heads"] = [heads]
        layer["kv_heads"] = layer["kv_heads"] and [kv_heads]
    if "ffn" in closed:
        layer["ffn"] = layer["ffn"][-1:]
    return Space.model_validate(value)


def _maximal(space: Space, seed: int, turn: int, rng: np.random.Generator) -> Architecture:
    """A member of maximal sizes whose ratio and linear mixer come from a shuffled cycle.

    Local mixers that the ratio does not count (``hybrid.local: separate``) are left to the sampled members.
    """
    depth = max(d for d, _ in space.patterns)
    ratios = [r for d, r in space.patterns if d == depth]
    linear = [i for i, (m, _) in enumerate(space.mixer_options) if i and space.mixer_class(m) == "linear"]
    pairs = [(r, m) for r in ratios for m in linear or [0] if r != "full" or not linear]
    if not pairs:
        return genome.largest(space)
    cycle = np.random.default_rng([seed, turn // len(pairs), 2]).permutation(len(pairs))
    ratio, option = pairs[cycle[turn % len(pairs)]]
    genomes = genome.encode(space, [genome.largest(space)])
    attention = next((i for i, (m, _) in enumerate(space.mixer_options) if m == "attention"), option)
    full = rng.permutation(space.slots) < space.full_count(ratio, space.slots)
    full |= genome.encoding(space).must_be_full
    genomes[0, 1::3] = np.where(full, attention, option)
    genomes[0, 2::3] = len(space.head_options) - 1
    return genome.decode(space, variation.repair(space, genomes, rng))[0]


def step_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step: a linear rise, then a cosine down to a twentieth."""
    rise = max(1, round(config.warmup * config.steps))
    if step < rise:
        return config.learning_rate * (step + 1) / rise
    done = (step - rise) / max(1, config.steps - rise)
    return config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
