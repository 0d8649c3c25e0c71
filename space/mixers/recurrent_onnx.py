"""The linear recurrence as ONNX nodes: the parts that its mixers share.

Written for few nodes, since a small model's decode step is bound by their number: projections that read the
same input are one product, and constants are folded into weights. Values are [B, T, heads * D].
"""

import numpy as np

from space.layer import MIN_LOG_DECAY
from space.mixers.recurrent import FEW
from space.onnx.block import Array, Block
from space.onnx.graph import CONTRIB, Graph


def project_parts(block: Block, **replaced: Array) -> dict[str, str]:
    """The packed product of the input, split into the value of each projection.

    Args:
        block: the block.
        replaced: by projection, another matrix in its place.
    """
    joined = block.packed(**replaced)
    return dict(zip(block.sizes, block.graph.split(joined, list(block.sizes.values())), strict=True))


def convolve_parts(block: Block) -> tuple[dict[str, str], str]:
    """The same, with the causal convolution and silu over q, k and v, the first three projections.

    Returns:
        The value of each projection, and the state of the convolution after the last token.
    """
    graph, weights = block.graph, block.weights
    names, sizes = list(block.sizes), list(block.sizes.values())
    mixed, *rest = graph.split(block.packed(), [sum(sizes[:3]), *sizes[3:]])
    taps = np.concatenate([weights[name] for name in ("conv_q", "conv_k", "conv_v")])
    mixed, after = _convolution(block, mixed, taps)
    mixed = graph.add("Transpose", graph.silu(mixed), perm=[0, 2, 1])
    return dict(zip(names, (*graph.split(mixed, sizes[:3]), *rest), strict=True)), after


def _convolution(block: Block, x: str, taps: Array) -> tuple[str, str]:
    """Causal depthwise convolution: x [B, T, C], taps [C, K] -> (out [B, C, T], next past [B, C, K-1]).

    For a few tokens onnxruntime has an operator with the state in it, that takes an eighth of the time; for
    many its general one is nearly twice as fast.
    """
    graph, past = block.graph, block.state["conv"]
    x = graph.add("Transpose", x, perm=[0, 2, 1])
    weight = block.constant("conv", taps[:, None])
    few = graph.once("few", lambda: _is_few(graph, block.source))

    def general(branch: Graph) -> tuple[str, str]:
        return general_convolution(branch, past, x, weight, taps.shape)

    def fused(branch: Graph) -> tuple[str, str]:
        out, after = branch.add("CausalConvWithState", x, weight, "", past, outputs=2, domain=CONTRIB)
        return out, after

    out, after = graph.branch(few, fused, general)
    return out, after


def _is_few(graph: Graph, source: str) -> str:
    most = graph.constant("few.tokens", np.array([FEW], np.int64))
    return str(graph.add("LessOrEqual", graph.size(source, 1), most))


def general_convolution(
    graph: Graph, past: str, x: str, weight: str, shape: tuple[int, ...]
) -> tuple[str, str]:
    """Causal depthwise convolution by the operator ``Conv``.

    Args:
        graph: the graph.
        past: the inputs before x, [B, C, K-1].
        x: [B, C, T].
        weight: name of the taps, a constant [C, 1, K].
        shape: (C, K).

    Returns:
        The output [B, C, T] and the past of the next call [B, C, K-1].
    """
    channels, before = shape[0], shape[1] - 1
    joined = graph.add("Concat", past, x, axis=2)
    out = graph.add("Conv", joined, weight, group=channels)
    start = graph.constant(f"conv.start.{before}", np.array([-before], np.int64))
    end = graph.constant("end", np.array([2**31 - 1], np.int64))
    axis = graph.constant("axis.2", np.array([2], np.int64))
    return out, graph.add("Slice", joined, start, end, axis)


def unit_heads(block: Block, q: str, k: str) -> tuple[str, str]:
    """Queries and keys with the L2 norm 1 in each head."""
    d = block.graph.model_config.head_dim
    heads = (block.sizes["q"] // d, block.sizes["k"] // d)
    first, second = (_unit(block.graph, x, count) for x, count in zip((q, k), heads, strict=True))
    return first, second


def _unit(graph: Graph, x: str, heads: int) -> str:
    """L2 norm per head, as an RMSNorm whose gain and epsilon are scaled to it: one node instead of four."""
    d = graph.model_config.head_dim
    by_head = graph.reshape(x, [0, 0, heads, d])
    normed = graph.norm(by_head, "unit", np.full(d, d**-0.5, np.float32), eps=1e-6 / d)
    return graph.reshape(normed, [0, 0, heads * d])


def write_strength_node(block: Block, beta: str) -> str:
    """The write strengths of the delta rules from their logits: [B, T, Hkv]."""
    return str(block.graph.add("Sigmoid", beta))


def step_nodes(block: Block, decay: str) -> tuple[str, str]:
    """Time steps and log decays of Mamba-2 and Gated DeltaNet from their logits: [B, T, Hkv] each."""
    graph, weights = block.graph, block.weights
    bias = block.constant("dt_bias", weights["dt_bias"])
    step = graph.add("Softplus", graph.add("Add", decay, bias))
    rate = block.constant("A", -np.exp(weights["A_log"].astype(np.float64)))
    return step, graph.add("Max", graph.add("Mul", step, rate), graph.scalar("floor", MIN_LOG_DECAY))


def recurrence_node(
    block: Block,
    q: str,
    k: str,
    v: str,
    *,
    rule: str,
    decay: str = "",
    beta: str = "",
    scale: float | None = None,
) -> tuple[str, str]:
    """The recurrence as one LinearAttention node; see :func:`space.attention.linear.linear_attention`.

    Args:
        block: the block, whose state has ``s``.
        q: queries [B, T, H*D].
        k: keys [B, T, Hkv*D].
        v: values [B, T, Hkv*D].
        rule: the recurrence.
        decay: log decays [B, T, Hkv] or [B, T, Hkv*D]; empty for a rule without.
        beta: write strengths [B, T, Hkv]; empty for a rule without.
        scale: multiplies the queries; D^-0.5 if None.

    Returns:
        The output [B, T, H*D], and S after the last token.
    """
    scale = block.graph.model_config.head_dim**-0.5 if scale is None else scale
    out, after = block.graph.add(
        "LinearAttention",
        *(q, k, v, block.state["s"], decay, beta),
        outputs=2,
        domain=CONTRIB,
        q_num_heads=block.layer.heads,
        kv_num_heads=block.layer.kv_heads,
        update_rule=rule,
        scale=scale,
    )
    return out, after


def norm_heads_nodes(block: Block, out: str) -> str:
    """The norm of each head's output: [B, T, H*D]."""
    graph, heads, d = block.graph, block.layer.heads, block.graph.model_config.head_dim
    by_head = graph.norm(graph.reshape(out, [0, 0, heads, d]), block.place + "norm", block.weights["norm"])
    return graph.reshape(by_head, [0, 0, heads * d])


def gate_heads_nodes(block: Block, out: str, gate: str, *, sigmoid: bool = False) -> str:
    """The norm of each head's output, then the output gate: [B, T, H*D].

    Args:
        block: the block.
        out: the output of the recurrence [B, T, H*D].
        gate: logits of the gate [B, T, H*D].
        sigmoid: the activation is the sigmoid; silu if False.
    """
    graph, normed = block.graph, norm_heads_nodes(block, out)
    return str(graph.add("Mul", normed, graph.add("Sigmoid", gate) if sigmoid else graph.silu(gate)))
