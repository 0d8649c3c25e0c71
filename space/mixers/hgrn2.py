"""HGRN2 (Qin et al. 2024): the forget gate of each key channel makes its key as well, with a lower bound.

The paper accumulates its lower bounds over the layers; here each layer has its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.layer import MIN_LOG_DECAY, Layer, ModelConfig
from space.mixers import register_mixer
from space.mixers.mixer import Mixer, MixerCall, Shapes, State, Weights, elementwise_activations
from space.mixers.recurrent import recurrent_flops, recurrent_shapes, recurrent_state
from space.workload import Workload

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from space.onnx.block import Block


def hgrn2_shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """The parameters of a recurrence, and the lower bound of each forget gate, as a logit."""
    shapes = recurrent_shapes(width, heads, kv_heads, model_config)
    return shapes | {"lower_bound": (kv_heads * model_config.head_dim,)}


def hgrn2_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """The recurrence with forget gates: hidden [B, T, width] -> ([B, T, H*D], state)."""
    import torch.nn.functional as F

    from space.attention.linear import linear_attention
    from space.mixers.recurrent_torch import norm_heads, project_heads

    q, k, v = project_heads(weights, hidden, call.model_config.head_dim)
    q = F.silu(q)
    k, decay = hgrn2_forget(k, weights["lower_bound"])
    out, state = linear_attention(q, k, v, rule="gated", decay=decay, state=call.state.get("s"))
    return norm_heads(weights, out), {"s": state}


def hgrn2_forget(f: Tensor, lower_bound: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and log decays from the logits of the forget gate [B, T, Hkv, D].

    The gate is a = lb + (1 - lb) sigmoid(f), lb the sigmoid of the parameter [Hkv * D], and the key
    is 1 - a. Both come from y, the logit of 1 - a: each is exact where the other is close to 1.
    """
    import torch
    import torch.nn.functional as F

    f, bound = f.to(lower_bound.dtype), lower_bound.view(f.shape[2:]).clamp(min=MIN_LOG_DECAY)
    y = F.logsigmoid(-bound) - f + F.logsigmoid(f - F.logsigmoid(bound))
    return torch.sigmoid(y), F.logsigmoid(-y)


def write_hgrn2(block: Block) -> tuple[str, dict[str, str]]:
    """The same as nodes of a graph."""
    from space.mixers.recurrent_onnx import norm_heads_nodes, project_parts, recurrence_node

    parts = project_parts(block)
    q = block.graph.silu(parts["q"])
    k, decay = _forget_nodes(block, parts["k"])
    out, state = recurrence_node(block, q, k, parts["v"], rule="gated", decay=decay)
    return norm_heads_nodes(block, out), {"s": state}


def _forget_nodes(block: Block, f: str) -> tuple[str, str]:
    """Keys and log decays from the logits of the forget gate.

    With b the lower bound's logit, the logit of the key is y = -b - softplus(f + softplus(-b)). The key is
    sigmoid(y) and the log decay -softplus(y): log and 1 - exp of the other would cancel.
    """
    import numpy as np

    from space.mixers.recurrent_onnx import decay_nodes

    bound = np.maximum(block.weights["lower_bound"].astype(np.float64), MIN_LOG_DECAY)
    minus = np.full(len(bound), -1.0)
    taken, _ = decay_nodes(block, f, np.logaddexp(0, -bound), minus, place="taken.")
    decay, _ = decay_nodes(block, taken, -bound, minus)
    y = block.graph.add("Add", taken, block.constant("-bound", -bound))
    return block.graph.add("Sigmoid", y), decay


def hgrn2_activations(
    layer: Layer, width: int, packed: int, workload: Workload, model_config: ModelConfig
) -> int:
    """Floats at the widest node, among them the silu of the queries with its parts."""
    tokens, d = workload.batch * workload.tokens, model_config.head_dim
    silu = tokens * (width + (3 * layer.heads + 2 * layer.kv_heads) * d)
    return max(elementwise_activations(layer, width, packed, workload, model_config), silu)


def lower_bounds(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Lower bounds of sigmoid(-4) = 0.018; nothing is drawn."""
    import torch

    return torch.full(shape, -4.0)


register_mixer(
    Mixer(
        name="hgrn2",
        mixer_class="linear",
        shapes=hgrn2_shapes,
        state_shapes=recurrent_state,
        forward=hgrn2_forward,
        write=write_hgrn2,
        flops=recurrent_flops,
        activations=hgrn2_activations,
        projections=("q", "k", "v"),
        initial={"lower_bound": lower_bounds},
    )
)
