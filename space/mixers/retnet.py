"""RetNet (Sun et al. 2023): a fixed decay for each head, RoPE, and an output gate.

The paper doubles the values; here they have the size of the keys, which the mixers of a layer share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.layer import ModelConfig
from space.mixers import register_mixer
from space.mixers.mixer import Mixer, MixerCall, Shapes, State, Weights
from space.mixers.recurrent import recurrent_flops, recurrent_shapes, recurrent_state

if TYPE_CHECKING:
    from torch import Tensor

    from space.onnx.block import Block


def retnet_shapes(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    """The parameters of a recurrence, and the output gate."""
    shapes = recurrent_shapes(width, heads, kv_heads, model_config)
    return shapes | {"gate": (heads * model_config.head_dim, width)}


def retnet_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """The recurrence with fixed decays: hidden [B, T, width] -> ([B, T, H*D], state)."""
    import torch.nn.functional as F

    from space.attention.linear import linear_attention
    from space.attention.rotary import rotate
    from space.mixers.recurrent_torch import gate_heads, project_heads

    q, k, v = project_heads(weights, hidden, call.model_config.head_dim)
    q, k = (rotate(x, call.position, call.model_config.rope) for x in (q, k))
    decay = retnet_decay(call.layer.kv_heads, hidden).expand(*hidden.shape[:2], -1)
    out, state = linear_attention(q, k, v, rule="gated", decay=decay, state=call.state.get("s"))
    return gate_heads(weights, hidden, out, F.silu), {"s": state}


def retnet_decay(kv_heads: int, like: Tensor) -> Tensor:
    """The fixed log decays, log(1 - 2^(-5-h)) for kv head h: [Hkv], in fp32 at least."""
    import torch

    head = torch.arange(kv_heads, dtype=torch.float64, device=like.device)
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.log1p(-torch.exp2(-5 - head)).to(wide)


def write_retnet(block: Block) -> tuple[str, dict[str, str]]:
    """The same as nodes of a graph."""
    from space.mixers.recurrent_onnx import gate_heads_nodes, project_parts, recurrence_node

    graph, layer, parts = block.graph, block.layer, project_parts(block)
    q = graph.rotate(parts["q"], layer.heads, "position")
    k = graph.rotate(parts["k"], layer.kv_heads, "position")
    decay = _decay_node(block)
    out, state = recurrence_node(block, q, k, parts["v"], rule="gated", decay=decay)
    return gate_heads_nodes(block, out, parts["gate"]), {"s": state}


def _decay_node(block: Block) -> str:
    """The fixed log decays as a value [B, T, Hkv], which all blocks of so many heads share."""
    import numpy as np

    graph, kv_heads = block.graph, block.layer.kv_heads

    def make() -> str:
        values = np.log1p(-np.exp2(-5.0 - np.arange(kv_heads))).astype(np.float32)
        heads = graph.constant(f"heads.{kv_heads}", np.array([kv_heads], np.int64))
        shape = graph.add("Concat", graph.size(block.source, 0), graph.size(block.source, 1), heads, axis=0)
        return str(graph.add("Expand", graph.constant(f"retnet.{kv_heads}", values), shape))

    return graph.once(f"retnet.{kv_heads}", make)


register_mixer(
    Mixer(
        name="retnet",
        mixer_class="linear",
        shapes=retnet_shapes,
        state_shapes=recurrent_state,
        forward=retnet_forward,
        write=write_retnet,
        flops=recurrent_flops,
        projections=("q", "k", "v", "gate"),
    )
)
