"""Running a graph of onnxruntime a number of times on preallocated buffers.

Also part of the probe kit: Python 3.8, and nothing but the standard library, numpy and onnxruntime.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Callable, Mapping, Sequence

import numpy as np
import onnxruntime as ort

Run = Callable[[int], None]


@dataclass(frozen=True)
class Feed:
    """One input or output of a graph, and the buffer it is bound to.

    Attributes:
        name: of the input or output.
        shape: of its buffer.
        fill: ``normal`` (scaled by ``scale``), ``tokens`` (integers from 1 below ``scale``), ``value``
            (the integer ``scale``) or ``zeros``.
        scale: see ``fill``.
        same: the input whose buffer an output shares; empty for one of its own.
    """

    name: str
    shape: tuple[int, ...]
    fill: str = "zeros"
    scale: float = 0.0
    same: str = ""

    def array(self, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        """The buffer's first values."""
        if self.fill == "normal":
            return np.asarray(self.scale * rng.standard_normal(self.shape, np.float32), np.float32)
        if self.fill == "tokens":
            return rng.integers(1, int(self.scale), self.shape)
        if self.fill == "value":
            return np.full(self.shape, int(self.scale), np.int64)
        return np.zeros(self.shape, np.float32)


@dataclass(frozen=True)
class Binding:
    """What is bound to a graph for one workload."""

    inputs: tuple[Feed, ...]
    outputs: tuple[Feed, ...]

    def to_json(self) -> dict[str, Any]:
        """As a plain JSON value."""
        return {
            "inputs": [asdict(feed) for feed in self.inputs],
            "outputs": [asdict(feed) for feed in self.outputs],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Binding:
        """Read a binding; the inverse of :meth:`to_json`."""

        def feeds(items: Sequence[Mapping[str, Any]]) -> tuple[Feed, ...]:
            return tuple(Feed(**{**item, "shape": tuple(item["shape"])}) for item in items)

        return Binding(feeds(value["inputs"]), feeds(value["outputs"]))


def bind(session: ort.InferenceSession, binding: Binding) -> Run:
    """A function that runs a session a number of times on buffers of its own."""
    rng = np.random.default_rng(0)
    bound = session.io_binding()
    buffers: dict[str, ort.OrtValue] = {}
    for feed in binding.inputs:
        buffers[feed.name] = ort.OrtValue.ortvalue_from_numpy(feed.array(rng))
        bound.bind_ortvalue_input(feed.name, buffers[feed.name])
    for feed in binding.outputs:
        buffers[feed.name] = (
            buffers[feed.same] if feed.same else ort.OrtValue.ortvalue_from_numpy(feed.array(rng))
        )
        bound.bind_ortvalue_output(feed.name, buffers[feed.name])

    def run(loops: int) -> None:
        for _ in range(loops):
            session.run_with_iobinding(bound)

    run.buffers = buffers  # type: ignore[attr-defined] # the binding does not own them
    return run


def session_options(threads: int) -> ort.SessionOptions:
    """A session runs one node at a time on so many threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options
