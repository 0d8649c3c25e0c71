"""Every mixer block written a second time: one sequence, token by token, in fp64.

Nothing here is shared with :mod:`space`: each formula is that of its paper, in the form in which it
stands there, so that a wrong slice, order or sign shows as a difference. Autograd runs through it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from space.architecture import Layer, ModelConfig
from space.layer import Rope

Changed = tuple[Tensor, Tensor | None]
FLOOR = -20.0  # of log decays that have no bound of their own


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def norm(x: Tensor, gain: Tensor, eps: float = 1e-5) -> Tensor:
    return x / ((x**2).mean(-1, keepdim=True) + eps).sqrt() * gain


def unit(x: Tensor) -> Tensor:
    return x / ((x**2).sum(-1, keepdim=True) + 1e-6).sqrt()


def frequency(share: float, rope: Rope) -> float:
    """Radians per token, in the form of transformers' ``_compute_llama3_parameters``."""
    plain, s = rope.theta**-share, rope.scaling
    wavelength = 2 * math.pi / plain
    if s is None or wavelength < s.original_max_position_embeddings / s.high_freq_factor:
        return plain
    if wavelength > s.original_max_position_embeddings / s.low_freq_factor:
        return plain / s.factor
    smooth = s.original_max_position_embeddings / wavelength - s.low_freq_factor
    smooth /= s.high_freq_factor - s.low_freq_factor
    return (1 - smooth) * plain / s.factor + smooth * plain


def rotate(x: Tensor, position: int, rope: Rope) -> Tensor:
    """One token's heads [H, D], pair by pair as complex numbers."""
    half = x.shape[-1] // 2
    rates = [frequency(pair / half, rope) for pair in range(half)]
    angles = position * torch.tensor(rates, dtype=torch.float64)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def convolve(rows: Tensor, taps: Tensor) -> Tensor:
    """Causal depthwise convolution: rows [T, C], taps [C, K]; the last tap is the present's."""
    size = taps.shape[1]
    return torch.stack(
        [sum((taps[:, -1 - i] * rows[t - i] for i in range(min(size, t + 1))), rows[t] * 0)
         for t in range(len(rows))]
    )  # fmt: skip


def naive_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Row by row: q [T, H, D], k and v [S, Hkv, D], the last T of S tokens."""
    (length, heads, dim), past = q.shape, len(k) - len(q)
    rows = []
    for t in range(length):
        last = past + t + 1
        first = max(0, last - window) if window else 0
        for h in range(heads):
            kv = h * k.shape[1] // heads
            shares = torch.softmax(k[first:last, kv] @ q[t, h] / math.sqrt(dim), dim=0)
            rows.append(shares @ v[first:last, kv])
    return torch.stack(rows).view(length, heads, dim)


def naive_mixer(
    w: dict[str, Tensor], x: Tensor, layer: Layer, model_config: ModelConfig
) -> tuple[Tensor, Tensor | None]:
    """A mixer block with its norm and residual, on x [T, width]; also S after it [Hkv, D, D], if any."""
    hidden = norm(x, w["pre_norm"], model_config.norm_eps)
    change, state = ORACLES[layer.mixer](w, hidden, layer, model_config)
    return x + change, state


def _short_conv(w: dict[str, Tensor], hidden: Tensor, layer: Layer, model_config: ModelConfig) -> Changed:
    b, c, inner = (hidden @ w[name].T for name in ("in_b", "in_c", "in_x"))
    return (c * convolve(b * inner, w["conv_x"])) @ w["out"].T, None


def _softmax(w: dict[str, Tensor], hidden: Tensor, layer: Layer, model_config: ModelConfig) -> Changed:
    bias = {name: w.get(f"{name}_bias", torch.zeros(())) for name in "qkv"}
    rows = {name: hidden @ w[name].T + bias[name] for name in "qkv"}
    q, k, v = (rows[name].view(len(hidden), -1, model_config.head_dim) for name in "qkv")
    if model_config.qk_norm:
        q, k = norm(q, w["q_norm"], model_config.norm_eps), norm(k, w["k_norm"], model_config.norm_eps)
    q, k = (torch.stack([rotate(row, t, model_config.rope) for t, row in enumerate(y)]) for y in (q, k))
    return naive_attention(q, k, v, layer.window).flatten(1) @ w["o"].T, None


def _recurrence(w: dict[str, Tensor], hidden: Tensor, layer: Layer, model_config: ModelConfig) -> Changed:
    """The linear mixers, which differ in :func:`_token` and :func:`_output`."""
    q, k, v = (hidden @ w[name].T for name in "qkv")
    if layer.mixer in ("mamba2", "deltanet", "gated_deltanet", "kda"):
        q, k, v = (silu(convolve(y, w[f"conv_{name}"])) for name, y in (("q", q), ("k", k), ("v", v)))
    state = torch.zeros(layer.kv_heads, model_config.head_dim, model_config.head_dim, dtype=hidden.dtype)
    outs = []
    for t in range(len(hidden)):
        token = _token(w, hidden[t], (q[t], k[t], v[t]), layer, model_config, t)
        state = token["kept"][:, :, None] * state
        write = token["v"]
        if layer.mixer in ("deltanet", "gated_deltanet", "kda"):
            write = write - torch.stack([s.T @ key for s, key in zip(state, token["k"], strict=True)])
        state = state + token["beta"][:, None, None] * token["k"][:, :, None] * write[:, None, :]
        row = [state[h * layer.kv_heads // layer.heads].T @ token["q"][h] for h in range(layer.heads)]
        outs.append(_output(w, hidden[t], token["scale"] * torch.stack(row), token, layer))
    return torch.stack(outs) @ w["o"].T, state


# By mixer: (weights, hidden [T, width], layer, model_config) -> (change of the residual stream, S or None).
ORACLES: dict[str, Callable[[dict[str, Tensor], Tensor, Layer, ModelConfig], Changed]] = {
    "attention": _softmax,
    "sliding": _softmax,
    "short_conv": _short_conv,
    "linear": _recurrence,
    "retnet": _recurrence,
    "mamba2": _recurrence,
    "gla": _recurrence,
    "hgrn2": _recurrence,
    "deltanet": _recurrence,
    "gated_deltanet": _recurrence,
    "kda": _recurrence,
}


def _token(
    w: dict[str, Tensor], hidden: Tensor, qkv: Any, layer: Layer, config: ModelConfig, t: int
) -> dict[str, Any]:
    """The output of the recurrence for one token; ``kept`` [Hkv, D] is the share of the state that stays."""
    d = config.head_dim
    q, k, v = (y.view(-1, d) for y in qkv)
    kept, beta, scale, skip = torch.ones_like(k), torch.ones_like(k[:, 0]), d**-0.5, None
    match layer.mixer:
        case "linear":
            q, k = (torch.where(y > 0, y + 1, y.clamp(max=0).exp()) for y in (q, k))
        case "retnet":
            q, k = rotate(q, t, config.rope), rotate(k, t, config.rope)
            kept = kept * (1 - 2.0 ** (-5 - torch.arange(layer.kv_heads, dtype=k.dtype)))[:, None]
        case "mamba2":
            dt = softplus(w["decay"] @ hidden + w["dt_bias"])[:, None]
            kept = kept * (-w["A_log"].exp()[:, None] * dt).clamp(min=FLOOR).exp()
            skip, v, scale = w["D"][:, None] * v, dt * v, 1.0
        case "gla":
            logits = w["decay_up"] @ (w["decay_down"] @ hidden) + w["decay_bias"]
            kept = (torch.sigmoid(logits) ** (1 / 16)).view(-1, d).clamp(min=math.exp(FLOOR))
        case "hgrn2":
            low = torch.sigmoid(w["lower_bound"].view(-1, d).clamp(min=FLOOR))
            kept = low + (1 - low) * torch.sigmoid(k)
            q, k = silu(q), 1 - kept
        case "kda":
            logits = (w["decay_up"] @ (w["decay_down"] @ hidden) + w["dt_bias"]).view(-1, d)
            kept = (-5 * torch.sigmoid(w["slope_log"].exp()[:, None] * logits)).exp()
        case "gated_deltanet":
            step = softplus(w["decay"] @ hidden + w["dt_bias"])[:, None]
            kept = kept * (-w["A_log"].exp()[:, None] * step).clamp(min=FLOOR).exp()
    if layer.mixer in ("deltanet", "gated_deltanet", "kda"):
        q, k, beta = unit(q), unit(k), torch.sigmoid(w["beta"] @ hidden)
    return {"q": q, "k": k, "v": v, "kept": kept, "beta": beta, "scale": scale, "skip": skip}


def _output(w: dict[str, Tensor], hidden: Tensor, row: Tensor, token: dict[str, Any], layer: Layer) -> Tensor:
    """Norm and gate of one token: [H, D] -> [H * D]."""
    match layer.mixer:
        case "mamba2":
            skip = [token["skip"][h * layer.kv_heads // layer.heads] for h in range(layer.heads)]
            gate = silu(w["gate"] @ hidden).view(row.shape)
            return norm((row + torch.stack(skip)) * gate, w["norm"]).flatten()
        case "kda":
            return norm(row, w["norm"]).flatten() * torch.sigmoid(w["gate"] @ hidden)
        case "retnet" | "gla" | "gated_deltanet":
            return norm(row, w["norm"]).flatten() * silu(w["gate"] @ hidden)
        case _:
            return norm(row, w["norm"]).flatten()
