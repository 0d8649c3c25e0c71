"""Linear attention with the feature map elu(x) + 1 (Katharopoulos et al. 2020), and a norm of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.mixers import register_mixer
from space.mixers.mixer import Mixer, MixerCall, State, Weights
from space.mixers.recurrent import recurrent_flops, recurrent_shapes, recurrent_state

if TYPE_CHECKING:
    from torch import Tensor

    from space.onnx.block import Block


def linear_forward(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """The recurrence without decay: hidden [B, T, width] -> ([B, T, H*D], state)."""
    import torch.nn.functional as F

    from space.attention.linear import linear_attention
    from space.mixers.recurrent_torch import norm_heads, project_heads

    q, k, v = project_heads(weights, hidden, call.model_config.head_dim)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out, state = linear_attention(q, k, v, rule="linear", state=call.state.get("s"))
    return norm_heads(weights, out), {"s": state}


def write_linear(block: Block) -> tuple[str, dict[str, str]]:
    """The same as nodes of a graph."""
    from space.mixers.recurrent_onnx import norm_heads_nodes, recurrence_node

    graph, sizes = block.graph, block.sizes
    queries_keys, v = graph.split(block.packed(), [sizes["q"] + sizes["k"], sizes["v"]])
    mapped = graph.add("Add", graph.add("Elu", queries_keys), graph.scalar("one", 1.0))
    q, k = graph.split(mapped, [sizes["q"], sizes["k"]])
    out, state = recurrence_node(block, q, k, v, rule="linear")
    return norm_heads_nodes(block, out), {"s": state}


register_mixer(
    Mixer(
        name="linear",
        mixer_class="linear",
        shapes=recurrent_shapes,
        state_shapes=recurrent_state,
        forward=linear_forward,
        write=write_linear,
        flops=recurrent_flops,
        projections=("q", "k", "v"),
    )
)
