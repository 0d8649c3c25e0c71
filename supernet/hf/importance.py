"""Order of a parent's channels, heads and FFN channels by their effect on the loss.

Sub-networks are prefixes, so the most important parts have to come first. The importance of residual
channels, heads and FFN channels is the size of their first-order effect on the loss (Molchanov et al. 2019).
Mean absolute activations (Minitron, Muralidharan et al. 2024) order heads and FFN channels about as well, but
residual channels no better than chance. All layers share one residual order. kv groups move with their query
heads, which are sorted within the group; a group is a large part of a layer, where the first order misleads,
so groups are sorted by the loss without them. Channels within a head keep their order, because RoPE pairs
them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from space import Architecture, Layer, ModelConfig
from space.attention.projection import project, rms_norm
from space.attention.softmax import softmax_attention
from space.blocks import part
from space.mixers.softmax_torch import rotated_heads
from space.shapes import ffn_shapes, mixer_shapes

Weights = Mapping[str, Tensor]
BATCH_WINDOWS = 4
# The axis that each dimension of a parent's parameter indexes, by the last part of its name.
AXES = {
    "embedding": ("", "residual"),
    "head": ("", "residual"),
    "norm": ("residual",),
    "pre_norm": ("residual",),
    "q": ("query", "residual"),
    "k": ("kv", "residual"),
    "v": ("kv", "residual"),
    "o": ("residual", "query"),
    "q_bias": ("query",),
    "k_bias": ("kv",),
    "v_bias": ("kv",),
    "q_norm": ("",),
    "k_norm": ("",),
    "gate": ("ffn", "residual"),
    "up": ("ffn", "residual"),
    "down": ("residual", "ffn"),
}


@dataclass(frozen=True)
class Importance:
    """Importance of a model's parts, in nats per token, fp64.

    The importance of a kv group is the loss without the group minus the loss with it; of any other part, the
    mean over tokens of ``|a * dL/da|`` with its activation ``a`` (Molchanov et al. 2019).

    Attributes:
        residual: residual channels, after every norm at once [width].
        heads: query heads [slots, heads].
        ffn: FFN channels [slots, ffn].
        groups: kv groups [slots, kv_heads].
    """

    residual: Tensor
    heads: Tensor
    ffn: Tensor
    groups: Tensor


def measure_importance(
    weights: Weights, architecture: Architecture, model_config: ModelConfig, windows: Tensor
) -> Importance:
    """Measure the importance of a parent's parts.

    Args:
        weights: weights of a model of equal attention layers.
        architecture: the model's architecture.
        model_config: the constants of the space.
        windows: text as token ids [N, T].
    """
    first, slots = architecture.layers[0], len(architecture.layers)
    totals = [
        torch.zeros(sizes, dtype=torch.float64, device=windows.device)
        for sizes in ((architecture.width,), (slots, first.heads), (slots, first.ffn))
    ]
    group_size = first.heads // first.kv_heads
    groups = torch.zeros(slots, first.kv_heads, dtype=torch.float64, device=windows.device)
    for batch in torch.split(windows, BATCH_WINDOWS):
        places = (batch.shape[0], batch.shape[1] - 1)
        gates = [
            torch.ones(*total.shape[:-1], *places, total.shape[-1], device=batch.device, requires_grad=True)
            for total in totals
        ]
        loss = _gated_loss(weights, architecture, model_config, batch, *gates)
        for total, effect in zip(totals, torch.autograd.grad(loss, gates), strict=True):
            total += effect.abs().double().sum((-3, -2))
        with torch.no_grad():
            residual, heads, hidden = gates
            for slot, group in np.ndindex(slots, first.kv_heads):
                without = heads.clone()
                without[slot, ..., group * group_size : (group + 1) * group_size] = 0
                groups[slot, group] += (
                    _gated_loss(weights, architecture, model_config, batch, residual, without, hidden) - loss
                )
    count = len(windows) * (windows.shape[1] - 1)
    return Importance(*(total / count for total in (*totals, groups)))


def _gated_loss(
    weights: Weights,
    architecture: Architecture,
    model_config: ModelConfig,
    windows: Tensor,
    residual: Tensor,
    heads: Tensor,
    hidden: Tensor,
) -> Tensor:
    """The summed loss with a factor on every normalised residual channel, head and FFN channel.

    Args:
        weights: the model's weights.
        architecture: the model's architecture.
        model_config: the constants of the space.
        windows: token ids [B, T + 1].
        residual: factors [B, T, width], the same after each norm.
        heads: factors [slots, B, T, H].
        hidden: factors [slots, B, T, ffn].
    """
    x = F.embedding(windows[:, :-1], weights["embedding"])
    for slot, layer in enumerate(architecture.layers):
        block = mixer_part(weights, architecture, slot, layer, model_config)
        normed = rms_norm(x, block["pre_norm"], model_config.norm_eps) * residual
        q, k, v = rotated_heads(block, normed, 0, model_config)
        out = softmax_attention(q, k, v) * heads[slot][..., None]
        x = x + project(out.flatten(2), block["o"])
        block = part(weights, f"layers.{slot}.ffn", ffn_shapes(architecture.width, layer.ffn))
        normed = rms_norm(x, block["pre_norm"], model_config.norm_eps) * residual
        active = F.silu(project(normed, block["gate"])) * project(normed, block["up"])
        x = x + project(active * hidden[slot], block["down"])
    logits = project(
        rms_norm(x, weights["norm"], model_config.norm_eps) * residual,
        weights["embedding" if model_config.tie_embeddings else "head"],
    )
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")


def reorder(
    weights: Weights, architecture: Architecture, model_config: ModelConfig, importance: Importance
) -> dict[str, Tensor]:
    """Permute weights so that residual channels, heads and FFN channels have falling importance.

    Args:
        weights: weights of a model of equal attention layers.
        architecture: the model's architecture.
        model_config: the constants of the space.
        importance: importance of the model's parts.

    Returns:
        Weights of the same function.
    """
    first = architecture.layers[0]
    residual = _falling(importance.residual)
    group = first.heads // first.kv_heads
    channel = torch.arange(model_config.head_dim, device=residual.device)
    orders: list[dict[str, Tensor]] = []  # per slot, by axis
    for slot in range(len(architecture.layers)):
        scores = importance.heads[slot].reshape(first.kv_heads, group)
        groups = _falling(importance.groups[slot])  # [Hkv]
        heads = (groups[:, None] * group + _falling(scores[groups])).flatten()
        orders.append(
            {
                "residual": residual,
                "query": (heads[:, None] * model_config.head_dim + channel).flatten(),
                "kv": (groups[:, None] * model_config.head_dim + channel).flatten(),
                "ffn": _falling(importance.ffn[slot]),
            }
        )
    permuted = {}
    for name, tensor in weights.items():
        order = orders[int(name.split(".")[1])] if name.startswith("layers.") else orders[0]
        for dimension, axis in enumerate(AXES[name.rsplit(".", 1)[-1]]):
            if axis:
                tensor = tensor.index_select(dimension, order[axis])
        permuted[name] = tensor
    return permuted


def _falling(scores: Tensor) -> Tensor:
    """Indices that sort the last dimension in descending order; stable."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def mixer_part(
    weights: Weights, architecture: Architecture, slot: int, layer: Layer, model_config: ModelConfig
) -> Weights:
    """The weights of one slot's mixer, by their last name.

    Args:
        weights: a model's weights.
        architecture: the model's architecture.
        slot: the slot.
        layer: the slot's layer.
        model_config: the constants of the space.
    """
    shapes = mixer_shapes(layer.mixer, architecture.width, layer.heads, layer.kv_heads, model_config)
    return part(weights, f"layers.{slot}.mixer", shapes)
