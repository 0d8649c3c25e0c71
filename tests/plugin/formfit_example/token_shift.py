"""The mixer ``token_shift``: each channel is a weighted sum of this token and the one before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.mixers import Mixer, MixerCall, Shapes, State, Weights, register_mixer

if TYPE_CHECKING:
    from torch import Tensor

    from space.layer import Layer, ModelConfig
    from space.onnx.block import Block
    from space.workload import Workload

TAPS = 2


def shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """The norm, one projection of the input, two weights of each channel, and the output matrix."""
    square = (width, width)
    return {"pre_norm": (width,), "in_x": square, "taps": (width, TAPS), "out": square}


def state_shapes(layer: Layer, width: int, model_config: ModelConfig, batch: int, past: int) -> Shapes:
    """The token before."""
    return {"last": (batch, TAPS - 1, width)}


def forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """Mix: hidden [B, T, width] -> ([B, T, width], the last token)."""
    from space.attention.convolution import causal_conv
    from space.attention.projection import project

    mixed, last = causal_conv(project(hidden, weights["in_x"]), weights["taps"], call.state.get("last"))
    return mixed, {"last": last}


def write(block: Block) -> tuple[str, dict[str, str]]:
    """The same as nodes of an ONNX graph."""
    from space.mixers.recurrent_onnx import convolution_nodes

    mixed, last = convolution_nodes(block, block.packed(), block.weights["taps"], block.state["last"])
    return mixed, {"last": last}


def flops(layer: Layer, width: int, workload: Workload, model_config: ModelConfig) -> int:
    """FLOPs of the weighted sums."""
    return 2 * workload.batch * workload.tokens * width * TAPS


def taps(shape: tuple[int, ...], generator: object) -> Tensor:
    """The mean of both tokens."""
    import torch

    return torch.full(shape, 1 / TAPS)


register_mixer(
    Mixer(
        name="token_shift",
        mixer_class="local",
        shapes=shapes,
        state_shapes=state_shapes,
        forward=forward,
        write=write,
        flops=flops,
        projections=("in_x",),
        output="out",
        initial={"taps": taps},
        has_heads=False,
        runs_everywhere=True,
    )
)
