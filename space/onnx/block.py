"""A mixer block that is being written to a graph, as a mixer's ONNX writer gets it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from space.layer import Layer
from space.onnx.graph import Arrays, Graph

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A mixer block between its pre-norm and its output matrix.

    Attributes:
        graph: the graph that nodes are appended to.
        layer: the layer, with heads and window.
        weights: every parameter of the block by name.
        state: name of the graph's input by state.
        place: prefix of the names of the block's constants.
        source: a value [B, T, ...] whose first two dimensions are batch and length; ``graph.size(source, 1)``
            is the number of tokens. It is an input of the graph, so that all layers share these nodes.
        hidden: the normed input [B, T, width].
        projections: the matrices that read it, in the order in which they are packed.
    """

    graph: Graph
    layer: Layer
    weights: Arrays
    state: Mapping[str, str]
    place: str
    source: str
    hidden: str
    projections: tuple[str, ...]

    def constant(self, name: str, value: Array) -> str:
        """A constant of this block, in fp32.

        Args:
            name: unique in the block.
            value: the constant.
        """
        return self.graph.constant(self.place + name, value.astype(np.float32))

    def product(self, x: str, name: str, weight: Array) -> str:
        """``x W^T``.

        Args:
            x: [..., in].
            name: of the constant, unique in the block.
            weight: W [out, in].
        """
        return self.graph.product(x, self.place + name, weight)

    @property
    def sizes(self) -> dict[str, int]:
        """The outputs of each projection, in order."""
        return {name: len(self.weights[name]) for name in self.projections}

    def packed(self, **replaced: Array) -> str:
        """The products of the input with all projections as one product, [B, T, sum of sizes].

        Args:
            replaced: by projection, another matrix [out, in] in its place, with a constant folded in.
        """
        matrices = [replaced.get(name, self.weights[name]) for name in self.projections]
        return self.product(self.hidden, "in", np.concatenate(matrices))
