"""A pretrained start: a Llama's weights become the supernet's, arranged for its sub-networks.

Three things happen to them, none of which changes the function of ``largest()``:

- *Order.* Sub-networks are prefixes, so residual channels, heads and FFN channels are sorted by
  their importance on a few windows: the size of their first-order effect on the loss (Molchanov et
  al. 2019). Mean absolute activations (Minitron, Muralidharan et al. 2024) order heads and FFN
  channels about as well, but residual channels no better than chance. The residual order is one
  for the whole model. kv groups move with their query heads, which are sorted within the group;
  a group is a large part of a layer, where the first order misleads, so groups are ordered by the
  loss without them. Channels within a head stay, because RoPE pairs them.
- *Inheritance.* Every mixer takes over the Llama's q, k, v, o and pre-norm, as far as it has them.
- *Alignment.* What a mixer does not share with attention is fitted, layer by layer, so that its
  residual contribution comes close to the attention's on the Llama's own hidden states.

Footgun: where the space varies the number of query heads per kv head, a sub-network of another
group size pairs its heads anew, and no order of the Llama's heads can prevent that.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from space import Architecture, InputError, Layer, ModelConfig
from space.architecture import has_heads
from space.attention.projection import heads_of, project, rms_norm
from space.attention.rotary import rotate
from space.attention.softmax import softmax_attention
from space.blocks import ffn, mixer, part
from space.shapes import ffn_shapes, mixer_shapes
from supernet.hf.llama import pretrained_digest, read_llama
from supernet.supernet import Supernet, prefix, sources

__all__ = ["Alignment", "load_pretrained", "pretrained_digest"]

Weights = Mapping[str, Tensor]
BATCH = 4  # windows that run at once
# What each dimension of a Llama's parameter indexes, by the last part of its name.
AXES = {
    "embedding": ("", "residual"),
    "head": ("", "residual"),
    "norm": ("residual",),
    "pre_norm": ("residual",),
    "q": ("query", "residual"),
    "k": ("kv", "residual"),
    "v": ("kv", "residual"),
    "o": ("residual", "query"),
    "gate": ("ffn", "residual"),
    "up": ("ffn", "residual"),
    "down": ("residual", "ffn"),
}


@dataclass(frozen=True)
class Importance:
    """How much the loss depends on a part, in nats per token and fp64.

    Of kv groups, the loss without the group less the loss with it. Of the others, the mean over tokens of
    |a * dL/da|, where a is the part's activation (Molchanov et al. 2019).
    """

    residual: Tensor  # [width] a channel after every norm at once
    heads: Tensor  # [slots, heads]
    ffn: Tensor  # [slots, ffn]
    groups: Tensor  # [slots, kv_heads]


@dataclass(frozen=True)
class Alignment:
    """How far a mixer's contribution is from the attention's: |difference|^2 / |attention's|^2."""

    slot: int
    mixer: str
    before: float
    after: float

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
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
    """Overwrite a supernet's weights with those of a Llama; deterministic, nothing is drawn.

    Args:
        supernet: of a space whose ``largest()`` is the Llama's architecture; changed in place.
        folder: of a ``LlamaForCausalLM``: config.json and safetensors.
        windows: training text [N, T] as token ids, N and T at least 2; three quarters of the windows are
            fitted to, the last quarter measures the errors.
        order: whether to sort by importance.
        steps: Adam steps for each slot and mixer; 0 leaves their own parts as they were.
        rate: the first learning rate of these steps; it falls linearly to 0.

    Returns:
        the error of each slot and mixer before and after.

    Raises:
        InputError: the folder does not hold that architecture, or a token is outside the vocabulary.
    """
    space = supernet.space
    architecture, weights = read_llama(folder, space)
    if windows.min() < 0 or windows.max() >= space.vocab_size:
        raise InputError(
            f"train.init: the text holds tokens {int(windows.min())} to {int(windows.max())}, "
            f"space {space.name} has 0 to {space.vocab_size - 1}"
        )
    device = next(supernet.parameters()).device
    windows = windows.to(device)
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    if order:
        found = importance(weights, architecture, space.config, windows)
        weights = reorder(weights, architecture, space.config, found)
    inherit(supernet, architecture, weights)
    return align(supernet, architecture, windows, steps, rate)


def importance(
    weights: Weights, architecture: Architecture, model_config: ModelConfig, windows: Tensor
) -> Importance:
    """Measure an all-attention model of equal layers on windows [N, T] of text."""
    first, slots = architecture.layers[0], len(architecture.layers)
    totals = [
        torch.zeros(sizes, dtype=torch.float64, device=windows.device)
        for sizes in ((architecture.width,), (slots, first.heads), (slots, first.ffn))
    ]
    each = first.heads // first.kv_heads
    groups = torch.zeros(slots, first.kv_heads, dtype=torch.float64, device=windows.device)
    for batch in torch.split(windows, BATCH):
        places = (batch.shape[0], batch.shape[1] - 1)
        gates = [
            torch.ones(*total.shape[:-1], *places, total.shape[-1], device=batch.device, requires_grad=True)
            for total in totals
        ]
        loss = _gated_loss(weights, architecture, model_config, batch, *gates)
        for total, effect in zip(totals, torch.autograd.grad(loss, gates), strict=True):
            total += effect.abs().double().sum((-3, -2))
        with torch.no_grad():
            residual, heads, hidden = gates
            for slot, group in np.ndindex(slots, first.kv_heads):
                without = heads.clone()
                without[slot, ..., group * each : (group + 1) * each] = 0
                groups[slot, group] += (
                    _gated_loss(weights, architecture, model_config, batch, residual, without, hidden) - loss
                )
    count = len(windows) * (windows.shape[1] - 1)
    return Importance(*(total / count for total in (*totals, groups)))


def _gated_loss(
    weights: Weights,
    architecture: Architecture,
    model_config: ModelConfig,
    windows: Tensor,
    residual: Tensor,
    heads: Tensor,
    hidden: Tensor,
) -> Tensor:
    """The summed loss with a factor on every normalised residual channel, head and FFN channel.

    windows [B, T + 1]; residual [B, T, width], the same after each norm; heads [slots, B, T, H];
    hidden [slots, B, T, ffn].
    """
    x = F.embedding(windows[:, :-1], weights["embedding"])
    for slot, layer in enumerate(architecture.layers):
        block = _mixer_part(weights, architecture, slot, layer, model_config)
        normed = rms_norm(x, block["pre_norm"]) * residual
        q, k, v = (heads_of(project(normed, block[name]), model_config.head_dim) for name in ("q", "k", "v"))
        out = softmax_attention(rotate(q, 0), rotate(k, 0), v) * heads[slot][..., None]
        x = x + project(out.flatten(2), block["o"])
        block = part(weights, f"layers.{slot}.ffn", ffn_shapes(architecture.width, layer.ffn))
        normed = rms_norm(x, block["pre_norm"]) * residual
        active = F.silu(project(normed, block["gate"])) * project(normed, block["up"])
        x = x + project(active * hidden[slot], block["down"])
    logits = project(
        rms_norm(x, weights["norm"]) * residual,
        weights["embedding" if model_config.tie_embeddings else "head"],
    )
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")


def reorder(
    weights: Weights, architecture: Architecture, model_config: ModelConfig, found: Importance
) -> dict[str, Tensor]:
    """The same function with residual channels, heads and FFN channels in falling importance."""
    first = architecture.layers[0]
    residual = _falling(found.residual)
    group = first.heads // first.kv_heads
    channel = torch.arange(model_config.head_dim, device=residual.device)
    places: list[dict[str, Tensor]] = []
    for slot in range(len(architecture.layers)):
        scores = found.heads[slot].reshape(first.kv_heads, group)
        groups = _falling(found.groups[slot])  # [Hkv]
        heads = (groups[:, None] * group + _falling(scores[groups])).flatten()
        places.append(
            {
                "residual": residual,
                "query": (heads[:, None] * model_config.head_dim + channel).flatten(),
                "kv": (groups[:, None] * model_config.head_dim + channel).flatten(),
                "ffn": _falling(found.ffn[slot]),
            }
        )
    moved = {}
    for name, tensor in weights.items():
        place = places[int(name.split(".")[1])] if name.startswith("layers.") else places[0]
        for dimension, axis in enumerate(AXES[name.rsplit(".", 1)[-1]]):
            if axis:
                tensor = tensor.index_select(dimension, place[axis])
        moved[name] = tensor
    return moved


def _falling(scores: Tensor) -> Tensor:
    """The order of the last dimension from the largest down; ties keep theirs."""
    return scores.argsort(dim=-1, descending=True, stable=True)


@torch.no_grad()
def inherit(supernet: Supernet, architecture: Architecture, weights: Weights) -> None:
    """Copy a model's weights into the supernet: the ends, the FFNs, and into every mixer by name."""
    parameters = dict(supernet.named_parameters())
    for layer in _mixers(supernet, architecture):
        alike = Architecture(architecture.width, (layer,) * len(architecture.layers))
        for name, (source, shape) in sources(supernet.space, alike).items():
            if name in weights and weights[name].shape == shape:
                prefix(parameters[source], shape).copy_(weights[name])


def _mixers(supernet: Supernet, architecture: Architecture) -> Iterator[Layer]:
    """The largest layer of each mixer of the space; of windows, the widest."""
    first = architecture.layers[0]
    for name, window in dict(supernet.space.mixer_options[1:]).items():
        heads, kv_heads = (first.heads, first.kv_heads) if has_heads(name) else (0, 0)
        yield Layer(mixer=name, heads=heads, kv_heads=kv_heads, window=window, ffn=first.ffn)


def align(
    supernet: Supernet, architecture: Architecture, tokens: Tensor, steps: int, rate: float
) -> list[Alignment]:
    """Fit what each mixer has for itself to the attention of the same slot; see :func:`load_pretrained`."""
    model_config = supernet.space.config
    weights = {name: view.detach() for name, view in supernet.weights(architecture).items()}
    x = F.embedding(tokens, weights["embedding"])
    errors = []
    for slot, layer in enumerate(architecture.layers):
        with torch.no_grad():
            block = _mixer_part(weights, architecture, slot, layer, model_config)
            after = torch.cat([mixer(block, some, layer, model_config)[0] for some in torch.split(x, BATCH)])
        for other in _mixers(supernet, architecture):
            if other.mixer != "attention":
                before_after = _fit(supernet, architecture.width, slot, other, x, after, steps, rate)
                errors.append(Alignment(slot, other.mixer, *before_after))
        with torch.no_grad():
            block = part(weights, f"layers.{slot}.ffn", ffn_shapes(architecture.width, layer.ffn))
            x = torch.cat([ffn(block, some) for some in torch.split(after, BATCH)])
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
    """Fit one mixer so that it takes x to ``after`` [N, T, width]; the errors on the last windows."""
    space = supernet.space
    parameters = dict(supernet.named_parameters())
    alike = Architecture(width, (layer,) * space.slots)
    views, own = {}, {}
    for name, (source, shape) in sources(space, alike).items():
        if name.startswith(f"layers.{slot}.mixer."):
            leaf = name.rsplit(".", 1)[1]
            views[leaf] = prefix(parameters[source].detach(), shape)
            if not source.startswith(f"layers.{slot}.shared."):
                own[leaf] = views[leaf].clone().requires_grad_()

    def error(weights: Weights, start: int, stop: int) -> Tensor:
        out, _ = mixer(weights, x[start:stop], layer, space.config)
        wanted = after[start:stop]
        return (out - wanted).square().sum() / (wanted - x[start:stop]).square().sum()

    def measured(weights: Weights) -> float:
        with torch.no_grad():
            starts = range(held, len(x), BATCH)
            return float(np.mean([float(error(weights, start, start + BATCH)) for start in starts]))

    held = len(x) - max(1, len(x) // 4)
    before = measured(views)
    if not steps:
        return before, before
    with torch.no_grad():
        for leaf, value in own.items():
            if leaf.startswith("conv_"):  # pass q, k and v through as they were inherited
                value.zero_()[:, -1] = 1
    # Gains have far to go from 1 where a mixer's output is large, matrices do not.
    groups: list[dict[str, Any]] = [
        {"params": [value for value in own.values() if value.ndim == 2], "factor": 1.0},
        {"params": [value for value in own.values() if value.ndim == 1], "factor": 5.0},
    ]
    optimiser = torch.optim.Adam(groups)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * group["factor"] * (1 - step / steps)
        start = step * BATCH % held
        loss = error(views | own, start, min(start + BATCH, held))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    reached = measured(views | own)
    if not reached < before:
        return before, before
    with torch.no_grad():
        for leaf, value in own.items():
            views[leaf].copy_(value)
    return before, reached


def _mixer_part(
    weights: Weights, architecture: Architecture, slot: int, layer: Layer, model_config: ModelConfig
) -> Weights:
    shapes = mixer_shapes(layer.mixer, architecture.width, layer.heads, layer.kv_heads, model_config)
    return part(weights, f"layers.{slot}.mixer", shapes)
