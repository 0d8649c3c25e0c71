"""Search space: architectures, the space and its encoding, ops, analytic cost, and the plain blocks.

Importing this package imports none of its modules: each public name is loaded on first use. Only
:mod:`space.blocks` and :mod:`space.attention` need torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from space.architecture import Architecture, Layer, ModelConfig
    from space.io.errors import FormfitError, InfeasibleError, InputError, LimitMissedError
    from space.space import Space, load_space
    from space.workload import Workload

__all__ = [
    "Architecture",
    "FormfitError",
    "InfeasibleError",
    "InputError",
    "Layer",
    "LimitMissedError",
    "ModelConfig",
    "Space",
    "Workload",
    "load_space",
]

_MODULE_OF = {
    "Architecture": "space.architecture",
    "FormfitError": "space.io.errors",
    "InfeasibleError": "space.io.errors",
    "InputError": "space.io.errors",
    "Layer": "space.architecture",
    "LimitMissedError": "space.io.errors",
    "ModelConfig": "space.architecture",
    "Space": "space.space",
    "Workload": "space.workload",
    "load_space": "space.space",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'space' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
