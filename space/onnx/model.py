"""The blocks as ONNX graphs for onnxruntime: profiling measures the graphs that are exported.

A graph is written node by node in milliseconds, without torch, from weights named as in
:mod:`space.shapes`. One graph serves prefill and decode: batch and length are dynamic,
states go in as ``state.SLOT.NAME`` and come out as ``state.SLOT.NAME.next``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from space.architecture import Architecture, Layer, ModelConfig
from space.io.errors import InputError
from space.mixers import MIXERS
from space.onnx.block import Block
from space.onnx.graph import Arrays, Graph
from space.shapes import ffn_shapes, mixer_shapes, state_shapes


def add_mixer(graph: Graph, x: str, slot: int, layer: Layer, weights: Arrays, source: str) -> str:
    """Append one mixer block with its state inputs and outputs.

    Args:
        graph: the graph.
        x: the residual stream [B, T, width].
        slot: in the names of its weights and states.
        layer: the layer, of which only the mixer is appended.
        weights: every parameter of the block by name.
        source: a value [B, T, ...] whose first two dimensions are batch and length.

    Returns:
        The residual stream after the block.

    Raises:
        InputError: no graph of this mixer can be written.
        ValueError: its writer does not keep its contract; the message names the mixer.
    """
    mixer = MIXERS.get(layer.mixer)
    if mixer.write is None:
        others = ", ".join(name for name in MIXERS if MIXERS.get(name).write is not None)
        raise InputError(f"mixer {layer.mixer}: no ONNX graph of it can be written; there are {others}")
    width, place = len(weights["pre_norm"]), f"layers.{slot}.mixer."
    inputs = _states(layer, width, graph.model_config, f"past.{slot}")
    state = {
        name: graph.input(f"state.{slot}.{name}", TensorProto.FLOAT, dims) for name, dims in inputs.items()
    }
    block = Block(
        graph=graph,
        layer=layer,
        weights=weights,
        state=state,
        place=place,
        source=source,
        hidden=graph.norm(x, place + "pre_norm", weights["pre_norm"]),
        projections=mixer.projections,
    )
    try:
        out, after = _written(mixer.write(block), state)
    except ValueError as error:
        raise ValueError(f"mixer {layer.mixer}: {error}") from error
    for name, dims in _states(layer, width, graph.model_config, f"next.{slot}").items():
        graph.output(f"state.{slot}.{name}.next", after[name], TensorProto.FLOAT, dims)
    return graph.residual(x, block.product(out, mixer.output, weights[mixer.output]))


def _written(written: Any, states: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The output and the states that a mixer's writer returned; a ValueError if they are wrong."""
    if not (isinstance(written, tuple) and len(written) == 2 and isinstance(written[1], Mapping)):
        raise ValueError(f"write returned no pair of an output and states by name: {written!r}")
    out, after = written
    if after.keys() != states.keys():
        raise ValueError(
            f"write returned the states {', '.join(after) or 'none'}, "
            f"but state_shapes has {', '.join(states) or 'none'}"
        )
    for name, value in {"the output": out, **after}.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} of write is not the name of a value: {value!r}")
    return out, dict(after)


def _states(layer: Layer, width: int, model_config: ModelConfig, held: str) -> dict[str, list[int | str]]:
    """The dimensions of a layer's states; batch is dynamic, and so is ``held``, the length of a cache."""
    ends = (0, model_config.max_seq_len)
    first, last = (state_shapes(layer, width, model_config, 1, past) for past in ends)
    return {
        name: ["batch", *(a if a == b else held for a, b in zip(shape[1:], last[name][1:], strict=True))]
        for name, shape in first.items()
    }


def add_ffn(graph: Graph, x: str, slot: int, weights: Arrays) -> str:
    """Append one SwiGLU block.

    Args:
        graph: the graph.
        x: the residual stream [B, T, width].
        slot: in the names of its weights.
        weights: every parameter of the block by name.

    Returns:
        The residual stream after the block.
    """
    place = f"layers.{slot}.ffn."
    hidden = graph.norm(x, place + "pre_norm", weights["pre_norm"])
    size = weights["gate"].shape[0]
    joined = graph.product(hidden, place + "in", np.concatenate([weights["gate"], weights["up"]]))
    gate, up = graph.split(joined, [size, size])
    gated = graph.add("Mul", graph.silu(gate), up)
    return graph.residual(x, graph.product(gated, place + "down", weights["down"]))


def add_embedding(graph: Graph, tokens: str, weight: NDArray[Any], name: str = "embedding") -> str:
    """Append the embedding.

    Args:
        graph: the graph.
        tokens: [B, T].
        weight: [vocab_size, width].
        name: of the constant.

    Returns:
        The residual stream [B, T, width].
    """
    return str(graph.add("Gather", graph.constant(name, weight.astype(np.float32)), tokens, axis=0))


def add_head(graph: Graph, x: str, gain: NDArray[Any], weight: str, name: str = "norm") -> str:
    """Append the final norm and the head.

    Args:
        graph: the graph.
        x: the residual stream [B, T, width].
        gain: of the norm [width].
        weight: name of the head's matrix [vocab_size, width], a constant of the graph.
        name: of the gain.

    Returns:
        The logits [B, T, vocab_size].
    """
    return str(graph.add("MatMul", graph.norm(x, name, gain), graph.add("Transpose", weight, perm=[1, 0])))


def model_graph(
    architecture: Architecture,
    model_config: ModelConfig,
    weights: Arrays,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """The graph of a whole sub-model.

    Inputs are ``tokens`` int64 [B, T], ``position`` int64 [1] (the place of the first token) and
    ``state.SLOT.NAME``; outputs are ``logits`` [B, T, vocab_size], the first, and
    ``state.SLOT.NAME.next``. A cache of :attr:`Mixer.cache_in_place` may be longer than ``position``: only
    the tokens before it are read.

    Args:
        architecture: the architecture.
        model_config: settings of its space.
        weights: every parameter by name.
        metadata: properties to store in the model.
    """
    graph = Graph(model_config)
    tokens = graph.input("tokens", TensorProto.INT64, ["batch", "length"])
    graph.input("position", TensorProto.INT64, [1])
    x = add_embedding(graph, tokens, weights["embedding"])
    for slot, layer in enumerate(architecture.layers):
        if layer.mixer != "none":
            shapes = mixer_shapes(layer.mixer, architecture.width, layer.heads, layer.kv_heads, model_config)
            block = {name: weights[f"layers.{slot}.mixer.{name}"] for name in shapes}
            x = add_mixer(graph, x, slot, layer, block, tokens)
        if layer.ffn:
            shapes = ffn_shapes(architecture.width, layer.ffn)
            x = add_ffn(graph, x, slot, {name: weights[f"layers.{slot}.ffn.{name}"] for name in shapes})
    head = "embedding"
    if not model_config.tie_embeddings:
        head = graph.constant("head", weights["head"].astype(np.float32))
    logits = add_head(graph, x, weights["norm"], head)
    shape: list[int | str] = ["batch", "length", model_config.vocab_size]
    graph.output("logits", logits, TensorProto.FLOAT, shape, first=True)
    return graph.model(metadata)
