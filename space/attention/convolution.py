"""The causal depthwise convolution before a recurrence, as a sum of shifted products.

On a CPU this takes a third to two thirds of ``conv1d``'s time forward and half of it forward and
backward, at every shape measured: B*T from 1 to 4096, 64 to 768 channels, 3 and 4 taps, float32
and bfloat16 (T=1024, C=768, K=4, float32: 0.8 against 2.4 ms, with backward 4.4 against 9.1).
Its output is contiguous, too, where ``conv1d``'s has its channels first.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_conv(x: Tensor, taps: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution with sums in float32 at least.

    Args:
        x: inputs [B, T, C].
        taps: [C, K], the last one for the present.
        past: the inputs before x [B, K-1, C]; None for zeros.

    Returns:
        The output [B, T, C] and the past of the next call [B, K-1, C], in the type of x.
    """
    before = taps.shape[1] - 1
    if past is None:
        past = x.new_zeros(x.shape[0], before, x.shape[2])
    joined = torch.cat([past.to(x.dtype), x], dim=1)  # [B, T+K-1, C]
    wide = torch.promote_types(x.dtype, torch.float32)
    out: Tensor = _Shifted.apply(joined.to(wide), taps.to(wide))  # type: ignore[no-untyped-call]
    out = out.to(x.dtype)
    return out, joined[:, joined.shape[1] - before :].contiguous()


class _Shifted(torch.autograd.Function):
    """out[:, t] = sum_i taps[:, i] * joined[:, t + i]: joined [B, T+K-1, C], taps [C, K] -> [B, T, C]."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(joined, taps)
        tokens = joined.shape[1] - taps.shape[1] + 1
        first, *rest = taps.mT.contiguous()  # rows of unit stride: three times faster than columns
        out: Tensor = joined[:, :tokens] * first
        for i, tap in enumerate(rest, 1):
            out.addcmul_(joined[:, i : i + tokens], tap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        joined, taps = ctx.saved_tensors
        tokens, d_out = d_out.shape[1], d_out.contiguous()
        d_joined, d_taps = torch.zeros_like(joined), []
        for i, tap in enumerate(taps.mT.contiguous()):
            d_joined[:, i : i + tokens].addcmul_(d_out, tap)
            d_taps.append((joined[:, i : i + tokens] * d_out).sum((0, 1)))
        return d_joined, torch.stack(d_taps, 1)
