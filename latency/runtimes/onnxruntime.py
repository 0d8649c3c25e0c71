"""What runs ops and models on this machine: onnxruntime, the runtime of deployment.

An op is timed in the state in which a model runs it: in a stack of copies with distinct
weights, fed through preallocated buffers. A softmax cache is bound to one buffer for input
and output, so that a decode step writes its token in place and copies nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from latency.device_runner.io_binding import Binding, Feed, Run, bind, session_options
from latency.device_runner.main import fingerprint
from latency.runtimes.protocol import random_weights
from latency.runtimes.rss import session_rss
from space import Architecture, InputError, Layer, ModelConfig, Workload
from space.mixers import MIXERS
from space.onnx.graph import Graph
from space.onnx.model import add_embedding, add_ffn, add_head, add_mixer, model_graph
from space.onnx.quantise import quantise
from space.ops import Op, mixer_op
from space.shapes import end_shapes, ffn_shapes, mixer_shapes, model_shapes, state_shapes

ANCHOR_SIDE = 256  # of the square product that serves as anchor


class OnnxRuntime:
    """onnxruntime on the CPU, with a fixed number of threads; what it is asked to build is of a precision."""

    name = "onnxruntime"

    def __init__(self, threads: int = 1, precision: str = "fp32") -> None:
        self.threads, self.precision = threads, precision

    def session(self, model: onnx.ModelProto | Path) -> ort.InferenceSession:
        """A session on the CPU that runs one node at a time."""
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        return ort.InferenceSession(source, session_options(self.threads), providers=["CPUExecutionProvider"])

    def stack(
        self, op: Op, height: int, workloads: Sequence[Workload], model_config: ModelConfig
    ) -> dict[Workload, Run]:
        """Runners of ``height`` copies of an op, one for each workload."""
        graph = quantise(stack_graph(op, height, model_config), self.precision)
        session = self._checked_session(graph, [op.layer], op.width, model_config)
        layers = [op.layer] * height if op.kind not in ("embedding", "head") else []
        return {w: bind_workload(session, w, model_config, op.width, layers) for w in workloads}

    def model(
        self, architecture: Architecture, workloads: Sequence[Workload], model_config: ModelConfig, seed: int
    ) -> dict[Workload, Run]:
        """Runners of a whole model with random weights, one for each workload."""
        weights = random_weights(model_shapes(architecture, model_config), seed)
        graph = quantise(model_graph(architecture, model_config, weights), self.precision)
        session = self._checked_session(graph, architecture.layers, architecture.width, model_config)
        return {
            w: bind_workload(session, w, model_config, architecture.width, architecture.layers)
            for w in workloads
        }

    def memory(
        self, architecture: Architecture, workloads: Sequence[Workload], model_config: ModelConfig
    ) -> dict[Workload, int]:
        """Bytes that a whole model adds to a process at its peak, by workload."""
        graph = model_graph(
            architecture, model_config, random_weights(model_shapes(architecture, model_config), 0)
        )
        graph = quantise(graph, self.precision)
        ends = architecture.width, architecture.layers
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(graph.SerializeToString())
            return {
                w: session_rss(path, graph_binding(graph, w, model_config, *ends), self.threads)
                for w in workloads
            }

    def lacking(self, layers: Sequence[Layer], width: int, model_config: ModelConfig) -> list[str]:
        """The mixers of these layers that this onnxruntime cannot run, each tried alone."""
        alone = {layer.mixer: mixer_op(width, layer) for layer in layers if layer.mixer != "none"}
        found = []
        for mixer, op in alone.items():
            try:
                self.session(quantise(stack_graph(op, 1, model_config), self.precision))
            except Exception:  # onnxruntime's own classes have no common base but this one
                found.append(mixer)
        return found

    def _checked_session(
        self, model: onnx.ModelProto, layers: Sequence[Layer], width: int, model_config: ModelConfig
    ) -> ort.InferenceSession:
        """A session, or an InputError that names the mixers which this onnxruntime lacks."""
        try:
            return self.session(model)
        except Exception as error:
            lacking = self.lacking(layers, width, model_config)
            if not lacking:
                raise
            raise InputError(lacks(lacking, error)) from None

    def load(
        self, path: Path, architecture: Architecture, workload: Workload, model_config: ModelConfig
    ) -> Run:
        """A runner of an exported model."""
        return bind_workload(
            self.session(path), workload, model_config, architecture.width, architecture.layers
        )

    def anchors(self) -> list[Run]:
        """A square matrix product in this runtime; see docs/adr/0005 for why there is no copy of memory."""
        session = self.session(anchor_graph())
        return [bind(session, anchor_binding())]

    def fingerprint(self) -> dict[str, Any]:
        """CPU, system and versions."""
        return fingerprint()


def anchor_graph() -> onnx.ModelProto:
    """A square matrix product; see docs/adr/0005 for why there is no copy of memory beside it."""
    weight = np.random.default_rng(0).standard_normal((ANCHOR_SIDE, ANCHOR_SIDE), np.float32)
    shape = list(weight.shape)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "anchor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        initializer=[numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def anchor_binding() -> Binding:
    """What the reference product runs on."""
    shape = (ANCHOR_SIDE, ANCHOR_SIDE)
    return Binding((Feed("x", shape, "normal", 1.0),), (Feed("y", shape),))


def graph_binding(
    model: onnx.ModelProto, workload: Workload, model_config: ModelConfig, width: int, layers: Sequence[Layer]
) -> Binding:
    """What a graph is bound to in a workload."""

    def shapes(values: Sequence[onnx.ValueInfoProto]) -> dict[str, list[Any]]:
        return {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in values}

    ends = shapes(model.graph.input), shapes(model.graph.output)
    return workload_binding(*ends, workload, model_config, width, layers)


def lacks(mixers: Sequence[str], error: Exception) -> str:
    """What to tell a person whose onnxruntime cannot run some mixers."""
    reason = str(error).splitlines()[0]
    return (
        f"mixer {', '.join(mixers)}: onnxruntime {ort.__version__} cannot run it ({reason}); "
        "leave it out of layer.mixer, or install another onnxruntime"
    )


def stack_graph(op: Op, height: int, model_config: ModelConfig) -> onnx.ModelProto:
    """``height`` copies of an op with distinct weights: in a row, or side by side for the ends."""
    graph = Graph(model_config)
    batch: list[int | str] = ["batch", "length"]
    if op.kind == "embedding":
        tokens = graph.input("tokens", TensorProto.INT64, batch)
        for i in range(height):
            weight = random_weights(end_shapes(op.width, model_config), i)["embedding"]
            out = add_embedding(graph, tokens, weight, f"embedding.{i}")
            graph.output(f"out.{i}", out, TensorProto.FLOAT, [*batch, op.width])
        return graph.model()
    x = graph.input("x", TensorProto.FLOAT, [*batch, op.width])
    if op.kind == "head":
        for i in range(height):
            weights = random_weights(end_shapes(op.width, model_config), i)
            head = graph.constant(f"head.{i}", weights["embedding"])
            out = add_head(graph, x, weights["norm"], head, f"norm.{i}")
            graph.output(f"out.{i}", out, TensorProto.FLOAT, [*batch, model_config.vocab_size])
        return graph.model()
    source = x
    if op.kind != "ffn":
        graph.input("position", TensorProto.INT64, [1])
    for i in range(height):
        if op.kind == "ffn":
            x = add_ffn(graph, x, i, random_weights(ffn_shapes(op.width, op.ffn), i))
        else:
            shapes = mixer_shapes(op.kind, op.width, op.heads, op.kv_heads, model_config)
            x = add_mixer(graph, x, i, op.layer, random_weights(shapes, i), source)
    graph.output("out", x, TensorProto.FLOAT, [*batch, op.width])
    return graph.model()


def workload_binding(
    inputs: Mapping[str, Sequence[Any]],
    outputs: Mapping[str, Sequence[Any]],
    workload: Workload,
    model_config: ModelConfig,
    width: int,
    layers: Sequence[Layer],
) -> Binding:
    """What a graph's inputs and outputs, given with their shapes, are bound to in a workload."""
    batch, tokens = workload.batch, workload.tokens
    feeds: list[Feed] = []
    after: dict[str, Feed] = {}
    for slot, layer in enumerate(layers):
        # A softmax cache has room for the whole workload and is bound to both ends.
        grows = layer.mixer != "none" and MIXERS.get(layer.mixer).cache_in_place
        before = state_shapes(layer, width, model_config, batch, workload.length if grows else workload.past)
        for name, shape in state_shapes(layer, width, model_config, batch, workload.length).items():
            state = f"state.{slot}.{name}"
            feeds.append(Feed(state, before[name], "normal", 0.1))
            after[f"{state}.next"] = Feed(f"{state}.next", shape, same=state if grows else "")
    for name, given in inputs.items():
        if name == "tokens":
            feeds.append(Feed(name, (batch, tokens), "tokens", model_config.vocab_size))
        elif name == "position":
            feeds.append(Feed(name, (1,), "value", workload.past))
        elif name == "x":
            feeds.append(Feed(name, (batch, tokens, given[2]), "normal", 1.0))
    ends = [after.get(name) or Feed(name, (batch, tokens, given[2])) for name, given in outputs.items()]
    return Binding(tuple(feeds), tuple(ends))


def bind_workload(
    session: ort.InferenceSession,
    workload: Workload,
    model_config: ModelConfig,
    width: int,
    layers: Sequence[Layer],
) -> Run:
    """A function that runs a workload a number of times on preallocated buffers."""
    inputs = {item.name: item.shape for item in session.get_inputs()}
    outputs = {item.name: item.shape for item in session.get_outputs()}
    return bind(session, workload_binding(inputs, outputs, workload, model_config, width, layers))
