"""The training recipe: which sub-networks a step trains, and the learning rate.

The sandwich rule (Yu and Huang 2019) trains a sub-network of maximal size, the smallest one and several
sampled ones in every step. On even steps the first is ``largest()``; on odd steps its mixers come from a
shuffled cycle over all pairs of a ratio and a linear mixer, so that linear mixers train at full size equally
often (the strict fairness of FairNAS, Chu et al. 2021). Options: balanced sampling (sampled sub-networks use
all mixers about equally often), progressive shrinking (elastic axes are added one after another;
Once-for-All, Cai et al. 2020), a warm-up of the largest sub-network, and depth warm-up (shallow sub-networks
first; they are cheap, and since matrices that write to the residual stream start at zero, a new layer changes
nothing at first).

``benchmarks/recipe.py`` measures each option. Everything random in step n is drawn from a generator seeded
with (seed, n), so that a resumed training equals an uninterrupted one.
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

CANDIDATES_PER_SUBNET = 32  # genomes drawn for each sub-network that balanced sampling chooses
ELASTIC_AXES = ("mixer", "ffn", "heads", "depth", "width")  # in the order of progressive shrinking
BLOCKWISE_DEFAULTS = {"steps": 256, "batch": 1, "learning_rate": 1.2e-2}
JOINT_ONLY = (  # besides depth_warmup, whose default depends on others
    "weight_decay", "clip", "warmup", "rule", "sampled", "balanced_sampling", "update", "largest_warmup",
    "distillation", "teacher", "progressive_shrinking", "maximal_mixers",
)  # fmt: skip
FINAL_RATE_SHARE = 0.05  # of the peak learning rate, at the last step


class BlockwiseConfig(BaseModel):
    """Settings of blockwise training, the key ``train.blockwise``.

    Attributes:
        tokens: tokens of the training text that blocks are fitted on; an eighth more are held out.
        inherited_rate: peak learning rate of weights that are taken over from the parent; like
            ``learning_rate``, that of a block which starts with an error of 1.
        storage: type of the captured activations on disk.
        score_windows: held-out sequences that score each block; 0 does not score.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tokens: Annotated[int, Field(gt=0)] = 65536
    inherited_rate: Annotated[float, Field(gt=0)] = 4e-3
    storage: Literal["bf16", "fp32"] = "bf16"
    score_windows: Annotated[int, Field(ge=0)] = 4


class TrainConfig(BaseModel):
    """Training settings, the key ``train`` of a run's configuration.

    Attributes:
        method: ``joint`` trains all sub-networks of a supernet together; ``blockwise`` fits each block of
            a space with ``sharing: block`` to the same block of a frozen parent, ``init``.
        data: the corpus.
        init: a parent to start from (:func:`supernet.parent.read_parent`), or with method blockwise also a
            sub-model that `formfit extract` wrote; None starts from random weights.
        blockwise: settings of method blockwise.
        steps: number of training steps; with method blockwise, of each block, 256 by default.
        batch: rows per sub-network and step, over all workers; 1 by default with method blockwise.
        length: tokens per row; None is the space's ``max_seq_len``.
        learning_rate: peak learning rate; with method blockwise, of weights that the parent does not have,
            in a block that starts with an error of 1 (in others in proportion to it), 0.012 by default.
        weight_decay: AdamW's weight decay of matrices.
        clip: greatest norm of the gradient.
        warmup: share of the steps in which the learning rate rises.
        rule: ``sandwich``, or ``random`` for sampled sub-networks only.
        sampled: sampled sub-networks per step.
        balanced_sampling: whether the sampled sub-networks of a step use all mixers about equally often.
        update: ``per_subnet`` gives each sub-network of a step rows and an optimiser step of its own;
            ``accumulated`` sums all gradients of the step on the same rows, as in the papers.
        largest_warmup: share of the steps that train the largest sub-network only, before the rule starts.
        distillation: weight of the teacher's cross-entropy; the text's is 1 minus it.
        teacher: the step's sub-network of maximal size (``same-step``), or the space's ``largest``.
        progressive_shrinking: share of the steps, after the largest warm-up, until all axes are elastic.
        depth_warmup: share of the steps in which the sub-networks' depth rises to the space's. The default
            is 0 if ``init``, ``largest_warmup`` or ``progressive_shrinking`` is set.
        maximal_mixers: whether every second sub-network of maximal size has linear mixers.
        precision: type of matrix products; ``auto`` is bf16 if the CPU has instructions for it.
        threads: torch threads per process; None is one per core, or 1 with ``workers``.
        workers: data-parallel processes; 0 trains in the calling process.
        checkpoint_every: steps between checkpoints.
        seed: of the weights, batches and sampled sub-networks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: Literal["joint", "blockwise"] = "joint"
    data: DataConfig = DataConfig()
    init: Path | None = None
    blockwise: BlockwiseConfig = BlockwiseConfig()
    steps: Annotated[int, Field(gt=0)] = 2000
    batch: Annotated[int, Field(gt=0)] = 4
    length: Annotated[int, Field(gt=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.02
    rule: Literal["sandwich", "random"] = "sandwich"
    sampled: Annotated[int, Field(ge=0)] = 7
    balanced_sampling: bool = True
    update: Literal["per_subnet", "accumulated"] = "per_subnet"
    largest_warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    teacher: Literal["same-step", "largest"] = "same-step"
    progressive_shrinking: Annotated[float, Field(ge=0, lt=1)] = 0.0
    depth_warmup: Annotated[float, Field(ge=0, lt=1)] = 0.4
    maximal_mixers: bool = True
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    threads: Annotated[int, Field(gt=0)] | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: Annotated[int, Field(gt=0)] = 100
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        starts_deep = ("init", "largest_warmup", "progressive_shrinking")
        if isinstance(value, Mapping) and value.get("method") == "blockwise":
            value = {**BLOCKWISE_DEFAULTS, **value}
        if isinstance(value, Mapping) and any(value.get(key) for key in starts_deep):
            value = {"depth_warmup": 0.0, **value}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.largest_warmup + self.progressive_shrinking >= 1:
            raise ValueError(
                "largest_warmup and progressive_shrinking leave no step that trains the whole space"
            )
        if self.depth_warmup and self.largest_warmup + self.progressive_shrinking:
            raise ValueError(
                "largest_warmup and progressive_shrinking start with deep sub-networks; set depth_warmup: 0"
            )
        if self.method == "blockwise":
            self._check_blockwise()
        elif self.blockwise != BlockwiseConfig():
            raise ValueError("blockwise: method joint has no such settings; set method: blockwise")
        if self.rule == "random" and self.distillation:
            raise ValueError("rule: random has no teacher; set distillation: 0")
        return self

    def _check_blockwise(self) -> None:
        if self.init is None:
            raise ValueError("method: blockwise needs a parent; name its folder with init")
        if self.data.recall == 1:
            raise ValueError("method: blockwise needs text; set data.recall below 1")
        for name in JOINT_ONLY:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: method blockwise does not use it; leave it out")


def subnet_count(config: TrainConfig, step: int) -> int:
    """Number of sub-networks that one step of a supernet's training trains.

    Args:
        config: the training settings.
        step: the step, from 0.
    """
    if step < config.largest_warmup * config.steps:
        return 1
    return max(1, config.sampled) if config.rule == "random" else 2 + config.sampled


def step_subnets(space: Space, config: TrainConfig, step: int) -> list[Architecture]:
    """The sub-networks that one step trains, a function of (seed, step).

    Args:
        space: the supernet's space.
        config: the training settings.
        step: the step, from 0.

    Returns:
        With the sandwich rule, first the one of maximal size (during depth warm-up, the largest of the drawn
        ones), then the smallest, then the sampled ones.
    """
    if step < config.largest_warmup * config.steps:
        return [genome.largest(space)]
    rng = np.random.default_rng([config.seed, step, 1])
    elastic = restrict_axes(space, elastic_axes(config, step))
    depth = max_subnet_depth(elastic, config, step)
    count, balanced = subnet_count(config, step), config.balanced_sampling
    if config.rule == "random":
        return genome.decode(elastic, draw_subnets(elastic, rng, count, balanced, depth))
    if depth < allowed_depths(elastic)[-1]:  # depth warm-up: nothing has the maximal size yet
        drawn = genome.decode(elastic, draw_subnets(elastic, rng, count - 1, balanced, depth))
        first, *sampled = sorted(drawn, key=lambda a: (a.depth, a.width), reverse=True)
        return [first, genome.smallest(elastic), *sampled]
    sampled = genome.decode(elastic, draw_subnets(elastic, rng, count - 2, balanced, depth))
    first = genome.largest(space)
    if config.maximal_mixers and step % 2:
        first = _max_size_subnet(space, config.seed, step // 2, rng)
    return [first, genome.smallest(elastic), *sampled]


def draw_subnets(
    space: Space, rng: np.random.Generator, count: int, balanced: bool, max_depth: int
) -> Genomes:
    """Draw genomes up to a depth, with depths drawn as :func:`space.variation.sample` draws them.

    Uniform draws over ratios give attention several times the layers of any linear mixer, and a mixer that is
    trained more looks better. Balanced sampling draws many candidates and takes, for each wanted depth, the
    one that leaves the mixers' shares of all layers most equal.

    Args:
        space: the space.
        rng: source of randomness.
        count: number of genomes.
        balanced: whether to balance the mixers.
        max_depth: greatest number of layers.

    Returns:
        Genomes [count, G].
    """
    if not count or (max_depth == allowed_depths(space)[-1] and not balanced):
        return variation.sample(space, rng, count)
    pool = variation.sample(space, rng, CANDIDATES_PER_SUBNET * count)
    pool = pool[depths(pool) <= max_depth]
    while len(pool) < count:
        more = variation.sample(space, rng, CANDIDATES_PER_SUBNET * count)
        pool = np.concatenate([pool, more[depths(more) <= max_depth]])
    if not balanced:
        return pool[:count]
    depth, mixer = depths(pool), genome.split(pool)[1]
    options = [i for i, (name, _) in enumerate(space.mixer_options) if i and name != "none"]
    layers = np.stack([(mixer == option).sum(axis=1) for option in options], axis=1).astype(np.float64)
    used, chosen = np.zeros(len(options)), []
    for wanted in depth[:count]:
        total = used + layers  # [N, options]
        # Sum of squared shares: 1 / options if all mixers have as many layers, 1 if one has them all.
        unevenness = (total**2).sum(axis=1) / np.maximum(total.sum(axis=1), 1) ** 2
        chosen.append(int(np.where(depth == wanted, unevenness, np.inf).argmin()))
        used = total[chosen[-1]]
    return pool[chosen]


def allowed_depths(space: Space) -> list[int]:
    """Depths of the architectures of a space, ascending.

    Args:
        space: the space.
    """
    return sorted({depth for depth, _ in space.patterns})


def max_subnet_depth(space: Space, config: TrainConfig, step: int) -> int:
    """Greatest depth of a step's sampled sub-networks; it rises during depth warm-up.

    Args:
        space: the space.
        config: the training settings.
        step: the step, from 0.
    """
    allowed = allowed_depths(space)
    if step >= config.depth_warmup * config.steps:
        return allowed[-1]
    return allowed[int(step / (config.depth_warmup * config.steps) * len(allowed))]


def elastic_axes(config: TrainConfig, step: int) -> tuple[str, ...]:
    """Axes along which a step's sub-networks may differ from ``largest()``.

    Args:
        config: the training settings.
        step: the step, from 0; past the largest warm-up.
    """
    begin = config.largest_warmup * config.steps
    duration = config.progressive_shrinking * config.steps
    if step >= begin + duration:
        return ELASTIC_AXES
    return ELASTIC_AXES[: 1 + int((step - begin) / duration * len(ELASTIC_AXES))]


@lru_cache(maxsize=32)
def restrict_axes(space: Space, axes: tuple[str, ...]) -> Space:
    """The part of a space that differs from its largest architecture along some axes only.

    Args:
        space: the space.
        axes: names out of :data:`ELASTIC_AXES`.
    """
    if set(axes) == set(ELASTIC_AXES):
        return space
    value = space.model_dump(mode="json")
    layer = value["layer"]
    fixed = set(ELASTIC_AXES) - set(axes)
    if "width" in fixed:
        value["width"] = value["width"][-1:]
    if "depth" in fixed:
        value["depth"] = value["depth"][-1:]
        layer["mixer"] = [m for m in layer["mixer"] if m != "none"]
    if "heads" in fixed:
        heads, kv_heads = space.head_options[-1]
        layer["heads"] = [heads]
        layer["kv_heads"] = layer["kv_heads"] and [kv_heads]
    if "ffn" in fixed:
        layer["ffn"] = layer["ffn"][-1:]
    return Space.model_validate(value)


def _max_size_subnet(space: Space, seed: int, turn: int, rng: np.random.Generator) -> Architecture:
    """A sub-network of maximal size; its ratio and linear mixer come from a shuffled cycle.

    Local mixers that the ratio does not count (``hybrid.local: separate``) occur in sampled sub-networks
    only.
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
    classes = genome.encoding(space).classes
    full_option = int((classes == genome.FULL).argmax()) if genome.FULL in classes else option
    counts = space.full_counts(ratio, space.slots)
    count = counts[0] if len(counts) == 1 else int(rng.choice(counts))
    full = rng.permutation(space.slots) < count
    full |= genome.encoding(space).must_be_full
    genomes[0, 1::3] = np.where(full, full_option, option)
    genomes[0, 2::3] = len(space.head_options) - 1
    return genome.decode(space, variation.repair(space, genomes, rng))[0]


def step_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of a step: linear warm-up, then cosine decay to a twentieth of the peak.

    Args:
        config: the training settings.
        step: the step, from 0.
    """
    warmup_steps = max(1, round(config.warmup * config.steps))
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, config.steps - warmup_steps)
    return config.learning_rate * (
        FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * done))
    )
