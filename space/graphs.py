"""The same blocks as ONNX graphs, for onnxruntime: what is measured is what is exported.

A graph is written node by node in milliseconds, without torch, from weights named as in
:mod:`space.shapes`. One graph serves prefill and decode: batch and length are dynamic,
states go in as ``state.SLOT.NAME`` and come out as ``state.SLOT.NAME.next``. Projections
that read the same input are packed into one product, since a small model's decode step is
bound by the number of nodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from space.architecture import Architecture, Frame, Layer
from space.shapes import CONV, MIN_LOG_DECAY, NORM_EPS, ROPE_BASE, ffn_shapes, mixer_shapes, state_shapes

Arrays = Mapping[str, NDArray[Any]]
OPSET = 21
CONTRIB = "com.microsoft"


@dataclass
class Graph:
    """An ONNX graph being written; values are known by their names."""

    frame: Frame
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def add(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append a node; returns the name of its output, or a tuple of names."""
        self.count += 1
        names = [f"v{self.count}" if outputs == 1 else f"v{self.count}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """A constant by name; one that is there already is used again."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def once(self, name: str, make: Any) -> str:
        """The value that ``make()`` appended the first time it was asked for under this name."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    def input(self, name: str, kind: int, shape: list[int | str]) -> str:
        """Declare a graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, value: str, kind: int, shape: list[int | str]) -> None:
        """Declare a graph output: the value takes the output's name (an Identity node would copy it)."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, known in enumerate(names):
                    if known == value:
                        names[i] = name
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def model(self, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self.nodes, "formfit", self.inputs, self.outputs, initializer=list(self.constants.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="formfit", ir_version=10)
        helper.set_model_props(model, dict(metadata or {}))
        return model

    # Pieces that several blocks use.

    def norm(self, x: str, gain: str, weight: NDArray[Any], eps: float = NORM_EPS) -> str:
        """RMSNorm over the last dimension."""
        gain = self.constant(gain, weight.astype(np.float32))
        return str(self.add("SimplifiedLayerNormalization", x, gain, axis=-1, epsilon=eps, stash_type=1))

    def product(self, x: str, name: str, weight: NDArray[Any]) -> str:
        """``x W^T`` for W [out, in]."""
        return str(self.add("MatMul", x, self.constant(name, weight.T.astype(np.float32))))

    def split(self, x: str, sizes: list[int]) -> tuple[str, ...]:
        """Cut the last dimension into pieces of the given sizes."""
        sizes_name = self.constant("split." + "-".join(map(str, sizes)), np.array(sizes, np.int64))
        return tuple(self.add("Split", x, sizes_name, outputs=len(sizes), axis=-1))

    def reshape(self, x: str, shape: list[int]) -> str:
        """Reshape; 0 keeps a dimension."""
        name = self.constant("shape." + ",".join(map(str, shape)), np.array(shape, np.int64))
        return str(self.add("Reshape", x, name))

    def silu(self, x: str) -> str:
        """``x sigmoid(x)``."""
        return str(self.add("Mul", x, self.add("Sigmoid", x)))

    def rotary(self) -> tuple[str, str]:
        """The caches of cosines and sines, [context, D/2]."""
        d = self.frame.head_dim
        angles = np.arange(self.frame.context)[:, None] * ROPE_BASE ** (-np.arange(0, d, 2) / d)
        return (
            self.constant("rope.cos", np.cos(angles).astype(np.float32)),
            self.constant("rope.sin", np.sin(angles).astype(np.float32)),
        )

    def rotate(self, x: str, heads: int, position: str) -> str:
        """Rotary embedding of [B, T, H*D] from a first position [1] or positions [B, T]."""
        cos, sin = self.rotary()
        return str(self.add("RotaryEmbedding", x, position, cos, sin, domain=CONTRIB, num_heads=heads))

    def scalar(self, name: str, value: Any, kind: Any = np.float32) -> str:
        """A scalar constant."""
        return self.constant(name, np.array(value, kind))

    def size(self, x: str, axis: int) -> str:
        """A dimension of a value, int64 [1]."""
        return self.once(f"{x}[{axis}]", lambda: self.add("Shape", x, start=axis, end=axis + 1))


def add_state(graph: Graph, slot: int, layer: Layer) -> dict[str, str]:
    """Declare a layer's state inputs; cache lengths are dynamic."""
    names = {}
    for name, shape in state_shapes(layer, graph.frame, 1, 1).items():
        dims: list[int | str] = ["batch", *shape[1:]]
        if name in ("key", "value"):
            dims[2] = f"past.{slot}"
        names[name] = graph.input(f"state.{slot}.{name}", TensorProto.FLOAT, dims)
    return names


def add_state_output(graph: Graph, slot: int, layer: Layer, after: Mapping[str, str]) -> None:
    """Declare a layer's state outputs."""
    for name, shape in state_shapes(layer, graph.frame, 1, 1).items():
        dims: list[int | str] = ["batch", *shape[1:]]
        if name in ("key", "value"):
            dims[2] = f"next.{slot}"
        graph.output(f"state.{slot}.{name}.next", after[name], TensorProto.FLOAT, dims)


def add_mixer(graph: Graph, x: str, slot: int, layer: Layer, weights: Arrays, source: str) -> str:
    """Append one mixer block with its state inputs and outputs: x [B, T, width] -> x.

    ``source`` is a value [B, T, ...] whose first two dimensions are batch and length.
    """
    state = add_state(graph, slot, layer)
    place = f"layers.{slot}.mixer."
    hidden = graph.norm(x, place + "pre_norm", weights["pre_norm"])
    packed = ["q", "k", "v", *(n for n in ("gate", "beta", "decay") if n in weights)]
    sizes = [weights[name].shape[0] for name in packed]
    joined = graph.product(hidden, place + "in", np.concatenate([weights[name] for name in packed]))
    if layer.mixer in ("attention", "sliding"):
        out, after = _softmax_mixer(graph, joined, sizes, layer, weights, state, place, source)
    else:
        out, after = _linear_mixer(graph, joined, packed, sizes, layer, weights, state, place, source)
    add_state_output(graph, slot, layer, after)
    return str(graph.add("Add", x, graph.product(out, place + "o", weights["o"])))


def _softmax_mixer(
    graph: Graph,
    joined: str,
    sizes: list[int],
    layer: Layer,
    weights: Arrays,
    state: Mapping[str, str],
    place: str,
    source: str,
) -> tuple[str, dict[str, str]]:
    """``attention`` and ``sliding`` as one GroupQueryAttention node, rotary embedding included."""
    query, key, value = joined, "", ""
    if graph.frame.qk_norm:
        d = graph.frame.head_dim
        query, key, value = graph.split(joined, sizes)
        normed = []
        for name, x, size in (("q_norm", query, sizes[0]), ("k_norm", key, sizes[1])):
            by_head = graph.norm(graph.reshape(x, [0, 0, size // d, d]), place + name, weights[name])
            normed.append(graph.reshape(by_head, [0, 0, size]))
        query, key = normed
    cos, sin = graph.rotary()
    if layer.mixer == "attention":
        last, total = _places(graph, "position", source)
        positions = ""
    else:
        last, total = _places(graph, graph.size(state["key"], 2), source)
        positions = _positions(graph, source)
    out, keys, values = graph.add(
        "GroupQueryAttention",
        *(query, key, value, state["key"], state["value"], last, total, cos, sin, positions),
        outputs=3,
        domain=CONTRIB,
        num_heads=layer.heads,
        kv_num_heads=layer.kv_heads,
        do_rotary=1,
        local_window_size=layer.window if layer.window else -1,
    )
    if layer.mixer == "sliding":
        start = graph.constant(f"held.{layer.window}", np.array([1 - layer.window], np.int64))
        end = graph.constant("end", np.array([2**31 - 1], np.int64))
        axis = graph.constant("axis.2", np.array([2], np.int64))
        keys, values = (graph.add("Slice", x, start, end, axis) for x in (keys, values))
    return out, {"key": keys, "value": values}


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


def _linear_mixer(
    graph: Graph,
    joined: str,
    packed: list[str],
    sizes: list[int],
    layer: Layer,
    weights: Arrays,
    state: Mapping[str, str],
    place: str,
    source: str,
) -> tuple[str, dict[str, str]]:
    """The mixers on the linear recurrence as one LinearAttention node."""
    d, kv = graph.frame.head_dim, layer.kv_heads
    after: dict[str, str] = {}
    rule, decay, beta = "linear", "", ""
    if layer.mixer == "gated_deltanet":
        rule = "gated_delta"
        qkv = sum(sizes[:3])
        mixed, *rest = graph.split(joined, [qkv, *sizes[3:]])
        parts = dict(zip(packed[3:], rest, strict=True))
        taps = np.concatenate([weights["conv_q"], weights["conv_k"], weights["conv_v"]])
        mixed, after["conv"] = _convolution(graph, mixed, state["conv"], place, taps)
        q, k, v = graph.split(mixed, sizes[:3])
        q, k = (_unit(graph, x, size // d, place) for x, size in ((q, sizes[0]), (k, sizes[1])))
        beta = graph.add("Sigmoid", parts["beta"])
        bias = graph.constant(place + "dt_bias", weights["dt_bias"].astype(np.float32))
        rate = graph.constant(place + "A", -np.exp(weights["A_log"].astype(np.float64)).astype(np.float32))
        step = graph.add("Softplus", graph.add("Add", parts["decay"], bias))
        floor = graph.scalar("floor", MIN_LOG_DECAY)
        decay = graph.add("Max", graph.add("Mul", step, rate), floor)
    else:
        q, k, v, *rest = graph.split(joined, sizes)
        parts = dict(zip(packed[3:], rest, strict=True))
        if layer.mixer == "linear":
            one = graph.scalar("one", 1.0)
            q, k = (graph.add("Add", graph.add("Elu", x), one) for x in (q, k))
        else:
            rule = "gated"
            q, k = graph.rotate(q, layer.heads, "position"), graph.rotate(k, kv, "position")
            decay = _retnet_decay(graph, kv, source)
    out, after["s"] = graph.add(
        "LinearAttention",
        *(q, k, v, state["s"], decay, beta),
        outputs=2,
        domain=CONTRIB,
        q_num_heads=layer.heads,
        kv_num_heads=kv,
        update_rule=rule,
        scale=d**-0.5,
    )
    by_head = graph.norm(graph.reshape(out, [0, 0, layer.heads, d]), place + "norm", weights["norm"])
    out = graph.reshape(by_head, [0, 0, layer.heads * d])
    if "gate" in parts:
        out = graph.add("Mul", out, graph.silu(parts["gate"]))
    return out, after


def _unit(graph: Graph, x: str, heads: int, place: str) -> str:
    """L2 norm per head, as an RMSNorm whose gain and epsilon are scaled to it: one node instead of four."""
    d = graph.frame.head_dim
    by_head = graph.reshape(x, [0, 0, heads, d])
    normed = graph.norm(by_head, "unit", np.full(d, d**-0.5, np.float32), eps=1e-6 / d)
    return graph.reshape(normed, [0, 0, heads * d])


def _convolution(graph: Graph, x: str, past: str, place: str, taps: NDArray[Any]) -> tuple[str, str]:
    """Causal depthwise convolution with silu: x [B, T, C] and past [B, C, K-1] -> (out, next past)."""
    channels_first = graph.add("Transpose", x, perm=[0, 2, 1])
    joined = graph.add("Concat", past, channels_first, axis=2)
    weight = graph.constant(place + "conv", taps[:, None].astype(np.float32))
    mixed = graph.silu(graph.add("Conv", joined, weight, group=len(taps)))
    start = graph.constant("conv.start", np.array([1 - CONV], np.int64))
    end = graph.constant("end", np.array([2**31 - 1], np.int64))
    axis = graph.constant("axis.2", np.array([2], np.int64))
    return graph.add("Transpose", mixed, perm=[0, 2, 1]), graph.add("Slice", joined, start, end, axis)


def _retnet_decay(graph: Graph, kv_heads: int, source: str) -> str:
    """RetNet's fixed log decays, [B, T, Hkv]."""

    def make() -> str:
        values = np.log1p(-np.exp2(-5.0 - np.arange(kv_heads))).astype(np.float32)
        heads = graph.constant(f"heads.{kv_heads}", np.array([kv_heads], np.int64))
        shape = graph.add("Concat", graph.size(source, 0), graph.size(source, 1), heads, axis=0)
        return str(graph.add("Expand", graph.constant(f"retnet.{kv_heads}", values), shape))

    return graph.once(f"retnet.{kv_heads}", make)


def add_ffn(graph: Graph, x: str, slot: int, weights: Arrays) -> str:
    """Append one SwiGLU block: x [B, T, width] -> x."""
    place = f"layers.{slot}.ffn."
    hidden = graph.norm(x, place + "pre_norm", weights["pre_norm"])
    size = weights["gate"].shape[0]
    joined = graph.product(hidden, place + "in", np.concatenate([weights["gate"], weights["up"]]))
    gate, up = graph.split(joined, [size, size])
    gated = graph.add("Mul", graph.silu(gate), up)
    return str(graph.add("Add", x, graph.product(gated, place + "down", weights["down"])))


def add_embedding(graph: Graph, tokens: str, weight: NDArray[Any], name: str = "embedding") -> str:
    """Append the embedding: tokens [B, T] -> [B, T, width]."""
    return str(graph.add("Gather", graph.constant(name, weight.astype(np.float32)), tokens, axis=0))


def add_head(graph: Graph, x: str, gain: NDArray[Any], weight: str, name: str = "norm") -> str:
    """Append the final norm and the head, whose weight [vocabulary, width] is a constant there already."""
    return str(graph.add("MatMul", graph.norm(x, name, gain), graph.add("Transpose", weight, perm=[1, 0])))


def model_graph(
    architecture: Architecture, frame: Frame, weights: Arrays, metadata: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """The graph of a whole sub-model.

    Inputs ``tokens`` int64 [B, T], ``position`` int64 [1] (the place of the first token) and
    ``state.SLOT.NAME``; outputs ``logits`` [B, T, vocabulary] and ``state.SLOT.NAME.next``. An
    attention cache may be longer than ``position``: only what lies before it is read.
    """
    graph = Graph(frame)
    tokens = graph.input("tokens", TensorProto.INT64, ["batch", "length"])
    graph.input("position", TensorProto.INT64, [1])
    x = add_embedding(graph, tokens, weights["embedding"])
    for slot, layer in enumerate(architecture.layers):
        if layer.mixer != "none":
            shapes = mixer_shapes(layer.mixer, architecture.width, layer.heads, layer.kv_heads, frame)
            block = {name: weights[f"layers.{slot}.mixer.{name}"] for name in shapes}
            x = add_mixer(graph, x, slot, layer, block, tokens)
        if layer.ffn:
            shapes = ffn_shapes(architecture.width, layer.ffn)
            x = add_ffn(graph, x, slot, {name: weights[f"layers.{slot}.ffn.{name}"] for name in shapes})
    head = "embedding"
    if not frame.tied:
        head = graph.constant("head", weights["head"].astype(np.float32))
    logits = add_head(graph, x, weights["norm"], head)
    graph.output("logits", logits, TensorProto.FLOAT, ["batch", "length", frame.vocabulary])
    return graph.model(metadata)
