"""Data types of a training: bf16 copies of large matrices, fp32 master weights."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from space import Architecture
from space.shapes import is_half_precision
from supernet.training.recipe import TrainConfig


def cast_matrices(
    parameters: Mapping[str, Tensor], dtype: torch.dtype, architecture: Architecture | None = None
) -> dict[str, Tensor]:
    """Detach parameters and cast large matrices; done once a step, before any slicing.

    Args:
        parameters: parameters by name.
        dtype: type of the matrices.
        architecture: of a sub-model; None for the parameters of a supernet.
    """
    return {
        name: p.detach().to(dtype if is_half_precision(name, p.shape, architecture) else p.dtype)
        for name, p in parameters.items()
    }


def matrix_type(config: TrainConfig) -> torch.dtype:
    """Data type of matrix products in training; ``auto`` is bf16 if the CPU has instructions for it.

    Args:
        config: the training settings.
    """
    if config.precision == "auto":
        fast = bool({"avx512_bf16", "amx_bf16"} & cpu_flags())
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def cpu_flags() -> frozenset[str]:
    """Feature flags of the CPU; empty if the operating system does not list them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return frozenset(lines[0].split(":", 1)[1].split()) if lines else frozenset()
