"""LFM2's gated short convolution (Liquid AI 2025): no heads, and a state of two tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.layer import Layer, ModelConfig
from space.mixers import register_mixer
from space.mixers.initial import taps
from space.mixers.mixer import Mixer, MixerCall, Shapes, State, Weights
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
    return {"conv": (batch, width, SHORT_CONV_TAPS - 1)}


def short_conv_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """The convolution between two gates: hidden [B, T, width] -> ([B, T, width], its last inputs)."""
    from space.attention.convolution import causal_conv
    from space.attention.projection import project

    b, c, x = (project(hidden, weights[name]) for name in ("in_b", "in_c", "in_x"))
    mixed, past = causal_conv(b * x, weights["conv_x"], call.state.get("conv"))
    return c * mixed, {"conv": past}


def write_short_conv(block: Block) -> tuple[str, dict[str, str]]:
    """The same with one Conv node.

    Older versions of onnxruntime have this operator for convolutions alone, and of the mixers with a
    convolution they run this one, so it does without the operator for few tokens.
    """
    from space.mixers.recurrent_onnx import general_convolution, project_parts

    graph, shape = block.graph, block.weights["conv_x"].shape
    b, c, x = project_parts(block).values()
    inner = graph.add("Transpose", graph.add("Mul", b, x), perm=[0, 2, 1])
    weight = block.constant("conv", block.weights["conv_x"][:, None])
    mixed, past = general_convolution(graph, block.state["conv"], inner, weight, shape)
    return str(graph.add("Mul", c, graph.add("Transpose", mixed, perm=[0, 2, 1]))), {"conv": past}


def short_conv_flops(layer: Layer, width: int, workload: Workload, model_config: ModelConfig) -> int:
    """FLOPs of the convolution."""
    return 2 * workload.batch * workload.tokens * width * SHORT_CONV_TAPS


register_mixer(
    Mixer(
        name="short_conv",
        mixer_class="local",
        shapes=short_conv_shapes,
        state_shapes=short_conv_state,
        forward=short_conv_forward,
        write=write_short_conv,
        flops=short_conv_flops,
        projections=("in_b", "in_c", "in_x"),
        output="out",
        initial={"conv_x": taps},
        has_heads=False,
        runs_everywhere=True,
    )
)
