"""Softmax attention over all tokens (Vaswani et al. 2017), with RoPE and grouped queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.layer import Layer, ModelConfig
from space.mixers import register_mixer
from space.mixers.mixer import Mixer, MixerCall, Shapes, State, Weights
from space.mixers.softmax import (
    BIAS_INITIAL,
    cache_shapes,
    softmax_activations,
    softmax_flops,
    softmax_shapes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from space.onnx.block import Block


def attention_state(layer: Layer, width: int, model_config: ModelConfig, batch: int, past: int) -> Shapes:
    """The keys and values of all tokens."""
    return cache_shapes(layer, model_config, batch, past)


def attention_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """Attention over all tokens: hidden [B, T, width] -> ([B, T, H*D], keys and values)."""
    from space.mixers.softmax_torch import softmax_forward

    return softmax_forward(weights, hidden, call)


def write_attention(block: Block) -> tuple[str, dict[str, str]]:
    """The same as nodes of a graph."""
    from space.mixers.softmax_onnx import softmax_nodes

    out, keys, values = softmax_nodes(block)
    return out, {"key": keys, "value": values}


register_mixer(
    Mixer(
        name="attention",
        mixer_class="full",
        shapes=softmax_shapes,
        state_shapes=attention_state,
        forward=attention_forward,
        write=write_attention,
        flops=softmax_flops,
        activations=softmax_activations,
        projections=("q", "k", "v"),
        initial=BIAS_INITIAL,
        cache_in_place=True,
        runs_everywhere=True,
    )
)
