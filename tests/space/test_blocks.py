"""The plain model as a Llama, and softmax attention row by row; test_mixers.py has each mixer's block."""

import numpy as np
import pytest
import torch

from space import Architecture, Layer, ModelConfig
from space.attention.softmax import softmax_attention
from space.blocks import Model
from tests.contracts import scatter
from tests.numerics import TOLERANCE, assert_close
from tests.space.naive import naive_attention

CONFIG = ModelConfig(vocab_size=37, max_seq_len=96, head_dim=16)
FP32 = TOLERANCE["float32"]


def model(*layers: Layer, width: int = 48, model_config: ModelConfig = CONFIG, seed: int = 0) -> Model:
    made = Model(Architecture(width, layers), model_config, torch.Generator().manual_seed(seed))
    scatter(made, seed)
    return made


def tokens(length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length)))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_softmax_model_equals_llama(kv_heads: int, tie_embeddings: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model_config = ModelConfig(vocab_size=37, max_seq_len=64, head_dim=16, tie_embeddings=tie_embeddings)
    layers = [Layer(mixer="attention", heads=4, kv_heads=kv_heads, ffn=80)] * 2
    ours = model(*layers, width=48, model_config=model_config)
    config = LlamaConfig(
        vocab_size=37, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=16, max_position_embeddings=64, rms_norm_eps=1e-5,
        tie_word_embeddings=tie_embeddings, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attention_bias=False,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    names = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
    }
    state = {}
    for name, value in ours.state_dict().items():
        if name in ("embedding", "norm", "head"):
            target = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}[name]
        else:
            _, slot, part, leaf = name.split(".")
            if leaf == "pre_norm":
                leaf_name = "input_layernorm" if part == "mixer" else "post_attention_layernorm"
            else:
                leaf_name = names[leaf] if part == "mixer" else f"mlp.{leaf}_proj"
            target = f"model.layers.{slot}.{leaf_name}"
        state[f"{target}.weight"] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if tie_embeddings else set())
    theirs.tie_weights()
    text = tokens(40)
    with torch.no_grad():
        assert_close("logits", ours(text)[0], theirs(text).logits, FP32)


@pytest.mark.parametrize(
    ("length", "past", "window"),
    [
        (1, 0, 0),
        (17, 0, 0),
        (1, 9, 0),
        (5, 9, 0),
        (8, 0, 8),
        (32, 0, 8),
        (24, 0, 8),
        (19, 0, 8),
        (1, 7, 8),
        (1, 20, 8),
    ],
)
def test_softmax_attention(length: int, past: int, window: int) -> None:
    generator = torch.Generator().manual_seed(length + past)
    q = torch.randn(2, length, 4, 16, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, length + past, 2, 16, dtype=torch.float64, generator=generator)
    expected = torch.stack([naive_attention(*row, window) for row in zip(q, k, v, strict=True)])
    assert_close("out", softmax_attention(q, k, v, window), expected, 1e-12)


def test_qk_norm_changes_logits_and_steps_equal_prefill() -> None:
    model_config = ModelConfig(vocab_size=37, max_seq_len=96, head_dim=16, qk_norm=True)
    made = model(Layer(mixer="attention", heads=4, kv_heads=2), model_config=model_config)
    text = tokens(20)
    with torch.no_grad():
        expected, _ = made(text)
        states, logits = None, []
        for t in range(20):
            out, states = made(text[:, t : t + 1], t, states)
            logits.append(out)
        assert_close("steps", torch.cat(logits, dim=1), expected, FP32)
        made.layers._modules["0"].mixer.q_norm.mul_(2)
        assert (made(text)[0] - expected).abs().max() > 1e-3
