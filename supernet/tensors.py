"""Safetensors files: written atomically, validated when read."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from space import InputError
from space.io.artefact import atomic_path
from space.io.filesystem import require_regular


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically.

    Args:
        path: path of the file.
        tensors: contiguous tensors by name.

    Raises:
        InputError: the library cannot write, for example because the disk is full.
    """
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary)
        except SafetensorError as error:
            raise InputError(f"{path}: cannot be written ({_reason(error)})") from None


def load_tensors(path: Path, made_by: str) -> dict[str, Tensor]:
    """Read tensors.

    Args:
        path: path of the file.
        made_by: command that writes it, for error messages.

    Raises:
        InputError: the file is missing, not whole, not a regular file, or holds a value that is not finite.
    """
    try:
        require_regular(path)
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: not a whole weights file ({_reason(error)}); `{made_by}` makes it"
        ) from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} has values that are not finite; `{made_by}` makes it again")
    return tensors


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else None
    return " ".join((text or str(error)).split())[:200]
