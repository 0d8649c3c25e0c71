"""The softmax mixers in torch, with RoPE and their cache."""

import torch
from torch import Tensor

from space.attention.projection import heads_of, project, rms_norm
from space.attention.rotary import rotate
from space.attention.softmax import softmax_attention
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
    d, window = call.model_config.head_dim, call.layer.window
    q, k, v = (heads_of(project(hidden, weights[name]), d) for name in ("q", "k", "v"))
    if call.model_config.qk_norm:
        q, k = rms_norm(q, weights["q_norm"]).to(v.dtype), rms_norm(k, weights["k_norm"]).to(v.dtype)
    q, k = rotate(q, call.position), rotate(k, call.position)
    if call.state:
        k = torch.cat([call.state["key"].transpose(1, 2), k], dim=1)
        v = torch.cat([call.state["value"].transpose(1, 2), v], dim=1)
    out = softmax_attention(q, k, v, window, None if call.mask is None else call.mask[:, -k.shape[1] :])
    held = slice(1 - window, None) if window else slice(None)
    return out.flatten(2), {"key": k[:, held].transpose(1, 2), "value": v[:, held].transpose(1, 2)}
