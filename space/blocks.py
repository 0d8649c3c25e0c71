"""The plain blocks: every mixer, the FFN and the whole model, as functions of their weights.

A block is a pure function of a mapping from parameter names (those of :mod:`space.shapes`)
to tensors. The plain module below owns such tensors; the supernet passes prefix views of
its own. So the sub-network and the sub-model run the very same lines, and what the lines
compute is checked against other people's code and fp64 recurrences.

Matrices may be bf16 and the rest fp32: a projection runs in its weight's type, norms,
recurrences and the residual stream run in fp32 (or fp64, where everything is).
"""

import functools
import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from space.architecture import Architecture, Layer, ModelConfig
from space.attention.convolution import causal_conv
from space.attention.decay import gla_decay, hgrn2_forget, kda_decay, retnet_decay, step_decay, unit
from space.attention.linear import linear_attention
from space.attention.softmax import softmax_attention
from space.shapes import (
    NORM_EPS,
    RECURRENCES,
    ROPE_BASE,
    Recurrence,
    Shapes,
    ffn_shapes,
    mixer_shapes,
    model_shapes,
)

Weights = Mapping[str, Tensor]
State = dict[str, Tensor]


def project(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` in the weight's type: [..., in] -> [..., out]."""
    return F.linear(x.to(weight.dtype), weight)


def project_wide(x: Tensor, weight: Tensor) -> Tensor:
    """A projection that makes gates of the state: in its own types, under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return project(x, weight).to(x.dtype)


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich 2019), in the gain's type."""
    return F.rms_norm(x.to(gain.dtype), gain.shape, gain, NORM_EPS)


def rope_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Rotary angles in fp64: positions [T] -> [T, D/2] (Su et al. 2021)."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    return positions.double()[:, None] * ROPE_BASE ** (-steps / head_dim)


def rotate(x: Tensor, position: int) -> Tensor:
    """Rotary embedding of [B, T, H, D] whose first token stands at ``position``; halves are paired."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = _turns(position, x.shape[1], x.shape[-1], wide, x.device)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin).to(x.dtype)


@functools.lru_cache(maxsize=8)
def _turns(
    position: int, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What `rotate` multiplies by, [T, 1, D] each: cos, and sin with the sign of each half.

    Kept for the other calls of a forward pass: in float64 they cost as much as the rotation itself.
    """
    with torch.inference_mode(False), torch.no_grad():
        angles = rope_angles(torch.arange(position, position + tokens, device=device), head_dim)
        cos, sin = angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]  # [T, 1, D/2]
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def heads_of(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, H*D] -> [B, T, H, D]."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def mixer(
    weights: Weights,
    x: Tensor,
    layer: Layer,
    model_config: ModelConfig,
    position: int = 0,
    state: State | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, State]:
    """One mixer block with its pre-norm and residual: x [B, T, width] -> (x, state after).

    The mask is that of :func:`forward`.
    """
    hidden = rms_norm(x, weights["pre_norm"])
    if mask is not None:
        # Padding on the left then reads as the nothing before a text: convolutions see zeros, and as v is
        # zero no recurrence writes.
        hidden = hidden * mask[:, -x.shape[1] :, None]
    if layer.mixer == "short_conv":
        out, state = _short_conv(weights, hidden, state or {})
        return x + project(out, weights["out"]), state
    q, k, v = (heads_of(project(hidden, weights[name]), model_config.head_dim) for name in ("q", "k", "v"))
    state = state or {}
    if layer.mixer in ("attention", "sliding"):
        out, state = _softmax_mixer(weights, q, k, v, layer, model_config, position, state, mask)
    else:
        out, state = _linear_mixer(weights, hidden, q, k, v, layer, position, state)
    return x + project(out.flatten(2), weights["o"]), state


def _softmax_mixer(
    weights: Weights,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: Layer,
    model_config: ModelConfig,
    position: int,
    state: State,
    mask: Tensor | None,
) -> tuple[Tensor, State]:
    """``attention`` and ``sliding``; the state holds keys after RoPE, [B, Hkv, tokens, D]."""
    if model_config.qk_norm:
        q, k = rms_norm(q, weights["q_norm"]).to(v.dtype), rms_norm(k, weights["k_norm"]).to(v.dtype)
    q, k = rotate(q, position), rotate(k, position)
    if state:
        k = torch.cat([state["key"].transpose(1, 2), k], dim=1)
        v = torch.cat([state["value"].transpose(1, 2), v], dim=1)
    out = softmax_attention(q, k, v, layer.window, None if mask is None else mask[:, -k.shape[1] :])
    held = slice(1 - layer.window, None) if layer.window else slice(None)
    return out, {"key": k[:, held].transpose(1, 2), "value": v[:, held].transpose(1, 2)}


def _linear_mixer(
    weights: Weights,
    hidden: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: Layer,
    position: int,
    state: State,
) -> tuple[Tensor, State]:
    """The mixers on the linear recurrence; the state is S [B, Hkv, D, D] and that of the convolution.

    Heads and sizes follow q, k, v, which the mixers of a layer share, and a norm is of one head. Where
    the papers differ: RetNet doubles the values; Mamba-2 expands the width by 2, has a state of 128,
    biases in its convolution and norms all heads together; GLA halves the keys; HGRN2 accumulates its
    lower bounds over the layers; Kimi Linear's output gate is of low rank.
    """
    recurrence, d = RECURRENCES[layer.mixer], q.shape[-1]
    after: State = {}
    decay = beta = scale = skip = None
    if recurrence.conv:
        joined = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1)
        taps = torch.cat([weights["conv_q"], weights["conv_k"], weights["conv_v"]])
        mixed, after["conv"] = causal_conv(joined, taps, state.get("conv"))
        sizes = [q.shape[2], k.shape[2], v.shape[2]]
        q, k, v = torch.split(heads_of(F.silu(mixed), d), sizes, dim=2)
    if recurrence.delta:
        q, k = unit(q), unit(k)
        beta = torch.sigmoid(project_wide(hidden, weights["beta"]))
    if recurrence.decay == "head":
        step = F.softplus(project_wide(hidden, weights["decay"]) + weights["dt_bias"])
        decay = step_decay(step, weights["A_log"])
        if layer.mixer == "mamba2":  # q, k, v are its C, B, x
            scale, skip = 1.0, v * weights["D"][:, None]
            v = v * step[..., None]
    elif layer.mixer == "linear":
        q, k = F.elu(q) + 1, F.elu(k) + 1
    elif layer.mixer == "retnet":
        q, k = rotate(q, position), rotate(k, position)
        decay = retnet_decay(layer.kv_heads, hidden).expand(*hidden.shape[:2], -1)
    elif layer.mixer == "hgrn2":
        q = F.silu(q)
        k, decay = hgrn2_forget(k, weights["lower_bound"])
    elif layer.mixer == "gla":
        decay = gla_decay(heads_of(_low_rank(weights, hidden) + weights["decay_bias"], d))
    elif layer.mixer == "kda":
        logits = heads_of(_low_rank(weights, hidden) + weights["dt_bias"], d)
        decay = kda_decay(logits, weights["slope_log"])
    out, after["s"] = linear_attention(
        q, k, v, rule=recurrence.rule, decay=decay, beta=beta, state=state.get("s"), scale=scale
    )
    if skip is not None:
        out = out + skip.repeat_interleave(layer.heads // layer.kv_heads, dim=2)
    return _norm_and_gate(weights, hidden, out, recurrence), after


def _low_rank(weights: Weights, hidden: Tensor) -> Tensor:
    """The product of two matrices that makes decays of channels: [B, T, Hkv*D]."""
    return project_wide(project_wide(hidden, weights["decay_down"]), weights["decay_up"])


def _norm_and_gate(weights: Weights, hidden: Tensor, out: Tensor, recurrence: Recurrence) -> Tensor:
    """The norm of each head and the output gate, on what the recurrence gave: [B, T, H, D]."""
    if not recurrence.gate:
        return rms_norm(out, weights["norm"])
    activation = torch.sigmoid if recurrence.gate == "sigmoid" else F.silu
    gate = heads_of(activation(project(hidden, weights["gate"])), out.shape[-1])
    if recurrence.gate_first:
        return rms_norm(out * gate, weights["norm"])
    return rms_norm(out, weights["norm"]) * gate


def _short_conv(weights: Weights, hidden: Tensor, state: State) -> tuple[Tensor, State]:
    """LFM2's gated short convolution (Liquid AI 2025) before its output projection: [B, T, width]."""
    b, c, x = (project(hidden, weights[name]) for name in ("in_b", "in_c", "in_x"))
    mixed, past = causal_conv(b * x, weights["conv_x"], state.get("conv"))
    return c * mixed, {"conv": past}


def ffn(weights: Weights, x: Tensor) -> Tensor:
    """One SwiGLU block with its pre-norm and residual: [B, T, width] -> [B, T, width]."""
    hidden = rms_norm(x, weights["pre_norm"])
    gated = F.silu(project(hidden, weights["gate"])) * project(hidden, weights["up"])
    return x + project(gated, weights["down"])


def part(weights: Weights, prefix: str, shapes: Shapes) -> Weights:
    """The weights of one block, by the names that its shapes have."""
    return {name: weights[f"{prefix}.{name}"] for name in shapes}


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
        architecture: what to run.
        model_config: what its space fixes.
        tokens: [B, T] integers.
        position: the place of the first token in its sequence.
        states: per slot, what an earlier call returned; None at the start of a sequence.
        mask: bool [B, position + T], True for real tokens, False for padding before them; None without
            padding. Real tokens get what they get without it, positions count it.
        keep: only the last so many tokens get logits, all of them if 0.

    Returns:
        logits [B, T or keep, vocabulary] and the states after the last token.
    """
    x = F.embedding(tokens, weights["embedding"]).to(weights["norm"].dtype)
    after: dict[int, State] = {}
    for slot, layer in enumerate(architecture.layers):
        if layer.mixer != "none":
            shapes = mixer_shapes(layer.mixer, architecture.width, layer.heads, layer.kv_heads, model_config)
            block = part(weights, f"layers.{slot}.mixer", shapes)
            x, after[slot] = mixer(block, x, layer, model_config, position, (states or {}).get(slot), mask)
        if layer.ffn:
            x = ffn(part(weights, f"layers.{slot}.ffn", ffn_shapes(architecture.width, layer.ffn)), x)
    head = weights["embedding" if model_config.tie_embeddings else "head"]
    return project(rms_norm(x[:, -keep:] if keep else x, weights["norm"]), head), after


def initial(
    name: str, shape: tuple[int, ...], generator: torch.Generator, *, tie_embeddings: bool = True
) -> Tensor:
    """A parameter's first value, by its name.

    Matrices are normal with variance 1/fan-in; those that write to the residual stream start at zero, so
    that every sub-network starts as the same function (docs/log.md has the gain). Decays of heads start
    as in Mamba-2 and Gated DeltaNet: A uniform on [1, 16], time steps log-uniform on [1e-3, 0.1]; gla's at
    log(1/2) / 16. kda's slope starts at 1, which with the same time steps gives decays of -0.5 to -0.005
    (steeper, its bounded gate would start shut and without a gradient), and hgrn2's lower bound at
    sigmoid(-4) = 0.018.

    An embedding that is no head as well starts at variance 1, so that what the blocks learn to add does
    not drown it. One that is also the head cannot, or the logits would start at sqrt(width).
    """
    kind = name.rsplit(".", 1)[-1]
    if kind.endswith("norm") or kind == "D":
        return torch.ones(shape)
    if kind in ("slope_log", "decay_bias", "o", "out", "down"):
        return torch.zeros(shape)
    if kind == "lower_bound":
        return torch.full(shape, -4.0)
    uniform = torch.rand(shape, generator=generator)
    if kind == "A_log":
        return torch.log(1 + 15 * uniform)
    if kind == "dt_bias":
        step = torch.exp(math.log(1e-3) + uniform * (math.log(0.1) - math.log(1e-3)))
        return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
    if kind.startswith("conv_"):
        return (2 * uniform - 1) / math.sqrt(shape[-1])
    scale = 1 / math.sqrt(shape[-1]) if tie_embeddings or kind != "embedding" else 1.0
    return torch.randn(shape, generator=generator) * scale


class Model(nn.Module):
    """A plain model: an architecture with weights of its own."""

    def __init__(
        self, architecture: Architecture, model_config: ModelConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.model_config = model_config
        generator = generator or torch.Generator().manual_seed(0)
        for name, shape in model_shapes(architecture, model_config).items():
            value = initial(name, shape, generator, tie_embeddings=model_config.tie_embeddings)
            add_parameter(self, name, value)

    def forward(
        self,
        tokens: Tensor,
        position: int = 0,
        states: Mapping[int, State] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, State]]:
        """Tokens [B, T] -> (logits [B, T, vocabulary], states); see :func:`forward`."""
        weights = dict(self.named_parameters())
        return forward(
            weights, self.architecture, self.model_config, tokens, position=position, states=states, mask=mask
        )


def add_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Register a parameter under a dotted name, making the modules between."""
    *path, leaf = name.split(".")
    for step in path:
        if step not in module._modules:
            module.add_module(step, nn.Module())
        module = cast(nn.Module, module._modules[step])
    module.register_parameter(leaf, nn.Parameter(value))
