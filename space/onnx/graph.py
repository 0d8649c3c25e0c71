"""A writer of ONNX graphs, node by node, and the pieces that several blocks use."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from space.layer import ModelConfig

Arrays = Mapping[str, NDArray[Any]]
Branch = Callable[["Graph"], tuple[str, ...]]
Step = Callable[["Graph", Sequence[str], Sequence[str]], tuple[Sequence[str], Sequence[str]]]
OPSET = 21
VERSION = 3  # of the graphs: timings of graphs of different versions are not comparable
CONTRIB = "com.microsoft"


def _is_same(first: NDArray[Any], second: NDArray[Any]) -> bool:
    """True for arrays of the same type, shape and bytes."""
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def _rename(nodes: Iterable[onnx.NodeProto], value: str, name: str) -> None:
    """Rename a value in nodes and in their sub-graphs."""
    for node in nodes:
        for names in (node.input, node.output):
            for i, known in enumerate(names):
                if known == value:
                    names[i] = name
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g.node, value, name)
                for item in attribute.g.output:
                    if item.name == value:
                        item.name = name


@dataclass
class Graph:
    """An ONNX graph being written; a value is referred to by its name.

    Attributes:
        model_config: settings of the space.
        nodes: in the order in which they run.
        constants: by name.
        inputs: of the graph.
        outputs: of the graph.
        shared: by key, values that :meth:`once` made.
        residuals: by value, sums that no norm was merged into yet.
        count: number of values made, which their names come from.
    """

    model_config: ModelConfig
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    residuals: dict[str, onnx.NodeProto] = field(default_factory=dict)
    count: int = 0

    def add(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append a node.

        Args:
            kind: the operator.
            inputs: names of values; empty for an optional one. Empty ones at the end are not written, since
                an older version of the operator may not know them.
            outputs: number of outputs.
            domain: of the operator.
            attributes: of the node.

        Returns:
            The name of the output, or a tuple of names.

        Raises:
            ValueError: an input is not a name.
        """
        for value in inputs:
            if not isinstance(value, str):
                raise ValueError(f"{kind}: an input is not the name of a value: {value!r}")
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        self.count += 1
        names = [f"v{self.count}" if outputs == 1 else f"v{self.count}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """A constant, added unless there is one of that name.

        Args:
            name: unique in the graph; the same name with the same value is one constant.
            value: of the constant.

        Raises:
            ValueError: another value has the name.
        """
        value = np.asarray(value, order="C")
        known = self.constants.get(name)
        if known is None:
            self.constants[name] = numpy_helper.from_array(value, name)
        elif not _is_same(numpy_helper.to_array(known), value):
            raise ValueError(
                f"constant {name!r} has another value already; a mixer names its own by Block.constant"
            )
        return name

    def literal(self, value: NDArray[Any]) -> str:
        """A constant of a branch alone: some nodes are only optimised if their constants are inside.

        Args:
            value: of the constant.
        """
        return str(self.add("Constant", value=numpy_helper.from_array(np.asarray(value, order="C"))))

    def once(self, name: str, make: Any) -> str:
        """A value that is made once and shared.

        Args:
            name: key of the value.
            make: appends its nodes and returns its name; called the first time only.
        """
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    def branch(self, condition: str, then: Branch, otherwise: Branch) -> tuple[str, ...]:
        """The values of one of two branches, chosen while the graph runs.

        Args:
            condition: name of a boolean.
            then: appends the nodes for True to the graph that it is given, and returns the names of its
                values; they may read all values outside.
            otherwise: the same for False.

        Returns:
            The names of the values, a tuple also for one.
        """
        parts, count = {}, 0
        for name, write in (("then_branch", then), ("else_branch", otherwise)):
            inner = Graph(self.model_config, constants=self.constants, count=self.count)
            values = write(inner)
            if isinstance(values, str):
                raise ValueError(f"{name}: a branch returns a tuple of names, not {values!r}")
            self.count, count = inner.count, len(values)
            outputs = [helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, None) for v in values]
            parts[name] = helper.make_graph(inner.nodes, name, [], outputs)
        made: str | tuple[str, ...] = self.add("If", condition, outputs=count, **parts)
        return (made,) if isinstance(made, str) else made

    def scan(self, states: Sequence[str], inputs: Sequence[str], step: Step) -> tuple[str, ...]:
        """A recurrence over the tokens, as an ONNX Scan node.

        Args:
            states: fp32 values before the first token.
            inputs: fp32 values [B, T, ...].
            step: ``(graph, states, inputs of one token [B, ...])`` -> (the states after it, its outputs):
                appends the nodes of a token to the graph that it is given. It returns values of these nodes.

        Returns:
            The states after the last token, then the outputs [B, T, ...].
        """
        inner = Graph(self.model_config, constants=self.constants, count=self.count)
        names = [f"scan{self.count}.{i}" for i in range(len(states) + len(inputs))]
        after, outputs = step(inner, names[: len(states)], names[len(states) :])
        self.count = inner.count
        read, made = (
            [helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None) for value in values]
            for values in (names, [*after, *outputs])
        )
        body = helper.make_graph(inner.nodes, "step", read, made)
        axes: dict[str, Any] = {"scan_input_axes": [1] * len(inputs), "scan_output_axes": [1] * len(outputs)}
        result = self.add(
            "Scan", *states, *inputs, outputs=len(made), body=body, num_scan_inputs=len(inputs), **axes
        )
        return (result,) if isinstance(result, str) else tuple(result)

    def input(self, name: str, kind: int, shape: list[int | str]) -> str:
        """Declare a graph input.

        Args:
            name: of the input, which is returned.
            kind: element type, of ``onnx.TensorProto``.
            shape: sizes, or names of dynamic dimensions.
        """
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(
        self, name: str, value: str, kind: int, shape: list[int | str], *, first: bool = False
    ) -> None:
        """Declare a graph output: the value takes the output's name, as an Identity node would copy it.

        Args:
            name: of the output.
            value: name of the value.
            kind: element type, of ``onnx.TensorProto``.
            shape: sizes, or names of dynamic dimensions.
            first: put it before the outputs declared so far, not after them.
        """
        _rename(self.nodes, value, name)
        place = 0 if first else len(self.outputs)
        self.outputs.insert(place, helper.make_tensor_value_info(name, kind, shape))

    def model(self, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
        """The finished model.

        Args:
            metadata: properties to store in it.
        """
        graph = helper.make_graph(
            self.nodes, "formfit", self.inputs, self.outputs, initializer=list(self.constants.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="formfit", ir_version=10)
        helper.set_model_props(model, dict(metadata or {}))
        return model

    # Pieces that several blocks use.

    def norm(self, x: str, gain: str, weight: NDArray[Any]) -> str:
        """The model's RMSNorm over the last dimension; that of a residual sum becomes one node with the sum.

        Args:
            x: the value.
            gain: name of the gain.
            weight: the gain.
        """
        eps = self.model_config.norm_eps
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
        """``x + change``; a norm of the sum becomes part of this node.

        Args:
            x: [B, T, width].
            change: [B, T, width].
        """
        total = str(self.add("Add", x, change))
        self.residuals[total] = self.nodes[-1]
        return total

    def product(self, x: str, name: str, weight: NDArray[Any]) -> str:
        """``x W^T``.

        Args:
            x: [..., in].
            name: of the constant.
            weight: W [out, in].
        """
        return str(self.add("MatMul", x, self.constant(name, weight.T.astype(np.float32))))

    def split(self, x: str, sizes: list[int]) -> tuple[str, ...]:
        """Split the last dimension.

        Args:
            x: the value.
            sizes: of the pieces.
        """
        sizes_name = self.constant("split." + "-".join(map(str, sizes)), np.array(sizes, np.int64))
        return tuple(self.add("Split", x, sizes_name, outputs=len(sizes), axis=-1))

    def reshape(self, x: str, shape: list[int]) -> str:
        """Reshape.

        Args:
            x: the value.
            shape: the new one; 0 keeps a dimension, -1 is inferred.
        """
        name = self.constant("shape." + ",".join(map(str, shape)), np.array(shape, np.int64))
        return str(self.add("Reshape", x, name))

    def silu(self, x: str) -> str:
        """``x sigmoid(x)``."""
        return str(self.add("Mul", x, self.add("Sigmoid", x)))

    def rotary(self) -> tuple[str, str]:
        """The caches of cosines and sines, [max_seq_len, D/2], which the runtime computes when it loads.

        In the file they would be most of a small model with a long context.
        """
        return self.once("rope.Cos", lambda: self._turns("Cos")), self.once(
            "rope.Sin", lambda: self._turns("Sin")
        )

    def _turns(self, kind: str) -> str:
        def angles() -> str:
            """Reduced to one turn in float64 first: older runtimes have cosines of float32 only."""
            d = self.model_config.head_dim
            ends = (("zero", 0), ("context", self.model_config.max_seq_len), ("one", 1))
            places = self.add("Range", *(self.scalar(f"rope.{name}", x, np.float64) for name, x in ends))
            rates = self.constant("rope.rates", np.array(self.model_config.rope.frequencies(d)))
            whole = self.add("Mul", self.reshape(places, [-1, 1]), rates)
            part = self.add("Mod", whole, self.scalar("rope.turn", 2 * np.pi, np.float64), fmod=1)
            return str(self.add("Cast", part, to=onnx.TensorProto.FLOAT))

        return str(self.add(kind, self.once("rope.angles", angles)))

    def rotate(self, x: str, heads: int, position: str) -> str:
        """Rotary embedding.

        Args:
            x: [B, T, H*D].
            heads: H.
            position: place of the first token [1], or of all tokens [B, T].
        """
        cos, sin = self.rotary()
        return str(self.add("RotaryEmbedding", x, position, cos, sin, domain=CONTRIB, num_heads=heads))

    def scalar(self, name: str, value: Any, kind: Any = np.float32) -> str:
        """A scalar constant.

        Args:
            name: of the constant.
            value: of the constant.
            kind: element type, of numpy.
        """
        return self.constant(name, np.array(value, kind))

    def size(self, x: str, axis: int) -> str:
        """A dimension of a value, int64 [1].

        Args:
            x: the value.
            axis: of the dimension.
        """
        return self.once(f"{x}[{axis}]", lambda: self.add("Shape", x, start=axis, end=axis + 1))
