"""Initialisers of the parameters that are no matrices: (shape, generator) -> first value."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Zeros; nothing is drawn."""
    import torch

    return torch.zeros(shape)


def ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ones; nothing is drawn."""
    import torch

    return torch.ones(shape)


def decay_rates(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The logarithm of decay rates A, uniform on [1, 16] (Dao and Gu 2024)."""
    import torch

    return torch.log(1 + 15 * torch.rand(shape, generator=generator))


def time_steps(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The inverse softplus of time steps, log-uniform on [1e-3, 0.1] (Dao and Gu 2024)."""
    import torch

    uniform = torch.rand(shape, generator=generator)
    step = torch.exp(math.log(1e-3) + uniform * (math.log(0.1) - math.log(1e-3)))
    return step + torch.log(-torch.expm1(-step))


def taps(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Taps of a depthwise convolution [C, K], uniform on +-1/sqrt(K), as torch's Conv1d starts."""
    import torch

    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[-1])
