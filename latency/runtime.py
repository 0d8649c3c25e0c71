"""What runs ops and models on this machine: onnxruntime, the runtime of deployment.

An op is timed in the state in which a model runs it: in a stack of copies with distinct
weights, fed through preallocated buffers. A softmax cache is bound to one buffer for input
and output, so that a decode step writes its token in place and copies nothing.
"""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from space import Architecture, Frame, InputError, Layer, Workload
from space.graphs import add_embedding, add_ffn, add_head, model_graph
from space.mixer_graphs import add_mixer
from space.onnx_writer import Graph
from space.ops import Op, mixer_op
from space.shapes import Shapes, end_shapes, ffn_shapes, mixer_shapes, model_shapes, state_shapes

Run = Callable[[int], None]
ANCHOR_SIDE = 256  # of the square product that serves as anchor


class Runtime(Protocol):
    """What profiling needs of a runtime."""

    name: str

    def stack(self, op: Op, height: int, workloads: Sequence[Workload], frame: Frame) -> dict[Workload, Run]:
        """Runners of ``height`` copies of an op, one for each workload."""
        ...

    def model(
        self, architecture: Architecture, workloads: Sequence[Workload], frame: Frame, seed: int
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


class OnnxRuntime:
    """onnxruntime on the CPU, with a fixed number of threads."""

    name = "onnxruntime"

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads

    def session(self, model: onnx.ModelProto | Path) -> ort.InferenceSession:
        """A session on the CPU that runs one node at a time."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def stack(self, op: Op, height: int, workloads: Sequence[Workload], frame: Frame) -> dict[Workload, Run]:
        """Runners of ``height`` copies of an op, one for each workload."""
        session = self._checked_session(stack_graph(op, height, frame), [op.layer], op.width, frame)
        layers = [op.layer] * height if op.kind not in ("embedding", "head") else []
        return {w: bind(session, w, frame, op.width, layers) for w in workloads}

    def model(
        self, architecture: Architecture, workloads: Sequence[Workload], frame: Frame, seed: int
    ) -> dict[Workload, Run]:
        """Runners of a whole model with random weights, one for each workload."""
        weights = random_weights(model_shapes(architecture, frame), seed)
        graph = model_graph(architecture, frame, weights)
        session = self._checked_session(graph, architecture.layers, architecture.width, frame)
        return {w: bind(session, w, frame, architecture.width, architecture.layers) for w in workloads}

    def lacking(self, layers: Sequence[Layer], width: int, frame: Frame) -> list[str]:
        """The mixers of these layers that this onnxruntime cannot run, each tried alone."""
        alone = {layer.mixer: mixer_op(width, layer) for layer in layers if layer.mixer != "none"}
        found = []
        for mixer, op in alone.items():
            try:
                self.session(stack_graph(op, 1, frame))
            except Exception:  # onnxruntime's own classes have no common base but this one
                found.append(mixer)
        return found

    def _checked_session(
        self, model: onnx.ModelProto, layers: Sequence[Layer], width: int, frame: Frame
    ) -> ort.InferenceSession:
        """A session, or an InputError that names the mixers which this onnxruntime lacks."""
        try:
            return self.session(model)
        except Exception as error:
            lacking = self.lacking(layers, width, frame)
            if not lacking:
                raise
            raise InputError(lacks(lacking, error)) from None

    def load(self, path: Path, architecture: Architecture, workload: Workload, frame: Frame) -> Run:
        """A runner of an exported model."""
        return bind(self.session(path), workload, frame, architecture.width, architecture.layers)

    def anchors(self) -> list[Run]:
        """A square matrix product in this runtime; see docs/adr/0005 for why there is no copy of memory."""
        side = ANCHOR_SIDE
        weight = np.random.default_rng(0).standard_normal((side, side), np.float32)
        shape = [side, side]
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "anchor",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            initializer=[numpy_helper.from_array(weight, "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        session = self.session(model)
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(weight))
        binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(np.zeros_like(weight)))

        def product(loops: int) -> None:
            for _ in range(loops):
                session.run_with_iobinding(binding)

        return [product]

    def fingerprint(self) -> dict[str, Any]:
        """CPU, system and versions."""
        return {
            "machine": platform.machine(),
            "cpu": cpu_model(),
            "system": platform.system(),
            "runtime": self.name,
            "runtime_version": ort.__version__,
        }


def lacks(mixers: Sequence[str], error: Exception) -> str:
    """What to tell a person whose onnxruntime cannot run some mixers."""
    reason = str(error).splitlines()[0]
    return (
        f"mixer {', '.join(mixers)}: onnxruntime {ort.__version__} cannot run it ({reason}); "
        "leave it out of layer.mixer, or install another onnxruntime"
    )


def cpu_model() -> str:
    """The CPU's name and feature flags in short, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    pairs = (line.partition(":") for line in reversed(lines))
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    name = fields.get("model name", "unknown")
    wide = [
        flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in fields.get("flags", "")
    ]
    return " ".join([name, f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}", *wide])


def stack_graph(op: Op, height: int, frame: Frame) -> onnx.ModelProto:
    """``height`` copies of an op with distinct weights: in a row, or side by side for the ends."""
    graph = Graph(frame)
    batch: list[int | str] = ["batch", "length"]
    if op.kind == "embedding":
        tokens = graph.input("tokens", TensorProto.INT64, batch)
        for i in range(height):
            weight = random_weights(end_shapes(op.width, frame), i)["embedding"]
            out = add_embedding(graph, tokens, weight, f"embedding.{i}")
            graph.output(f"out.{i}", out, TensorProto.FLOAT, [*batch, op.width])
        return graph.model()
    x = graph.input("x", TensorProto.FLOAT, [*batch, op.width])
    if op.kind == "head":
        for i in range(height):
            weights = random_weights(end_shapes(op.width, frame), i)
            head = graph.constant(f"head.{i}", weights["embedding"])
            out = add_head(graph, x, weights["norm"], head, f"norm.{i}")
            graph.output(f"out.{i}", out, TensorProto.FLOAT, [*batch, frame.vocabulary])
        return graph.model()
    source = x
    if op.kind != "ffn":
        graph.input("position", TensorProto.INT64, [1])
    for i in range(height):
        if op.kind == "ffn":
            x = add_ffn(graph, x, i, random_weights(ffn_shapes(op.width, op.ffn), i))
        else:
            shapes = mixer_shapes(op.kind, op.width, op.heads, op.kv_heads, frame)
            x = add_mixer(graph, x, i, op.layer, random_weights(shapes, i), source)
    graph.output("out", x, TensorProto.FLOAT, [*batch, op.width])
    return graph.model()


def bind(
    session: ort.InferenceSession, workload: Workload, frame: Frame, width: int, layers: Sequence[Layer]
) -> Run:
    """A function that runs a workload a number of times on preallocated buffers."""
    rng = np.random.default_rng(0)
    binding = session.io_binding()
    keep: list[ort.OrtValue] = []
    batch, tokens = workload.batch, workload.tokens
    after = {}
    for slot, layer in enumerate(layers):
        # A softmax cache has room for the whole workload and is bound to both ends.
        room = workload.length if layer.mixer == "attention" else workload.past
        before = state_shapes(layer, width, frame, batch, room)
        for name, shape in state_shapes(layer, width, frame, batch, workload.length).items():
            value = ort.OrtValue.ortvalue_from_numpy(0.1 * rng.standard_normal(before[name], np.float32))
            out = (
                value
                if layer.mixer == "attention"
                else ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            )
            binding.bind_ortvalue_input(f"state.{slot}.{name}", value)
            after[f"state.{slot}.{name}.next"] = out
            keep += [value, out]
    for item in session.get_inputs():
        if item.name == "tokens":
            array: NDArray[Any] = rng.integers(1, frame.vocabulary, (batch, tokens))
        elif item.name == "position":
            array = np.array([workload.past])
        elif item.name == "x":
            array = rng.standard_normal((batch, tokens, item.shape[2]), np.float32)
        else:
            continue
        keep.append(ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_input(item.name, keep[-1])
    for item in session.get_outputs():
        if item.name not in after:
            zeros = np.zeros((batch, tokens, item.shape[2]), np.float32)
            after[item.name] = ort.OrtValue.ortvalue_from_numpy(zeros)
        binding.bind_ortvalue_output(item.name, after[item.name])
    keep += list(after.values())

    def run(loops: int) -> None:
        for _ in range(loops):
            session.run_with_iobinding(binding)

    run.buffers = keep  # type: ignore[attr-defined] # the binding does not own them
    return run
