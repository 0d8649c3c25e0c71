"""The linear recurrence in torch: the parts that its mixers share.

Shape suffixes: B batch, T tokens, W width, H query heads, K kv heads, D head dimension. Keys, values, decays
and write strengths belong to kv heads; a query head reads the state of its group.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from space.attention.convolution import causal_conv
from space.attention.projection import heads_of, project, project_wide, rms_norm
from space.layer import MIN_LOG_DECAY
from space.mixers.mixer import Weights


def project_heads(weights: Weights, hidden: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, D], keys and values [B, T, K, D] of hidden [B, T, W]."""
    q, k, v = (heads_of(project(hidden, weights[name]), head_dim) for name in ("q", "k", "v"))
    return q, k, v


def convolve_heads(
    weights: Weights, q: Tensor, k: Tensor, v: Tensor, past: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A causal depthwise convolution and silu over q, k and v.

    Args:
        weights: with the taps ``conv_q``, ``conv_k`` and ``conv_v``, [channels, taps] each.
        q: queries [B, T, H, D].
        k: keys [B, T, K, D].
        v: values [B, T, K, D].
        past: the inputs before the first token [B, taps - 1, (H + 2K) D]; None for zeros.

    Returns:
        q, k and v in their shapes, and the past of the next call.
    """
    joined = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1)
    taps = torch.cat([weights["conv_q"], weights["conv_k"], weights["conv_v"]])
    mixed, past = causal_conv(joined, taps, past)
    sizes = [q.shape[2], k.shape[2], v.shape[2]]
    q, k, v = torch.split(heads_of(F.silu(mixed), q.shape[-1]), sizes, dim=2)
    return q, k, v, past


def unit(x: Tensor) -> Tensor:
    """L2-normalised over the last dimension, in fp32 at least, with 1e-6 under the root."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def write_strength(weights: Weights, hidden: Tensor) -> Tensor:
    """The write strengths of the delta rules, in (0, 1): hidden [B, T, W] -> [B, T, K]."""
    return torch.sigmoid(project_wide(hidden, weights["beta"]))


def time_step(weights: Weights, hidden: Tensor) -> Tensor:
    """The time steps of Mamba-2 and Gated DeltaNet, above 0: hidden [B, T, W] -> [B, T, K]."""
    return F.softplus(project_wide(hidden, weights["decay"]) + weights["dt_bias"])


def step_decay(step: Tensor, a_log: Tensor) -> Tensor:
    """Their log decays -exp(A_log) dt: steps [B, T, K], a_log [K] -> [B, T, K] (Dao and Gu 2024)."""
    return (-a_log.exp() * step).clamp(min=MIN_LOG_DECAY)


def low_rank(weights: Weights, hidden: Tensor) -> Tensor:
    """The product of two matrices that makes decays of channels: hidden [B, T, W] -> [B, T, K*D]."""
    return project_wide(project_wide(hidden, weights["decay_down"]), weights["decay_up"])


def norm_heads(weights: Weights, out: Tensor) -> Tensor:
    """The norm of each head's output: [B, T, H, D] -> [B, T, H*D]."""
    return rms_norm(out, weights["norm"]).flatten(2)


def gate_heads(
    weights: Weights,
    hidden: Tensor,
    out: Tensor,
    activation: Callable[[Tensor], Tensor],
    *,
    gate_first: bool = False,
) -> Tensor:
    """The norm of each head's output and the output gate.

    Args:
        weights: with the gain ``norm`` [D] and the matrix ``gate`` [H*D, W].
        hidden: the mixer's input [B, T, W].
        out: the output of the recurrence [B, T, H, D].
        activation: of the gate.
        gate_first: the gate comes before the norm.

    Returns:
        The output matrix's input [B, T, H*D].
    """
    gate = heads_of(activation(project(hidden, weights["gate"])), out.shape[-1])
    if gate_first:
        return rms_norm(out * gate, weights["norm"]).flatten(2)
    return (rms_norm(out, weights["norm"]) * gate).flatten(2)
