"""The softmax mixers in torch, with RoPE and their cache."""

import torch
from torch import Tensor

from space.attention.projection import heads_of, project, rms_norm
from space.attention.rotary import rotate
from space.attention.softmax import softmax_attention
from space.layer import ModelConfig
from space.mixers.mixer import MixerCall, State, Weights


def softmax_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """Causal softmax attention over all tokens, or over the layer's window.

    Args:
        weights: of the block.
        hidden: the normed input [B, T, W].
        call: the layer and what came before; the state holds keys after RoPE, [B, Hkv, tokens, D].

    Returns:
        The output matrix's input [B, T, H*D], and the state after the last token.
    """
    window = call.layer.window
    q, k, v = rotated_heads(weights, hidden, call.position, call.model_config)
    if call.state:
        k = torch.cat([call.state["key"].transpose(1, 2), k], dim=1)
        v = torch.cat([call.state["value"].transpose(1, 2), v], dim=1)
    out = softmax_attention(q, k, v, window, None if call.mask is None else call.mask[:, -k.shape[1] :])
    held = slice(1 - window, None) if window else slice(None)
    return out.flatten(2), {"key": k[:, held].transpose(1, 2), "value": v[:, held].transpose(1, 2)}


def rotated_heads(
    weights: Weights, hidden: Tensor, position: int, model_config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, D] and keys [B, T, Hkv, D] as they are compared, and values [B, T, Hkv, D].

    Args:
        weights: of the block.
        hidden: the normed input [B, T, W].
        position: place of the first token in its sequence.
        model_config: the settings of the space.
    """
    q, k, v = (_projected(weights, hidden, name, model_config) for name in ("q", "k", "v"))
    if model_config.qk_norm:
        eps = model_config.norm_eps
        q, k = (rms_norm(x, weights[f"{n}_norm"], eps).to(v.dtype) for n, x in (("q", q), ("k", k)))
    q, k = (rotate(x, position, model_config.rope) for x in (q, k))
    return q, k, v


def _projected(weights: Weights, hidden: Tensor, name: str, model_config: ModelConfig) -> Tensor:
    """Queries, keys or values with their bias, if any: [B, T, heads, D]."""
    x = project(hidden, weights[name])
    if model_config.qkv_bias:
        x = (x + weights[f"{name}_bias"]).to(x.dtype)  # a bias stays in fp32 where matrices are bf16
    return heads_of(x, model_config.head_dim)
