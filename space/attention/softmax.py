"""Causal softmax attention over all earlier tokens, or over a window of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

SLIDING_BLOCK = 32  # queries per block of sliding attention; 64 and more are slower
QUERY_BLOCK = 64  # queries per block of attention in training; 32 and 128 are slower
MAX_QUERY_BLOCK_TOKENS = 512  # full attention trains by query blocks up to here; at 1024 torch's is faster


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, window: int = 0, mask: Tensor | None = None) -> Tensor:
    """Causal attention of the last T of S tokens over all S.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, S, Hkv, D], S >= T.
        v: values [B, S, Hkv, D].
        window: a token sees itself and so many tokens less one before it; 0 for all.
        mask: bool [B, S], False for padding, which no other token sees; None without padding.

    Returns:
        The output [B, T, H, D].
    """
    tokens, keys = q.shape[1], k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if mask is not None:
        places = torch.arange(keys, device=q.device)
        real = mask[:, None, None] | (places[keys - tokens :, None] == places)  # itself too: no row is empty
        seen = _within(tokens, keys, window or keys, q).masked_fill(~real, -torch.inf)  # [B, 1, T, S]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
    elif tokens == keys and _trains_by_blocks(q, window):
        out = _by_query_blocks(q, k, v, window)
    elif tokens == keys and (not window or tokens <= window):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif tokens == keys:
        out = _block_local(q, k, v, window, grouped)
    elif tokens == 1 and (not window or keys <= window):
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    else:
        seen = _within(tokens, keys, window or keys, q)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
    return out.transpose(1, 2)


def _trains_by_blocks(q: Tensor, window: int) -> bool:
    training = q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad
    return training and (window > 0 or q.shape[2] <= MAX_QUERY_BLOCK_TOKENS)


def _within(tokens: int, keys: int, window: int, like: Tensor) -> Tensor:
    """The mask of the last T of S tokens, each seeing itself and the W - 1 before it: 0 or -inf, [T, S]."""
    distance = torch.arange(keys - tokens, keys, device=like.device)[:, None]
    distance = distance - torch.arange(keys, device=like.device)
    return like.new_zeros(tokens, keys).masked_fill_((distance < 0) | (distance >= window), -torch.inf)


def _by_query_blocks(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention for training on a CPU: plain products, a block of queries at a time.

    All tensors are [B, H, T, D]. Forward and backward take half the time of torch's fused attention, whose
    backward is the slow part (bf16, T 256, D 32: 13 against 29 ms).
    """
    batch, heads, length, width = q.shape
    states = batch * k.shape[1]  # M = B * Hkv; R = H / Hkv query heads read the same keys
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = (q * width**-0.5).reshape(states, -1, length, width)  # [M, R, T, D]
    k, v = k.reshape(states, length, width), v.reshape(states, length, width)
    outs = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        seen = slice(max(0, start - window + 1) if window else 0, stop)
        some = rows[:, :, start:stop].flatten(1, 2)  # [M, R*C, D]
        scores = some.bmm(k[:, seen].mT).unflatten(1, (-1, stop - start)).to(wide)
        bias = _within(stop - start, scores.shape[-1], window or length, scores)  # [C, S]
        weights = (scores + bias).softmax(-1).to(v.dtype)  # [M, R, C, S]
        outs.append(weights.flatten(1, 2).bmm(v[:, seen]).unflatten(1, (-1, stop - start)))
    return torch.cat(outs, 2).view(batch, heads, length, width)


def _block_local(q: Tensor, k: Tensor, v: Tensor, window: int, grouped: bool) -> Tensor:
    """Sliding attention over T > W tokens, by blocks of Q queries: each sees Q + W keys, under one mask.

    All tensors are [B, H, T, D]. The first W queries see all keys before them and are plainly causal. Costs
    T * (W + Q) instead of T * T; a mask over the whole square is slower than no window at all.
    """
    batch, length, head_dim = q.shape[0], q.shape[2], q.shape[3]
    size = min(SLIDING_BLOCK, window)
    head = slice(window)
    first = F.scaled_dot_product_attention(
        q[:, :, head], k[:, :, head], v[:, :, head], is_causal=True, enable_gqa=grouped
    )

    def fold(x: Tensor, start: int, span: int) -> Tensor:  # [B, H, T, D] -> [B*n, H, span, D]
        x = F.pad(x[:, :, start:], (0, 0, 0, (window - length) % size))
        return x.unfold(2, span, size).permute(0, 2, 1, 4, 3).flatten(0, 1)

    rest = F.scaled_dot_product_attention(
        fold(q, window, size),
        fold(k, 0, window + size),
        fold(v, 0, window + size),
        attn_mask=_within(size, window + size, window, q),
        enable_gqa=grouped,
    )
    rest = rest.view(batch, -1, q.shape[1], size, head_dim).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest[:, :, : length - window]], dim=2)
