"""Softmax attention over a window of tokens (Beltagy et al. 2020), with RoPE and grouped queries."""

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
from space.workload import Workload

if TYPE_CHECKING:
    from torch import Tensor

    from space.onnx.block import Block


def sliding_state(layer: Layer, width: int, model_config: ModelConfig, batch: int, past: int) -> Shapes:
    """The keys and values of the tokens that the next one sees besides itself."""
    return cache_shapes(layer, model_config, batch, min(past, layer.window - 1))


def sliding_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """Attention over the window: hidden [B, T, width] -> ([B, T, H*D], keys and values)."""
    from space.mixers.softmax_torch import softmax_forward

    return softmax_forward(weights, hidden, call)


def write_sliding(block: Block) -> tuple[str, dict[str, str]]:
    """The same as nodes of a graph; keys and values are cut to the window."""
    import numpy as np

    from space.mixers.softmax_onnx import softmax_nodes

    graph, window = block.graph, block.layer.window
    out, *caches = softmax_nodes(block)
    start = graph.constant(f"held.{window}", np.array([1 - window], np.int64))
    end = graph.constant("end", np.array([2**31 - 1], np.int64))
    axis = graph.constant("axis.2", np.array([2], np.int64))
    keys, values = (str(graph.add("Slice", x, start, end, axis)) for x in caches)
    return out, {"key": keys, "value": values}


def sliding_activations(
    layer: Layer, width: int, packed: int, workload: Workload, model_config: ModelConfig
) -> int:
    """Floats at the widest node; the caches of state and input stand side by side before they are cut."""
    tokens, d = workload.batch * workload.tokens, model_config.head_dim
    held = min(workload.past, layer.window - 1) + workload.tokens
    caches = 2 * layer.kv_heads * d * workload.batch * held
    cutting = tokens * (width + packed + layer.heads * d) + caches
    return max(softmax_activations(layer, width, packed, workload, model_config), cutting)


register_mixer(
    Mixer(
        name="sliding",
        mixer_class="local",
        shapes=softmax_shapes,
        state_shapes=sliding_state,
        forward=sliding_forward,
        write=write_sliding,
        flops=softmax_flops,
        activations=sliding_activations,
        projections=("q", "k", "v"),
        initial=BIAS_INITIAL,
        windowed=True,
        runs_everywhere=True,
    )
)
