"""Mamba-2 (Dao and Gu 2024): q, k and v are its C, B and x; a learned time step decays and scales the writes.

The paper expands the width by 2, has a state of 128, biases in its convolution, and norms all heads together;
here sizes follow q, k and v, which the mixers of a layer share, and the norm is of one head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.layer import ModelConfig
from space.mixers import register_mixer
from space.mixers.initial import decay_rates, ones, time_steps
from space.mixers.mixer import Mixer, MixerCall, Shapes, State, Weights
from space.mixers.recurrent import (
    CONV_INITIAL,
    conv_shapes,
    convolved_activations,
    convolved_flops,
    convolved_state,
    recurrent_shapes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from space.onnx.block import Block


def mamba2_shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """The parameters of a recurrence, the gate, and by kv head the time step, decay rate and skip D."""
    return {
        **recurrent_shapes(width, heads, kv_heads, model_config),
        "gate": (heads * model_config.head_dim, width),
        "decay": (kv_heads, width),
        "A_log": (kv_heads,),
        "dt_bias": (kv_heads,),
        "D": (kv_heads,),
        **conv_shapes(heads, kv_heads, model_config),
    }


def mamba2_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """The recurrence with time steps: hidden [B, T, width] -> ([B, T, H*D], states)."""
    import torch.nn.functional as F

    from space.attention.linear import linear_attention
    from space.mixers.recurrent_torch import (
        convolve_heads,
        gate_heads,
        project_heads,
        step_decay,
        time_step,
    )

    layer = call.layer
    q, k, v = project_heads(weights, hidden, call.model_config.head_dim)
    q, k, v, past = convolve_heads(weights, q, k, v, call.state.get("conv"))
    step = time_step(weights, hidden)  # [B, T, Hkv]
    decay = step_decay(step, weights["A_log"])
    skip = v * weights["D"][:, None]  # [B, T, Hkv, D]
    v = v * step[..., None]
    out, state = linear_attention(q, k, v, rule="gated", decay=decay, state=call.state.get("s"), scale=1.0)
    out = out + skip.repeat_interleave(layer.heads // layer.kv_heads, dim=2)
    return gate_heads(weights, hidden, out, F.silu, gate_first=True), {"conv": past, "s": state}


def write_mamba2(block: Block) -> tuple[str, dict[str, str]]:
    """The same as nodes of a graph."""
    from space.mixers.recurrent_onnx import convolve_parts, norm_heads_nodes, recurrence_node, step_nodes

    graph, layer, d = block.graph, block.layer, block.graph.model_config.head_dim
    heads, kv = layer.heads, layer.kv_heads
    parts, past = convolve_parts(block)
    step, decay = step_nodes(block, parts["decay"])
    inner = graph.reshape(parts["v"], [0, 0, kv, 1, d])
    v = graph.reshape(graph.add("Mul", inner, graph.reshape(step, [0, 0, kv, 1, 1])), [0, 0, kv * d])
    out, state = recurrence_node(block, parts["q"], parts["k"], v, rule="gated", decay=decay, scale=1.0)
    skip = graph.add("Mul", inner, block.constant("D", block.weights["D"][:, None, None]))
    out = graph.add("Add", graph.reshape(out, [0, 0, kv, heads // kv, d]), skip)
    out = graph.reshape(out, [0, 0, heads * d])
    gated = graph.add("Mul", out, graph.silu(parts["gate"]))
    return norm_heads_nodes(block, gated), {"conv": past, "s": state}


register_mixer(
    Mixer(
        name="mamba2",
        mixer_class="linear",
        shapes=mamba2_shapes,
        state_shapes=convolved_state,
        forward=mamba2_forward,
        write=write_mamba2,
        flops=convolved_flops,
        activations=convolved_activations,
        projections=("q", "k", "v", "gate", "decay"),
        full_precision=("decay",),
        initial={"A_log": decay_rates, "dt_bias": time_steps, "D": ones, **CONV_INITIAL},
    )
)
