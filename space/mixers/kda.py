"""Kimi Delta Attention (Kimi Linear, 2025): the delta rule with a bounded decay for each key channel.

The paper's output gate is of low rank; here it is one matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.layer import ModelConfig
from space.mixers import register_mixer
from space.mixers.initial import time_steps, zeros
from space.mixers.mixer import Mixer, MixerCall, Shapes, State, Weights
from space.mixers.recurrent import (
    CONV_INITIAL,
    conv_shapes,
    convolved_activations,
    convolved_state,
    delta_flops,
    recurrent_shapes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from space.onnx.block import Block


def kda_shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """The parameters of a recurrence, the gate, write strengths, and the product that makes the decays."""
    d = model_config.head_dim
    return {
        **recurrent_shapes(width, heads, kv_heads, model_config),
        "gate": (heads * d, width),
        "beta": (kv_heads, width),
        "decay_down": (d, width),
        "decay_up": (kv_heads * d, d),
        "slope_log": (kv_heads,),
        "dt_bias": (kv_heads * d,),
        **conv_shapes(heads, kv_heads, model_config),
    }


def kda_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """The delta rule with decays of channels: hidden [B, T, width] -> ([B, T, H*D], states)."""
    import torch

    from space.attention.linear import linear_attention
    from space.attention.projection import heads_of
    from space.mixers.recurrent_torch import (
        convolve_heads,
        gate_heads,
        low_rank,
        project_heads,
        unit,
        write_strength,
    )

    d = call.model_config.head_dim
    q, k, v = project_heads(weights, hidden, d)
    q, k, v, past = convolve_heads(weights, q, k, v, call.state.get("conv"))
    q, k = unit(q), unit(k)
    beta = write_strength(weights, hidden)
    logits = heads_of(low_rank(weights, hidden) + weights["dt_bias"], d)
    decay = kda_decay(logits, weights["slope_log"])
    out, state = linear_attention(
        q, k, v, rule="gated_delta", decay=decay, beta=beta, state=call.state.get("s")
    )
    return gate_heads(weights, hidden, out, torch.sigmoid), {"conv": past, "s": state}


def kda_decay(logits: Tensor, slope_log: Tensor) -> Tensor:
    """The bounded log decays, -5 sigmoid(exp(slope_log) logits): [B, T, Hkv, D]."""
    import torch

    return -5 * torch.sigmoid(slope_log.exp()[:, None] * logits)


def write_kda(block: Block) -> tuple[str, dict[str, str]]:
    """The same as nodes of a graph."""
    from space.mixers.recurrent_onnx import (
        convolve_parts,
        gate_heads_nodes,
        recurrence_node,
        unit_heads,
        write_strength_node,
    )

    parts, past = convolve_parts(block)
    q, k = unit_heads(block, parts["q"], parts["k"])
    beta = write_strength_node(block, parts["beta"])
    decay = _decay_nodes(block, parts["decay_down"])
    out, state = recurrence_node(block, q, k, parts["v"], rule="gated_delta", decay=decay, beta=beta)
    return gate_heads_nodes(block, out, parts["gate"], sigmoid=True), {"conv": past, "s": state}


def _decay_nodes(block: Block, low: str) -> str:
    """The log decays from the low-rank product; the slope is folded into the matrix and the bias."""
    import numpy as np

    graph, w = block.graph, block.weights
    slope = np.exp(w["slope_log"].astype(np.float64)).repeat(graph.model_config.head_dim)
    logits = block.product(low, "decay_up", slope[:, None] * w["decay_up"])
    logits = graph.add("Add", logits, block.constant("dt_bias", slope * w["dt_bias"]))
    return str(graph.add("Mul", graph.add("Sigmoid", logits), graph.scalar("-5", -5.0)))


register_mixer(
    Mixer(
        name="kda",
        mixer_class="linear",
        shapes=kda_shapes,
        state_shapes=convolved_state,
        forward=kda_forward,
        write=write_kda,
        flops=delta_flops,
        activations=convolved_activations,
        projections=("q", "k", "v", "gate", "beta", "decay_down"),
        matrices=("decay_up",),
        full_precision=("beta", "decay_down", "decay_up"),
        # The slope starts at 1, which with these time steps gives decays of -0.5 to -0.005: steeper, the
        # bounded gate would start shut and without a gradient.
        initial={"slope_log": zeros, "dt_bias": time_steps, **CONV_INITIAL},
    )
)
