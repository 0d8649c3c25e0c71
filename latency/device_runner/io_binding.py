"""Running an onnxruntime session repeatedly on preallocated buffers.

Part of every kit: Python 3.8, the standard library, numpy and onnxruntime.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from latency.device_runner.timer import Run
from latency.device_runner.timing import JsonObject


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph, and the contents of the buffer bound to it.

    Attributes:
        name: name of the input or output.
        shape: shape of its buffer.
        fill: ``normal`` (float32, standard deviation ``scale``), ``tokens`` (int64, uniform in
            ``[1, scale)``), ``value`` (int64, all equal to ``scale``) or ``zeros`` (float32).
        scale: parameter of ``fill``.
        same: name of the input whose buffer this output shares; empty if it has its own.
    """

    name: str
    shape: tuple[int, ...]
    fill: str = "zeros"
    scale: float = 0.0
    same: str = ""

    def array(self, rng: np.random.Generator) -> NDArray[np.generic]:
        """Initial contents of the buffer.

        Args:
            rng: source of random values.
        """
        if self.fill == "normal":
            return np.asarray(self.scale * rng.standard_normal(self.shape, np.float32), np.float32)
        if self.fill == "tokens":
            return rng.integers(1, int(self.scale), self.shape)
        if self.fill == "value":
            return np.full(self.shape, int(self.scale), np.int64)
        return np.zeros(self.shape, np.float32)


@dataclass(frozen=True)
class IoBinding:
    """The buffers that a graph runs on in one workload.

    Attributes:
        inputs: one specification for each input of the graph.
        outputs: one for each output.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_json(self) -> JsonObject:
        """The binding as a JSON object."""
        return {
            "inputs": [asdict(spec) for spec in self.inputs],
            "outputs": [asdict(spec) for spec in self.outputs],
        }

    @staticmethod
    def from_json(value: JsonObject) -> IoBinding:
        """Read a binding; the inverse of :meth:`to_json`."""

        def specs(items: Sequence[JsonObject]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(**{**item, "shape": tuple(item["shape"])}) for item in items)

        return IoBinding(specs(value["inputs"]), specs(value["outputs"]))


def bind(session: ort.InferenceSession, io_binding: IoBinding) -> Run:
    """Bind a session to new buffers.

    Args:
        session: a session of the graph.
        io_binding: shape and contents of every input and output.

    Returns:
        A function that runs the session the given number of times on these buffers.
    """
    rng = np.random.default_rng(0)
    bound = session.io_binding()
    buffers: dict[str, ort.OrtValue] = {}
    for spec in io_binding.inputs:
        buffers[spec.name] = ort.OrtValue.ortvalue_from_numpy(spec.array(rng))
        bound.bind_ortvalue_input(spec.name, buffers[spec.name])
    for spec in io_binding.outputs:
        buffers[spec.name] = (
            buffers[spec.same] if spec.same else ort.OrtValue.ortvalue_from_numpy(spec.array(rng))
        )
        bound.bind_ortvalue_output(spec.name, buffers[spec.name])

    def run(loops: int) -> None:
        for _ in range(loops):
            session.run_with_iobinding(bound)

    run.buffers = buffers  # type: ignore[attr-defined] # keeps them alive: the session's binding does not
    return run


def session_options(threads: int) -> ort.SessionOptions:
    """Options of a session that runs one node at a time.

    Args:
        threads: number of threads that a node may use.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options
