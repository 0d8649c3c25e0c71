"""Names of parameters in transformers' Llama, Qwen2 and Qwen3, which are alike."""

from collections.abc import Sequence

ENDS = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
BLOCKS = {
    "mixer.pre_norm": "input_layernorm.weight",
    "mixer.q": "self_attn.q_proj.weight",
    "mixer.k": "self_attn.k_proj.weight",
    "mixer.v": "self_attn.v_proj.weight",
    "mixer.o": "self_attn.o_proj.weight",
    "mixer.q_bias": "self_attn.q_proj.bias",
    "mixer.k_bias": "self_attn.k_proj.bias",
    "mixer.v_bias": "self_attn.v_proj.bias",
    "mixer.q_norm": "self_attn.q_norm.weight",
    "mixer.k_norm": "self_attn.k_norm.weight",
    "ffn.pre_norm": "post_attention_layernorm.weight",
    "ffn.gate": "mlp.gate_proj.weight",
    "ffn.up": "mlp.up_proj.weight",
    "ffn.down": "mlp.down_proj.weight",
}


def transformers_name(name: str, slots: Sequence[int]) -> str:
    """The name in transformers of a parameter of :func:`space.shapes.model_shapes`.

    Args:
        name: such as ``layers.3.mixer.q``.
        slots: the slots that are transformers' layers, in order.
    """
    if name in ENDS:
        return ENDS[name]
    _, slot, block = name.split(".", 2)
    return f"model.layers.{slots.index(int(slot))}.{BLOCKS[block]}"
