"""Graphs in eight bits against numpy's own reading of their bytes, and their sizes against the cost table."""

import logging
from math import prod

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from latency.runtimes.onnx_graphs import stack_graph
from latency.runtimes.onnxruntime import OnnxRuntime
from latency.runtimes.protocol import random_weights
from space import Architecture, Layer, ModelConfig
from space.cost import op_weight_bytes
from space.mixers import MIXERS
from space.onnx.model import model_graph
from space.onnx.quantise import quantise
from space.ops import Op, count_ops
from space.precision import PRECISIONS, block_size
from space.shapes import model_shapes, state_shapes


def layer_of(mixer: str) -> Layer:
    """A layer of a mixer; one without heads has no FFN."""
    entry = MIXERS.get(mixer)
    if not entry.has_heads:
        return Layer(mixer=mixer)
    return Layer(mixer=mixer, heads=4, kv_heads=2, window=8 if entry.windowed else 0, ffn=48)


LAYERS = {mixer: layer_of(mixer) for mixer in MIXERS}
ARCHITECTURE = Architecture(96, (*LAYERS.values(), Layer(), Layer(ffn=32)))
CONFIGS = {
    "tie_embeddings": ModelConfig(vocab_size=37, max_seq_len=64, head_dim=16),
    "untied": ModelConfig(vocab_size=37, max_seq_len=64, head_dim=16, tie_embeddings=False),
}
each_frame = pytest.mark.parametrize("model_config", CONFIGS.values(), ids=CONFIGS)


def graph_of(model_config: ModelConfig, architecture: Architecture = ARCHITECTURE) -> onnx.ModelProto:
    weights = random_weights(model_shapes(architecture, model_config), 0)
    return model_graph(architecture, model_config, weights, {"formfit.key": "kept"})


def logits(
    model: onnx.ModelProto, model_config: ModelConfig, architecture: Architecture = ARCHITECTURE
) -> NDArray[np.float32]:
    session = OnnxRuntime().session(model)
    feeds = {"tokens": np.arange(24)[None] % 37, "position": np.zeros(1, np.int64)}
    for slot, layer in enumerate(architecture.layers):
        for name, shape in state_shapes(layer, architecture.width, model_config, 1, 0).items():
            feeds[f"state.{slot}.{name}"] = np.zeros(shape, np.float32)
    known = {item.name for item in session.get_inputs()}
    found: NDArray[np.float32] = session.run(["logits"], {k: v for k, v in feeds.items() if k in known})[0]
    return found


def distance(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all constants but shapes and other whole numbers."""
    return sum(
        numpy_helper.to_array(tensor).nbytes
        for tensor in model.graph.initializer
        if tensor.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    )


@pytest.mark.parametrize("inputs", [16, 48, 64, 96, 160, 128, 256, 1024])
def test_block_size_divides_the_inputs(inputs: int) -> None:
    size = block_size(inputs)
    assert inputs % size == 0
    assert 16 <= size <= 128
    assert size & (size - 1) == 0


def test_inputs_that_no_block_divides_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 16"):
        block_size(24)


@each_frame
@pytest.mark.parametrize("precision", ["int8", "int8-dynamic"])
def test_quantised_weights_have_the_predicted_bytes(model_config: ModelConfig, precision: str) -> None:
    ops = count_ops(ARCHITECTURE)
    expected = sum(
        n * (op_weight_bytes(op, model_config) - op_weight_bytes(op, model_config, precision))
        for op, n in ops.items()
    )
    small = quantise(graph_of(model_config), precision)
    saved = weight_bytes(graph_of(model_config)) - weight_bytes(small)
    assert saved == expected
    assert {item.key: item.value for item in small.metadata_props}["formfit.key"] == "kept"


@each_frame
def test_quantised_weights_are_within_half_a_step(model_config: ModelConfig) -> None:
    """The bytes as numpy reads them: a product's weight is (byte - 128) * scale of its block."""
    plain, small = graph_of(model_config), quantise(graph_of(model_config), "int8")
    exact = {t.name: numpy_helper.to_array(t) for t in plain.graph.initializer}
    if model_config.tie_embeddings:
        exact["embedding.T"] = exact["embedding"].T
    else:
        exact |= {"head.T": exact["head"].T, "embedding.T": exact["embedding"].T}
    found = {t.name: numpy_helper.to_array(t) for t in small.graph.initializer}
    products = [node for node in small.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == sum(node.op_type == "MatMul" for node in plain.graph.node)
    for node in products:
        rows, scales = found[node.input[1]].astype(np.float64), found[node.input[2]]
        read = ((rows - 128) * scales[..., None]).reshape(len(rows), -1)
        expected = exact[node.input[1].removesuffix("_Q8")].T
        step = np.repeat(np.abs(scales), rows.shape[-1], axis=1)
        assert (np.abs(read - expected) <= step * 1.001).all()
        assert np.sqrt(np.mean((read - expected) ** 2)) <= 0.01 * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("mixer", [*LAYERS, "ffn"])
@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.05), ("int8-dynamic", 0.25)])
def test_quantised_layer_is_close_to_fp32(mixer: str, precision: str, bound: float) -> None:
    model_config = CONFIGS["untied"]
    architecture = Architecture(96, (LAYERS.get(mixer, Layer(ffn=48)),))
    expected = logits(graph_of(model_config, architecture), model_config, architecture)
    found = logits(quantise(graph_of(model_config, architecture), precision), model_config, architecture)
    assert 0 < distance(found, expected) < bound


def test_tied_embedding_is_stored_once() -> None:
    model_config, architecture = (
        CONFIGS["tie_embeddings"],
        Architecture(96, (Layer(mixer="linear", heads=2, kv_heads=2),)),
    )
    small = quantise(graph_of(model_config, architecture), "int8")
    tables = [t for t in small.graph.initializer if prod(t.dims) == model_config.vocab_size * 96]
    assert [onnx.TensorProto.DataType.Name(t.data_type) for t in tables] == ["UINT8"]
    expected = logits(graph_of(model_config, architecture), model_config, architecture)
    assert distance(logits(small, model_config, architecture), expected) < 0.05


@pytest.mark.parametrize("precision", PRECISIONS)
def test_outputs_keep_their_order(precision: str) -> None:
    model_config = CONFIGS["tie_embeddings"]
    declared = [item.name for item in graph_of(model_config).graph.output]
    session = OnnxRuntime().session(quantise(graph_of(model_config), precision))
    assert [item.name for item in session.get_outputs()] == declared
    assert declared[0] == "logits"


def test_stacks_of_ends_run_in_every_precision() -> None:
    model_config = CONFIGS["untied"]
    for precision in ("int8", "int8-dynamic"):
        runtime = OnnxRuntime(1, precision)
        for op in (Op(kind="embedding", width=96), Op(kind="head", width=96)):
            session = runtime.session(quantise(stack_graph(op, 3, model_config), precision))
            assert isinstance(session, ort.InferenceSession)
            assert len(session.get_outputs()) == 3


def test_quantisation_leaves_logging_unchanged() -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.root.manager.disable
    quantise(graph_of(CONFIGS["tie_embeddings"], Architecture(96, (Layer(ffn=16),))), "int8")
    assert (root.handlers[:], root.level, logging.root.manager.disable) == before
