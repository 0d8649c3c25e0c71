"""Quantisation of graphs to eight bits with onnxruntime's tools, for measuring and export alike.

``int8`` makes every product a ``MatMulNBits`` node with a scale for each block of inputs, ``int8-dynamic``
a product of integers with ranges found while it runs. The embedding is quantised too; in ``int8`` a tied one
is one tensor, of which the embedding reads rows and the head is a product.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from space.onnx.graph import CONTRIB
from space.precision import MIN_BLOCK_INPUTS, block_size


def quantise(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """A graph of :mod:`space.onnx.model` in a precision; fp32 returns it unchanged.

    Args:
        model: a graph with fp32 weights; it may be changed.
        precision: one of :data:`space.precision.PRECISIONS`.
    """
    if precision == "fp32":
        return model
    _transpose_heads(model.graph)
    with _quiet_tools():
        if precision == "int8":
            _by_blocks(model.graph)
        else:
            model = _dynamic(model)
    _drop_unused(model.graph)
    return model


@contextmanager
def _quiet_tools() -> Iterator[None]:
    """Silence the tools, which set up logging for the whole process on import and log every node."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        root.handlers[:], root.level = handlers, level


def _weights(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def _transpose_heads(graph: onnx.GraphProto) -> None:
    """Replace a head's transposed matrix by a constant [width, vocab_size], which the tools can quantise."""
    weights = _weights(graph)
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        value = numpy_helper.to_array(weights[node.input[0]])
        name = f"{node.input[0]}.T"
        if name not in weights:
            weights[name] = numpy_helper.from_array(np.ascontiguousarray(value.T), name)
            graph.initializer.append(weights[name])
        for reader in graph.node:
            for i, read in enumerate(reader.input):
                if read == node.output[0]:
                    reader.input[i] = name
        graph.node.remove(node)


def _by_blocks(graph: onnx.GraphProto) -> None:
    """``int8``: products as MatMulNBits, embeddings as GatherBlockQuantized of the same layout."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    def product(node: onnx.NodeProto, inputs: int) -> onnx.NodeProto:
        config = DefaultWeightOnlyQuantConfig(
            block_size=block_size(inputs),
            is_symmetric=True,
            accuracy_level=4,  # sums in integers; fp32 sums take ten times as long
            bits=8,
        )
        made: onnx.NodeProto = DefaultWeightOnlyQuantizer(config).quantize(node, [graph])[0]
        return made

    done: list[onnx.NodeProto] = []
    heads: dict[str, onnx.NodeProto] = {}  # quantised products by the name of their weight
    for node in graph.node:
        weight = _weights(graph).get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.dims[0] % MIN_BLOCK_INPUTS:
            done.append(node)
            continue
        if weight.name not in heads:
            heads[weight.name] = product(node, weight.dims[0])
        else:  # the tool would write the weight again
            again = onnx.NodeProto()
            again.CopyFrom(heads[weight.name])
            again.input[0], again.output[0] = node.input[0], node.output[0]
            done.append(again)
            continue
        done.append(heads[weight.name])
    found: list[onnx.NodeProto] = []
    for node in done:
        table = _weights(graph).get(node.input[0]) if node.op_type == "Gather" else None
        if table is None:
            found.append(node)
            continue
        tied = heads.get(f"{table.name}.T")
        if tied is None:
            name = f"{table.name}.T"
            value = np.ascontiguousarray(numpy_helper.to_array(table).T)
            graph.initializer.append(numpy_helper.from_array(value, name))
            tied = product(helper.make_node("MatMul", ["", name], [""]), table.dims[1])
        found += _rows(graph, node, table, tied)
    del graph.node[:]
    graph.node.extend(found)


def _rows(
    graph: onnx.GraphProto, node: onnx.NodeProto, table: onnx.TensorProto, product: onnx.NodeProto
) -> list[onnx.NodeProto]:
    """The nodes that read rows of an embedding [V, K] quantised as a product's weight."""
    (count, inputs), block = table.dims, block_size(table.dims[1])
    shapes = {"rows": [count, inputs], "scales": [count, inputs // block]}
    names = {part: f"{table.name}.{part}" for part in shapes}
    for part, shape in shapes.items():
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), f"{names[part]}.shape"))
    flat = [
        helper.make_node("Reshape", [source, f"{names[part]}.shape"], [names[part]])
        for part, source in zip(shapes, product.input[1:3], strict=True)
    ]
    gather = helper.make_node(
        "GatherBlockQuantized",
        [names["rows"], node.input[1], names["scales"]],
        list(node.output),
        domain=CONTRIB,
        bits=8,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    return [*flat, gather]


def _dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    """``int8-dynamic``: products of integers, each tensor of activations by its own range."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options: dict[str, Any] = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # of contrib operators' outputs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options=options,
        )
        return onnx.load_model(path)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove the constants that no node reads."""
    read = _read(graph)
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _read(graph: onnx.GraphProto) -> set[str]:
    """The names of the values that the nodes of a graph and of its branches read."""
    found = {name for node in graph.node for name in node.input}
    return found.union(
        *(_read(part.g) for node in graph.node for part in node.attribute if part.HasField("g"))
    )
