"""Small random parents of every family, made by transformers, as folders and as GGUF files."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.contracts import scatter

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
# Family, and what differs from SETTINGS.
PARENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False, "rms_norm_eps": 1e-3}),
    "heads of 8": ("llama", {"head_dim": 8, "num_attention_heads": 6, "intermediate_size": 36}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": False, "rms_norm_eps": 1e-2}),
}
SETTINGS: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def a_parent(name: str, **changes: Any) -> Any:
    """A random model of transformers with distinct values in every parameter."""
    family, differing = PARENTS[name]
    config_class, model_class = CLASSES[family]
    settings = SETTINGS | {"num_key_value_heads": 1 if name != "heads of 8" else 2} | differing | changes
    torch.manual_seed(1)
    model = model_class(config_class(**settings, attn_implementation="eager"))
    scatter(model)
    return model.eval()


def saved(folder: Path, name: str, **changes: Any) -> Any:
    """The model, written as transformers writes it."""
    model = a_parent(name, **changes)
    model.save_pretrained(folder)
    return model


def tokens(rows: int = 2, length: int = 50, seed: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 61, (rows, length)))


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, use_cache=False).logits
    return found


# GGUF, by llama.cpp's conventions (convert_hf_to_gguf.py): names, and a Llama's interleaved q and k.

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's permutation of a Llama's q and k."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(
    path: Path, model: Any, kind: str = "F32", factors: np.ndarray[Any, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Write a model; returns what its matrices became, by transformers' names."""
    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if head_dim := getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    quantisation = gguf.GGMLQuantizationType[kind]
    became = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((n for part, n in heads.items() if family == "llama" and part in name), 0)
        value = interleaved(value, count) if count else value
        if name in GGUF_ENDS:
            theirs = GGUF_ENDS[name]
        else:
            _, _, slot, block = name.split(".", 3)
            block, leaf = block.rsplit(".", 1)
            theirs = f"blk.{slot}.{GGUF_NAMES[block]}.{leaf}"
        if value.ndim == 2 and kind != "F32":
            packed = gguf.quants.quantize(value, quantisation)
            writer.add_tensor(theirs, packed, raw_dtype=quantisation)
            value = gguf.quants.dequantize(packed, quantisation)
        else:
            writer.add_tensor(theirs, value)
        back = (
            value.reshape(count, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            if count
            else value
        )
        became[name] = torch.from_numpy(np.ascontiguousarray(back))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return became
