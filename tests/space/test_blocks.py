"""The plain blocks against other people's code and token-by-token fp64 arithmetic."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from space import Architecture, Frame, Layer
from space.blocks import Model, softmax_attention
from tests.contracts import scatter
from tests.numerics import TOLERANCE, assert_close

FRAME = Frame(vocabulary=37, context=96, head_dim=16)
FP32 = TOLERANCE["float32"]


def model(*layers: Layer, width: int = 48, frame: Frame = FRAME, seed: int = 0) -> Model:
    made = Model(Architecture(width, layers), frame, torch.Generator().manual_seed(seed))
    scatter(made, seed)
    return made


def tokens(length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, FRAME.vocabulary, (batch, length)))


MIXERS = {
    "attention": Layer(mixer="attention", heads=4, kv_heads=2),
    "sliding": Layer(mixer="sliding", heads=2, kv_heads=1, window=8),
    "linear": Layer(mixer="linear", heads=4, kv_heads=2),
    "retnet": Layer(mixer="retnet", heads=4, kv_heads=2),
    "gated_deltanet": Layer(mixer="gated_deltanet", heads=4, kv_heads=2),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_all_softmax_is_a_llama(kv_heads: int, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    frame = Frame(vocabulary=37, context=64, head_dim=16, tied=tied)
    layers = [Layer(mixer="attention", heads=4, kv_heads=kv_heads, ffn=80)] * 2
    ours = model(*layers, width=48, frame=frame)
    config = LlamaConfig(
        vocab_size=37, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=16, max_position_embeddings=64, rms_norm_eps=1e-5,
        tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
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
    assert set(missing) <= ({"lm_head.weight"} if tied else set())
    theirs.tie_weights()
    text = tokens(40)
    with torch.no_grad():
        assert_close("logits", ours(text)[0], theirs(text).logits, FP32)


def naive_attention(q: Any, k: Any, v: Any, window: int) -> Any:
    """Row by row in fp64: q [B, T, H, D], k and v [B, S, Hkv, D]."""
    batch, length, heads, dim = q.shape
    out = np.zeros((batch, length, heads, dim))
    past = k.shape[1] - length
    for b in range(batch):
        for h in range(heads):
            kv = h * k.shape[2] // heads
            for t in range(length):
                last = past + t + 1
                first = max(0, last - window) if window else 0
                scores = k[b, first:last, kv] @ q[b, t, h] / math.sqrt(dim)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights @ v[b, first:last, kv] / weights.sum()
    return out


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
    rng = np.random.default_rng(length + past)
    q = rng.standard_normal((2, length, 4, 16))
    k, v = rng.standard_normal((2, 2, length + past, 2, 16))
    found = softmax_attention(*(torch.from_numpy(x) for x in (q, k, v)), window)
    assert_close("out", found, naive_attention(q, k, v, window), 1e-12)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def norm(x: Any, gain: Any) -> Any:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain


def rotate(x: Any, position: int) -> Any:
    """One token's heads [H, D], pair by pair as complex numbers."""
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * position * 10000.0 ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def naive_linear_mixer(w: dict[str, Any], x: Any, layer: Layer) -> Any:
    """One sequence [T, width], token by token in fp64, from the formulas of the papers."""
    d, heads, kv = FRAME.head_dim, layer.heads, layer.kv_heads
    state = np.zeros((kv, d, d))
    recent: list[Any] = [np.zeros((heads + 2 * kv) * d)] * 3
    outs = []
    for t, row in enumerate(x):
        hidden = norm(row, w["pre_norm"])
        q, k, v = (w[name] @ hidden for name in "qkv")
        log_decay, beta = np.zeros(kv), np.ones(kv)
        if layer.mixer == "gated_deltanet":
            recent = [*recent[-3:], np.concatenate([q, k, v])]
            taps = np.concatenate([w["conv_q"], w["conv_k"], w["conv_v"]])
            mixed = sum(taps[:, i] * recent[i] for i in range(4))
            mixed = mixed * sigmoid(mixed)
            q, k, v = np.split(mixed, [heads * d, (heads + kv) * d])
            beta = sigmoid(w["beta"] @ hidden)
            log_decay = -np.exp(w["A_log"]) * np.log1p(np.exp(w["decay"] @ hidden + w["dt_bias"]))
        q, k, v = (y.reshape(-1, d) for y in (q, k, v))
        if layer.mixer == "gated_deltanet":
            q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        elif layer.mixer == "linear":
            q, k = (np.where(y > 0, y + 1, np.exp(y)) for y in (q, k))
        else:
            q, k = rotate(q, t), rotate(k, t)
            log_decay = np.log(1 - 2.0 ** (-5 - np.arange(kv)))
        out = np.zeros((heads, d))
        for h in range(kv):
            state[h] *= np.exp(log_decay[h])
            write = v[h] - state[h].T @ k[h] if layer.mixer == "gated_deltanet" else v[h]
            state[h] += beta[h] * np.outer(k[h], write)
        for h in range(heads):
            out[h] = norm(state[h * kv // heads].T @ q[h] / math.sqrt(d), w["norm"])
        flat = out.reshape(-1)
        if "gate" in w:
            gate = w["gate"] @ hidden
            flat = flat * gate * sigmoid(gate)
        outs.append(row + w["o"] @ flat)
    return np.array(outs)


@pytest.mark.parametrize("name", ["linear", "retnet", "gated_deltanet"])
def test_linear_mixers_token_by_token(name: str) -> None:
    layer = MIXERS[name]
    made = model(layer).double()
    text = tokens(50, batch=1)
    weights = {k.removeprefix("layers.0.mixer."): v.detach().numpy() for k, v in made.named_parameters()}
    x = naive_linear_mixer(weights, weights["embedding"][text[0].numpy()], layer)
    expected = norm(x, made.norm.detach().numpy()) @ weights["embedding"].T
    with torch.no_grad():
        assert_close("fp64", made(text)[0][0], expected, 1e-11)
        assert_close("fp32", made.float()(text)[0][0], expected, FP32)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("length", [1, 2, 7, 15, 31, 33, 63, 64, 65])
def test_split_prefill_and_single_tokens(name: str, length: int) -> None:
    made = model(MIXERS[name], Layer(), Layer(ffn=32))
    text = tokens(length)
    with torch.no_grad():
        expected, final = made(text)
        for cuts in ([0, max(1, length // 3), length], list(range(length + 1))):
            states, logits = None, []
            for start, end in pairwise(cuts):
                if end > start:
                    out, states = made(text[:, start:end], start, states)
                    logits.append(out)
            assert_close("logits", torch.cat(logits, dim=1), expected, FP32)
            for key, value in final[0].items():
                assert_close(key, states[0][key], value, FP32)


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_gets_a_gradient_and_bf16_is_finite(name: str) -> None:
    made = model(MIXERS[name], Layer(ffn=32))
    made(tokens(40))[0].square().mean().backward()
    for key, parameter in made.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(made(tokens(40))[0]).all()


def test_nothing_sees_the_future() -> None:
    made = model(*(MIXERS[name] for name in MIXERS))
    text = tokens(60)
    changed = text.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % FRAME.vocabulary
    with torch.no_grad():
        before, after = made(text)[0], made(changed)[0]
    assert torch.equal(before[:, :30], after[:, :30]) or (before - after)[:, :30].abs().max() < 1e-5
    assert (before - after)[:, 30:].abs().max() > 1e-2


def test_qk_norm_changes_the_logits_and_keeps_the_steps() -> None:
    frame = Frame(vocabulary=37, context=96, head_dim=16, qk_norm=True)
    made = model(MIXERS["attention"], frame=frame)
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
