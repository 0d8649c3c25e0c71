"""The plain blocks: every mixer, the FFN and the whole model, as functions of their weights.

A block is a pure function of a mapping from parameter names (those of :mod:`space.shapes`)
to tensors. The plain module below owns such tensors; the supernet passes prefix views of
its own. So the sub-network and the sub-model run the very same lines, and what the lines
compute is checked against other people's code and fp64 recurrences.

Matrices may be bf16 and the rest fp32: a projection runs in its weight's type, norms,
recurrences and the residual stream run in fp32 (or fp64, where everything is).
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from space.architecture import Architecture, Frame, Layer
from space.linear_attention import linear_attention
from space.shapes import (
    CONV,
    MIN_LOG_DECAY,
    NORM_EPS,
    ROPE_BASE,
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


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich 2019), in the gain's type."""
    return F.rms_norm(x.to(gain.dtype), gain.shape, gain, NORM_EPS)


def rope_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Rotary angles in fp64: positions [T] -> [T, D/2] (Su et al. 2021)."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    return positions.double()[:, None] * ROPE_BASE ** (-steps / head_dim)


def rotate(x: Tensor, position: int) -> Tensor:
    """Rotary embedding of [B, T, H, D] whose first token stands at ``position``; halves are paired."""
    positions = torch.arange(position, position + x.shape[1], device=x.device)
    angles = rope_angles(positions, x.shape[-1])[:, None, :]  # [T, 1, D/2]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def heads_of(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, H*D] -> [B, T, H, D]."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """Causal attention of the last T of S tokens over all S.

    q [B, T, H, D], k and v [B, S, Hkv, D] with S >= T; out [B, T, H, D]. With a window W, a
    token sees itself and the W - 1 before it.
    """
    tokens, keys = q.shape[1], k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if tokens == keys and (not window or tokens <= window):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif tokens == keys and tokens % window == 0:
        out = _block_local(q, k, v, window, grouped)
    elif tokens == 1 and (not window or keys <= window):
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    else:
        row = torch.arange(keys - tokens, keys, device=q.device)[:, None]
        distance = row - torch.arange(keys, device=q.device)
        seen = distance >= 0
        if window:
            seen &= distance < window
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
    return out.transpose(1, 2)


def _block_local(q: Tensor, k: Tensor, v: Tensor, window: int, grouped: bool) -> Tensor:
    """Sliding attention block by block: a block of W queries sees its own and the previous block.

    All of [B, H, T, D] with T a multiple of W. Costs T * 2W instead of T * T; a mask over the
    whole square is slower than no window at all.
    """
    batch, length, head_dim = q.shape[0], q.shape[2], q.shape[3]
    blocks = length // window

    def fold(x: Tensor) -> Tensor:  # [B, H, T, D] -> [B, n, H, W, D]
        return x.reshape(batch, -1, blocks, window, head_dim).transpose(1, 2)

    def pairs(x: Tensor) -> Tensor:  # [B, n, H, W, D] -> [B, n, H, 2W, D]
        return torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], dim=3)

    row = torch.arange(window, device=q.device)[:, None] + window
    column = torch.arange(2 * window, device=q.device)
    seen = (row >= column) & (row - column < window)  # [W, 2W]
    first = seen & (column >= window)  # the first block has nothing before it
    mask = torch.cat([first[None], seen.expand(blocks - 1, -1, -1)])[:, None]  # [n, 1, W, 2W]
    keys, values = pairs(fold(k)).flatten(0, 1), pairs(fold(v)).flatten(0, 1)
    out = F.scaled_dot_product_attention(
        fold(q).flatten(0, 1), keys, values, attn_mask=mask.repeat(batch, 1, 1, 1), enable_gqa=grouped
    )
    out = out.reshape(batch, blocks, -1, window, head_dim)
    return out.transpose(1, 2).reshape(batch, -1, length, head_dim)


def causal_conv(x: Tensor, taps: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution: x [B, T, C], taps [C, K], past [B, C, K-1] -> (out, next past)."""
    x = x.transpose(1, 2)
    if past is None:
        past = x.new_zeros(x.shape[0], x.shape[1], CONV - 1)
    joined = torch.cat([past.to(x.dtype), x], dim=2)
    out = F.conv1d(joined, taps.to(x.dtype)[:, None], groups=x.shape[1])
    return out.transpose(1, 2), joined[:, :, -(CONV - 1) :]


def mixer(
    weights: Weights, x: Tensor, layer: Layer, frame: Frame, position: int = 0, state: State | None = None
) -> tuple[Tensor, State]:
    """One mixer block with its pre-norm and residual: x [B, T, width] -> (x, state after)."""
    hidden = rms_norm(x, weights["pre_norm"])
    q, k, v = (heads_of(project(hidden, weights[name]), frame.head_dim) for name in ("q", "k", "v"))
    state = state or {}
    if layer.mixer in ("attention", "sliding"):
        out, state = _softmax_mixer(weights, q, k, v, layer, frame, position, state)
    else:
        out, state = _linear_mixer(weights, hidden, q, k, v, layer, position, state)
    return x + project(out.flatten(2), weights["o"]), state


def _softmax_mixer(
    weights: Weights, q: Tensor, k: Tensor, v: Tensor, layer: Layer, frame: Frame, position: int, state: State
) -> tuple[Tensor, State]:
    """``attention`` and ``sliding``; the state holds keys after RoPE, [B, Hkv, tokens, D]."""
    if frame.qk_norm:
        q, k = rms_norm(q, weights["q_norm"]).to(v.dtype), rms_norm(k, weights["k_norm"]).to(v.dtype)
    q, k = rotate(q, position), rotate(k, position)
    if state:
        k = torch.cat([state["key"].transpose(1, 2), k], dim=1)
        v = torch.cat([state["value"].transpose(1, 2), v], dim=1)
    out = softmax_attention(q, k, v, layer.window)
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

    Heads and sizes follow q, k, v, which the mixers of a layer share, so value heads are as
    wide as key heads where a paper has them wider (RetNet doubles the values).
    """
    after: State = {}
    decay = beta = None
    rule = "linear"
    if layer.mixer == "linear":  # Katharopoulos et al. 2020
        q, k = F.elu(q) + 1, F.elu(k) + 1
    elif layer.mixer == "retnet":  # Sun et al. 2023
        rule = "gated"
        q, k = rotate(q, position), rotate(k, position)
        decay = retnet_decay(layer.kv_heads, hidden).expand(*hidden.shape[:2], -1)
    elif layer.mixer == "gated_deltanet":  # Yang, Kautz and Hatamizadeh 2024
        rule = "gated_delta"
        joined = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1)
        taps = torch.cat([weights["conv_q"], weights["conv_k"], weights["conv_v"]])
        mixed, after["conv"] = causal_conv(joined, taps, state.get("conv"))
        sizes = [q.shape[2], k.shape[2], v.shape[2]]
        q, k, v = torch.split(heads_of(F.silu(mixed), q.shape[-1]), sizes, dim=2)
        q, k = unit(q), unit(k)
        beta = torch.sigmoid(project(hidden, weights["beta"]).to(hidden.dtype))
        step = F.softplus(project(hidden, weights["decay"]).to(hidden.dtype) + weights["dt_bias"])
        decay = (-weights["A_log"].exp() * step).clamp(min=MIN_LOG_DECAY)
    out, after["s"] = linear_attention(q, k, v, rule=rule, decay=decay, beta=beta, state=state.get("s"))
    out = rms_norm(out, weights["norm"])
    if "gate" in weights:
        out = out * heads_of(F.silu(project(hidden, weights["gate"])), out.shape[-1])
    return out, after


def retnet_decay(kv_heads: int, like: Tensor) -> Tensor:
    """RetNet's fixed log decays, log(1 - 2^(-5-h)) for kv head h: [Hkv]."""
    head = torch.arange(kv_heads, dtype=torch.float64, device=like.device)
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.log1p(-torch.exp2(-5 - head)).to(wide)


def unit(x: Tensor) -> Tensor:
    """L2-normalised over the last dimension, in fp32 at least, with 1e-6 under the root."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


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
    frame: Frame,
    tokens: Tensor,
    *,
    position: int = 0,
    states: Mapping[int, State] | None = None,
) -> tuple[Tensor, dict[int, State]]:
    """Run an architecture on its weights.

    Args:
        weights: every parameter of :func:`space.shapes.model_shapes`, of exactly that shape.
        architecture: what to run.
        frame: what its space fixes.
        tokens: [B, T] integers.
        position: the place of the first token in its sequence.
        states: per slot, what an earlier call returned; None at the start of a sequence.

    Returns:
        logits [B, T, vocabulary] and the states after the last token.
    """
    x = F.embedding(tokens, weights["embedding"]).to(weights["norm"].dtype)
    after: dict[int, State] = {}
    for slot, layer in enumerate(architecture.layers):
        if layer.mixer != "none":
            shapes = mixer_shapes(layer.mixer, architecture.width, layer.heads, layer.kv_heads, frame)
            block = part(weights, f"layers.{slot}.mixer", shapes)
            x, after[slot] = mixer(block, x, layer, frame, position, (states or {}).get(slot))
        if layer.ffn:
            x = ffn(part(weights, f"layers.{slot}.ffn", ffn_shapes(architecture.width, layer.ffn)), x)
    head = weights["embedding" if frame.tied else "head"]
    return project(rms_norm(x, weights["norm"]), head), after


def initial(name: str, shape: tuple[int, ...], slots: int, generator: torch.Generator) -> Tensor:
    """A parameter's first value, by its name.

    Matrices are normal with variance 1/fan-in; what writes to the residual stream is divided
    by sqrt(2 * slots) (Radford et al. 2019). The gated delta rule starts as in its paper:
    A uniform on [1, 16], time steps log-uniform on [1e-3, 0.1].
    """
    kind = name.rsplit(".", 1)[-1]
    if kind.endswith("norm"):
        return torch.ones(shape)
    uniform = torch.rand(shape, generator=generator)
    if kind == "A_log":
        return torch.log(1 + 15 * uniform)
    if kind == "dt_bias":
        step = torch.exp(math.log(1e-3) + uniform * (math.log(0.1) - math.log(1e-3)))
        return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
    if kind.startswith("conv_"):
        return (2 * uniform - 1) / math.sqrt(CONV)
    scale = 1 / math.sqrt(shape[-1])
    if kind in ("o", "down"):
        scale /= math.sqrt(2 * slots)
    return torch.randn(shape, generator=generator) * scale


class Model(nn.Module):
    """A plain model: an architecture with weights of its own."""

    def __init__(
        self, architecture: Architecture, frame: Frame, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.frame = frame
        generator = generator or torch.Generator().manual_seed(0)
        for name, shape in model_shapes(architecture, frame).items():
            add_parameter(self, name, initial(name, shape, len(architecture.layers), generator))

    def forward(
        self, tokens: Tensor, position: int = 0, states: Mapping[int, State] | None = None
    ) -> tuple[Tensor, dict[int, State]]:
        """Tokens [B, T] -> (logits [B, T, vocabulary], states); see :func:`forward`."""
        weights = dict(self.named_parameters())
        return forward(weights, self.architecture, self.frame, tokens, position=position, states=states)


def add_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Register a parameter under a dotted name, making the modules between."""
    *path, leaf = name.split(".")
    for step in path:
        if step not in module._modules:
            module.add_module(step, nn.Module())
        module = cast(nn.Module, module._modules[step])
    module.register_parameter(leaf, nn.Parameter(value))
