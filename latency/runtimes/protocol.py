"""What profiling needs of a runtime."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from latency.device_runner.io_binding import Run
from space import Architecture, ModelConfig, Workload
from space.ops import Op
from space.shapes import Shapes


class Runtime(Protocol):
    """What profiling needs of a runtime."""

    name: str

    def stack(
        self, op: Op, height: int, workloads: Sequence[Workload], model_config: ModelConfig
    ) -> dict[Workload, Run]:
        """Runners of ``height`` copies of an op, one for each workload."""
        ...

    def model(
        self, architecture: Architecture, workloads: Sequence[Workload], model_config: ModelConfig, seed: int
    ) -> dict[Workload, Run]:
        """Runners of a whole model with random weights, one for each workload."""
        ...

    def anchors(self) -> list[Run]:
        """The fixed reference work that the machine's drift is read from."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the device and the runtime's version."""
        ...


def random_weights(shapes: Shapes, seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights of the size that trained ones have, distinct everywhere."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        weights[name] = 1 + 0.1 * values if len(shape) == 1 else values * np.float32(shape[-1] ** -0.5)
    return weights
