"""Expectations of libraries on a model of transformers: embeddings that can be resized, and PEFT's LoRA."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from space import Architecture, ModelConfig
from space.blocks import Model
from supernet.hf.export import load_hf, tensor_name, write_hf
from tests.numerics import TOLERANCE, assert_close
from tests.supernet.hf.test_export import layer_of, words

CONFIG = ModelConfig(vocab_size=61, max_seq_len=96, head_dim=16, tie_embeddings=False)
MIXERS = ("attention", "gated_deltanet", "mamba2", "short_conv")
FP32 = TOLERANCE["float32"]


def plain(tie_embeddings: bool = False) -> Model:
    config = ModelConfig(vocab_size=61, max_seq_len=96, head_dim=16, tie_embeddings=tie_embeddings)
    architecture = Architecture(32, tuple(map(layer_of, MIXERS)))
    model = Model(architecture, config, torch.Generator().manual_seed(1)).requires_grad_(False)
    for parameter in model.parameters():  # matrices that write to the residual stream start at zero
        parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return model.eval()


def exported(folder: Path, model: Model) -> Any:
    write_hf(folder, model.state_dict(), model.architecture, model.model_config, None)
    return load_hf(folder)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_matrices_are_plain_modules(tie_embeddings: bool, tmp_path: Path) -> None:
    model = plain(tie_embeddings)
    loaded = exported(tmp_path, model)
    kinds = {name: type(module) for name, module in loaded.named_modules()}
    for name, value in model.state_dict().items():
        if tensor_name(name, tuple(value.shape), model.architecture) == name:
            assert name not in kinds  # norms, convolutions, decays
        else:
            assert kinds[name] is (nn.Embedding if name == "embedding" else nn.Linear)
    assert loaded.get_input_embeddings() is loaded.embedding
    assert loaded.get_output_embeddings() is (None if tie_embeddings else loaded.head)
    ids = words(2, 20)
    with torch.no_grad():
        assert_close("logits", loaded(ids).logits, copy.deepcopy(model).double()(ids)[0], FP32)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_embeddings_can_be_resized_and_saved(tie_embeddings: bool, tmp_path: Path) -> None:
    model = plain(tie_embeddings)
    loaded, ids = exported(tmp_path / "one", model), words(2, 20)
    with torch.no_grad():
        before = loaded(ids).logits
        loaded.resize_token_embeddings(70)
        after = loaded(ids).logits
    assert after.shape[-1] == 70
    assert torch.equal(after[..., :61], before)
    assert loaded.config.vocab_size == 70
    loaded.save_pretrained(tmp_path / "two")
    again = type(loaded).from_pretrained(tmp_path / "two").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, after)
        assert again(torch.full((1, 3), 69)).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
def test_lora_trains_adds_and_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = plain()
    loaded, ids = exported(tmp_path, model), words(2, 20)
    with torch.no_grad():
        before = loaded(ids).logits
    config = peft.LoraConfig(r=4, target_modules=["q", "v", "up", "down"], init_lora_weights=False)
    tuned = peft.get_peft_model(loaded, config)
    tuned(ids, labels=ids).loss.backward()
    trained = [name for name, parameter in tuned.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        adapted = tuned(ids).logits
        assert (adapted - before).abs().max() > 1e-3
        with tuned.disable_adapter():
            assert torch.equal(tuned(ids).logits, before)
        merged = tuned.merge_and_unload()
        assert_close("merged", merged(ids).logits, adapted, FP32)
        # The same as a plain model with the merged matrices.
        found, architecture = merged.state_dict(), model.architecture
        state = model.state_dict()
        names = {name: tensor_name(name, tuple(value.shape), architecture) for name, value in state.items()}
        model.load_state_dict({name: found[theirs] for name, theirs in names.items()})
        assert_close("plain", merged(ids).logits, model(ids)[0], FP32)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_other_adapters_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    loaded = exported(tmp_path, plain())
    tuned = peft.get_peft_model(loaded, peft.LoraConfig(r=4, target_modules=["q"], use_dora=True))
    with pytest.raises(TypeError, match="plain LoRA only"):
        tuned(words(1, 4))
