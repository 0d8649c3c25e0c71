"""The blocks that are fitted at each slot, and the parent's own."""

from dataclasses import dataclass, replace

from space import Architecture, Layer, ModelConfig, Space
from supernet.blockwise.block import Block
from supernet.supernet import block_choices, block_name


@dataclass(frozen=True)
class Candidate:
    """One choice of a slot.

    Attributes:
        slot: the slot.
        layer: a layer with either a mixer or an FFN.
        is_parents: whether the parent's block at the slot is the same choice, so that it is copied.
    """

    slot: int
    layer: Layer
    is_parents: bool

    @property
    def name(self) -> str:
        """Name of the choice, such as ``sliding-h9-k3-w256`` or ``ffn-768``."""
        return block_name(self.layer)

    @property
    def is_ffn(self) -> bool:
        """True for an FFN size."""
        return self.layer.mixer == "none"

    def block(self, width: int, model_config: ModelConfig) -> Block:
        """The block as a function.

        Args:
            width: of the residual stream.
            model_config: the constants of the space.
        """
        return Block(self.layer, width, model_config)


def halves(layer: Layer) -> tuple[Layer, Layer]:
    """A layer's mixer and its FFN, as layers with only one of them.

    Args:
        layer: the layer.
    """
    return replace(layer, ffn=0), Layer(ffn=layer.ffn)


def candidates(space: Space, parent: Architecture, slot: int) -> list[Candidate]:
    """The choices of a slot, mixers first.

    Args:
        space: the space.
        parent: the parent's architecture.
        slot: the slot.
    """
    own = halves(parent.layers[slot])
    return [Candidate(slot, layer, layer in own) for layer in block_choices(space, slot)]
