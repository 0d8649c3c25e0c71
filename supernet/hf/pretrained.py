"""Pretrained start: copies a parent's weights into the supernet, arranged for its sub-networks.

Three steps, none of which changes the function of ``largest()``:

- *Order.* Residual channels, heads and FFN channels are sorted by importance (:mod:`supernet.hf.importance`),
  since sub-networks are prefixes.
- *Inheritance.* Every mixer takes the parent's q, k, v, o and pre-norm, as far as it has them.
- *Alignment.* The parameters that a mixer does not share with attention are fitted, layer by layer, so that
  its residual contribution approximates the attention's on the parent's own hidden states.

Footgun: if the space varies the number of query heads per kv head, a sub-network of another group size pairs
heads differently, which no order of the parent's heads can prevent.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from space import Architecture, InputError, Layer, Space, genome
from space.architecture import has_heads
from space.blocks import ffn, mixer_block, part
from space.shapes import ffn_shapes
from supernet.hf.importance import BATCH_WINDOWS, Weights, measure_importance, mixer_part, reorder
from supernet.parent import Parent, read_parent
from supernet.supernet import Supernet, prefix, sources

VECTOR_RATE_FACTOR = 5.0  # gains start at 1 and move far for a mixer with large outputs; matrices do not


@dataclass(frozen=True)
class Alignment:
    """Relative error of a mixer's residual contribution, |difference|^2 / |attention's contribution|^2.

    Attributes:
        slot: the layer's slot.
        mixer: the mixer's name.
        before: error before the fit.
        after: error after the fit.
    """

    slot: int
    mixer: str
    before: float
    after: float

    def to_json(self) -> dict[str, int | str | float]:
        """The attributes as a JSON object."""
        return asdict(self)


def load_pretrained(
    supernet: Supernet,
    folder: Path,
    windows: Tensor,
    *,
    order: bool = True,
    steps: int = 40,
    rate: float = 1e-2,
) -> list[Alignment]:
    """Overwrite a supernet's weights with those of a parent; deterministic.

    Args:
        supernet: a supernet whose space's ``largest()`` is the parent's architecture; changed in place.
        folder: the parent, as for :func:`supernet.parent.read_parent`.
        windows: training text as token ids [N, T], N and T at least 2; the first three quarters of the
            windows are for fitting, the last quarter measures the errors.
        order: whether to sort by importance.
        steps: Adam steps per slot and mixer; 0 keeps the parameters that attention does not have.
        rate: initial learning rate of these steps; it falls linearly to 0.

    Returns:
        The error of each slot and mixer before and after the fit.

    Raises:
        InputError: the parent has another architecture, or a token is outside the vocabulary.
    """
    space = supernet.space
    parent = read_parent(folder)
    _require_largest(parent, space)
    architecture, weights = parent.architecture, parent.weights
    if windows.min() < 0 or windows.max() >= space.vocab_size:
        raise InputError(
            f"train.init: the text holds tokens {int(windows.min())} to {int(windows.max())}, "
            f"space {space.name} has 0 to {space.vocab_size - 1}"
        )
    device = next(supernet.parameters()).device
    windows = windows.to(device)
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    if order:
        importance = measure_importance(weights, architecture, space.config, windows)
        weights = reorder(weights, architecture, space.config, importance)
    inherit(supernet, architecture, weights)
    return align(supernet, architecture, windows, steps, rate)


def _require_largest(parent: Parent, space: Space) -> None:
    """Raise an InputError unless the parent is a space's largest architecture; the context may be shorter."""
    largest = genome.largest(space)
    theirs, ours = (
        {**vars(config), "width": architecture.width, "layers": architecture.describe().partition(": ")[2]}
        for architecture, config in (
            (parent.architecture, parent.model_config),
            (largest, space.config),
        )
    )
    wrong = [
        f"{name} {theirs[name]} (space: {value})"
        for name, value in ours.items()
        if value != theirs[name] and not (name == "max_seq_len" and value < theirs[name])
    ]
    if wrong:
        raise InputError(
            f"{parent.folder}: not the largest architecture of space {space.name}: it has {', '.join(wrong)}"
        )


@torch.no_grad()
def inherit(supernet: Supernet, architecture: Architecture, weights: Weights) -> None:
    """Copy a model's weights into the supernet: embedding, head, norms, FFNs, and into every mixer by name.

    Args:
        supernet: the supernet, changed in place.
        architecture: the model's architecture.
        weights: the model's weights.
    """
    parameters = dict(supernet.named_parameters())
    for layer in _mixers(supernet, architecture):
        uniform = Architecture(architecture.width, (layer,) * len(architecture.layers))
        for name, (source, shape) in sources(supernet.space, uniform).items():
            if name in weights and weights[name].shape == shape:
                prefix(parameters[source], shape).copy_(weights[name])


def _mixers(supernet: Supernet, architecture: Architecture) -> Iterator[Layer]:
    """The largest layer of each mixer of the space, with its widest window."""
    first = architecture.layers[0]
    for name, window in dict(supernet.space.mixer_options[1:]).items():
        heads, kv_heads = (first.heads, first.kv_heads) if has_heads(name) else (0, 0)
        yield Layer(mixer=name, heads=heads, kv_heads=kv_heads, window=window, ffn=first.ffn)


def align(
    supernet: Supernet, architecture: Architecture, tokens: Tensor, steps: int, rate: float
) -> list[Alignment]:
    """Fit the parameters that each mixer does not share with attention to the attention of the same slot.

    Args:
        supernet: the supernet, changed in place.
        architecture: the largest architecture, with the parent's weights.
        tokens: text as token ids [N, T].
        steps: Adam steps per slot and mixer.
        rate: initial learning rate.

    Returns:
        The error of each slot and mixer before and after the fit.
    """
    model_config = supernet.space.config
    weights = {name: view.detach() for name, view in supernet.weights(architecture).items()}
    x = F.embedding(tokens, weights["embedding"])
    errors = []
    for slot, layer in enumerate(architecture.layers):
        with torch.no_grad():
            block = mixer_part(weights, architecture, slot, layer, model_config)
            after = torch.cat(
                [mixer_block(block, rows, layer, model_config)[0] for rows in torch.split(x, BATCH_WINDOWS)]
            )
        for other in _mixers(supernet, architecture):
            if other.mixer != "attention":
                before_after = _fit(supernet, architecture.width, slot, other, x, after, steps, rate)
                errors.append(Alignment(slot, other.mixer, *before_after))
        with torch.no_grad():
            block = part(weights, f"layers.{slot}.ffn", ffn_shapes(architecture.width, layer.ffn))
            x = torch.cat([ffn(block, rows, model_config) for rows in torch.split(after, BATCH_WINDOWS)])
    return errors


def _fit(
    supernet: Supernet,
    width: int,
    slot: int,
    layer: Layer,
    x: Tensor,
    after: Tensor,
    steps: int,
    rate: float,
) -> tuple[float, float]:
    """Fit one mixer so that it maps x to ``after`` [N, T, width].

    Returns:
        Errors on the last quarter of the windows, before and after. A fit that is no better is discarded.
    """
    views, private = _mixer_weights(supernet, width, slot, layer)
    held_out = len(x) - max(1, len(x) // 4)

    def error(weights: Weights, start: int, stop: int) -> Tensor:
        out, _ = mixer_block(weights, x[start:stop], layer, supernet.space.config)
        target = after[start:stop]
        return (out - target).square().sum() / (target - x[start:stop]).square().sum()

    def held_out_error(weights: Weights) -> float:
        with torch.no_grad():
            starts = range(held_out, len(x), BATCH_WINDOWS)
            return float(np.mean([float(error(weights, start, start + BATCH_WINDOWS)) for start in starts]))

    before = held_out_error(views)
    if not steps:
        return before, before
    with torch.no_grad():
        for leaf, value in private.items():
            if leaf.startswith("conv_"):  # identity: q, k and v pass through as inherited
                value.zero_()[:, -1] = 1
    factors = {2: 1.0, 1: VECTOR_RATE_FACTOR}  # by number of dimensions
    optimiser = torch.optim.Adam(
        [
            {"params": [value for value in private.values() if value.ndim == ndim], "factor": factor}
            for ndim, factor in factors.items()
        ]
    )
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * group["factor"] * (1 - step / steps)
        start = step * BATCH_WINDOWS % held_out
        loss = error(views | private, start, min(start + BATCH_WINDOWS, held_out))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    reached = held_out_error(views | private)
    if not reached < before:
        return before, before
    with torch.no_grad():
        for leaf, value in private.items():
            views[leaf].copy_(value)
    return before, reached


def _mixer_weights(
    supernet: Supernet, width: int, slot: int, layer: Layer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Views of a mixer's weights by their last name, and trainable copies of those that it does not share."""
    parameters = dict(supernet.named_parameters())
    uniform = Architecture(width, (layer,) * supernet.space.slots)
    views, private = {}, {}
    for name, (source, shape) in sources(supernet.space, uniform).items():
        if name.startswith(f"layers.{slot}.mixer."):
            leaf = name.rsplit(".", 1)[1]
            views[leaf] = prefix(parameters[source].detach(), shape)
            if not source.startswith(f"layers.{slot}.shared."):
                private[leaf] = views[leaf].clone().requires_grad_()
    return views, private
