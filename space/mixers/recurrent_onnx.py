"""The linear recurrence as ONNX nodes: the parts that its mixers share.

Written for few nodes, since a small model's decode step is bound by their number: projections that read the
same input are one product, and constants are folded into weights. Values are [B, T, heads * D].
"""

import numpy as np

from space.layer import NORM_EPS
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
    mixed, after = convolution_nodes(block, mixed, taps, block.state["conv"], fused=True)
    return dict(zip(names, (*graph.split(graph.silu(mixed), sizes[:3]), *rest), strict=True)), after


def convolution_nodes(
    block: Block, x: str, taps: Array, past: str, *, fused: bool = False
) -> tuple[str, str]:
    """Causal depthwise convolution, by other nodes for one token than for more.

    Many tokens are an image of height 1: onnxruntime has a convolution that is vectorised over channels for
    images only, and on x86 only. Without it, one token would take ten times as long.

    Args:
        block: the block.
        x: [B, T, C].
        taps: [C, K], the last one for the present.
        past: the inputs before x, [B, K-1, C].
        fused: one token is convolved by the operator ``CausalConvWithState``, which older versions of
            onnxruntime lack; otherwise by a product and a sum.

    Returns:
        The output [B, T, C] and the past of the next call [B, K-1, C].
    """
    graph, (channels, count) = block.graph, taps.shape
    taps = taps.astype(np.float32)

    def join(branch: Graph, axis: str) -> tuple[str, str]:
        joined = branch.add("Concat", past, x, axis=1)
        start, end = (branch.literal(np.array([i], np.int64)) for i in (1 - count, 2**31 - 1))
        return joined, branch.add("Slice", joined, start, end, axis)

    def image(branch: Graph) -> tuple[str, str]:
        axis, kernel = branch.literal(np.array([1], np.int64)), branch.literal(taps[:, None, None])
        joined, after = join(branch, axis)
        wide = branch.add("Transpose", branch.add("Unsqueeze", joined, axis), perm=[0, 3, 1, 2])
        out = branch.add("Conv", wide, kernel, group=channels)
        return branch.add("Squeeze", branch.add("Transpose", out, perm=[0, 2, 3, 1]), axis), after

    def single(branch: Graph) -> tuple[str, str]:
        if fused:
            kernel, layout = branch.literal(taps[:, None]), {"channels_last": 1}
            made = branch.add("CausalConvWithState", x, kernel, "", past, outputs=2, domain=CONTRIB, **layout)
            return made[0], made[1]
        axis, rows = branch.literal(np.array([1], np.int64)), branch.literal(taps.T)
        joined, after = join(branch, axis)
        return branch.add("ReduceSum", branch.add("Mul", joined, rows), axis, keepdims=1), after

    one = graph.once("one token", lambda: _is_one(graph, block.source))
    out, after = graph.branch(one, single, image)
    return out, after


def _is_one(graph: Graph, source: str) -> str:
    one = graph.constant("one.int64[1]", np.array([1], np.int64))
    return str(graph.add("Equal", graph.size(source, 1), one))


def unit_heads(block: Block, q: str, k: str) -> tuple[str, str]:
    """Queries and keys with the L2 norm 1 in each head."""
    d = block.graph.model_config.head_dim
    heads = (block.sizes["q"] // d, block.sizes["k"] // d)
    first, second = (_unit(block.graph, x, count) for x, count in zip((q, k), heads, strict=True))
    return first, second


def _unit(graph: Graph, x: str, heads: int) -> str:
    """L2 norm per head, as an RMSNorm whose gain and epsilon are scaled to it: one node instead of four."""
    d = graph.model_config.head_dim
    gain = graph.constant("unit", np.full(d, d**-0.5, np.float32))
    return _norm(graph, x, gain, heads, 1e-6 / d)


def _norm(graph: Graph, x: str, gain: str, heads: int, eps: float) -> str:
    """RMSNorm of each head, [B, T, heads * D]."""
    return str(graph.add("BranchwiseRMSNorm", x, gain, domain=CONTRIB, num_branches=heads, epsilon=eps))


def write_strength_node(block: Block, beta: str) -> str:
    """The write strengths of the delta rules from their logits: [B, T, Hkv]."""
    return str(block.graph.add("Sigmoid", beta))


def decay_nodes(
    block: Block, logits: str, bias: Array, rate: Array, strength: str = "", *, place: str = ""
) -> tuple[str, str]:
    """Log decays ``rate * softplus(logits + bias)``, and the write strengths where their logits are given.

    The decays have no floor: the recurrence of a graph multiplies by their exponentials and nothing else.

    Args:
        block: the block.
        logits: [B, T, size].
        bias: [size].
        rate: at most 0, [size].
        strength: logits of the write strengths [B, T, size]; empty for a rule without.
        place: prefix of the names of the constants, unique in the block.

    Returns:
        The decays [B, T, size], and the write strengths in that shape, empty without logits.
    """
    constants = block.constant(f"{place}bias", bias), block.constant(f"{place}rate", rate)
    outputs = 2 if strength else 1
    made = block.graph.add(
        "LinearAttentionGate", logits, *constants, strength, outputs=outputs, domain=CONTRIB
    )
    return made if strength else (str(made), "")


def step_rate(block: Block) -> Array:
    """The rates of Mamba-2 and Gated DeltaNet, -exp(A_log): [Hkv]."""
    return -np.exp(block.weights["A_log"].astype(np.float64))


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
    gain = block.constant("norm", block.weights["norm"])
    return _norm(block.graph, out, gain, block.layer.heads, NORM_EPS)


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
