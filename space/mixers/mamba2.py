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

    from space.onnx.block import Array, Block


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
    from space.mixers.recurrent_onnx import (
        convolve_parts,
        decay_nodes,
        norm_heads_nodes,
        recurrence_node,
        step_rate,
    )

    graph, rate = block.graph, step_rate(block)
    parts, past = convolve_parts(block)
    decay, _ = decay_nodes(block, parts["decay"], block.weights["dt_bias"], rate)
    v = graph.add("Mul", parts["v"], _steps(block, decay, rate))
    out, state = recurrence_node(block, parts["q"], parts["k"], v, rule="gated", decay=decay, scale=1.0)
    out = _add_skip(block, out, parts["v"])
    gated = graph.add("Mul", out, graph.silu(parts["gate"]))
    return norm_heads_nodes(block, gated), {"conv": past, "s": state}


def _steps(block: Block, decay: str, rate: Array) -> str:
    """The time steps of all channels [B, T, Hkv*D], from the decays, which are steps times rates.

    A product with a matrix of one value in each column: four nodes fewer than a product of heads by channels.
    Not a ``MatMul``, which would be quantised.
    """
    import numpy as np

    from space.onnx.graph import CONTRIB

    spread = np.kron(np.diag(1 / rate), np.ones(block.graph.model_config.head_dim))
    return str(block.graph.add("FusedMatMul", decay, block.constant("steps", spread), domain=CONTRIB))


def _add_skip(block: Block, out: str, v: str) -> str:
    """The output [B, T, H*D] plus D times the values [B, T, Hkv*D] of its kv head."""
    graph, layer, d, skip = block.graph, block.layer, block.graph.model_config.head_dim, block.weights["D"]
    if layer.heads == layer.kv_heads:
        return str(graph.add("Add", out, graph.add("Mul", v, block.constant("D", skip.repeat(d)))))
    inner = graph.reshape(v, [0, 0, layer.kv_heads, 1, d])
    scaled = graph.add("Mul", inner, block.constant("D", skip[:, None, None]))
    by_group = graph.reshape(out, [0, 0, layer.kv_heads, layer.heads // layer.kv_heads, d])
    return graph.reshape(graph.add("Add", by_group, scaled), [0, 0, layer.heads * d])


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
