"""The softmax mixers as one GroupQueryAttention node, rotary embedding included."""

import numpy as np
from onnx import TensorProto

from space.mixers.softmax import rotates_inside
from space.onnx.block import Block
from space.onnx.graph import CONTRIB, Graph


def softmax_nodes(block: Block) -> tuple[str, str, str]:
    """Append the product, the norms of queries and keys, and the attention.

    Without a window the cache is read up to the graph's input ``position``; with one it holds exactly the
    tokens before, and the places of the new ones are given to the operator.

    Args:
        block: the block, whose state has ``key`` and ``value``.

    Returns:
        The output [B, T, H*D], the keys and the values of all tokens, [B, Hkv, tokens, D].
    """
    graph, layer = block.graph, block.layer
    query, key, value = _queries_keys_values(block)
    inside = rotates_inside(graph.model_config)
    if inside:
        cos, sin = graph.rotary()
    else:
        cos = sin = ""
        query = graph.rotate(query, layer.heads, "position")
        key = graph.rotate(key, layer.kv_heads, "position")
    past = graph.size(block.state["key"], 2) if layer.window else "position"
    last, total = _places(graph, past, block.source)
    positions = _positions(graph, block.source) if layer.window and inside else ""
    out, keys, values = graph.add(
        "GroupQueryAttention",
        *(query, key, value, block.state["key"], block.state["value"], last, total, cos, sin, positions),
        outputs=3,
        domain=CONTRIB,
        num_heads=layer.heads,
        kv_num_heads=layer.kv_heads,
        do_rotary=int(inside),
        local_window_size=layer.window if layer.window else -1,
    )
    return out, keys, values


def _queries_keys_values(block: Block) -> tuple[str, str, str]:
    """The packed product with biases as it is; its parts where queries and keys are normed or rotated."""
    graph, joined, d = block.graph, block.packed(), block.graph.model_config.head_dim
    if graph.model_config.qkv_bias:
        bias = np.concatenate([block.weights[f"{name}_bias"] for name in ("q", "k", "v")])
        joined = str(graph.add("Add", joined, block.constant("bias", bias)))
    if not graph.model_config.qk_norm and rotates_inside(graph.model_config):
        return joined, "", ""
    sizes = list(block.sizes.values())
    query, key, value = graph.split(joined, sizes)
    if not graph.model_config.qk_norm:
        return query, key, value
    normed = []
    for name, x, size in (("q_norm", query, sizes[0]), ("k_norm", key, sizes[1])):
        by_head = graph.norm(graph.reshape(x, [0, 0, size // d, d]), block.place + name, block.weights[name])
        normed.append(graph.reshape(by_head, [0, 0, size]))
    return normed[0], normed[1], value


def _places(graph: Graph, past: str, source: str) -> tuple[str, str]:
    """For a number of past tokens [1]: the last place int32 [B], and the total length int32 []."""

    def total() -> str:
        length = graph.add("Add", past, graph.size(source, 1))
        return str(graph.add("Cast", length, to=TensorProto.INT32))

    def last() -> str:
        one = graph.constant("one.int32", np.array([1], np.int32))
        place = graph.add("Sub", graph.once(f"total.{past}", total), one)
        return str(graph.add("Expand", place, graph.size(source, 0)))

    def as_scalar() -> str:
        return str(graph.add("Squeeze", graph.once(f"total.{past}", total)))

    return graph.once(f"last.{past}", last), graph.once(f"scalar.{past}", as_scalar)


def _positions(graph: Graph, source: str) -> str:
    """The places of all tokens, int64 [B, T]."""

    def make() -> str:
        zero, one = graph.scalar("zero.int64", 0, np.int64), graph.scalar("one.int64", 1, np.int64)
        length = graph.add("Squeeze", graph.size(source, 1))
        places = graph.add("Add", graph.add("Range", zero, length, one), "position")
        shape = graph.add("Concat", graph.size(source, 0), graph.size(source, 1), axis=0)
        return str(graph.add("Expand", places, shape))

    return graph.once("positions", make)
