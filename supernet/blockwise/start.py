"""First weights of a block: what it takes over from the parent's block, and neutral values of the rest.

A mixer takes the parent's pre-norm, q, k, v and o, with as many heads as it has: heads that are cut are those
whose output the others make up best, keys and values are repeated for more kv heads than the parent has, and
averaged for fewer. The rest starts so that it changes as little as possible of what was taken over:

- convolutions are the identity, scaled so that the silu after them is nearly linear;
- an output gate is constant: its rows are the direction that the hidden state has at every token
  (:func:`constant_direction`), where a zero would switch a silu gate off, and random rows would be noise;
- write strengths are one half (a constant; the entropy of the parent's attention could refine it), decays
  forget at the mean distance that the parent's heads look back.

The output matrix is then solved (:mod:`supernet.blockwise.ridge`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from space import InputError
from space.attention.projection import rms_norm
from space.blocks import initial
from space.mixers.softmax_torch import rotated_heads
from supernet.blockwise.block import Block, Weights
from supernet.blockwise.ridge import Moments, elimination_order

SOFTMAX_MIXERS = ("attention", "sliding")
QUERY_ROWS, KV_ROWS = ("q", "q_bias"), ("k", "v", "k_bias", "v_bias")  # have rows for each head
GATE_LEVEL = 1.278  # silu(1.278) = 1
SILU_INPUT = 0.1  # root mean square of what a scaled convolution passes to its silu
VALUE_INPUT = 0.05  # less: next to the epsilon of its norm, the output of a head is nearly linear in them too
MAX_DISTANCE = 1e4  # tokens; a longer memory is the same within any context


@dataclass(frozen=True, eq=False)
class Measured:
    """Measurements of a parent's mixer block, from which its alternatives start.

    Attributes:
        constant: direction of the normed input [W] along which it is about 1 at every token.
        square: mean of h h^T over the normed input h [W, W].
        moments: of the parent's own features and contribution; None if it has no heads.
        distances: mean distance that each head looks back, in tokens [H]; None without softmax.
    """

    constant: Tensor
    square: Tensor
    moments: Moments | None
    distances: Tensor | None


def constant_direction(square: Tensor, mean: Tensor) -> Tensor:
    """The direction u [W] with the least E (u h - 1)^2, by ridge regression, in fp32.

    Args:
        square: E h h^T [W, W], fp64.
        mean: E h [W], fp64.
    """
    penalty = 1e-4 * float(square.diagonal().mean())
    system = square + penalty * torch.eye(len(square), dtype=square.dtype)
    found: Tensor = torch.linalg.solve(system, mean)
    return found.float()


@torch.no_grad()
def mean_distances(block: Block, weights: Weights, x: Tensor) -> Tensor:
    """The mean distance that each head of a softmax mixer looks back, in tokens [H].

    The first token is left out: where heads have nothing to say, they look at it, however far it is.

    Args:
        block: the mixer block.
        weights: of the block.
        x: the residual stream before it [B, T, W], T at least 2.
    """
    hidden = rms_norm(x, weights["pre_norm"], block.model_config.norm_eps)
    q, k, _ = rotated_heads(weights, hidden, 0, block.model_config)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    places = torch.arange(x.shape[1])
    distance = (places[:, None] - places)[1:, 1:].float()  # [T - 1, T - 1]
    totals = torch.zeros(q.shape[2])
    for row_q, row_k in zip(q.unbind(), k.unbind(), strict=True):
        scores = row_q[1:].movedim(1, 0) @ row_k[1:].permute(1, 2, 0) * q.shape[3] ** -0.5  # [H, T-1, T-1]
        hidden_from = distance < 0
        if block.layer.window:
            hidden_from = hidden_from | (distance >= block.layer.window)
        weight = scores.masked_fill(hidden_from, -math.inf).softmax(-1)
        totals += (weight * distance).sum(-1).mean(-1)
    return totals / len(q)


def chosen_heads(block: Block, parent: Block, moments: Moments, output: Tensor) -> list[int]:
    """The parent's heads that a block takes over, in its order.

    Args:
        block: the mixer block.
        parent: the parent's mixer block.
        moments: of the parent's features.
        output: the parent's output matrix.

    Raises:
        InputError: the block has more heads than the parent.
    """
    heads, kv_heads = block.layer.heads, block.layer.kv_heads
    all_heads, all_kv = parent.layer.heads, parent.layer.kv_heads
    if heads > all_heads:
        raise InputError(f"layer.heads: {heads} is more than the {all_heads} of the parent")
    if heads == all_heads:
        return list(range(heads))
    d, group = block.model_config.head_dim, all_heads // all_kv
    if heads // kv_heads == group:  # whole groups
        order = elimination_order(moments.gram, output, group * d)
        return [g * group + i for g in sorted(order[:kv_heads]) for i in range(group)]
    if kv_heads == all_kv:
        groups = [head // group for head in range(all_heads)]
        order = elimination_order(moments.gram, output, d, groups, heads // kv_heads)
    else:
        order = elimination_order(moments.gram, output, d)
    return sorted(order[:heads])


def inherited(block: Block, parent: Block, weights: Weights, chosen: Sequence[int]) -> dict[str, Tensor]:
    """The weights that a mixer block takes over, by name.

    Args:
        block: the mixer block.
        parent: the parent's mixer block.
        weights: of the parent's block.
        chosen: the parent's head of each of its heads; empty if either has no heads.
    """
    taken = {name: weights[name].clone() for name, shape in block.shapes.items()
             if name in weights and tuple(weights[name].shape) == shape}  # fmt: skip
    if not chosen:
        return taken
    d, group = block.model_config.head_dim, parent.layer.heads // parent.layer.kv_heads
    served = len(chosen) // block.layer.kv_heads
    # The parent's kv heads that each kv head stands for.
    sources = [
        sorted({head // group for head in chosen[i : i + served]}) for i in range(0, len(chosen), served)
    ]
    for name in block.shapes:
        value = weights.get(name)
        if value is None:
            continue
        if name in QUERY_ROWS:
            taken[name] = value.reshape(-1, d, *value.shape[1:])[list(chosen)].flatten(0, 1)
        elif name in KV_ROWS:
            by_head = value.reshape(-1, d, *value.shape[1:])
            taken[name] = torch.cat([by_head[some].mean(0) for some in sources])
    taken["o"] = weights["o"].reshape(block.width, -1, d)[:, list(chosen)].flatten(1)
    return taken


def start_mixer(
    block: Block, parent: Block, weights: Weights, measured: Measured, generator: torch.Generator
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The first weights of a mixer block.

    Args:
        block: the mixer block.
        parent: the parent's block of the slot.
        weights: of the parent's block.
        measured: of the parent's block.
        generator: draws what neither is taken over nor has a neutral value.

    Returns:
        The weights by name, and the names of those that were taken over.

    Raises:
        InputError: the block has more heads than the parent.
    """
    chosen: list[int] = []
    if block.layer.heads and parent.layer.heads and measured.moments is not None:
        chosen = chosen_heads(block, parent, measured.moments, weights[parent.output])
    taken = inherited(block, parent, weights, chosen)
    made = {
        name: taken[name]
        if name in taken
        else initial(f"layers.0.mixer.{name}", shape, generator, mixer=block.layer.mixer)
        for name, shape in block.shapes.items()
    }
    if chosen:
        made |= _neutral(block, made, measured, chosen)
    return made, frozenset(taken)


def _neutral(block: Block, made: Weights, measured: Measured, chosen: Sequence[int]) -> dict[str, Tensor]:
    """Values by which what was taken over passes unchanged, for the parameters that have one."""
    neutral: dict[str, Tensor] = {}
    for name, value in made.items():
        if name.startswith("conv_"):
            source = made[name.removeprefix("conv_")]
            neutral[name] = torch.zeros_like(value)
            size = torch.einsum("ow,wv,ov->o", source.double(), measured.square, source.double()).sqrt()
            heads = size.view(-1, block.model_config.head_dim).square().mean(1).sqrt()  # one scale a head
            level = VALUE_INPUT if name == "conv_v" else SILU_INPUT
            scale = (level / heads.clamp(min=1e-6)).float()
            neutral[name][:, -1] = scale.repeat_interleave(block.model_config.head_dim)
        elif name == "gate":
            neutral[name] = GATE_LEVEL * measured.constant.expand_as(value).clone()
        elif name in ("beta", "D"):
            neutral[name] = torch.zeros_like(value)
    start_decay = DECAYS.get(block.layer.mixer)
    if start_decay and measured.distances is not None:
        served = len(chosen) // block.layer.kv_heads
        distances = measured.distances[list(chosen)].view(-1, served).mean(1)
        neutral |= start_decay(made, distances.clamp(1.0, MAX_DISTANCE))
    if block.layer.mixer == "kda":  # a sigmoid: constant at zero weights
        neutral["gate"] = torch.zeros_like(made["gate"])
    return neutral


def _time_step_decay(made: Weights, distances: Tensor) -> dict[str, Tensor]:
    """Log decays -exp(A_log) softplus(decay h + dt_bias) of -1 / distance."""
    step = 1 / distances
    return {
        "decay": torch.zeros_like(made["decay"]),
        "A_log": torch.zeros_like(made["A_log"]),
        "dt_bias": step + torch.log(-torch.expm1(-step)),  # inverse softplus
    }


def _gla_decay(made: Weights, distances: Tensor) -> dict[str, Tensor]:
    """Log decays logsigmoid(decay_up decay_down h + decay_bias) / 16 of -1 / distance."""
    bias = -torch.log(torch.expm1(16 / distances))
    channels = len(made["decay_bias"]) // len(distances)
    return {
        "decay_up": torch.zeros_like(made["decay_up"]),
        "decay_bias": bias.repeat_interleave(channels),
    }


def _kda_decay(made: Weights, distances: Tensor) -> dict[str, Tensor]:
    """Log decays -5 sigmoid(exp(slope_log) (decay_up decay_down h + dt_bias)) of -1 / distance."""
    slope = made["slope_log"].exp()
    bias = torch.logit(1 / (5 * distances)) / slope
    channels = len(made["dt_bias"]) // len(distances)
    return {"decay_up": torch.zeros_like(made["decay_up"]), "dt_bias": bias.repeat_interleave(channels)}


DECAYS: Mapping[str, Callable[[Weights, Tensor], dict[str, Tensor]]] = {
    "gated_deltanet": _time_step_decay,
    "mamba2": _time_step_decay,
    "gla": _gla_decay,
    "kda": _kda_decay,
}


def start_ffn(block: Block, weights: Weights, order: Sequence[int]) -> dict[str, Tensor]:
    """The first weights of an FFN: the parent's most important channels.

    Args:
        block: the FFN.
        weights: of the parent's FFN.
        order: the parent's channels, the most important first.
    """
    kept = torch.tensor(order[: block.layer.ffn])
    return {
        "pre_norm": weights["pre_norm"].clone(),
        "gate": weights["gate"][kept],
        "up": weights["up"][kept],
        "down": weights["down"][:, kept].contiguous(),
    }
