"""An ONNX graph being written node by node, and the pieces that several blocks use."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from space.layer import NORM_EPS, ROPE_BASE, ModelConfig

Arrays = Mapping[str, NDArray[Any]]
Branch = Callable[["Graph"], tuple[str, ...]]
OPSET = 21
VERSION = 2  # of what graphs execute: timings of another version are timings of something else
CONTRIB = "com.microsoft"


@dataclass
class Graph:
    """An ONNX graph being written; values are known by their names."""

    model_config: ModelConfig
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    residuals: dict[str, onnx.NodeProto] = field(default_factory=dict)  # sums that no norm took yet, by value
    count: int = 0

    def add(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append a node; returns the name of its output, or a tuple of names.

        Inputs left out at the end are not written: an older operator may not know of them.
        """
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        self.count += 1
        names = [f"v{self.count}" if outputs == 1 else f"v{self.count}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """A constant by name; one that is there already is used again."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def once(self, name: str, make: Any) -> str:
        """The value that ``make()`` appended the first time it was asked for under this name."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    def branch(self, condition: str, then: Branch, otherwise: Branch) -> tuple[str, ...]:
        """The values that one of two branches gives: both append nodes that may read all that is there."""
        parts, count = {}, 0
        for name, write in (("then_branch", then), ("else_branch", otherwise)):
            inner = Graph(self.model_config, constants=self.constants, count=self.count)
            found = write(inner)
            self.count, count = inner.count, len(found)
            outputs = [helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, None) for v in found]
            parts[name] = helper.make_graph(inner.nodes, name, [], outputs)
        made: tuple[str, ...] = self.add("If", condition, outputs=count, **parts)
        return made

    def input(self, name: str, kind: int, shape: list[int | str]) -> str:
        """Declare a graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(
        self, name: str, value: str, kind: int, shape: list[int | str], *, first: bool = False
    ) -> None:
        """Declare a graph output: the value takes the output's name (an Identity node would copy it).

        Outputs stand in the order in which they are declared; ``first`` puts one before those that are there.
        """
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, known in enumerate(names):
                    if known == value:
                        names[i] = name
        place = 0 if first else len(self.outputs)
        self.outputs.insert(place, helper.make_tensor_value_info(name, kind, shape))

    def model(self, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self.nodes, "formfit", self.inputs, self.outputs, initializer=list(self.constants.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="formfit", ir_version=10)
        helper.set_model_props(model, dict(metadata or {}))
        return model

    # Pieces that several blocks use.

    def norm(self, x: str, gain: str, weight: NDArray[Any], eps: float = NORM_EPS) -> str:
        """RMSNorm over the last dimension; of a residual sum, together with the sum: a node less."""
        gain = self.constant(gain, weight.astype(np.float32))
        node = self.residuals.pop(x, None)
        if node is None:
            return str(self.add("SimplifiedLayerNormalization", x, gain, axis=-1, epsilon=eps, stash_type=1))
        self.count += 1
        normed = f"v{self.count}"
        node.op_type, node.domain = "SkipSimplifiedLayerNormalization", CONTRIB
        node.input.append(gain)
        node.output[:] = [normed, "", "", x]
        node.attribute.append(helper.make_attribute("epsilon", eps))
        return normed

    def residual(self, x: str, change: str) -> str:
        """``x + change``, both [B, T, width]; a norm of it becomes part of this node."""
        total = str(self.add("Add", x, change))
        self.residuals[total] = self.nodes[-1]
        return total

    def product(self, x: str, name: str, weight: NDArray[Any]) -> str:
        """``x W^T`` for W [out, in]."""
        return str(self.add("MatMul", x, self.constant(name, weight.T.astype(np.float32))))

    def split(self, x: str, sizes: list[int]) -> tuple[str, ...]:
        """Cut the last dimension into pieces of the given sizes."""
        sizes_name = self.constant("split." + "-".join(map(str, sizes)), np.array(sizes, np.int64))
        return tuple(self.add("Split", x, sizes_name, outputs=len(sizes), axis=-1))

    def reshape(self, x: str, shape: list[int]) -> str:
        """Reshape; 0 keeps a dimension."""
        name = self.constant("shape." + ",".join(map(str, shape)), np.array(shape, np.int64))
        return str(self.add("Reshape", x, name))

    def silu(self, x: str) -> str:
        """``x sigmoid(x)``."""
        return str(self.add("Mul", x, self.add("Sigmoid", x)))

    def rotary(self) -> tuple[str, str]:
        """The caches of cosines and sines, [context, D/2], which the runtime works out once, as it loads.

        In the file they would be most of a small model of a long context.
        """
        return self.once("rope.Cos", lambda: self._turns("Cos")), self.once(
            "rope.Sin", lambda: self._turns("Sin")
        )

    def _turns(self, kind: str) -> str:
        def angles() -> str:
            """Within one turn, in float64 until then: older runtimes have a cosine of float32 alone."""
            d = self.model_config.head_dim
            ends = (("zero", 0), ("max_seq_len", self.model_config.max_seq_len), ("one", 1))
            places = self.add("Range", *(self.scalar(f"rope.{name}", x, np.float64) for name, x in ends))
            rates = self.constant("rope.rates", ROPE_BASE ** (-np.arange(0, d, 2) / d))
            whole = self.add("Mul", self.reshape(places, [-1, 1]), rates)
            part = self.add("Mod", whole, self.scalar("rope.turn", 2 * np.pi, np.float64), fmod=1)
            return str(self.add("Cast", part, to=onnx.TensorProto.FLOAT))

        return str(self.add(kind, self.once("rope.angles", angles)))

    def rotate(self, x: str, heads: int, position: str) -> str:
        """Rotary embedding of [B, T, H*D] from a first position [1] or positions [B, T]."""
        cos, sin = self.rotary()
        return str(self.add("RotaryEmbedding", x, position, cos, sin, domain=CONTRIB, num_heads=heads))

    def scalar(self, name: str, value: Any, kind: Any = np.float32) -> str:
        """A scalar constant."""
        return self.constant(name, np.array(value, kind))

    def size(self, x: str, axis: int) -> str:
        """A dimension of a value, int64 [1]."""
        return self.once(f"{x}[{axis}]", lambda: self.add("Shape", x, start=axis, end=axis + 1))
