"""Linear attention: one function for the recurrences of the linear mixers.

A sequence is cut into chunks of 32 tokens. Within a chunk everything is matrix products,
batched over chunks and heads; from chunk to chunk only the D x D state is carried. A single
token takes one step of the recurrence.

Easy to get wrong:

- Every exponent is the log decay from one token to a later one, hence never positive; above
  the diagonal it is -inf. Nothing overflows, in an output or a gradient, however fast the decay.
- Differences of float32 sums lose 1e-5 where a step of -20 meets steps of -0.01: decays per
  channel are only ever added, those per head are summed and subtracted in float64.
- ``exp2`` of logs to base 2 takes half the time of ``exp`` on a CPU, and a fortieth where the
  result is denormal.
- The triangular system of the delta rule is solved by substitution; powers of its matrix,
  the other way to invert it, grow to 1e27 on correlated keys.

Keys that are not normalised make the delta rule diverge in any implementation.

On a GPU, half precision goes to the kernels of :mod:`space.attention.fla` where they are installed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from space.attention.chunks import LOG2_E, Carry, Doubling
from space.attention.fla import fla_linear_attention, fla_takes

RULES = ("linear", "gated", "delta", "gated_delta")
CHUNK = 32  # a power of two; 16 and 64 are slower
CACHED = 2**17  # elements of q worked on at a time on a CPU, so that intermediate results stay in its cache

# The terms of chunks, for M = N * B * Hkv chunks of C tokens and R query heads for each kv head: the queries'
# scores with the keys of the chunk [M, C*R, C], and the queries decayed since the start of the chunk
# [M, C*R, D]; the keys decayed until its end [M, C, D]; the decay of the state over it [M, 1 or D, 1], None
# without decay; and for the delta rules the keys' scores with the keys before them [M, C, C], and the keys
# decayed since the start [M, C, D].
Weighed = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rule: str,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one of four recurrences over a sequence; the output is ``scale * S_t^T q_t``.

    - ``linear``: S_t = S_{t-1} + k_t v_t^T (Katharopoulos et al. 2020)
    - ``gated``: S_t = diag(exp g_t) S_{t-1} + k_t v_t^T (Sun et al. 2023, RetNet; Yang et al. 2023, GLA)
    - ``delta``: S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T (Yang et al. 2024, Parallelizing Linear
      Transformers with the Delta Rule)
    - ``gated_delta``: the same, from S' = diag(exp g_t) S_{t-1} (Yang et al. 2024, Gated Delta Networks)

    Args:
        q: queries [B, T, H, D].
        k: keys [B, T, Hkv, D]; H is a multiple of Hkv, the state belongs to the kv head.
        v: values [B, T, Hkv, D].
        rule: the recurrence.
        decay: log decay g <= 0 of the gated rules: [B, T, Hkv], or [B, T, Hkv, D] for one per key channel.
        beta: write strength of the delta rules [B, T, Hkv].
        state: S before the first token [B, Hkv, D, D], key channels first; None for zeros.
        scale: multiplies the queries; D^-0.5 if None.

    Returns:
        The output [B, T, H, D] in the dtype of q, and S after the last token [B, Hkv, D, D]. All is
        computed, and the state returned, in float32, or in float64 if q is.

    Raises:
        ValueError: the rule is unknown, its decay or beta is missing, one is given that it does not use, or
            H is not a multiple of Hkv.
    """
    (batch, tokens, heads, width), kv_heads = q.shape, k.shape[2]
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(RULES)}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} kv heads")
    if (decay is None) == ("gated" in rule) or (beta is None) == ("delta" in rule):
        raise ValueError(f"rule {rule!r}: decay goes with the gated rules, beta with the delta rules")
    scale = width**-0.5 if scale is None else scale
    if state is None:
        state = q.new_zeros(batch, kv_heads, width, width)
    state = state.to(torch.promote_types(q.dtype, torch.float32))
    if fla_takes(q, k, v):
        return fla_linear_attention(q, k, v, rule, decay, beta, state, scale)
    state = state.flatten(0, 1)  # [B*Hkv, D, D]
    cached = CACHED // (batch * heads * width) // CHUNK * CHUNK
    span = max(CHUNK, cached) if q.device.type == "cpu" else tokens  # tokens worked on at a time
    run = _step if tokens == 1 else _chunked
    # Split, since slices would each get a gradient of full size.
    spans = zip(*(torch.split(x, span, 1) for x in (q, k, v)), strict=True)
    decays, betas = (
        [None] * -(-tokens // span) if x is None else torch.split(x, span, 1) for x in (decay, beta)
    )
    outs = []
    with torch.autocast(q.device.type, enabled=False):
        for (q_now, k_now, v_now), g, b in zip(spans, decays, betas, strict=True):
            out, state = run(q_now, k_now, v_now, g, b, state, scale)
            outs.append(out.to(q.dtype))
    return torch.cat(outs, 1), state.view(batch, kv_heads, width, width)


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, for one token; the state is [B*Hkv, D, D], the output [B, 1, H, D]."""
    width = q.shape[3]
    rows, k, v = (x.to(state.dtype).reshape(len(state), -1, width) for x in (q, k, v))  # [B*Hkv, R or 1, D]
    if g is not None:
        state = state * g.to(state.dtype).reshape(len(state), -1, 1).exp()
    if beta is not None:
        v = beta.to(state.dtype).reshape(-1, 1, 1) * (v - k @ state)
    state = state + k.mT * v
    return scale * (rows @ state).view(q.shape), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The recurrence by chunks (Yang et al. 2024); shapes as in `_step`, but for T tokens."""
    (batch, tokens, heads, width), kv_heads = q.shape, k.shape[2]
    count = -(-tokens // CHUNK)  # N chunks; below, M = N * B * Hkv and R = H / Hkv

    def cut(x: Tensor) -> Tensor:  # [B, T, Hkv, ...] -> [M, C, ...]
        x = x.to(state.dtype)
        if tokens % CHUNK:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -tokens % CHUNK))
        return x.view(batch, count, CHUNK, *x.shape[2:]).movedim((1, 0, 3), (0, 1, 2)).flatten(0, 2)

    rows, k, v = cut(q.view(batch, tokens, kv_heads, -1, width)), cut(k), cut(v)
    if g is None:
        weighed = _undecayed(rows, k, beta is not None)
    elif g.ndim == 3:
        weighed = _by_head(rows, k, cut(g), beta is not None)
    else:
        weighed = Doubling.apply(rows, k, cut(g), beta is not None)  # type: ignore[no-untyped-call]
    scores, starts, ends, fade, overlap, reads = weighed
    if beta is not None and overlap is not None and reads is not None:
        beta = cut(beta)[:, None]  # [M, 1, C]
        # (I + diag(beta) overlap)^-1 diag(beta), solved from the right, which takes half the time
        solve = torch.linalg.solve_triangular(
            overlap * beta, beta[:, 0].diag_embed(), upper=False, left=False, unitriangular=True
        )  # [M, C, C]
        v, reads = solve.bmm(v), solve.bmm(reads)
    states, state, written = Carry.apply(ends, v, fade, reads, state)  # type: ignore[no-untyped-call]
    v = v if written is None else written  # [M, C, D]
    out = starts.bmm(states).baddbmm_(scores, v, beta=scale, alpha=scale)  # [M, C*R, D]
    out = out.view(count, batch, kv_heads, CHUNK, -1, width).permute(1, 0, 3, 2, 4, 5)
    # A copy here, in cache: torch.cat of permuted tensors is ten times slower.
    return out.reshape(batch, -1, heads, width)[:, :tokens], state


def _undecayed(rows: Tensor, k: Tensor, delta: bool) -> Weighed:
    """The terms of chunks without decay; rows are queries [M, C, R, D], k is [M, C, D]."""
    lower = torch.ones(CHUNK, CHUNK, dtype=k.dtype, device=k.device).tril_()[:, None]
    scores = rows.flatten(1, 2).bmm(k.mT).view(*rows.shape[:3], CHUNK) * lower
    # The solver reads only the part of the overlap below the diagonal.
    overlap, reads = (k.bmm(k.mT), k) if delta else (None, None)
    return scores.flatten(1, 2), rows.flatten(1, 2), k, None, overlap, reads


def _by_head(rows: Tensor, k: Tensor, g: Tensor, delta: bool) -> Weighed:
    """The terms for decays of heads g [M, C]; rows are queries [M, C, R, D], k is [M, C, D]."""
    total = (g.double() * LOG2_E).cumsum(1)
    above = torch.full((CHUNK, CHUNK), -torch.inf, dtype=k.dtype, device=k.device).triu_(1)
    within = (total[:, :, None] - total[:, None, :]).to(k.dtype).add_(above).exp2_()  # [M, C, C]
    since = total.to(k.dtype).exp2()[:, :, None]  # [M, C, 1]
    until = (total[:, -1:] - total).to(k.dtype).exp2_()[:, :, None]  # [M, C, 1]
    scores = rows.flatten(1, 2).bmm(k.mT).view(*rows.shape[:3], CHUNK) * within[:, :, None]
    starts = (rows * since[:, :, None]).flatten(1, 2)
    overlap, reads = (k.bmm(k.mT) * within, k * since) if delta else (None, None)
    return scores.flatten(1, 2), starts, k * until, since[:, -1:], overlap, reads
