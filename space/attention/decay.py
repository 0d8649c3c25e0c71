"""What the linear mixers make of their projections: log decays, keys and writes of the recurrence.

Everything here is in float32 at least. A log decay is never above 0, and never below -20 where
its formula has no bound of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from space.shapes import MIN_LOG_DECAY


def unit(x: Tensor) -> Tensor:
    """L2-normalised over the last dimension, in fp32 at least, with 1e-6 under the root."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def retnet_decay(kv_heads: int, like: Tensor) -> Tensor:
    """RetNet's fixed log decays, log(1 - 2^(-5-h)) for kv head h: [Hkv] (Sun et al. 2023)."""
    head = torch.arange(kv_heads, dtype=torch.float64, device=like.device)
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.log1p(-torch.exp2(-5 - head)).to(wide)


def step_decay(step: Tensor, a_log: Tensor) -> Tensor:
    """A time step's log decays, -exp(A_log) step: [B, T, Hkv] (Dao and Gu 2024)."""
    return (-a_log.exp() * step).clamp(min=MIN_LOG_DECAY)


def gla_decay(logits: Tensor) -> Tensor:
    """GLA's log decays, logsigmoid(logits) / 16, in the shape of the logits (Yang et al. 2023)."""
    return (F.logsigmoid(logits) / 16).clamp(min=MIN_LOG_DECAY)


def hgrn2_forget(f: Tensor, lower_bound: Tensor) -> tuple[Tensor, Tensor]:
    """HGRN2's keys and log decays from the logits of its forget gate [B, T, Hkv, D] (Qin et al. 2024).

    The gate is a = lb + (1 - lb) sigmoid(f), lb the sigmoid of the parameter [Hkv * D], and the key
    is 1 - a. Both come from y, the logit of 1 - a: each is exact where the other is close to 1.
    """
    f, bound = f.to(lower_bound.dtype), lower_bound.view(f.shape[2:]).clamp(min=MIN_LOG_DECAY)
    y = F.logsigmoid(-bound) - f + F.logsigmoid(f - F.logsigmoid(bound))
    return torch.sigmoid(y), F.logsigmoid(-y)


def kda_decay(logits: Tensor, slope_log: Tensor) -> Tensor:
    """KDA's bounded log decays, -5 sigmoid(exp(slope_log) logits): [B, T, Hkv, D] (Kimi Linear, 2025)."""
    return -5 * torch.sigmoid(slope_log.exp()[:, None] * logits)
