"""LFM2's gated short convolution (Liquid AI 2025): no heads, and a state of two tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.layer import Layer, ModelConfig
from space.mixers import register_mixer
from space.mixers.initial import taps
from space.mixers.mixer import Mixer, MixerCall, Shapes, State, Weights, elementwise_activations
from space.workload import Workload

if TYPE_CHECKING:
    from torch import Tensor

    from space.onnx.block import Block

SHORT_CONV_TAPS = 3  # of the causal depthwise convolution


def short_conv_shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """Three projections of the input, the taps of the convolution, and the output matrix."""
    square = (width, width)
    inner: Shapes = {"in_b": square, "in_c": square, "in_x": square, "conv_x": (width, SHORT_CONV_TAPS)}
    return {"pre_norm": (width,)} | inner | {"out": square}


def short_conv_state(layer: Layer, width: int, model_config: ModelConfig, batch: int, past: int) -> Shapes:
    """The last inputs of the convolution."""
    return {"conv": (batch, SHORT_CONV_TAPS - 1, width)}


def short_conv_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """The convolution between two gates: hidden [B, T, width] -> ([B, T, width], its last inputs)."""
    from space.attention.convolution import causal_conv
    from space.attention.projection import project

    b, c, x = (project(hidden, weights[name]) for name in ("in_b", "in_c", "in_x"))
    mixed, past = causal_conv(b * x, weights["conv_x"], call.state.get("conv"))
    return c * mixed, {"conv": past}


def write_short_conv(block: Block) -> tuple[str, dict[str, str]]:
    """The same as nodes of a graph, of operators that older versions of onnxruntime have too."""
    from space.mixers.recurrent_onnx import convolution_nodes, project_parts

    graph = block.graph
    b, c, x = project_parts(block).values()
    taps, past = block.weights["conv_x"], block.state["conv"]
    mixed, after = convolution_nodes(block, graph.add("Mul", b, x), taps, past)
    return str(graph.add("Mul", c, mixed)), {"conv": after}


def short_conv_flops(layer: Layer, width: int, workload: Workload, model_config: ModelConfig) -> int:
    """FLOPs of the convolution."""
    return 2 * workload.batch * workload.tokens * width * SHORT_CONV_TAPS


def short_conv_activations(
    layer: Layer, width: int, packed: int, workload: Workload, model_config: ModelConfig
) -> int:
    """Floats at the widest node; for one token it is the product with the taps, its past included."""
    held = workload.batch * (workload.tokens + SHORT_CONV_TAPS - 1)
    weighing = 2 * width * (workload.batch * workload.tokens + held)
    return max(elementwise_activations(layer, width, packed, workload, model_config), weighing)


register_mixer(
    Mixer(
        name="short_conv",
        mixer_class="local",
        shapes=short_conv_shapes,
        state_shapes=short_conv_state,
        forward=short_conv_forward,
        write=write_short_conv,
        flops=short_conv_flops,
        activations=short_conv_activations,
        projections=("in_b", "in_c", "in_x"),
        output="out",
        initial={"conv_x": taps},
        has_heads=False,
        runs_everywhere=True,
    )
)
