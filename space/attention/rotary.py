"""Rotary position embedding (Su et al. 2021); the halves of a head are paired, as in Llama."""

import functools

import torch
from torch import Tensor

from space.layer import Rope


def rope_angles(positions: Tensor, head_dim: int, rope: Rope) -> Tensor:
    """Rotary angles in fp64: positions [T] -> [T, D/2]."""
    frequencies = torch.tensor(rope.frequencies(head_dim), dtype=torch.float64, device=positions.device)
    return positions.double()[:, None] * frequencies


def rotate(x: Tensor, position: int, rope: Rope) -> Tensor:
    """Rotary embedding of [B, T, H, D] whose first token stands at ``position``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = _turns(position, x.shape[1], x.shape[-1], rope, wide, x.device)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin).to(x.dtype)


@functools.lru_cache(maxsize=8)
def _turns(
    position: int, tokens: int, head_dim: int, rope: Rope, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The factors of `rotate`, [T, 1, D] each: cos, and sin with the sign of each half.

    Cached for the other calls of a forward pass: in float64 they cost as much as the rotation itself.
    """
    with torch.inference_mode(False), torch.no_grad():
        angles = rope_angles(torch.arange(position, position + tokens, device=device), head_dim, rope)
        cos, sin = angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]  # [T, 1, D/2]
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
