"""Products with matrices, and the root-mean-square norm.

Matrices may be bf16 and the rest fp32: a projection runs in its weight's type, norms run in fp32 (or fp64,
where everything is).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from space.layer import NORM_EPS


def project(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` in the weight's type: x [..., in], weight [out, in] -> [..., out]."""
    return F.linear(x.to(weight.dtype), weight)


def project_wide(x: Tensor, weight: Tensor) -> Tensor:
    """The same for the gates of a recurrent state: in its own types under autocast too, out in that of x."""
    with torch.autocast(x.device.type, enabled=False):
        return project(x, weight).to(x.dtype)


def rms_norm(x: Tensor, gain: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich 2019), in the gain's type.

    Args:
        x: [..., size].
        gain: [size].
        eps: added to the mean of squares; the default is that of norms inside recurrent mixers, and the
            model's own norms are given ``ModelConfig.norm_eps``.
    """
    return F.rms_norm(x.to(gain.dtype), gain.shape, gain, eps)


def heads_of(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, H*D] -> [B, T, H, D]."""
    return x.reshape(*x.shape[:-1], -1, head_dim)
