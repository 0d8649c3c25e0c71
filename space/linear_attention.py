"""Linear attention: one function for the recurrences of eight token mixers.

A sequence is cut into chunks of 32 tokens. Within a chunk everything is matrix products,
batched over all chunks; from chunk to chunk only the D x D state is carried. A single
token takes one step of the recurrence.

What is easily got wrong, and how it is kept right here:

- Sums of log decays are taken in float64 and rounded once, just before the exponential:
  in float32 a step of -20 beside steps of -0.01 costs 1e-5.
- Every exponent is the log decay from one token to a later one, hence never positive; above
  the diagonal it is -inf. Nothing overflows, in the output or in a gradient, at any decay.
- ``exp2`` of logs to base 2: half the time of ``exp`` on a CPU, which moreover takes 40 times
  longer where the result is denormal.
- The delta rule's triangular system is solved by substitution; powers of its matrix, the
  other way to invert it, grow to 1e27 on correlated keys.

Keys that are not normalised make the delta rule diverge in any implementation.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32
GATED = {"linear": False, "gated": True, "delta": False, "gated_delta": True}
LOG2_E = math.log2(math.e)

# Rows [M, C, R, D] -> their scores against the chunk's keys [M, C*R, C], the rows decayed from the
# start of the chunk [M, C*R, D]
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

        linear        S_t = S_{t-1} + k_t v_t^T                         (Katharopoulos et al. 2020)
        gated         S_t = diag(exp g_t) S_{t-1} + k_t v_t^T           (Sun et al. 2023; Yang et al. 2023, GLA)
        delta         S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T             (Yang et al. 2024)
        gated_delta   S' = diag(exp g_t) S_{t-1};  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T
                                                            (Yang et al. 2024, Gated Delta Networks)

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
    if rule not in GATED:
        raise ValueError(f"rule {rule!r} is none of {', '.join(GATED)}")
    if (decay is not None) != GATED[rule] or (beta is not None) != rule.endswith("delta"):
        raise ValueError(f"rule {rule!r}: decay goes with the gated rules, beta with the delta rules")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are no multiple of {k.shape[2]} kv heads")
    batch, tokens, _, width = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = width**-0.5 if scale is None else scale
    grouped = q.unflatten(2, (k.shape[2], -1))  # [B, T, Hkv, R, D]
    if state is None:
        state = torch.zeros(batch, k.shape[2], width, width, dtype=dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        run = _step if tokens == 1 else _chunked
        inputs = (x if x is None else x.to(dtype) for x in (grouped, k, v, decay, beta, state))
        out, state = run(*inputs, scale)
    return out.reshape(q.shape).to(q.dtype), state


def _step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, for one token."""
    q, k, v = q[:, 0], k[:, 0, :, None], v[:, 0, :, None]  # [B, Hkv, R, D], [B, Hkv, 1, D]
    if decay is not None:
        state = state * (decay[:, 0].exp()[..., None] if decay.ndim == 4 else decay[:, 0, :, None, None].exp())
    if beta is not None:
        v = beta[:, 0, :, None, None] * (v - k @ state)
    state = state + k.mT * v  # [B, Hkv, D, D]
    return scale * (q @ state), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The recurrence over a sequence, by chunks (Yang et al. 2024, equations of the gated delta rule)."""
    batch, tokens, heads, group, width = q.shape
    count = -(-tokens // CHUNK)  # N; below, M = N * B * Hkv

    def cut(x: Tensor) -> Tensor:  # [B, T, Hkv, ...] -> [M, C, ...]
        if tokens % CHUNK:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -tokens % CHUNK))
        return x.unflatten(1, (count, CHUNK)).movedim((1, 0, 3), (0, 1, 2)).flatten(0, 2)

    def per_chunk(x: Tensor) -> tuple[Tensor, ...]:  # [M, ...] -> N of [B*Hkv, ...]
        return x.unflatten(0, (count, -1)).unbind()

    rows, k, v = cut(q), cut(k), cut(v)  # [M, C, R, D], [M, C, D], [M, C, D]
    decay = k.new_zeros(1, CHUNK) if decay is None else cut(decay)
    weigh, ends, carry = (_by_channel if decay.ndim == 3 else _by_head)(k, decay)
    scores, starts = weigh(rows)
    carries = per_chunk(carry.expand(len(k), -1, -1))
    s = state.flatten(0, 1)  # [B*Hkv, D, D]
    states = []
    if beta is None:
        for write, keep in zip(per_chunk(ends.mT @ v), carries, strict=True):
            states.append(s)
            s = torch.addcmul(write, s, keep)
    else:
        beta = cut(beta)  # [M, C]
        overlap, reads = weigh(k[:, :, None])  # [M, C, C], [M, C, D]
        solve = torch.linalg.solve_triangular(
            beta[..., None] * overlap, torch.diag_embed(beta), upper=False, unitriangular=True
        )  # (I + L)^-1 diag(beta): [M, C, C]
        parts = (per_chunk(x) for x in (solve @ v, solve @ reads, ends.mT, carry.expand(len(k), -1, -1)))
        values = []
        for value, read, key, keep in zip(*parts, strict=True):
            states.append(s)
            values.append(torch.baddbmm(value, read, s, alpha=-1))
            s = (s * keep).baddbmm_(key, values[-1])
        v = torch.cat(values)  # [M, C, D]
    out = (starts @ torch.cat(states)).baddbmm_(scores, v, beta=scale, alpha=scale)  # [M, C*R, D]
    out = out.view(count, batch, heads, CHUNK, group, width).permute(1, 0, 3, 2, 4, 5)
    return out.reshape(batch, -1, heads, group, width)[:, :tokens], s.view(state.shape)


def _by_head(k: Tensor, g: Tensor) -> tuple[Weigh, Tensor, Tensor]:
    """Decays that all channels of a head share.

    Args:
        k: keys [M, C, D].
        g: log decays [M, C], or [1, C] where they are the same everywhere.

    Returns:
        How to weigh rows, the keys decayed to the end of the chunk [M, C, D], the decay of the state
        over the chunk [M, 1, 1].
    """
    total = (g.double() * LOG2_E).cumsum(-1)
    later = torch.full((CHUNK, CHUNK), -torch.inf, dtype=k.dtype, device=k.device).triu_(1)
    within = ((total[:, :, None] - total[:, None, :]).to(k.dtype) + later).exp2()  # [M, C, C]
    start = total.to(k.dtype).exp2()
    end = (total[:, -1:] - total).to(k.dtype).exp2()

    def weigh(rows: Tensor) -> tuple[Tensor, Tensor]:
        scores = (rows.flatten(1, 2) @ k.mT).unflatten(1, (CHUNK, -1)) * within[:, :, None]
        return scores.flatten(1, 2), (rows * start[:, :, None, None]).flatten(1, 2)

    return weigh, k * end[:, :, None], start[:, -1:, None]


def _by_channel(k: Tensor, g: Tensor) -> tuple[Weigh, Tensor, Tensor]:
    """Decays of each key channel, by doubling: blocks of 1, 2, 4 ... tokens are joined in pairs.

    Rows carry the decay since the start of their block, keys that to its end: their product is the
    decay between a row of a block and a key of the block before, whatever its size. So each
    factor stays within [0, 1], and is a product of at most five rounded numbers.

    Args:
        k: keys [M, C, D].
        g: log decays [M, C, D].

    Returns:
        As `_by_head`, but for the state's decay [M, D, 1].
    """
    total = (g * LOG2_E)[:, :, None]  # [M, blocks, 1, D]
    fade = first = total.exp2()
    ends = k[:, :, None]  # [M, blocks, tokens, D]
    levels = []
    while ends.shape[1] > 1:
        (k0, k1), (fade0, fade1), (total0, total1) = _pairs(ends), _pairs(fade), _pairs(total)
        levels.append((k0, fade0))
        ends = torch.cat((k0 * fade1, k1), 2)
        total = total0 + total1
        fade = total.exp2()

    def weigh(rows: Tensor) -> tuple[Tensor, Tensor]:
        scores = (rows * k[:, :, None]).sum(-1, keepdim=True)  # [M, blocks, tokens*R, tokens]
        rows = rows * first  # [M, blocks, tokens*R, D]
        for k0, fade0 in levels:
            (rows0, rows1), (scores0, scores1) = _pairs(rows), _pairs(scores)
            cross = rows1 @ k0.mT if k0.shape[2] > 1 else (rows1 * k0).sum(-1, keepdim=True)
            upper = F.pad(scores0, (0, k0.shape[2]))
            scores = torch.cat((upper, torch.cat((cross, scores1), 3)), 2)
            rows = torch.cat((rows0, rows1 * fade0), 2)
        return scores[:, 0], rows[:, 0]

    return weigh, ends[:, 0], fade[:, 0].mT


def _pairs(x: Tensor) -> tuple[Tensor, ...]:
    """The even and the odd blocks of [M, blocks, tokens, width]."""
    return x.unflatten(1, (-1, 2)).unbind(2)
