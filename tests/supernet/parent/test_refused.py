"""Every input that is no parent, or one that is not supported, is one line that names the reason."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from space import InputError
from supernet.data.tokenizer import load_tokenizer
from supernet.parent import read_parent
from tests.supernet.parent.models import LLAMA3, a_parent, write_gguf


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sharded folder of each family."""
    made = {}
    for family in ("llama", "qwen2", "qwen3"):
        made[family] = tmp_path_factory.mktemp(family)
        a_parent(family).save_pretrained(made[family], max_shard_size="20KB")
    return made


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's folder."""

    def copy(family: str) -> Path:
        for path in folders[family].iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    return copy


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_parent(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another family": ("llama", {"model_type": "gemma2"}, "model_type 'gemma2' is not supported; supported"),
    "family a list": ("llama", {"model_type": []}, "model_type [] is not supported"),
    "code": ("llama", {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, "never executed"),
    "code of a known family": ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "never executed"),
    "another class": ("llama", {"architectures": ["LlamaForTokenClassification"]}, "LlamaForCausalLM"),
    "text for a size": ("llama", {"hidden_size": "wide"}, "hidden_size 'wide' is not a positive integer"),
    "text for a number": ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers '2' is not a positive"),
    "true for a size": ("llama", {"vocab_size": True}, "vocab_size True is not a positive integer"),
    "text for epsilon": ("llama", {"rms_norm_eps": "1e-5"}, "norm_eps: '1e-5' is not a number above 0"),
    "text for theta": ("llama", {"rope_parameters": ROPE | {"rope_theta": "1"}}, "theta: '1' is not"),
    "text for tied": ("llama", {"tie_word_embeddings": "no"}, "tie_embeddings: 'no' is not true or false"),
    "no layers": ("llama", {"num_hidden_layers": None}, "num_hidden_layers None is not a positive integer"),
    "many layers": ("llama", {"num_hidden_layers": 10**12}, "is more than 256"),
    "width": ("llama", {"hidden_size": 40}, "hidden_size 40 is not a multiple of 16"),
    "head size": ("llama", {"head_dim": 12}, "head_dim 12 is not a multiple of 8"),
    "kv heads": ("llama", {"num_key_value_heads": 2}, "num_key_value_heads 2 does not divide 3 heads"),
    "attention biases": ("llama", {"attention_bias": True}, "a bias of the output projection"),
    "qwen3 biases": ("qwen3", {"attention_bias": True}, "a bias of the output projection"),
    "ffn biases": ("llama", {"mlp_bias": True}, "biases in the FFN"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    "sliding": ("qwen2", {"use_sliding_window": True}, "is not supported (sliding windows)"),
    "llama with a window": ("llama", {"sliding_window": 64}, "sliding_window 64"),
    "layer types": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layers of several"),
    "experts": ("llama", {"num_local_experts": 8}, "mixture of experts"),
    "soft cap": ("llama", {"final_logit_softcapping": 30.0}, "soft-capped logits"),
    "multiplier": ("llama", {"embedding_multiplier": 12.0}, "an embedding multiplier"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantised weights"),
    "yarn": ("llama", {"rope_parameters": ROPE | {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
    "old dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None},
                    "rope_type 'dynamic' is not supported"),
    "partial": ("llama", {"partial_rotary_factor": 0.5}, "partial rotation is not supported"),
    "rope by layer": ("llama", {"rope_parameters": {"full_attention": ROPE}}, "several kinds of layers"),
    "rope a list": ("llama", {"rope_parameters": [1]}, "expected an object, found [1]"),
    "llama3 without factors": ("llama", {"rope_parameters": ROPE | {"rope_type": "llama3"}},
                               "scaling: expected an object with factor, low_freq_factor"),
    "llama3 upside down": ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 9.0}}, "not below"),
    "other sizes": ("llama", {"intermediate_size": 80}, "its settings say (80, 48)"),
    "more layers": ("llama", {"num_hidden_layers": 3}, "has no weight model.layers.2"),
    "fewer layers": ("llama", {"num_hidden_layers": 1}, "is a weight that llama models do not have"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, copied: Callable[[str], Path]) -> None:
    family, change, words = SETTINGS[name]
    folder = copied(family)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert words in refusal(folder)


def broken(folder: Path, how: str) -> None:
    """Corrupt a sharded folder."""
    shard = max(folder.glob("model-*.safetensors"), key=lambda path: path.stat().st_size)
    tensors = load_file(shard)
    name = next(key for key in sorted(tensors) if tensors[key].ndim == 2)
    index = folder / "model.safetensors.index.json"
    if how in ("no config", "nothing", "a pickle"):
        for path in [folder / "config.json"] if how == "no config" else list(folder.iterdir()):
            if how != "a pickle" or path.name != "config.json":
                path.unlink()
        if how == "a pickle":
            (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    elif how == "config not JSON":
        (folder / "config.json").write_text("{")
    elif how == "config a list":
        (folder / "config.json").write_text("[]")
    elif how == "no index":
        index.unlink()
    elif how == "index outside":
        index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    elif how == "index empty":
        index.write_text("{}")
    elif how == "shard missing":
        shard.unlink()
    elif how == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif how == "tokenizer of another vocabulary":
        words = {str(i): i for i in range(62)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": words}}))
    elif how == "tokenizer with more added":
        added = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 61, "content": "<x>"}]}
        (folder / "tokenizer.json").write_text(json.dumps(added))
    elif how == "tokenizer not one":
        (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": "b"}}}')
    else:
        if how == "tensor missing":
            del tensors[name]
        elif how == "bias":
            tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(48)
        elif how == "shape":
            tensors[name] = tensors[name][:-1].contiguous()
        elif how == "NaN":
            tensors[name][0, 0] = torch.nan
        elif how == "integers":
            tensors[name] = tensors[name].to(torch.int8)
        save_file(tensors, shard)


BROKEN = {
    "nothing": "config.json: cannot be read",
    "no config": "config.json: cannot be read",
    "a pickle": "pytorch_model.bin is a pickle, which is never loaded",
    "config not JSON": "config.json: not a complete JSON file",
    "config a list": "config.json: expected a JSON object, found list",
    "no index": "neither model.safetensors nor model.safetensors.index.json",
    "index outside": "'../other.safetensors', expected a safetensors file beside it",
    "index empty": "expected a weight_map",
    "shard missing": "safetensors: not a complete safetensors file",
    "shard cut": "safetensors: not a complete safetensors file",
    "tokenizer of another vocabulary": "tokenizer.json: has 62 tokens, the model's vocabulary has 61",
    "tokenizer with more added": "tokenizer.json: has 62 tokens, the model's vocabulary has 61",
    "tokenizer not one": "tokenizer.json: not a Hugging Face tokenizer.json",
    "tensor missing": "has no weight model.",
    "bias": "o_proj.bias is a weight that llama models do not have",
    "shape": "its settings say (",
    "NaN": "expected finite",
    "integers": "holds torch.int8",
}


@pytest.mark.parametrize("how", BROKEN)
def test_incomplete_folder(how: str, copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    broken(folder, how)
    assert BROKEN[how] in refusal(folder)


def test_paths_that_are_no_parent(tmp_path: Path) -> None:
    assert "not found; give a folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert "no parent; give a folder" in refusal(tmp_path / "weights.safetensors")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "holds 2 GGUF files; give one of them" in refusal(tmp_path)


def test_gguf_that_is_cut_off(tmp_path: Path) -> None:
    """At every hundredth byte of the header and at some of the data."""
    path = tmp_path / "model.gguf"
    write_gguf(path, a_parent("llama"))
    whole = path.read_bytes()
    cuts = [*range(0, 4000, 100), *range(4000, len(whole), 20000), len(whole) - 1]
    for size in cuts:
        path.write_bytes(whole[:size])
        assert "not a complete GGUF file" in refusal(path), size
    path.write_bytes(b"other" + whole)
    assert "not a complete GGUF file" in refusal(path)


def test_gguf_of_another_kind(tmp_path: Path) -> None:
    path, model = tmp_path / "model.gguf", a_parent("llama")
    write_gguf(path, model, factors=torch.linspace(1, 9, 8).numpy())
    assert "rope_freqs.weight is not Llama 3's scaling" in refusal(path)
    for before, after, words in (
        (b"llama", b"falco", "model_type 'falco' is not supported"),
        (b"blk.0.attn_q.", b"blk.0.attn_x.", "model.layers.0.attn_x.weight is a weight that llama models"),
    ):
        write_gguf(path, model)
        path.write_bytes(path.read_bytes().replace(before, after))
        assert words in refusal(path)


def test_packages_that_are_not_installed(
    copied: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gguf" / "model.gguf"
    path.parent.mkdir()
    write_gguf(path, a_parent("llama"))
    parent = read_parent(path)
    for package in ("transformers", "gguf"):
        monkeypatch.setitem(sys.modules, package, None)
    assert "needs the package gguf; `pip install 'formfit[hf]'`" in refusal(path)
    assert parent.tokenizer
    with pytest.raises(InputError, match=r"needs transformers; `pip install 'formfit\[hf\]'`"):
        load_tokenizer(parent.tokenizer)
    assert read_parent(copied("llama")).family == "llama"  # needs neither
