"""Gated linear attention (Yang et al. 2023): a learned decay for each key channel, and an output gate.

The paper halves the keys; here they have the size of the values, which the mixers of a layer share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.layer import MIN_LOG_DECAY, ModelConfig
from space.mixers import register_mixer
from space.mixers.initial import zeros
from space.mixers.mixer import Mixer, MixerCall, Shapes, State, Weights
from space.mixers.recurrent import recurrent_flops, recurrent_shapes, recurrent_state

if TYPE_CHECKING:
    from torch import Tensor

    from space.onnx.block import Block

GLA_RANK = 16  # of the product that makes the decays


def gla_shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """The parameters of a recurrence, the gate, and the product that makes decays of channels."""
    d = model_config.head_dim
    return {
        **recurrent_shapes(width, heads, kv_heads, model_config),
        "gate": (heads * d, width),
        "decay_down": (GLA_RANK, width),
        "decay_up": (kv_heads * d, GLA_RANK),
        "decay_bias": (kv_heads * d,),
    }


def gla_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """The recurrence with decays of channels: hidden [B, T, width] -> ([B, T, H*D], state)."""
    import torch.nn.functional as F

    from space.attention.linear import linear_attention
    from space.attention.projection import heads_of
    from space.mixers.recurrent_torch import gate_heads, low_rank, project_heads

    d = call.model_config.head_dim
    q, k, v = project_heads(weights, hidden, d)
    decay = gla_decay(heads_of(low_rank(weights, hidden) + weights["decay_bias"], d))
    out, state = linear_attention(q, k, v, rule="gated", decay=decay, state=call.state.get("s"))
    return gate_heads(weights, hidden, out, F.silu), {"s": state}


def gla_decay(logits: Tensor) -> Tensor:
    """The log decays, logsigmoid(logits) / 16, in the shape of the logits."""
    import torch.nn.functional as F

    return (F.logsigmoid(logits) / 16).clamp(min=MIN_LOG_DECAY)


def write_gla(block: Block) -> tuple[str, dict[str, str]]:
    """The same as nodes of a graph."""
    from space.mixers.recurrent_onnx import gate_heads_nodes, project_parts, recurrence_node

    parts = project_parts(block)
    decay = _decay_nodes(block, parts["decay_down"])
    out, state = recurrence_node(block, parts["q"], parts["k"], parts["v"], rule="gated", decay=decay)
    return gate_heads_nodes(block, out, parts["gate"]), {"s": state}


def _decay_nodes(block: Block, low: str) -> str:
    """The log decays from the low-rank product, as -softplus(-(W2 low + b)) / 16."""
    import numpy as np

    from space.mixers.recurrent_onnx import decay_nodes

    up, bias = block.weights["decay_up"], block.weights["decay_bias"]
    return decay_nodes(block, block.product(low, "decay_up", -up), -bias, np.full(len(up), -1 / 16))[0]


register_mixer(
    Mixer(
        name="gla",
        mixer_class="linear",
        shapes=gla_shapes,
        state_shapes=recurrent_state,
        forward=gla_forward,
        write=write_gla,
        flops=recurrent_flops,
        projections=("q", "k", "v", "gate", "decay_down"),
        matrices=("decay_up",),
        full_precision=("decay_down", "decay_up"),
        initial={"decay_bias": zeros},  # decays of channels start at log(1/2) / 16
    )
)
