"""onnxruntime as a runtime: the one that exported models are deployed on.

An op is timed in the conditions of a model: in a stack of copies with distinct weights, on preallocated
buffers.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from latency.device_runner.fingerprint import Fingerprint
from latency.device_runner.io_binding import bind, session_options
from latency.device_runner.main import fingerprint
from latency.device_runner.timer import Run
from latency.runtimes import rss
from latency.runtimes.onnx_graphs import (
    anchor_graph,
    anchor_io_binding,
    graph_io_binding,
    stack_graph,
    workload_io_binding,
)
from latency.runtimes.protocol import ExportedModel, Runtime, random_weights
from latency.runtimes.registry import register_runtime
from space import Architecture, InputError, Layer, ModelConfig, Workload
from space.onnx.graph import VERSION
from space.onnx.model import model_graph
from space.onnx.quantise import quantise
from space.ops import Op, mixer_op
from space.precision import PRECISIONS
from space.shapes import model_shapes, state_shapes


class OnnxRuntime(Runtime):
    """onnxruntime on the CPU.

    Args:
        threads: number of threads of every session.
        precision: precision of the stacks and models that it builds.
    """

    name = "onnxruntime"
    supports_rss = rss.is_supported()

    def __init__(self, threads: int = 1, precision: str = "fp32") -> None:
        self.threads, self.precision = threads, precision

    def session(self, model: onnx.ModelProto | Path) -> ort.InferenceSession:
        """Create a session on the CPU that runs one node at a time.

        Args:
            model: a graph, or its file.
        """
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        return ort.InferenceSession(source, session_options(self.threads), providers=["CPUExecutionProvider"])

    def stack(
        self, op: Op, height: int, workloads: Sequence[Workload], model_config: ModelConfig
    ) -> dict[Workload, Run]:
        """Build copies of an op; see :meth:`Runtime.stack`."""
        graph = quantise(stack_graph(op, height, model_config), self.precision)
        session = self._checked_session(graph, [op.layer], op.width, model_config)
        layers = [op.layer] * height if op.kind not in ("embedding", "head") else []
        return {w: bind_workload(session, w, model_config, op.width, layers) for w in workloads}

    def model(
        self, architecture: Architecture, workloads: Sequence[Workload], model_config: ModelConfig, seed: int
    ) -> dict[Workload, Run]:
        """Build a whole model with random weights; see :meth:`Runtime.model`."""
        graph = self._random_graph(architecture, model_config, seed)
        session = self._checked_session(graph, architecture.layers, architecture.width, model_config)
        return {
            w: bind_workload(session, w, model_config, architecture.width, architecture.layers)
            for w in workloads
        }

    def load(
        self, path: Path, architecture: Architecture, workload: Workload, model_config: ModelConfig
    ) -> Run:
        """Load an exported graph.

        Args:
            path: file of the graph.
            architecture: its architecture.
            workload: shapes of the inputs and states.
            model_config: vocabulary, context and heads.
        """
        session = self.session(path)
        return bind_workload(session, workload, model_config, architecture.width, architecture.layers)

    def deploy(self, exported: ExportedModel, workloads: Sequence[Workload]) -> dict[Workload, Run]:
        """Load the exported graph of each workload's precision; see :meth:`Runtime.deploy`."""
        architecture, model_config = exported.architecture, exported.model_config
        return {w: self.load(exported.files[w.precision], architecture, w, model_config) for w in workloads}

    def logits(self, exported: ExportedModel, tokens_BT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of the exported fp32 graph, from empty states; see :meth:`Runtime.logits`."""
        session, architecture = self.session(exported.files["fp32"]), exported.architecture
        inputs: dict[str, NDArray[np.generic]] = {"tokens": tokens_BT, "position": np.zeros(1, np.int64)}
        for slot, layer in enumerate(architecture.layers):
            shapes = state_shapes(layer, architecture.width, exported.model_config, len(tokens_BT), 0)
            inputs |= {f"state.{slot}.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
        declared = {item.name for item in session.get_inputs()}
        (found,) = session.run(["logits"], {name: v for name, v in inputs.items() if name in declared})
        return np.asarray(found)

    def rss(
        self, architecture: Architecture, workloads: Sequence[Workload], model_config: ModelConfig
    ) -> dict[Workload, int]:
        """Peak resident memory of a session of a random model; see :meth:`Runtime.rss`."""
        graph = self._random_graph(architecture, model_config, 0)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(graph.SerializeToString())
            return {
                w: self._session_rss(path, graph, architecture, w, model_config, self.threads)
                for w in workloads
            }

    def deployed_rss(self, exported: ExportedModel, workloads: Sequence[Workload]) -> dict[Workload, int]:
        """Peak resident memory of a session of the exported graph; see :meth:`Runtime.deployed_rss`."""
        architecture, model_config = exported.architecture, exported.model_config
        found = {}
        for w in workloads:
            path = exported.files[w.precision]
            graph = onnx.load_model(path)
            found[w] = self._session_rss(path, graph, architecture, w, model_config, w.threads)
        return found

    def lacking(self, layers: Sequence[Layer], width: int, model_config: ModelConfig) -> list[str]:
        """The mixers that this version of onnxruntime cannot run, each tried in a graph of its own.

        Args:
            layers: layers whose mixers are tried.
            width: residual width.
            model_config: vocabulary, context and heads.
        """
        ops = {layer.mixer: mixer_op(width, layer) for layer in layers if layer.mixer != "none"}
        found = []
        for mixer, op in ops.items():
            try:
                self.session(quantise(stack_graph(op, 1, model_config), self.precision))
            except Exception:  # onnxruntime's own classes have no other common base
                found.append(mixer)
        return found

    def anchors(self) -> list[Run]:
        """A product of two square matrices; see :meth:`Runtime.anchors`."""
        return [bind(self.session(anchor_graph()), anchor_io_binding())]

    def fingerprint(self) -> Fingerprint:
        """CPU, system and version of onnxruntime."""
        return fingerprint()

    def _random_graph(
        self, architecture: Architecture, model_config: ModelConfig, seed: int
    ) -> onnx.ModelProto:
        weights = random_weights(model_shapes(architecture, model_config), seed)
        return quantise(model_graph(architecture, model_config, weights), self.precision)

    @staticmethod
    def _session_rss(
        path: Path,
        graph: onnx.ModelProto,
        architecture: Architecture,
        workload: Workload,
        model_config: ModelConfig,
        threads: int,
    ) -> int:
        ends = architecture.width, architecture.layers
        return rss.session_rss(path, graph_io_binding(graph, workload, model_config, *ends), threads)

    def _checked_session(
        self, model: onnx.ModelProto, layers: Sequence[Layer], width: int, model_config: ModelConfig
    ) -> ort.InferenceSession:
        """A session, or an InputError that names the mixers that onnxruntime lacks."""
        try:
            return self.session(model)
        except Exception as error:
            lacking = self.lacking(layers, width, model_config)
            if not lacking:
                raise
            reason = str(error).splitlines()[0]
            raise InputError(
                f"mixer {', '.join(lacking)}: onnxruntime {ort.__version__} cannot run it ({reason}); "
                "leave it out of layer.mixer, or install another onnxruntime"
            ) from None


def bind_workload(
    session: ort.InferenceSession,
    workload: Workload,
    model_config: ModelConfig,
    width: int,
    layers: Sequence[Layer],
) -> Run:
    """Bind a session to new buffers for a workload.

    Args:
        session: a session of a stack or of a whole model.
        workload: batch, number of tokens, and tokens in the states.
        model_config: vocabulary, context and heads.
        width: residual width.
        layers: the layers that have states, by slot.

    Returns:
        A function that runs the workload the given number of times.
    """
    inputs = {item.name: item.shape for item in session.get_inputs()}
    outputs = {item.name: item.shape for item in session.get_outputs()}
    return bind(session, workload_io_binding(inputs, outputs, workload, model_config, width, layers))


register_runtime("onnxruntime", OnnxRuntime, precisions=PRECISIONS, graph_version=VERSION)
