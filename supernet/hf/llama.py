"""Reads a Llama's folder as the weights of a space's largest architecture.

The folder is what transformers writes for ``LlamaForCausalLM`` (Touvron et al. 2023): ``config.json`` and
safetensors, in one file or in shards with an index. Both are read as data, without transformers. An
all-attention architecture of equal layers computes the same function, so any difference (a size, an epsilon,
a RoPE setting) is an error, never approximated.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from space import Architecture, InputError, Space, genome
from space.io.artefact import canonical_json, digest, file_digest
from space.layer import NORM_EPS, ROPE_THETA
from space.shapes import model_shapes

Settings = dict[str, Any]
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ENDS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
BLOCKS = {
    "mixer.pre_norm": "input_layernorm",
    "mixer.q": "self_attn.q_proj",
    "mixer.k": "self_attn.k_proj",
    "mixer.v": "self_attn.v_proj",
    "mixer.o": "self_attn.o_proj",
    "ffn.pre_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
# Defaults of transformers for keys that config.json omits; sizes have none.
DEFAULTS: Settings = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}


def read_llama(folder: Path, space: Space) -> tuple[Architecture, dict[str, Tensor]]:
    """Read a Llama's weights.

    Args:
        folder: folder of a ``LlamaForCausalLM``.
        space: the space whose largest architecture the Llama has to be.

    Returns:
        The largest architecture, and the weights in fp32, named as in its sub-model.

    Raises:
        InputError: the folder is incomplete, or not a Llama of exactly that architecture.
    """
    architecture = genome.largest(space)
    _check_config(folder / "config.json", space, architecture)
    names = {_llama_name(name): name for name in model_shapes(architecture, space.config)}
    shapes = {_llama_name(name): shape for name, shape in model_shapes(architecture, space.config).items()}
    weights: dict[str, Tensor] = {}
    for path, llama_name, tensor in _tensors(folder):
        if llama_name.endswith("rotary_emb.inv_freq") or (
            space.tie_embeddings and llama_name == "lm_head.weight"
        ):
            continue  # a buffer in old folders; the embedding a second time
        expected = shapes.get(llama_name)
        if tuple(tensor.shape) != expected:
            raise InputError(
                f"{path}: {llama_name} is {tuple(tensor.shape)}, space {space.name} expects {expected}"
            )
        if tensor.dtype not in FLOAT_TYPES or not tensor.isfinite().all():
            raise InputError(
                f"{path}: {llama_name} holds {tensor.dtype}, expected finite fp32, bf16, fp16 or fp64"
            )
        weights[names[llama_name]] = tensor.to(torch.float32)
    missing = sorted(llama_name for llama_name, name in names.items() if name not in weights)
    if missing:
        raise InputError(f"{folder}: {missing[0]} is not in its safetensors ({len(missing)} are missing)")
    return architecture, weights


def pretrained_digest(folder: Path) -> str:
    """The sha256 of the settings and weights in a Llama's folder, as 64 hexadecimal digits.

    Args:
        folder: the folder; its path is not part of the digest.

    Raises:
        InputError: a file is missing.
    """
    paths = [folder / "config.json", *_weight_files(folder)]
    try:
        return digest(canonical_json({path.name: file_digest(path) for path in paths}))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _llama_name(name: str) -> str:
    if name in ENDS:
        return f"{ENDS[name]}.weight"
    _, slot, block = name.split(".", 2)
    return f"model.layers.{slot}.{BLOCKS[block]}.weight"


def _check_config(path: Path, space: Space, architecture: Architecture) -> None:
    """Check that the space's largest architecture is a Llama, and that the folder's Llama is that one.

    Raises:
        InputError: either is not so.
    """
    first = architecture.layers[0]
    uniform = all(layer == first for layer in architecture.layers)
    if not (uniform and first.mixer == "attention" and first.ffn and not space.qk_norm):
        extra = ", with q/k norm" if space.qk_norm else ""
        raise InputError(
            f"train.init: {path.parent} holds a Llama (equal layers of attention and an FFN, no q/k norm), "
            f"the largest architecture of space {space.name} is {architecture.describe()}{extra}"
        )
    expected = {
        "model_type": "llama",
        "hidden_size": architecture.width,
        "intermediate_size": first.ffn,
        "num_hidden_layers": space.slots,
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "head_dim": space.head_dim,
        "vocab_size": space.vocab_size,
        "tie_word_embeddings": space.tie_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "rope_type": "default",
        "partial_rotary_factor": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": None,
    }
    found = _settings(path)
    wrong = [f"{key} {found.get(key)!r} (space: {value!r})" for key, value in expected.items()
             if found.get(key) != value]  # fmt: skip
    if wrong:
        raise InputError(
            f"{path}: not the largest architecture of space {space.name}: it has {', '.join(wrong)}"
        )


def _settings(path: Path) -> Settings:
    """The settings of config.json with defaults; RoPE settings are flattened."""
    value = _read_object(path)
    heads, width = value.get("num_attention_heads"), value.get("hidden_size")
    derived = {"num_key_value_heads": heads, "head_dim": None}
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        derived["head_dim"] = width // heads
    derived |= DEFAULTS | {key: item for key, item in value.items() if item is not None}
    rope: Settings = {"rope_theta": ROPE_THETA, "rope_type": "default", "partial_rotary_factor": 1.0}
    for source in (value, value.get("rope_scaling"), value.get("rope_parameters")):
        source = source if isinstance(source, dict) else {}
        rope |= {key: source[key] for key in rope if source.get(key) is not None}
        if source is not value and "type" in source:  # the name in older versions
            rope["rope_type"] = source["type"]
    return derived | rope


def _read_object(path: Path) -> Settings:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); train.init names the folder of a LlamaForCausalLM"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a complete JSON file ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The files of the weights: one file, or the index and its shards."""
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.exists():
        raise InputError(
            f"{folder}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}; train.init reads safetensors only"
        )
    table = _read_object(index).get("weight_map")
    shards = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index}: weight_map names {shard!r}, expected a safetensors file beside it")
    if not shards:
        raise InputError(f"{index}: expected a weight_map from tensors to files")
    return [index, *(folder / shard for shard in shards)]


def _tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """Yields every tensor with its file and name, one in memory at a time."""
    for path in _weight_files(folder):
        if path.name == INDEX_FILE:
            continue
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    yield path, name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a complete safetensors file ({error})") from None
