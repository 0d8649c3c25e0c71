"""What can be built: architectures, the search space, ops, analytic cost, and the plain blocks.

Importing this package does not import torch; :mod:`space.blocks` and
:mod:`space.attention.linear` do.
"""

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
