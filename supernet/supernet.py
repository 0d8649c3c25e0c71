"""The supernet: one set of weights in which every architecture of a space is a prefix.

Each parameter is kept at its greatest size. An architecture's weights are views of leading
rows and columns (rows keep their unit stride, so nothing is copied), and they run through
the same functions as a plain model's. The architecture is an argument of every call and
never a state, so that calls are pure.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from space import Architecture, Space
from space.blocks import State, add_parameter, forward, initial
from space.shapes import (
    SHARED,
    Shapes,
    end_shapes,
    ffn_shapes,
    mixer_shapes,
    model_shapes,
    parameter_mixer,
)

Sources = Mapping[str, tuple[str, tuple[int, ...]]]  # sub-model's name -> supernet's name, shape


def supernet_shapes(space: Space) -> Shapes:
    """Every parameter of the supernet at its greatest size.

    Names are ``layers.SLOT.MIXER.NAME``, ``layers.SLOT.shared.NAME`` for the projections that
    a layer's mixers share, ``layers.SLOT.ffn.NAME``, and the ends.
    """
    width, model_config = max(space.width), space.config
    heads = max(h for h, _ in space.head_options)
    kv_heads = max(k for _, k in space.head_options)
    shapes = end_shapes(width, model_config)
    for slot in range(space.slots):
        for mixer in sorted({m for m, _ in space.mixer_options[1:]}):
            for name, shape in mixer_shapes(mixer, width, heads, kv_heads, model_config).items():
                shapes[f"layers.{slot}.{_owner(space, mixer, name)}.{name}"] = shape
        if max(space.ffn_options):
            for name, shape in ffn_shapes(width, max(space.ffn_options)).items():
                shapes[f"layers.{slot}.ffn.{name}"] = shape
    return shapes


def _owner(space: Space, mixer: str, name: str) -> str:
    return "shared" if space.sharing == "qkvo" and name in SHARED else mixer


def sources(space: Space, architecture: Architecture) -> Sources:
    """For each parameter of a sub-model: the supernet's parameter it is a prefix of, and its shape."""
    table = {}
    for name, shape in model_shapes(architecture, space.config).items():
        source = name
        if ".mixer." in name:
            slot, leaf = int(name.split(".")[1]), name.rsplit(".", 1)[1]
            mixer = architecture.layers[slot].mixer
            source = f"layers.{slot}.{_owner(space, mixer, leaf)}.{leaf}"
        table[name] = (source, shape)
    return table


def prefix(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The view of a tensor's leading rows and columns."""
    return tensor[tuple(slice(size) for size in shape)]


def leaves(parameters: Mapping[str, Tensor], table: Sources) -> dict[str, Tensor]:
    """A member's weights as views that are leaves of their own.

    So autograd never builds a gradient of the supernet's full size for each of them; what it
    builds, :func:`add_gradients` adds into prefixes.
    """
    return {
        name: prefix(parameters[source], shape).detach().requires_grad_()
        for name, (source, shape) in table.items()
    }


def add_gradients(found: Mapping[str, Tensor], table: Sources, totals: Mapping[str, Tensor]) -> None:
    """Add the gradients of a member's leaves into the prefixes of those of the whole."""
    for name, (source, shape) in table.items():
        gradient = found[name].grad
        if gradient is None:
            raise RuntimeError(f"parameter {name} got no gradient")
        prefix(totals[source], shape).add_(gradient)


class Supernet(nn.Module):
    """One set of weights that holds every architecture of a space."""

    def __init__(self, space: Space, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.space = space
        generator = generator or torch.Generator().manual_seed(0)
        for name, shape in supernet_shapes(space).items():
            owner = parameter_mixer(name)
            value = initial(name, shape, generator, mixer=owner, tie_embeddings=space.tie_embeddings)
            add_parameter(self, name, value)

    def weights(
        self, architecture: Architecture, parameters: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """An architecture's weights as views, named as in its sub-model.

        Args:
            architecture: a member of the space.
            parameters: where to slice from instead of the supernet's own (the training's bf16 copies, say).
        """
        full = dict(self.named_parameters()) if parameters is None else parameters
        return {
            name: prefix(full[source], shape)
            for name, (source, shape) in sources(self.space, architecture).items()
        }

    def forward(
        self,
        tokens: Tensor,
        architecture: Architecture,
        position: int = 0,
        states: Mapping[int, State] | None = None,
    ) -> tuple[Tensor, dict[int, State]]:
        """Run a sub-network: tokens [B, T] -> (logits [B, T, vocabulary], states)."""
        weights = self.weights(architecture)
        return forward(weights, architecture, self.space.config, tokens, position=position, states=states)
