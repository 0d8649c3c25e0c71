"""The plain blocks: mixer block, FFN and the whole model, as functions of their weights.

A block is a pure function of a mapping from parameter names (those of :mod:`space.shapes`)
to tensors. The plain module below owns such tensors; the supernet passes prefix views of
its own. So the sub-network and the sub-model run the very same lines, and what the lines
compute is checked against independent code and fp64 recurrences.

Matrices may be bf16 and the rest fp32: a projection runs in its weight's type, norms,
recurrences and the residual stream run in fp32 (or fp64, where everything is).

Shapes: B batch, T tokens, W width, V vocabulary; x is [B, T, W], logits [B, T, V]. Inside a mixer: H query
heads, Hkv kv heads, D head dimension; q is [B, T, H, D], k and v [B, T, Hkv, D].
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from space.architecture import Architecture, Layer, ModelConfig
from space.attention.projection import project, rms_norm
from space.mixers import MIXERS, MixerCall, Shapes, State, Weights
from space.shapes import ffn_shapes, mixer_shapes, model_shapes, parameter_mixer

__all__ = [
    "Model",
    "State",
    "Weights",
    "add_parameter",
    "ffn",
    "forward",
    "hidden_states",
    "initial",
    "mixer_block",
    "output_logits",
    "part",
]


def mixer_block(
    weights: Weights,
    x: Tensor,
    layer: Layer,
    model_config: ModelConfig,
    position: int = 0,
    state: State | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, State]:
    """One mixer block with its pre-norm and residual.

    Args:
        weights: every parameter of the block by name.
        x: the residual stream [B, T, W].
        layer: the layer, of which only the mixer is run.
        model_config: the settings of the space.
        position: place of the first token in its sequence.
        state: the state that an earlier call returned; None at the start of a sequence.
        mask: as in :func:`forward`.

    Returns:
        The residual stream after the block, and the state after the last token.
    """
    entry = MIXERS.get(layer.mixer)
    hidden = rms_norm(x, weights["pre_norm"], model_config.norm_eps)
    if mask is not None:
        # Padding on the left then reads as the nothing before a text: convolutions see zeros, and as v is
        # zero no recurrence writes.
        hidden = hidden * mask[:, -x.shape[1] :, None]
    made = entry.forward(weights, hidden, MixerCall(layer, model_config, position, state or {}, mask))
    if not isinstance(made, tuple) or len(made) != 2:
        raise ValueError(f"mixer {layer.mixer}: forward returned no pair of an output and states by name")
    out, state = made
    return x + project(out, weights[entry.output]), state


def ffn(weights: Weights, x: Tensor, model_config: ModelConfig) -> Tensor:
    """One SwiGLU block (Shazeer 2020) with its pre-norm and residual.

    Args:
        weights: every parameter of the block by name.
        x: the residual stream [B, T, W].
        model_config: the settings of the space.

    Returns:
        The residual stream after the block.
    """
    hidden = rms_norm(x, weights["pre_norm"], model_config.norm_eps)
    gated = F.silu(project(hidden, weights["gate"])) * project(hidden, weights["up"])
    return x + project(gated, weights["down"])


def part(weights: Weights, prefix: str, shapes: Shapes) -> Weights:
    """The weights of one block.

    Args:
        weights: of the model.
        prefix: of the block's names in the model, such as ``layers.0.mixer``.
        shapes: of the block, whose names are the keys of the result.
    """
    return {name: weights[f"{prefix}.{name}"] for name in shapes}


def hidden_states(
    weights: Weights,
    architecture: Architecture,
    model_config: ModelConfig,
    tokens: Tensor,
    *,
    position: int = 0,
    states: Mapping[int, State] | None = None,
    mask: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, dict[int, State]]:
    """Run an architecture up to its final norm; :func:`output_logits` gives the rest.

    Args:
        weights: every parameter of :func:`space.shapes.model_shapes`, of exactly that shape.
        architecture: the architecture.
        model_config: the settings of its space.
        tokens: [B, T] integers.
        position: place of the first token in its sequence.
        states: by slot, the states that an earlier call returned; None at the start of a sequence.
        mask: bool [B, position + T], True for real tokens, False for padding on the left; None without
            padding. Padding changes nothing for real tokens, except that positions count it.
        keep: number of last tokens that are returned; 0 for all.

    Returns:
        The normed residual stream [B, T or keep, W], and the states after the last token by slot.
    """
    x = F.embedding(tokens, weights["embedding"]).to(weights["norm"].dtype)
    after: dict[int, State] = {}
    for slot, layer in enumerate(architecture.layers):
        if layer.mixer != "none":
            shapes = mixer_shapes(layer.mixer, architecture.width, layer.heads, layer.kv_heads, model_config)
            block = part(weights, f"layers.{slot}.mixer", shapes)
            x, after[slot] = mixer_block(
                block, x, layer, model_config, position, (states or {}).get(slot), mask
            )
        if layer.ffn:
            block = part(weights, f"layers.{slot}.ffn", ffn_shapes(architecture.width, layer.ffn))
            x = ffn(block, x, model_config)
    return rms_norm(x[:, -keep:] if keep else x, weights["norm"], model_config.norm_eps), after


def output_logits(weights: Weights, model_config: ModelConfig, hidden: Tensor) -> Tensor:
    """Logits [..., V] of final hidden states.

    Args:
        weights: of the model, with the embedding or the head.
        model_config: the settings of the space.
        hidden: of :func:`hidden_states`, [..., W].
    """
    return project(hidden, weights["embedding" if model_config.tie_embeddings else "head"])


def forward(
    weights: Weights,
    architecture: Architecture,
    model_config: ModelConfig,
    tokens: Tensor,
    *,
    position: int = 0,
    states: Mapping[int, State] | None = None,
    mask: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, dict[int, State]]:
    """Run an architecture on its weights.

    Args:
        weights: every parameter of :func:`space.shapes.model_shapes`, of exactly that shape.
        architecture: the architecture.
        model_config: the settings of its space.
        tokens: [B, T] integers.
        position: as in :func:`hidden_states`.
        states: as in :func:`hidden_states`.
        mask: as in :func:`hidden_states`.
        keep: number of last tokens that get logits; 0 for all.

    Returns:
        Logits [B, T or keep, V], and the states after the last token by slot.
    """
    hidden, after = hidden_states(
        weights,
        architecture,
        model_config,
        tokens,
        position=position,
        states=states,
        mask=mask,
        keep=keep,
    )
    return output_logits(weights, model_config, hidden), after


def initial(
    name: str,
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    mixer: str = "",
    tie_embeddings: bool = True,
) -> Tensor:
    """The first value of a parameter.

    Matrices are normal with variance 1/fan-in, norms start at one. Matrices that write to the residual stream
    start at zero, so that every sub-network starts as the same function (docs/log.md has the gain). A mixer
    names the initialisers of its other parameters.

    An embedding that is not the output matrix too starts at variance 1, so that what the blocks learn to add
    does not drown it. A tied one cannot, or the logits would start at sqrt(width).

    Args:
        name: dotted; the last part counts.
        shape: of the parameter.
        generator: draws the value.
        mixer: the mixer that the parameter is private to; see :func:`space.shapes.parameter_mixer`.
        tie_embeddings: the embedding is the output matrix too.
    """
    leaf = name.rsplit(".", 1)[-1]
    entry = MIXERS.get(mixer) if mixer else None
    if entry and leaf in entry.initial:
        return entry.initial[leaf](shape, generator)
    if leaf.endswith("norm"):
        return torch.ones(shape)
    if leaf == (entry.output if entry else "o") or leaf == "down":
        return torch.zeros(shape)
    torch.rand(shape, generator=generator)  # unused, but seeds keep the weights that they have always drawn
    scale = 1 / math.sqrt(shape[-1]) if tie_embeddings or leaf != "embedding" else 1.0
    return torch.randn(shape, generator=generator) * scale


class Model(nn.Module):
    """A plain model: an architecture with weights of its own.

    Args:
        architecture: the architecture.
        model_config: the settings of its space.
        generator: draws the first weights; None for one with seed 0.
    """

    def __init__(
        self, architecture: Architecture, model_config: ModelConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.model_config = model_config
        generator = generator or torch.Generator().manual_seed(0)
        tied = model_config.tie_embeddings
        for name, shape in model_shapes(architecture, model_config).items():
            owner = parameter_mixer(name, architecture)
            value = initial(name, shape, generator, mixer=owner, tie_embeddings=tied)
            add_parameter(self, name, value)

    def forward(
        self,
        tokens: Tensor,
        position: int = 0,
        states: Mapping[int, State] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, State]]:
        """Run the model; see :func:`forward`.

        Args:
            tokens: [B, T] integers.
            position: place of the first token in its sequence.
            states: by slot, the states that an earlier call returned.
            mask: bool [B, position + T], False for padding on the left.

        Returns:
            Logits [B, T, V], and the states after the last token by slot.
        """
        weights = dict(self.named_parameters())
        return forward(
            weights, self.architecture, self.model_config, tokens, position=position, states=states, mask=mask
        )


def add_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Register a parameter under a dotted name, making the modules between.

    Args:
        module: the outermost module.
        name: dotted, such as ``layers.0.mixer.q``.
        value: the parameter's value.
    """
    *path, leaf = name.split(".")
    for step in path:
        if step not in module._modules:
            module.add_module(step, nn.Module())
        module = cast(nn.Module, module._modules[step])
    module.register_parameter(leaf, nn.Parameter(value))
