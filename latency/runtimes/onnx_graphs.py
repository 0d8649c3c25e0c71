"""ONNX graphs that are timed, and the buffers that they are bound to."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from latency.device_runner.io_binding import IoBinding, TensorSpec
from latency.runtimes.protocol import ANCHOR_SIDE, random_weights
from space import Layer, ModelConfig, Workload
from space.mixers import MIXERS
from space.onnx.graph import Graph
from space.onnx.model import add_embedding, add_ffn, add_head, add_mixer
from space.ops import Op
from space.shapes import end_shapes, ffn_shapes, mixer_shapes, state_shapes

Dims = Sequence[int | str]  # a number, or the name of a symbolic dimension


def anchor_graph() -> onnx.ModelProto:
    """The product of two square matrices; docs/adr/0005 says why there is no copy of memory beside it."""
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


def anchor_io_binding() -> IoBinding:
    """The buffers of :func:`anchor_graph`."""
    shape = (ANCHOR_SIDE, ANCHOR_SIDE)
    return IoBinding((TensorSpec("x", shape, "normal", 1.0),), (TensorSpec("y", shape),))


def stack_graph(op: Op, height: int, model_config: ModelConfig) -> onnx.ModelProto:
    """Copies of an op with distinct random weights.

    Each copy reads the output of the one before; copies of an embedding or a head run side by side.

    Args:
        op: the op.
        height: number of copies.
        model_config: vocabulary, context and heads.
    """
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


def graph_io_binding(
    model: onnx.ModelProto, workload: Workload, model_config: ModelConfig, width: int, layers: Sequence[Layer]
) -> IoBinding:
    """The buffers of a graph in a workload.

    Args:
        model: a graph of a stack or of a whole model.
        workload: batch, number of tokens, and tokens in the states.
        model_config: vocabulary, context and heads.
        width: residual width.
        layers: the layers that have states, by slot.
    """

    def dims(values: Sequence[onnx.ValueInfoProto]) -> dict[str, Dims]:
        return {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in values}

    ends = dims(model.graph.input), dims(model.graph.output)
    return workload_io_binding(*ends, workload, model_config, width, layers)


def workload_io_binding(
    inputs: Mapping[str, Dims],
    outputs: Mapping[str, Dims],
    workload: Workload,
    model_config: ModelConfig,
    width: int,
    layers: Sequence[Layer],
) -> IoBinding:
    """The buffers of a graph's inputs and outputs in a workload.

    Args:
        inputs: dimensions of each input by name.
        outputs: dimensions of each output by name.
        workload: batch, number of tokens, and tokens in the states.
        model_config: vocabulary, context and heads.
        width: residual width.
        layers: the layers that have states, by slot.
    """
    batch, tokens = workload.batch, workload.tokens
    specs: list[TensorSpec] = []
    after: dict[str, TensorSpec] = {}
    for slot, layer in enumerate(layers):
        # A cache that may be longer than the past is as long as the whole workload and is bound to both ends:
        # a decode step writes its token in place and copies nothing.
        grows = layer.mixer != "none" and MIXERS.get(layer.mixer).cache_in_place
        before = state_shapes(layer, width, model_config, batch, workload.length if grows else workload.past)
        for name, shape in state_shapes(layer, width, model_config, batch, workload.length).items():
            state = f"state.{slot}.{name}"
            specs.append(TensorSpec(state, before[name], "normal", 0.1))
            after[f"{state}.next"] = TensorSpec(f"{state}.next", shape, same=state if grows else "")
    for name, dims in inputs.items():
        if name == "tokens":
            specs.append(TensorSpec(name, (batch, tokens), "tokens", model_config.vocab_size))
        elif name == "position":
            specs.append(TensorSpec(name, (1,), "value", workload.past))
        elif name == "x":
            specs.append(TensorSpec(name, (batch, tokens, int(dims[2])), "normal", 1.0))
    ends = [
        after.get(name) or TensorSpec(name, (batch, tokens, int(dims[2]))) for name, dims in outputs.items()
    ]
    return IoBinding(tuple(specs), tuple(ends))
