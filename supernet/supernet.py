"""The supernet: one set of weights, of which every architecture of a space is a prefix.

Each parameter has its greatest size. An architecture's weights are views of leading rows and columns (rows
keep their unit stride, so nothing is copied), and run through the same functions as a plain model's. The
architecture is an argument of every call, never a state, so that calls are pure.

With ``sharing: block`` nothing is shared but embedding, final norm and head: every choice of a slot has its
own block (:func:`block_name`), and an architecture's weights are whole parameters.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from space import Architecture, Layer, Space
from space.architecture import has_heads
from space.blocks import State, add_parameter, forward, initial
from space.shapes import (
    SHARED,
    Shapes,
    end_shapes,
    ffn_shapes,
    layer_shapes,
    mixer_shapes,
    model_shapes,
    parameter_mixer,
)

Sources = Mapping[str, tuple[str, tuple[int, ...]]]
"""For each parameter of a sub-model, the supernet's parameter that it is a prefix of, and its shape."""


def supernet_shapes(space: Space) -> Shapes:
    """The shape of every parameter of the supernet.

    Names are ``layers.SLOT.MIXER.NAME``, ``layers.SLOT.shared.NAME`` for the projections that a layer's
    mixers share, ``layers.SLOT.ffn.NAME``, and those of embedding, final norm and head; with ``sharing:
    block``, ``layers.SLOT.BLOCK.NAME``.

    Args:
        space: the supernet's space.
    """
    width, model_config = max(space.width), space.config
    if space.sharing == "block":
        return end_shapes(width, model_config) | {
            f"layers.{slot}.{block_name(layer)}.{name.split('.')[1]}": shape
            for slot in range(space.slots)
            for layer in block_choices(space, slot)
            for name, shape in layer_shapes(layer, width, model_config).items()
        }
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


def block_choices(space: Space, slot: int) -> list[Layer]:
    """The blocks that a slot can have: each mixer with its heads and window, then each FFN size.

    Args:
        space: the space.
        slot: a slot of it.

    Returns:
        Layers with either a mixer or an FFN.
    """
    mixers = [
        Layer(mixer=mixer, heads=heads, kv_heads=kv_heads, window=window)
        for mixer, window in space.mixer_options[1:]
        if slot not in space.hybrid.full_layers or space.mixer_class(mixer) == "full"
        for heads, kv_heads in (space.head_options if has_heads(mixer) else ((0, 0),))
    ]
    return mixers + [Layer(ffn=size) for size in space.ffn_options if size]


def block_name(layer: Layer) -> str:
    """The name of a private block, such as ``sliding-h9-k3-w256`` or ``ffn-768``.

    Args:
        layer: a layer with either a mixer or an FFN.
    """
    if layer.mixer == "none":
        return f"ffn-{layer.ffn}"
    heads = f"-h{layer.heads}-k{layer.kv_heads}" if layer.heads else ""
    return f"{layer.mixer}{heads}" + (f"-w{layer.window}" if layer.window else "")


def _owner(space: Space, mixer: str, name: str) -> str:
    return "shared" if space.sharing == "qkvo" and name in SHARED else mixer


def sources(space: Space, architecture: Architecture) -> Sources:
    """The supernet's parameter and the shape of its prefix, for each parameter of a sub-model.

    Args:
        space: the supernet's space.
        architecture: an architecture of the space.
    """
    table = {}
    for name, shape in model_shapes(architecture, space.config).items():
        source = name
        if name.startswith("layers."):
            _, slot, part, leaf = name.split(".")
            layer = architecture.layers[int(slot)]
            if space.sharing == "block":
                layer = Layer(ffn=layer.ffn) if part == "ffn" else replace(layer, ffn=0)
                part = block_name(layer)
            elif part == "mixer":
                part = _owner(space, layer.mixer, leaf)
            source = f"layers.{slot}.{part}.{leaf}"
        table[name] = (source, shape)
    return table


def prefix(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view of a tensor's leading rows and columns.

    Args:
        tensor: the tensor.
        shape: the view's shape.
    """
    return tensor[tuple(slice(size) for size in shape)]


def leaves(parameters: Mapping[str, Tensor], table: Sources) -> dict[str, Tensor]:
    """An architecture's weights as views that are autograd leaves.

    Autograd then allocates gradients of the views' sizes, not of the supernet's; :func:`add_gradients` adds
    them to the supernet's.

    Args:
        parameters: the supernet's parameters by name.
        table: the architecture's :func:`sources`.
    """
    return {
        name: prefix(parameters[source], shape).detach().requires_grad_()
        for name, (source, shape) in table.items()
    }


def add_gradients(views: Mapping[str, Tensor], table: Sources, totals: Mapping[str, Tensor]) -> None:
    """Add an architecture's gradients to the supernet's, in place.

    Args:
        views: the architecture's :func:`leaves`, after the backward pass.
        table: its :func:`sources`.
        totals: gradients of the supernet's parameters by name.

    Raises:
        RuntimeError: a parameter has no gradient.
    """
    for name, (source, shape) in table.items():
        gradient = views[name].grad
        if gradient is None:
            raise RuntimeError(f"parameter {name} got no gradient")
        prefix(totals[source], shape).add_(gradient)


class Supernet(nn.Module):
    """One set of weights that contains every architecture of a space.

    Args:
        space: the space.
        generator: source of the initial weights; None is a generator with seed 0.
        values: the weights by name, used as they are instead of initial ones; a large supernet is then in
            memory once.

    Raises:
        ValueError: ``values`` has other names or shapes than :func:`supernet_shapes`.
    """

    def __init__(
        self,
        space: Space,
        generator: torch.Generator | None = None,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.space = space
        if values is not None:
            shapes = supernet_shapes(space)
            found = {name: tuple(value.shape) for name, value in values.items()}
            wrong = [n for n in shapes.keys() | found.keys() if found.get(n) != shapes.get(n)]
            if wrong:
                first = min(wrong)
                raise ValueError(
                    f"weights of another space: {first} is {found.get(first)}, expected {shapes.get(first)} "
                    f"({len(wrong)} differ)"
                )
            for name in shapes:
                add_parameter(self, name, values[name])
            return
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
            architecture: an architecture of the space.
            parameters: parameters to slice instead of the supernet's own, such as bf16 copies.
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
        """Run a sub-network.

        Args:
            tokens: token ids [B, T].
            architecture: an architecture of the space.
            position: number of tokens before ``tokens``.
            states: states after those tokens, by slot; None at position 0.

        Returns:
            Logits [B, T, V] and the states after the last token.
        """
        weights = self.weights(architecture)
        return forward(weights, architecture, self.space.config, tokens, position=position, states=states)
