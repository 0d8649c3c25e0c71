"""A GGUF file in the form of a transformers folder: settings of ``config.json``, and tensors by name.

The optional package ``gguf`` (extra ``hf``) reads the file and dequantises its tensors; what they then
compute is the model. Two conventions of llama.cpp are undone: the rows of a Llama's q and k are interleaved
for its form of RoPE, and Llama 3's scaling is stored as a tensor of factors.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from space.io.errors import InputError
from space.layer import Llama3Scaling, Rope
from supernet.parent.folder import TensorOf

ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Settings of transformers, and the keys of their values after the architecture's name.
KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_experts": "expert_count",
    "sliding_window": "attention.sliding_window",
}
ROPE_FACTORS = "rope_freqs.weight"
# What Llama 3.1, 3.2 and 3.3 have, beside the factor of each model; a file has only the resulting factors.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GgufFile:
    """An open GGUF file.

    Args:
        path: the file.

    Attributes:
        settings: as in ``config.json``.

    Raises:
        InputError: the package ``gguf`` is not installed, or the file is not a complete GGUF of a supported
            kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.library: Any = importlib.import_module("gguf")
        except ImportError:
            raise InputError(
                f"{path}: needs the package gguf; `pip install 'formfit[hf]'` installs it"
            ) from None
        try:
            with np.errstate(all="ignore"):  # sizes in a damaged file may be anything
                self.reader = self.library.GGUFReader(path)
                self.settings = self._settings()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{path}: not a complete GGUF file ({reason})") from None

    def _field(self, key: str) -> Any:
        field = self.reader.fields.get(key)
        value = None if field is None else field.contents()
        if isinstance(value, float):  # an fp32 value stands for the decimal that it was written from
            return float(str(np.float32(value)))
        return value

    def _settings(self) -> dict[str, Any]:
        family = self._field("general.architecture")
        settings = {name: self._field(f"{family}.{key}") for name, key in KEYS.items()}
        sizes = {tensor.name: tensor.shape for tensor in self.reader.tensors}
        rotated = self._field(f"{family}.rope.dimension_count")
        scaling = self._field(f"{family}.rope.scaling.type")
        if rotated and settings["hidden_size"] and settings["num_attention_heads"]:
            head_dim = settings["head_dim"] or settings["hidden_size"] // settings["num_attention_heads"]
            settings["partial_rotary_factor"] = rotated / head_dim
        if scaling not in (None, "none"):
            settings["rope_scaling"] = {"rope_type": scaling}
        elif ROPE_FACTORS in sizes:
            settings["rope_scaling"] = self._llama3(settings)
        embedding = sizes.get("token_embd.weight")
        return settings | {
            "model_type": family,
            "vocab_size": None if embedding is None else int(embedding[-1]),
            "tie_word_embeddings": "output.weight" not in sizes,
        }

    def _llama3(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The scaling whose factors the file has; an InputError if they are of none that is known."""
        (tensor,) = (tensor for tensor in self.reader.tensors if tensor.name == ROPE_FACTORS)
        factors = self._values(tensor).double()
        theta, head_dim = settings["rope_theta"] or 10000.0, 2 * len(factors)
        scaling = Llama3Scaling(factor=float(factors.max()), **LLAMA3)  # type: ignore[arg-type]
        plain, scaled = (
            torch.tensor(Rope(theta=theta, scaling=given).frequencies(head_dim), dtype=torch.float64)
            for given in (None, scaling)
        )
        if not torch.allclose(plain / scaled, factors, rtol=1e-4):
            raise InputError(f"{self.path}: {ROPE_FACTORS} is not Llama 3's scaling, which is not supported")
        return {"rope_type": "llama3", **vars(scaling)}

    def _values(self, tensor: Any) -> torch.Tensor:
        """A tensor's values in fp32."""
        try:
            values = self.library.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise InputError(f"{self.path}: {tensor.name}: {error}") from None
        return torch.from_numpy(np.array(values, np.float32))

    def tensors(self) -> Iterator[TensorOf]:
        """Yield every tensor with the file and its name in transformers, one in memory at a time.

        Raises:
            InputError: a tensor has a type that the package cannot dequantise.
        """
        heads = {"q": self.settings["num_attention_heads"], "k": self.settings["num_key_value_heads"]}
        for tensor in self.reader.tensors:
            if tensor.name == ROPE_FACTORS:
                continue
            name, value = tensor.name, self._values(tensor)
            if name in ENDS:
                yield self.path, ENDS[name], value
                continue
            _, slot, block, kind = [*name.split("."), "", "", ""][:4]
            for projection, count in heads.items():
                if self.settings["model_type"] == "llama" and block == f"attn_{projection}":
                    value = _halves(value, count or heads["q"])
            yield self.path, f"model.layers.{slot}.{BLOCKS.get(block, block)}.{kind}", value


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of heads whose rotated pairs are neighbours, with each pair's rows in the halves of its head."""
    if len(weight) % (2 * heads):
        return weight  # its shape is refused by the reader
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()
