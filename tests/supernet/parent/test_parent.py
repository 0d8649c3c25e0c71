"""Parents of every family against transformers: logits in torch, ONNX and exported folders, and text."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from search.submodel.decoder import Decoder
from search.submodel.export import export
from search.submodel.generation import Sampling, generate
from space.blocks import forward
from space.cost import params
from space.layer import Llama3Scaling, Rope
from supernet.extract import write_model
from supernet.hf.export import load_hf
from supernet.parent import Parent, parent_digest, read_parent
from tests.numerics import TOLERANCE, assert_close
from tests.supernet.parent.models import LLAMA3, PARENTS, a_parent, logits_of, saved, tokens, write_gguf

NEW_TOKENS = 64


def our_logits(parent: Parent, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return forward(parent.weights, parent.architecture, parent.model_config, ids)[0]


def greedy(model: Any, prompt: torch.Tensor) -> list[int]:
    """New tokens of transformers' generate."""
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return [int(token) for token in out[0, prompt.shape[1] :]]


@pytest.mark.parametrize("name", PARENTS)
def test_parent_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    """In torch, as an ONNX graph, and as the folder that is exported: logits, and 64 greedy tokens."""
    theirs = saved(tmp_path / "parent", name)
    parent = read_parent(tmp_path / "parent")
    ids = tokens()
    expected = logits_of(theirs, ids)
    assert_close("torch", our_logits(parent, ids), expected, TOLERANCE["float32"])
    assert parent.family == theirs.config.model_type

    submodel = write_model(
        tmp_path / "model", parent.weights, parent.architecture, parent.model_config, {}, {}, space="parent"
    )
    assert submodel.model_config == parent.model_config  # read back from its JSON
    export(submodel, ["onnx", "hf"])
    decoder = Decoder(tmp_path / "model" / "model.onnx")
    found, _ = decoder(ids.numpy(), decoder.start(batch=2))
    assert_close("onnx", found, expected, TOLERANCE["float32"])
    prompt = ids[:1, :5]
    text = greedy(theirs, prompt)
    assert len(set(text)) > 3
    assert list(generate(decoder, prompt[0].tolist(), NEW_TOKENS, Sampling(), None)) == text

    exported = load_hf(tmp_path / "model" / "hf")
    assert type(exported) is type(theirs)
    assert_close("exported", logits_of(exported, ids), expected, TOLERANCE["float32"])
    exported.generation_config.eos_token_id = None
    assert greedy(exported, prompt) == text
    again = read_parent(tmp_path / "model" / "hf")
    assert again.model_config == parent.model_config
    assert again.architecture == parent.architecture
    assert all(torch.equal(again.weights[key], value) for key, value in parent.weights.items())


def test_settings_that_no_family_has_are_exported_with_code(tmp_path: Path) -> None:
    """Biases and q/k norm together, with a window: the generated modelling file carries all settings."""
    saved(tmp_path / "parent", "qwen2")
    parent = read_parent(tmp_path / "parent")
    layers = list(parent.architecture.layers)
    layers[0] = replace(layers[0], mixer="sliding", window=8)
    architecture = replace(parent.architecture, layers=tuple(layers))
    config = replace(parent.model_config, qk_norm=True, rope=Rope(scaling=scaling_of(LLAMA3)))
    gains = {
        f"layers.{slot}.mixer.{side}_norm": torch.linspace(0.5, 1.5, config.head_dim)
        for slot in range(2)
        for side in "qk"
    }
    weights = parent.weights | gains
    submodel = write_model(tmp_path / "model", weights, architecture, config, {}, {}, space="parent")
    export(submodel, ["onnx", "hf"])
    ids = tokens()
    with torch.no_grad():
        expected = forward(weights, architecture, config, ids)[0]
    exported = load_hf(tmp_path / "model" / "hf")
    assert type(exported).__name__ == "FormfitForCausalLM"
    assert_close("exported", logits_of(exported, ids), expected, TOLERANCE["float32"])
    decoder = Decoder(tmp_path / "model" / "model.onnx")
    assert_close("onnx", decoder(ids.numpy(), decoder.start(batch=2))[0], expected, TOLERANCE["float32"])


def test_int8_of_a_parent_is_close(tmp_path: Path) -> None:
    """Heads of 8 and biases are exported in int8 too."""
    for name in ("heads of 8", "qwen2"):
        saved(tmp_path / name, name)
        parent = read_parent(tmp_path / name)
        out = tmp_path / f"{name} model"
        submodel = write_model(
            out, parent.weights, parent.architecture, parent.model_config, {}, {}, space="parent"
        )
        export(submodel, ["onnx"], ["int8"])
        decoder, ids = Decoder(out / "model.int8.onnx"), tokens()
        found, _ = decoder(ids.numpy(), decoder.start(batch=2))
        expected = our_logits(parent, ids).numpy()
        assert np.square(found - expected).mean() < 0.1**2 * np.square(expected).mean()


def scaling_of(value: dict[str, Any]) -> Llama3Scaling:
    names = Llama3Scaling.__dataclass_fields__
    return Llama3Scaling.from_json({name: value[name] for name in names}, "test")


@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_llama3_scaling_equals_transformers(head_dim: int) -> None:
    for original in (64, 8192):
        value = LLAMA3 | {"original_max_position_embeddings": original}
        config = a_parent("llama", head_dim=head_dim, rope_parameters=value, num_hidden_layers=1).config
        expected, factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        found = Rope(theta=500000.0, scaling=scaling_of(value)).frequencies(head_dim)
        assert factor == 1.0
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)
        if head_dim == 128:
            assert len(set(np.round(np.array(found) / Rope(theta=500000.0).frequencies(head_dim), 6))) > 3


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        {"rope_theta": 500000.0, "rope_scaling": {("type" if k == "rope_type" else k): v
                                                  for k, v in LLAMA3.items() if k != "rope_theta"}},
        {"rope_parameters": LLAMA3},
    ],
    ids=["rope_scaling", "type", "rope_parameters"],
)  # fmt: skip
def test_every_form_of_rope_settings_is_read(rope: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, "llama3")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | rope))
    assert read_parent(tmp_path).model_config.rope == Rope(theta=500000.0, scaling=scaling_of(LLAMA3))


def test_shards_and_bf16(tmp_path: Path) -> None:
    a_parent("qwen3").to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    model = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    parent, ids = read_parent(tmp_path), tokens()
    assert all(weight.dtype == torch.float32 for weight in parent.weights.values())
    assert_close("logits", our_logits(parent, ids), logits_of(model, ids), TOLERANCE["float32"])


def test_ffn_is_padded_with_zeros(tmp_path: Path) -> None:
    model = saved(tmp_path, "heads of 8")
    parent = read_parent(tmp_path)
    assert {layer.ffn for layer in parent.architecture.layers} == {48}
    for name, pad in (("gate", slice(36, 48)), ("up", slice(36, 48))):
        assert not parent.weights[f"layers.1.ffn.{name}"][pad].any()
        theirs = model.get_parameter(f"model.layers.1.mlp.{name}_proj.weight")
        assert torch.equal(parent.weights[f"layers.1.ffn.{name}"][:36], theirs)
    assert not parent.weights["layers.1.ffn.down"][:, 36:].any()
    assert params(parent.architecture, parent.model_config) == sum(w.numel() for w in parent.weights.values())


def test_head_beside_a_tied_config_counts_if_it_differs(tmp_path: Path) -> None:
    model = a_parent("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "untied")
    for folder in ("same", "other"):
        shutil.copytree(tmp_path / "untied", tmp_path / folder)
        path = tmp_path / folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    path = tmp_path / "same" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    assert read_parent(tmp_path / "same").model_config.tie_embeddings
    parent, ids = read_parent(tmp_path / "other"), tokens()
    assert not parent.model_config.tie_embeddings
    assert_close("logits", our_logits(parent, ids), logits_of(model, ids), TOLERANCE["float32"])


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_gguf(name: str, kind: str, tmp_path: Path) -> None:
    """The model is what the dequantised file computes, by transformers with the same weights."""
    changes = {} if kind == "F32" else {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}
    model = a_parent(name, **changes)
    path = tmp_path / "a model.gguf"
    became = write_gguf(path, model, kind)
    model.load_state_dict(became, strict=False)
    ids = tokens()
    for given in (path, tmp_path):
        parent = read_parent(given)
        assert parent.folder == path
        assert parent.model_config.norm_eps == model.config.rms_norm_eps  # not its fp32 neighbour
        assert parent.tokenizer == path
        assert_close("logits", our_logits(parent, ids), logits_of(model, ids), TOLERANCE["float32"])


def test_gguf_with_llama3_factors(tmp_path: Path) -> None:
    value = LLAMA3 | {"original_max_position_embeddings": 8192, "factor": 32.0}
    model = a_parent("llama", rope_parameters=value, head_dim=64)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    write_gguf(tmp_path / "model.gguf", model, factors=plain / scaled.numpy())
    parent, ids = read_parent(tmp_path), tokens()
    assert parent.model_config.rope == Rope(theta=500000.0, scaling=scaling_of(value))
    assert_close("logits", our_logits(parent, ids), logits_of(model, ids), TOLERANCE["float32"])


def test_digest_depends_on_content_only(tmp_path: Path) -> None:
    a_parent("llama").save_pretrained(tmp_path / "a", max_shard_size="20KB")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_gguf(tmp_path / "c.gguf", a_parent("llama"))
    shutil.copy(tmp_path / "c.gguf", tmp_path / "d.gguf")
    first, second, third, fourth = (parent_digest(tmp_path / x) for x in ("a", "b", "c.gguf", "d.gguf"))
    assert first == second == read_parent(tmp_path / "b").digest
    assert third == fourth != first
    shard = min((tmp_path / "b").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert parent_digest(tmp_path / "b") != first
