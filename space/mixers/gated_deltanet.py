"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024): the delta rule with Mamba-2's decay of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.layer import ModelConfig
from space.mixers import register_mixer
from space.mixers.initial import decay_rates, time_steps
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


def gated_deltanet_shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """The parameters of a recurrence, the gate, and by kv head write strength, time step and decay rate."""
    return {
        **recurrent_shapes(width, heads, kv_heads, model_config),
        "gate": (heads * model_config.head_dim, width),
        "beta": (kv_heads, width),
        "decay": (kv_heads, width),
        "A_log": (kv_heads,),
        "dt_bias": (kv_heads,),
        **conv_shapes(heads, kv_heads, model_config),
    }


def gated_deltanet_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """The delta rule with decays of heads: hidden [B, T, width] -> ([B, T, H*D], states)."""
    import torch.nn.functional as F

    from space.attention.linear import linear_attention
    from space.mixers.recurrent_torch import (
        convolve_heads,
        gate_heads,
        project_heads,
        step_decay,
        time_step,
        unit,
        write_strength,
    )

    q, k, v = project_heads(weights, hidden, call.model_config.head_dim)
    q, k, v, past = convolve_heads(weights, q, k, v, call.state.get("conv"))
    q, k = unit(q), unit(k)
    beta = write_strength(weights, hidden)
    decay = step_decay(time_step(weights, hidden), weights["A_log"])
    out, state = linear_attention(
        q, k, v, rule="gated_delta", decay=decay, beta=beta, state=call.state.get("s")
    )
    return gate_heads(weights, hidden, out, F.silu), {"conv": past, "s": state}


def write_gated_deltanet(block: Block) -> tuple[str, dict[str, str]]:
    """The same as nodes of a graph."""
    from space.mixers.recurrent_onnx import (
        convolve_parts,
        decay_nodes,
        gate_heads_nodes,
        recurrence_node,
        step_rate,
        unit_heads,
    )

    parts, past = convolve_parts(block)
    q, k = unit_heads(block, parts["q"], parts["k"])
    bias, rate = block.weights["dt_bias"], step_rate(block)
    decay, beta = decay_nodes(block, parts["decay"], bias, rate, parts["beta"])
    out, state = recurrence_node(block, q, k, parts["v"], rule="gated_delta", decay=decay, beta=beta)
    return gate_heads_nodes(block, out, parts["gate"]), {"conv": past, "s": state}


register_mixer(
    Mixer(
        name="gated_deltanet",
        mixer_class="linear",
        shapes=gated_deltanet_shapes,
        state_shapes=convolved_state,
        forward=gated_deltanet_forward,
        write=write_gated_deltanet,
        flops=delta_flops,
        activations=convolved_activations,
        projections=("q", "k", "v", "gate", "beta", "decay"),
        full_precision=("beta", "decay"),
        initial={"A_log": decay_rates, "dt_bias": time_steps, **CONV_INITIAL},
    )
)
