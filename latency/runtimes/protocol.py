"""The interface of a runtime: everything that profiling, search and verification ask of it."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from latency.device_runner.fingerprint import Fingerprint
from latency.device_runner.timer import Run
from space import Architecture, ModelConfig, Workload
from space.ops import Op
from space.shapes import Shapes

ANCHOR_SIDE = 256  # of the square matrix product that is the timer's anchor
Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A trained model in the forms that a runtime may deploy.

    Attributes:
        architecture: the architecture.
        model_config: vocabulary, context and heads.
        files: exported ONNX graph by precision.
        load_weights: returns the weights by the names of :func:`space.shapes.model_shapes`, in fp32; called
            only by runtimes that build the model themselves.
    """

    architecture: Architecture
    model_config: ModelConfig
    files: Mapping[str, Path]
    load_weights: Callable[[], Weights]


class Runtime(Protocol):
    """A library that runs models on this machine, with a fixed number of threads.

    Subclass it and register a function that opens it with
    :func:`latency.runtimes.registry.register_runtime`. Methods that take workloads return one function for
    each workload; the function runs the workload the given number of times on inputs and states of its own,
    and returns when the last run has ended.

    Attributes:
        name: the registered name.
        supports_rss: True if :meth:`rss` and :meth:`deployed_rss` are implemented and work on this system.
        torch_device: torch device on which verification also checks the plain model, such as ``cuda``.
    """

    name: str
    supports_rss: bool = False
    torch_device: str = "cpu"

    @abstractmethod
    def stack(
        self, op: Op, height: int, workloads: Sequence[Workload], model_config: ModelConfig
    ) -> dict[Workload, Run]:
        """Build copies of an op with distinct random weights, each fed with the output of the one before.

        Copies of an embedding or a head run side by side.

        Args:
            op: the op.
            height: number of copies.
            workloads: shapes of the inputs and states.
            model_config: vocabulary, context and heads.

        Returns:
            A runner for each workload.

        Raises:
            InputError: the runtime lacks the op's mixer; names it.
        """

    @abstractmethod
    def model(
        self, architecture: Architecture, workloads: Sequence[Workload], model_config: ModelConfig, seed: int
    ) -> dict[Workload, Run]:
        """Build a whole model with random weights.

        Args:
            architecture: the architecture.
            workloads: shapes of the inputs and states.
            model_config: vocabulary, context and heads.
            seed: seed of the weights.

        Returns:
            A runner for each workload.

        Raises:
            InputError: the runtime lacks a mixer; names it.
        """

    @abstractmethod
    def deploy(self, exported: ExportedModel, workloads: Sequence[Workload]) -> dict[Workload, Run]:
        """Load a trained model in the form in which it would be shipped.

        Args:
            exported: the model.
            workloads: shapes of the inputs and states, and the precision of the model.

        Returns:
            A runner for each workload.
        """

    @abstractmethod
    def logits(self, exported: ExportedModel, tokens_BT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of a trained model, in fp32 and in the form in which it would be shipped.

        Args:
            exported: the model.
            tokens_BT: token ids: [batch, length].

        Returns:
            Logits: [batch, length, vocabulary].
        """

    @abstractmethod
    def anchors(self) -> list[Run]:
        """Reference work of the timer: a product of two square fp32 matrices of side ``ANCHOR_SIDE``.

        It runs where models run, so that it feels the same drift.
        """

    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """The identity of the device and of the runtime's version; equal whenever it is asked for."""

    def rss(
        self, architecture: Architecture, workloads: Sequence[Workload], model_config: ModelConfig
    ) -> dict[Workload, int]:
        """Peak resident memory of a whole model with random weights.

        Args:
            architecture: the architecture.
            workloads: shapes of the inputs and states.
            model_config: vocabulary, context and heads.

        Returns:
            Bytes that the model adds to a process at its peak, by workload.

        Raises:
            OSError: a process with the model ended before its memory was known.
        """
        raise OSError(f"runtime {self.name} does not measure memory")

    def deployed_rss(self, exported: ExportedModel, workloads: Sequence[Workload]) -> dict[Workload, int]:
        """Peak resident memory of a trained model; arguments and result as of :meth:`deploy` and :meth:`rss`.

        Args:
            exported: the model.
            workloads: shapes of the inputs and states, and the precision of the model.
        """
        raise OSError(f"runtime {self.name} does not measure memory")


def random_weights(shapes: Shapes, seed: int) -> dict[str, NDArray[np.float32]]:
    """Random weights of the magnitude of trained ones; no two parameters are equal.

    Args:
        shapes: shape by parameter name.
        seed: seed of the values.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        weights[name] = 1 + 0.1 * values if len(shape) == 1 else values * np.float32(shape[-1] ** -0.5)
    return weights
