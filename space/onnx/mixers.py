"""The mixers as ONNX nodes: softmax ones as GroupQueryAttention, the linear recurrence as LinearAttention.

Written for few nodes, since a small model's decode step is bound by their number: projections
that read the same input are one product, and constants are folded into weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from space.architecture import Layer
from space.io.errors import InputError
from space.onnx.graph import CONTRIB, Arrays, Graph
from space.shapes import FEW, MIN_LOG_DECAY, PACKED, RECURRENCES, state_shapes

Array = NDArray[Any]


@dataclass(frozen=True)
class Block:
    """A mixer block being written, after its packed product."""

    graph: Graph
    layer: Layer
    weights: Arrays
    state: Mapping[str, str]  # the state's names in the graph
    place: str  # what the names of its weights begin with
    source: str  # a value [B, T, ...] that tells batch and length
    joined: str  # the packed product [B, T, ...]
    sizes: Mapping[str, int]  # the pieces of the packed product, in order

    def constant(self, name: str, value: Array) -> str:
        """A constant of this block."""
        return self.graph.constant(self.place + name, value.astype(np.float32))

    def product(self, x: str, name: str, weight: Array) -> str:
        """``x W^T`` for W [out, in]."""
        return self.graph.product(x, self.place + name, weight)


def add_state(graph: Graph, slot: int, layer: Layer, width: int) -> dict[str, str]:
    """Declare a layer's state inputs; cache lengths are dynamic."""
    names = {}
    for name, shape in state_shapes(layer, width, graph.model_config, 1, 1).items():
        dims: list[int | str] = ["batch", *shape[1:]]
        if name in ("key", "value"):
            dims[2] = f"past.{slot}"
        names[name] = graph.input(f"state.{slot}.{name}", TensorProto.FLOAT, dims)
    return names


def add_state_output(graph: Graph, slot: int, layer: Layer, width: int, after: Mapping[str, str]) -> None:
    """Declare a layer's state outputs."""
    for name, shape in state_shapes(layer, width, graph.model_config, 1, 1).items():
        dims: list[int | str] = ["batch", *shape[1:]]
        if name in ("key", "value"):
            dims[2] = f"next.{slot}"
        graph.output(f"state.{slot}.{name}.next", after[name], TensorProto.FLOAT, dims)


def add_mixer(graph: Graph, x: str, slot: int, layer: Layer, weights: Arrays, source: str) -> str:
    """Append one mixer block with its state inputs and outputs: x [B, T, width] -> x.

    ``source`` is a value [B, T, ...] whose first two dimensions are batch and length.

    Raises:
        InputError: there is no graph of this mixer.
    """
    if layer.mixer not in WRITERS:
        raise InputError(
            f"mixer {layer.mixer}: no ONNX graph of it can be written; there are {', '.join(WRITERS)}"
        )
    width = len(weights["pre_norm"])
    state = add_state(graph, slot, layer, width)
    place = f"layers.{slot}.mixer."
    hidden = graph.norm(x, place + "pre_norm", weights["pre_norm"])
    packed = {name: weights[name] for name in PACKED if name in weights}
    if layer.mixer == "hgrn2":
        packed["k"] = -packed["k"]
    joined = graph.product(hidden, place + "in", np.concatenate(list(packed.values())))
    sizes = {name: len(weight) for name, weight in packed.items()}
    block = Block(graph, layer, weights, state, place, source, joined, sizes)
    out, after = WRITERS[layer.mixer](block)
    add_state_output(graph, slot, layer, width, after)
    last = "out" if layer.mixer == "short_conv" else "o"
    return graph.residual(x, graph.product(out, place + last, weights[last]))


def _softmax_mixer(block: Block) -> tuple[str, dict[str, str]]:
    """``attention`` and ``sliding`` as one GroupQueryAttention node, rotary embedding included."""
    graph, layer, weights, state = block.graph, block.layer, block.weights, block.state
    query, key, value = block.joined, "", ""
    if graph.model_config.qk_norm:
        d, sizes = graph.model_config.head_dim, list(block.sizes.values())
        query, key, value = graph.split(block.joined, sizes)
        normed = []
        for name, x, size in (("q_norm", query, sizes[0]), ("k_norm", key, sizes[1])):
            by_head = graph.norm(graph.reshape(x, [0, 0, size // d, d]), block.place + name, weights[name])
            normed.append(graph.reshape(by_head, [0, 0, size]))
        query, key = normed
    cos, sin = graph.rotary()
    if layer.mixer == "attention":
        last, total = _places(graph, "position", block.source)
        positions = ""
    else:
        last, total = _places(graph, graph.size(state["key"], 2), block.source)
        positions = _positions(graph, block.source)
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


def _linear_mixer(block: Block) -> tuple[str, dict[str, str]]:
    """The mixers on the linear recurrence as one LinearAttention node."""
    graph, layer, weights = block.graph, block.layer, block.weights
    recurrence, d, kv = RECURRENCES[layer.mixer], graph.model_config.head_dim, layer.kv_heads
    after: dict[str, str] = {}
    names, sizes = list(block.sizes), list(block.sizes.values())
    if recurrence.conv:
        mixed, *rest = graph.split(block.joined, [sum(sizes[:3]), *sizes[3:]])
        taps = np.concatenate([weights[name] for name in ("conv_q", "conv_k", "conv_v")])
        mixed, after["conv"] = _convolution(block, mixed, taps)
        mixed = graph.add("Transpose", graph.silu(mixed), perm=[0, 2, 1])
        q, k, v = graph.split(mixed, sizes[:3])
    else:
        q, k, v, *rest = graph.split(block.joined, sizes)
    parts = dict(zip(names[3:], rest, strict=True))
    decay = beta = ""
    scale = d**-0.5
    if recurrence.delta:
        q, k = (_unit(graph, x, size // d) for x, size in zip((q, k), sizes[:2], strict=True))
        beta = graph.add("Sigmoid", parts["beta"])
    if recurrence.decay == "head":
        bias = block.constant("dt_bias", weights["dt_bias"])
        step = graph.add("Softplus", graph.add("Add", parts["decay"], bias))
        rate = block.constant("A", -np.exp(weights["A_log"].astype(np.float64)))
        decay = graph.add("Max", graph.add("Mul", step, rate), graph.scalar("floor", MIN_LOG_DECAY))
    if layer.mixer == "linear":
        one = graph.scalar("one", 1.0)
        q, k = (graph.add("Add", graph.add("Elu", x), one) for x in (q, k))
    elif layer.mixer == "retnet":
        q, k = graph.rotate(q, layer.heads, "position"), graph.rotate(k, kv, "position")
        decay = _retnet_decay(graph, kv, block.source)
    elif layer.mixer == "mamba2":
        scale = 1.0
        inner = graph.reshape(v, [0, 0, kv, 1, d])
        v = graph.reshape(graph.add("Mul", inner, graph.reshape(step, [0, 0, kv, 1, 1])), [0, 0, kv * d])
    elif layer.mixer == "gla":
        decay = _gla_decay(block, parts["decay_down"])
    elif layer.mixer == "hgrn2":
        q = graph.silu(q)
        k, decay = _hgrn2_forget(block, k)
    elif layer.mixer == "kda":
        decay = _kda_decay(block, parts["decay_down"])
    out, after["s"] = graph.add(
        "LinearAttention",
        *(q, k, v, block.state["s"], decay, beta),
        outputs=2,
        domain=CONTRIB,
        q_num_heads=layer.heads,
        kv_num_heads=kv,
        update_rule=recurrence.rule,
        scale=scale,
    )
    if layer.mixer == "mamba2":
        skip = graph.add("Mul", inner, block.constant("D", weights["D"][:, None, None]))
        out = graph.add("Add", graph.reshape(out, [0, 0, kv, layer.heads // kv, d]), skip)
        out = graph.reshape(out, [0, 0, layer.heads * d])
    return _norm_and_gate(block, out, parts.get("gate", "")), after


def _norm_and_gate(block: Block, out: str, gate: str) -> str:
    """The norm of each head and the output gate: [B, T, H*D]."""
    graph, d, recurrence = block.graph, block.graph.model_config.head_dim, RECURRENCES[block.layer.mixer]

    def gated(x: str) -> str:
        open_ = graph.add("Sigmoid", gate) if recurrence.gate == "sigmoid" else graph.silu(gate)
        return str(graph.add("Mul", x, open_))

    def normed(x: str) -> str:
        by_head = graph.reshape(x, [0, 0, block.layer.heads, d])
        by_head = graph.norm(by_head, block.place + "norm", block.weights["norm"])
        return graph.reshape(by_head, [0, 0, block.layer.heads * d])

    if not gate:
        return normed(out)
    return normed(gated(out)) if recurrence.gate_first else gated(normed(out))


def _short_conv(block: Block) -> tuple[str, dict[str, str]]:
    """LFM2's gated short convolution as one Conv node, before its output projection."""
    graph = block.graph
    b, c, x = graph.split(block.joined, list(block.sizes.values()))
    mixed, past = _convolution(block, graph.add("Mul", b, x), block.weights["conv_x"])
    return graph.add("Mul", c, graph.add("Transpose", mixed, perm=[0, 2, 1])), {"conv": past}


def _unit(graph: Graph, x: str, heads: int) -> str:
    """L2 norm per head, as an RMSNorm whose gain and epsilon are scaled to it: one node instead of four."""
    d = graph.model_config.head_dim
    by_head = graph.reshape(x, [0, 0, heads, d])
    normed = graph.norm(by_head, "unit", np.full(d, d**-0.5, np.float32), eps=1e-6 / d)
    return graph.reshape(normed, [0, 0, heads * d])


def _convolution(block: Block, x: str, taps: Array) -> tuple[str, str]:
    """Causal depthwise convolution: x [B, T, C], taps [C, K] -> (out [B, C, T], next past [B, C, K-1]).

    For a few tokens onnxruntime has an operator with the state in it, that takes an eighth of the time; for
    many its general one is nearly twice as fast. An older onnxruntime has the general one alone, and of the
    mixers with a convolution it runs short_conv, so that stays with it.
    """
    graph, past = block.graph, block.state["conv"]
    x = graph.add("Transpose", x, perm=[0, 2, 1])
    weight = block.constant("conv", taps[:, None])
    if block.layer.mixer == "short_conv":
        return _general_convolution(graph, past, x, weight, taps.shape)
    few = graph.once("few", lambda: _is_few(graph, block.source))

    def general(branch: Graph) -> tuple[str, str]:
        return _general_convolution(branch, past, x, weight, taps.shape)

    def fused(branch: Graph) -> tuple[str, str]:
        out, after = branch.add("CausalConvWithState", x, weight, "", past, outputs=2, domain=CONTRIB)
        return out, after

    out, after = graph.branch(few, fused, general)
    return out, after


def _is_few(graph: Graph, source: str) -> str:
    most = graph.constant("few.tokens", np.array([FEW], np.int64))
    return str(graph.add("LessOrEqual", graph.size(source, 1), most))


def _general_convolution(
    graph: Graph, past: str, x: str, weight: str, shape: tuple[int, ...]
) -> tuple[str, str]:
    channels, before = shape[0], shape[1] - 1
    joined = graph.add("Concat", past, x, axis=2)
    out = graph.add("Conv", joined, weight, group=channels)
    start = graph.constant(f"conv.start.{before}", np.array([-before], np.int64))
    end = graph.constant("end", np.array([2**31 - 1], np.int64))
    axis = graph.constant("axis.2", np.array([2], np.int64))
    return out, graph.add("Slice", joined, start, end, axis)


def _retnet_decay(graph: Graph, kv_heads: int, source: str) -> str:
    """RetNet's fixed log decays, [B, T, Hkv]."""

    def make() -> str:
        values = np.log1p(-np.exp2(-5.0 - np.arange(kv_heads))).astype(np.float32)
        heads = graph.constant(f"heads.{kv_heads}", np.array([kv_heads], np.int64))
        shape = graph.add("Concat", graph.size(source, 0), graph.size(source, 1), heads, axis=0)
        return str(graph.add("Expand", graph.constant(f"retnet.{kv_heads}", values), shape))

    return graph.once(f"retnet.{kv_heads}", make)


def _gla_decay(block: Block, low: str) -> str:
    """GLA's log decays from the low-rank product, as -softplus(-(W2 low + b)) / 16."""
    graph, w = block.graph, block.weights
    logits = block.product(low, "decay_up", -w["decay_up"])
    logits = graph.add("Add", logits, block.constant("-decay_bias", -w["decay_bias"]))
    decay = graph.add("Mul", graph.add("Softplus", logits), graph.scalar("-1/16", -1 / 16))
    return str(graph.add("Max", decay, graph.scalar("floor", MIN_LOG_DECAY)))


def _hgrn2_forget(block: Block, f: str) -> tuple[str, str]:
    """HGRN2's keys and log decays from the negated logits of its forget gate.

    With y the logit of the key, k = sigmoid(y) and g = -softplus(y): both exact, where log and 1 - exp
    of what the graph has would cancel.
    """
    graph = block.graph
    bound = np.maximum(block.weights["lower_bound"].astype(np.float64), MIN_LOG_DECAY)
    room = block.constant("room", -np.logaddexp(0, bound))  # log(1 - lower bound)
    taken = graph.add("Softplus", graph.add("Add", f, block.constant("low", -np.logaddexp(0, -bound))))
    y = graph.add("Sub", graph.add("Add", f, room), taken)
    return graph.add("Sigmoid", y), graph.add("Neg", graph.add("Softplus", y))


def _kda_decay(block: Block, low: str) -> str:
    """KDA's bounded log decays from the low-rank product; the slope is folded into what it multiplies."""
    graph, w = block.graph, block.weights
    slope = np.exp(w["slope_log"].astype(np.float64)).repeat(graph.model_config.head_dim)
    logits = block.product(low, "decay_up", slope[:, None] * w["decay_up"])
    logits = graph.add("Add", logits, block.constant("dt_bias", slope * w["dt_bias"]))
    return str(graph.add("Mul", graph.add("Sigmoid", logits), graph.scalar("-5", -5.0)))


WRITERS: dict[str, Callable[[Block], tuple[str, dict[str, str]]]] = {
    **dict.fromkeys(("attention", "sliding"), _softmax_mixer),
    **dict.fromkeys(RECURRENCES, _linear_mixer),
    "short_conv": _short_conv,
}
