"""Mixers as a plug-in would bring them: one of each class, of growing, fixed and windowed states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.layer import Layer, ModelConfig
from space.mixers import Mixer, MixerCall, Shapes, State, Weights
from space.mixers.initial import zeros
from space.mixers.recurrent import recurrent_flops, recurrent_shapes, recurrent_state
from space.mixers.sliding import sliding_activations, sliding_state
from space.mixers.softmax import cache_shapes, softmax_flops, softmax_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from space.onnx.block import Block


# Full: softmax attention without positions, in ordinary operators; its cache grows by concatenation.


def shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    d = model_config.head_dim
    kv = (kv_heads * d, width)
    return {"pre_norm": (width,), "q": (heads * d, width), "k": kv, "v": kv, "o": (width, heads * d)}


def state_shapes(layer: Layer, width: int, model_config: ModelConfig, batch: int, past: int) -> Shapes:
    return cache_shapes(layer, model_config, batch, past)


def forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    import torch

    from space.attention.softmax import softmax_attention
    from space.mixers.recurrent_torch import project_heads

    q, k, v = project_heads(weights, hidden, call.model_config.head_dim)
    if call.state:
        k = torch.cat([call.state["key"].transpose(1, 2), k], 1)
        v = torch.cat([call.state["value"].transpose(1, 2), v], 1)
    out = softmax_attention(q, k, v, 0, call.mask)
    return out.flatten(2), {"key": k.transpose(1, 2), "value": v.transpose(1, 2)}


def write(block: Block) -> tuple[str, dict[str, str]]:
    import numpy as np

    from space.mixers.recurrent_onnx import project_parts

    graph, layer, d = block.graph, block.layer, block.graph.model_config.head_dim
    parts, kv, group = project_parts(block), layer.kv_heads, layer.heads // layer.kv_heads

    def by_head(x: str, heads: int) -> str:
        return str(graph.add("Transpose", graph.reshape(x, [0, 0, heads, d]), perm=[0, 2, 1, 3]))

    keys = graph.add("Concat", block.state["key"], by_head(parts["k"], kv), axis=2)
    values = graph.add("Concat", block.state["value"], by_head(parts["v"], kv), axis=2)  # [B, Hkv, S, D]
    wide = graph.constant(f"five.{d}", np.array([0, kv, 1, -1, d], np.int64))
    key, value = (graph.add("Reshape", x, wide) for x in (keys, values))  # [B, Hkv, 1, S, D]
    query = graph.reshape(by_head(parts["q"], layer.heads), [0, kv, group, -1, d])  # [B, Hkv, R, T, D]
    query = graph.add("Mul", query, graph.scalar(f"scale.{d}", d**-0.5))
    scores = graph.add("MatMul", query, graph.add("Transpose", key, perm=[0, 1, 2, 4, 3]))
    zero, one = graph.scalar("zero.int64", 0, np.int64), graph.scalar("one.int64", 1, np.int64)
    total = graph.add("Squeeze", graph.size(keys, 2))
    places = graph.add("Range", zero, total, one)
    first = graph.add("Sub", total, graph.add("Squeeze", graph.size(block.source, 1)))
    own = graph.reshape(graph.add("Range", first, total, one), [-1, 1])
    seen = graph.add("LessOrEqual", places, own)  # [T, S]
    scores = graph.add("Where", seen, scores, graph.scalar("-inf", -np.inf))
    out = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), value)  # [B, Hkv, R, T, D]
    out = graph.add("Transpose", out, perm=[0, 3, 1, 2, 4])
    return graph.reshape(out, [0, 0, layer.heads * d]), {"key": keys, "value": values}


PLAIN = Mixer(
    name="plain_attention",
    mixer_class="full",
    shapes=shapes,
    state_shapes=state_shapes,
    forward=forward,
    write=write,
    flops=softmax_flops,
    projections=("q", "k", "v"),
)


# Linear: a learned decay of each head, the same for all tokens.


def decayed_shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    return recurrent_shapes(width, heads, kv_heads, model_config) | {"rate": (kv_heads,)}


def decayed_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    import torch.nn.functional as F

    from space.attention.linear import linear_attention
    from space.mixers.recurrent_torch import norm_heads, project_heads

    q, k, v = project_heads(weights, hidden, call.model_config.head_dim)
    decay = -F.softplus(weights["rate"]).expand(*hidden.shape[:2], -1)
    out, state = linear_attention(q, k, v, rule="gated", decay=decay, state=call.state.get("s"))
    return norm_heads(weights, out), {"s": state}


def write_decayed(block: Block) -> tuple[str, dict[str, str]]:
    import numpy as np

    from space.mixers.recurrent_onnx import norm_heads_nodes, project_parts, recurrence_node

    graph, kv, parts = block.graph, block.layer.kv_heads, project_parts(block)
    heads = graph.constant(f"heads.{kv}", np.array([kv], np.int64))
    shape = graph.add("Concat", graph.size(block.source, 0), graph.size(block.source, 1), heads, axis=0)
    rate = -np.logaddexp(0, block.weights["rate"].astype(np.float64))
    decay = graph.add("Expand", block.constant("decay", rate), shape)
    out, state = recurrence_node(block, parts["q"], parts["k"], parts["v"], rule="gated", decay=decay)
    return norm_heads_nodes(block, out), {"s": state}


DECAYED = Mixer(
    name="decayed",
    mixer_class="linear",
    shapes=decayed_shapes,
    state_shapes=recurrent_state,
    forward=decayed_forward,
    write=write_decayed,
    flops=recurrent_flops,
    projections=("q", "k", "v"),
    initial={"rate": zeros},
)


# Local: a window, and none of the parameters that the mixers of a layer share.

RENAMED = {"q": "query", "k": "near_key", "v": "near_value", "o": "out"}


def near_shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    usual = softmax_shapes(width, heads, kv_heads, model_config)
    return {RENAMED.get(name, name): shape for name, shape in usual.items()}


def near_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    from space.mixers.softmax_torch import softmax_forward

    names = {new: old for old, new in RENAMED.items()}
    return softmax_forward({names.get(name, name): w for name, w in weights.items()}, hidden, call)


def write_near(block: Block) -> tuple[str, dict[str, str]]:
    from space.mixers.sliding import write_sliding

    return write_sliding(block)


NEAR = Mixer(
    name="near",
    mixer_class="local",
    shapes=near_shapes,
    state_shapes=sliding_state,
    forward=near_forward,
    write=write_near,
    flops=softmax_flops,
    activations=sliding_activations,
    projections=("query", "near_key", "near_value"),
    output="out",
    windowed=True,
)

ALL = (PLAIN, DECAYED, NEAR)
