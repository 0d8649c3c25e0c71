"""DeltaNet (Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.layer import ModelConfig
from space.mixers import register_mixer
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


def deltanet_shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """The parameters of a recurrence, and the write strength of each kv head."""
    return {
        **recurrent_shapes(width, heads, kv_heads, model_config),
        "beta": (kv_heads, width),
        **conv_shapes(heads, kv_heads, model_config),
    }


def deltanet_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """The delta rule without decay: hidden [B, T, width] -> ([B, T, H*D], states)."""
    from space.attention.linear import linear_attention
    from space.mixers.recurrent_torch import convolve_heads, norm_heads, project_heads, unit, write_strength

    q, k, v = project_heads(weights, hidden, call.model_config.head_dim)
    q, k, v, past = convolve_heads(weights, q, k, v, call.state.get("conv"))
    q, k = unit(q), unit(k)
    beta = write_strength(weights, hidden)
    out, state = linear_attention(q, k, v, rule="delta", beta=beta, state=call.state.get("s"))
    return norm_heads(weights, out), {"conv": past, "s": state}


def write_deltanet(block: Block) -> tuple[str, dict[str, str]]:
    """The same as nodes of a graph."""
    from space.mixers.recurrent_onnx import (
        convolve_parts,
        norm_heads_nodes,
        recurrence_node,
        unit_heads,
        write_strength_node,
    )

    parts, past = convolve_parts(block)
    q, k = unit_heads(block, parts["q"], parts["k"])
    beta = write_strength_node(block, parts["beta"])
    out, state = recurrence_node(block, q, k, parts["v"], rule="delta", beta=beta)
    return norm_heads_nodes(block, out), {"conv": past, "s": state}


register_mixer(
    Mixer(
        name="deltanet",
        mixer_class="linear",
        shapes=deltanet_shapes,
        state_shapes=convolved_state,
        forward=deltanet_forward,
        write=write_deltanet,
        flops=delta_flops,
        activations=convolved_activations,
        projections=("q", "k", "v", "beta"),
        full_precision=("beta",),
        initial=CONV_INITIAL,
    )
)
