"""Linear attention: one function for the recurrences of eight token mixers.

A sequence is cut into chunks of 32 tokens. Within a chunk everything is matrix products,
batched over chunks and heads; from chunk to chunk only the D x D state is carried. A single
token takes one step of the recurrence.

What is easily got wrong, and how it is kept right here:

- Every exponent is the log decay from one token to a later one, hence never positive; above
  the diagonal it is -inf. Nothing overflows, in an output or a gradient, however fast the decay.
- Differences of float32 sums lose 1e-5 where a step of -20 meets steps of -0.01: decays per
  channel are only ever added, those per head are summed and subtracted in float64.
- ``exp2`` of logs to base 2 takes half the time of ``exp`` on a CPU, and a fortieth where the
  result is denormal.
- The triangular system of the delta rule is solved by substitution; powers of its matrix,
  the other way to invert it, grow to 1e27 on correlated keys.

Keys that are not normalised make the delta rule diverge in any implementation.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

RULES = ("linear", "gated", "delta", "gated_delta")
CHUNK = 32  # a power of two; 16 and 64 are slower
CACHED = 2**17  # elements of q worked on at a time on a CPU, so that what comes between stays in its cache
LOG2_E = math.log2(math.e)

# Rows [M, C, R, D] -> their scores with the keys of their chunk [M, C*R, C], and the rows decayed since
# the start of the chunk [M, C*R, D]
Weigh = Callable[[Tensor], tuple[Tensor, Tensor]]


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
        ValueError: the rule is unknown, lacks its decay or beta or is given one it has no use for, or
            the heads do not divide.
    """
    (batch, tokens, heads, width), kv_heads = q.shape, k.shape[2]
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is none of {', '.join(RULES)}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} kv heads")
    if (decay is None) == ("gated" in rule) or (beta is None) == ("delta" in rule):
        raise ValueError(f"rule {rule!r}: decay goes with the gated rules, beta with the delta rules")
    scale = width**-0.5 if scale is None else scale
    if state is None:
        state = q.new_zeros(batch, kv_heads, width, width)
    state = state.to(torch.promote_types(q.dtype, torch.float32)).flatten(0, 1)  # [B*Hkv, D, D]
    cached = CACHED // (batch * heads * width) // CHUNK * CHUNK
    span = max(CHUNK, cached) if q.device.type == "cpu" else tokens  # tokens worked on at a time
    run = _step if tokens == 1 else _chunked
    outs = []
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, tokens, span):
            now = slice(start, start + span)
            g = None if decay is None else decay[:, now]
            b = None if beta is None else beta[:, now]
            out, state = run(q[:, now], k[:, now], v[:, now], g, b, state, scale)
            outs.append(out.to(q.dtype))
    out = torch.cat(outs, 1).reshape(batch, -1, heads, width)[:, :tokens]
    return out, state.view(batch, kv_heads, width, width)


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, for one token; the state is [B*Hkv, D, D], the output [B, Hkv, R, D]."""
    width = q.shape[3]
    rows, k, v = (x.to(state.dtype).reshape(len(state), -1, width) for x in (q, k, v))  # [B*Hkv, R or 1, D]
    if g is not None:
        state = state * g.to(state.dtype).reshape(len(state), -1, 1).exp()
    if beta is not None:
        v = beta.to(state.dtype).reshape(-1, 1, 1) * (v - k @ state)
    state = state + k.mT * v
    return scale * (rows @ state).view(len(q), -1, *rows.shape[1:]), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The recurrence by chunks (Yang et al. 2024); as `_step`, but the output is [B, N, C, Hkv, R, D]."""
    (batch, tokens, _, width), kv_heads = q.shape, k.shape[2]
    count = -(-tokens // CHUNK)  # N chunks; below, M = N * B * Hkv and R = H / Hkv

    def cut(x: Tensor) -> Tensor:  # [B, T, Hkv, ...] -> [M, C, ...]
        x = x.to(state.dtype)
        if tokens % CHUNK:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -tokens % CHUNK))
        return x.view(batch, count, CHUNK, *x.shape[2:]).movedim((1, 0, 3), (0, 1, 2)).flatten(0, 2)

    def by_chunk(x: Tensor) -> tuple[Tensor, ...]:  # [M, ...] -> N times [B*Hkv, ...]
        return torch.split(x, batch * kv_heads)

    rows, k, v = cut(q.view(batch, tokens, kv_heads, -1, width)), cut(k), cut(v)
    g = k.new_zeros(1, CHUNK) if g is None else cut(g)
    weigh, ends, fade = (_by_head if g.ndim == 2 else _by_channel)(k, g)
    scores, starts = weigh(rows)  # [M, C*R, C], [M, C*R, D]
    fades = by_chunk(fade.expand(len(k), -1, -1))  # N times [B*Hkv, 1 or D, 1]
    states = []
    if beta is None:
        for write, kept in zip(by_chunk(ends.mT.bmm(v)), fades, strict=True):
            states.append(state)
            state = torch.addcmul(write, state, kept)
    else:
        beta = cut(beta)[:, None]  # [M, 1, C]
        overlap, reads = weigh(k[:, :, None])  # [M, C, C], [M, C, D]
        # (I + diag(beta) overlap)^-1 diag(beta), solved from the right, which takes half the time
        solve = torch.linalg.solve_triangular(
            overlap * beta, beta[:, 0].diag_embed(), upper=False, left=False, unitriangular=True
        )  # [M, C, C]
        parts = by_chunk(solve.bmm(v)), by_chunk(solve.bmm(reads)), by_chunk(ends.mT), fades
        values = []
        for value, read, key, kept in zip(*parts, strict=True):
            states.append(state)
            values.append(torch.baddbmm(value, read, state, alpha=-1))
            state = (state * kept).baddbmm_(key, values[-1])
        v = torch.cat(values)  # [M, C, D]
    out = starts.bmm(torch.cat(states)).baddbmm_(scores, v, beta=scale, alpha=scale)  # [M, C*R, D]
    return out.view(count, batch, kv_heads, CHUNK, -1, width).permute(1, 0, 3, 2, 4, 5), state


def _by_head(k: Tensor, g: Tensor) -> tuple[Weigh, Tensor, Tensor]:
    """Decays that all channels of a head share.

    Args:
        k: keys [M, C, D].
        g: log decays [M, C], or [1, C] where they are the same everywhere.

    Returns:
        How to weigh rows, the keys decayed until the end of the chunk [M, C, D], and the decay of the
        state over the chunk [M, 1, 1].
    """
    total = (g.double() * LOG2_E).cumsum(1)
    above = torch.full((CHUNK, CHUNK), -torch.inf, dtype=k.dtype, device=k.device).triu_(1)
    within = ((total[:, :, None] - total[:, None, :]).to(k.dtype) + above).exp2()  # [M, C, C]
    since = total.to(k.dtype).exp2()  # [M, C]
    until = (total[:, -1:] - total).to(k.dtype).exp2()  # [M, C]

    def weigh(rows: Tensor) -> tuple[Tensor, Tensor]:
        scores = rows.flatten(1, 2).bmm(k.mT).view(*rows.shape[:3], CHUNK) * within[:, :, None]
        return scores.flatten(1, 2), (rows * since[:, :, None, None]).flatten(1, 2)

    return weigh, k * until[:, :, None], since[:, -1:, None]


def _by_channel(k: Tensor, g: Tensor) -> tuple[Weigh, Tensor, Tensor]:
    """Decays of each key channel, by doubling: blocks of 1, 2, 4 ... tokens are joined in pairs.

    Rows carry the decay since the start of their block, keys that until its end; so the product of
    a row with a key of the block before holds just the decay between the two. No factor exceeds 1,
    and a gradient of g sums only what it truly depends on, so that even tiny ones are exact.

    Args:
        k: keys [M, C, D].
        g: log decays [M, C, D].

    Returns:
        As `_by_head`, but for the state's decay [M, D, 1].
    """
    total = g.reshape(-1, 1, g.shape[2]) * LOG2_E  # [M*blocks, 1, D]
    fade = single = total.exp2()
    ends = k.reshape(total.shape)  # [M*blocks, tokens, D]
    joins = []
    while ends.shape[1] < CHUNK:
        joins.append((ends[::2], fade[::2]))
        ends = torch.cat((ends[::2] * fade[1::2], ends[1::2]), 1)
        total = total[::2] + total[1::2]
        fade = total.exp2()

    def weigh(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.flatten(0, 1)  # [M*blocks, tokens*R, D]
        scores = (rows * k.reshape(total.shape[0] * CHUNK, 1, -1)).sum(2, keepdim=True)
        rows = rows * single
        for key, fade in joins:
            later = rows[1::2]
            # The first level's products, of one row and one key, are cheaper as a sum than as a batch.
            cross = later.bmm(key.mT) if key.shape[1] > 1 else (later * key).sum(2, keepdim=True)
            upper = F.pad(scores[::2], (0, key.shape[1]))  # [M*blocks/2, tokens*R, tokens*2]
            scores = torch.cat((upper, torch.cat((cross, scores[1::2]), 2)), 1)
            rows = torch.cat((rows[::2], later * fade), 1)
        return scores, rows

    return weigh, ends, fade.mT
