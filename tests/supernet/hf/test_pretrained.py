"""Pretrained start compared with transformers: logits by its model, importance by hooks on it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from space import Architecture, InputError, Layer, Space, genome, variation
from space.blocks import mixer_block
from supernet.data.corpus import DataConfig, load_corpus, train_batch
from supernet.evaluate import evaluate, evaluation_set
from supernet.hf.pretrained import load_pretrained
from supernet.supernet import Supernet
from supernet.training.recipe import TrainConfig
from supernet.training.trainer import Trainer
from tests.contracts import every_architecture, scatter, tiny_space
from tests.numerics import TOLERANCE, assert_close
from tests.supernet.parent.models import CLASSES

LINEAR = [
    "sliding",
    "linear",
    "retnet",
    "mamba2",
    "gla",
    "hgrn2",
    "deltanet",
    "gated_deltanet",
    "kda",
    "short_conv",
]
SHAPES: dict[str, dict[str, Any]] = {
    "one kv head a head": {"heads": [1, 2]},
    "group of 2": {"heads": [2, 4], "kv_group": 2},
    "group of 4": {"heads": [4], "kv_group": 4, "width": [48, 80]},
    "kv heads vary": {"heads": [2, 4, 8], "kv_heads": [1, 2, 4]},
    "untied": {"heads": [4, 8], "kv_group": 4, "tie_embeddings": False, "depth": [1, 3]},
    "private projections": {"heads": [2, 4], "kv_group": 2, "sharing": "none"},
    "window": {"mixer": ["attention", "sliding", "linear"], "window": [8, 16]},
    "biases": {"heads": [2, 4], "kv_group": 2, "qkv_bias": True, "norm_eps": 1e-3, "rope": {"theta": 500.0}},
    "q/k norm": {"heads": [4], "kv_group": 2, "qk_norm": True, "norm_eps": 1e-2},
}


def a_space(**changes: Any) -> Space:
    return tiny_space(**{"ffn": [16, 48], "width": [16, 32], "depth": [1, 2], **changes})


def a_llama(space: Space, **changes: Any) -> Any:
    """A random Llama of the space's largest shape, with distinct values in every parameter.

    With biases or q/k norm it is the model of transformers that has them, Qwen2 or Qwen3.
    """
    config_class, model_class = CLASSES["qwen2" if space.qkv_bias else "qwen3" if space.qk_norm else "llama"]
    largest = genome.largest(space)
    layer = largest.layers[0]
    settings = {
        "vocab_size": space.vocab_size,
        "hidden_size": largest.width,
        "intermediate_size": layer.ffn,
        "num_hidden_layers": len(largest.layers),
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "head_dim": space.head_dim,
        "rms_norm_eps": space.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": space.rope.theta},
        "tie_word_embeddings": space.tie_embeddings,
        "initializer_range": 0.15,
        "max_position_embeddings": space.max_seq_len,
        "attn_implementation": "eager",
    }
    torch.manual_seed(1)
    llama = model_class(config_class(**settings | changes))
    scatter(llama)
    return llama.eval()


def text(space: Space, rows: int = 4, length: int = 17, seed: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, space.vocab_size, (rows, length)))


def logits_of(llama: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return llama(tokens, use_cache=False).logits


def largest_logits(supernet: Supernet, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return supernet(tokens, genome.largest(supernet.space))[0]


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_largest_equals_llama(shape: str, order: bool, tmp_path: Path) -> None:
    space = a_space(**SHAPES[shape])
    llama = a_llama(space)
    llama.save_pretrained(tmp_path)
    supernet = Supernet(space)
    load_pretrained(supernet, tmp_path, text(space), order=order, steps=2)
    other = text(space, 3, 40, seed=4)
    assert_close("logits", largest_logits(supernet, other), logits_of(llama, other), TOLERANCE["float32"])
    embedding = llama.get_input_embeddings().weight
    assert torch.equal(supernet.get_parameter("embedding"), embedding) is not order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_and_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    space = a_space(heads=[2, 4], kv_group=2)
    a_llama(space).to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    llama = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    supernet = Supernet(space)
    load_pretrained(supernet, tmp_path, text(space), steps=0)
    tokens = text(space, seed=4)
    expected = logits_of(llama, tokens)
    assert_close("logits", largest_logits(supernet, tokens), expected, TOLERANCE["float32"])


def effects(llama: Any, tokens: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """The mean over tokens of |dL/d(factor)| for every part of an fp64 Llama, by hooks.

    For kv groups, how much the loss grows when what their heads give is set to 0.
    """
    llama = llama.double()
    config, layers = llama.config, llama.model.layers
    rows, length = tokens[:, 1:].shape
    d = config.head_dim

    def factor(size: int) -> torch.Tensor:
        return torch.ones(rows, length, size, dtype=torch.float64, requires_grad=True)

    parts = {"residual": factor(config.hidden_size)}
    hooks = []

    def scale_output(module: torch.nn.Module, by: torch.Tensor) -> None:
        hooks.append(module.register_forward_hook(lambda _, __, out: out * by))

    def scale_input(module: torch.nn.Module, by: torch.Tensor, each: int) -> None:
        hooks.append(
            module.register_forward_pre_hook(lambda _, given: (given[0] * by.repeat_interleave(each, -1),))
        )

    scale_output(llama.model.norm, parts["residual"])
    for i, layer in enumerate(layers):
        scale_output(layer.input_layernorm, parts["residual"])
        scale_output(layer.post_attention_layernorm, parts["residual"])
        parts[f"heads {i}"] = factor(config.num_attention_heads)
        scale_input(layer.self_attn.o_proj, parts[f"heads {i}"], d)
        parts[f"ffn {i}"] = factor(config.intermediate_size)
        scale_input(layer.mlp.down_proj, parts[f"ffn {i}"], 1)
    logits = llama(tokens[:, :-1], use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    found = {name: part.grad.abs().mean((0, 1)).numpy() for name, part in parts.items()}

    def loss_without(layer: Any, channels: slice) -> float:
        def cut(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            left = given[0].clone()
            left[..., channels] = 0
            return (left,)

        hook = layer.self_attn.o_proj.register_forward_pre_hook(cut)
        with torch.no_grad():
            logits = llama(tokens[:, :-1], use_cache=False).logits
        hook.remove()
        return float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    each = config.num_attention_heads // config.num_key_value_heads * d
    for i, layer in enumerate(layers):
        places = [slice(g * each, (g + 1) * each) for g in range(config.num_key_value_heads)]
        found[f"groups {i}"] = np.array([loss_without(layer, place) for place in places])
    return found


@pytest.mark.parametrize("shape", ["one kv head a head", "group of 2", "kv heads vary", "untied"])
def test_prefixes_are_sorted_by_importance(shape: str, tmp_path: Path) -> None:
    """Each matrix, element by element, compared with an order computed by transformers only."""
    space = a_space(**SHAPES[shape])
    llama = a_llama(space)
    llama.save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    tokens = text(space, 6, 20)
    found = effects(llama, tokens)
    supernet = Supernet(space)
    load_pretrained(supernet, tmp_path, tokens, steps=0)
    ours = supernet.weights(genome.largest(space))
    layer, d = genome.largest(space).layers[0], space.head_dim
    group = layer.heads // layer.kv_heads

    def falling(scores: Any) -> list[int]:
        return sorted(range(len(scores)), key=lambda i: -scores[i])

    residual = falling(found["residual"])
    assert residual != sorted(residual)
    ends = {"embedding": "model.embed_tokens.weight"} | (
        {} if space.tie_embeddings else {"head": "lm_head.weight"}
    )
    for name, source in ends.items():
        assert torch.equal(ours[name], theirs[source][:, residual])
    assert torch.equal(ours["norm"], theirs["model.norm.weight"][residual])
    for slot in range(space.slots):
        scores = found[f"heads {slot}"]
        members = [list(range(g * group, (g + 1) * group)) for g in range(layer.kv_heads)]
        groups = falling(found[f"groups {slot}"])
        heads = [members[g][i] for g in groups for i in falling([scores[h] for h in members[g]])]
        rows = [h * d + c for h in heads for c in range(d)]
        kv_rows = [g * d + c for g in groups for c in range(d)]
        channels = falling(found[f"ffn {slot}"])
        expected = {
            "mixer.pre_norm": ("input_layernorm", residual, None),
            "mixer.q": ("self_attn.q_proj", rows, residual),
            "mixer.k": ("self_attn.k_proj", kv_rows, residual),
            "mixer.v": ("self_attn.v_proj", kv_rows, residual),
            "mixer.o": ("self_attn.o_proj", residual, rows),
            "ffn.pre_norm": ("post_attention_layernorm", residual, None),
            "ffn.gate": ("mlp.gate_proj", channels, residual),
            "ffn.up": ("mlp.up_proj", channels, residual),
            "ffn.down": ("mlp.down_proj", residual, channels),
        }
        for name, (source, first, second) in expected.items():
            wanted = theirs[f"model.layers.{slot}.{source}.weight"][first]
            wanted = wanted if second is None else wanted[:, second]
            assert torch.equal(ours[f"layers.{slot}.{name}"], wanted), name


@pytest.mark.parametrize("sharing", ["qkvo", "none"])
def test_mixers_inherit_and_are_aligned_to_attention(sharing: str, tmp_path: Path) -> None:
    """Reported errors are those of the final weights, measured against transformers' attention."""
    space = a_space(
        mixer=["attention", *LINEAR],
        window=[8, 12],
        heads=[2, 4],
        kv_group=2,
        sharing=sharing,
        max_linear_kinds=10,
    )
    llama = a_llama(space)
    llama.save_pretrained(tmp_path)
    windows = text(space, 16, 32)
    supernet = Supernet(space)
    start = {name: p.detach().clone() for name, p in supernet.named_parameters()}
    errors = load_pretrained(supernet, tmp_path, windows, order=False, steps=25)
    assert [(e.slot, e.mixer) for e in errors] == [(s, m) for s in range(space.slots) for m in LINEAR]
    assert all(e.after <= e.before for e in errors)
    assert all(e.after < 0.97 * e.before for e in errors if e.mixer != "sliding")

    caught: dict[str, torch.Tensor] = {}
    for slot, layer in enumerate(llama.model.layers):
        layer.register_forward_pre_hook(lambda _, given, s=slot: caught.__setitem__(f"x {s}", given[0]))
        layer.self_attn.register_forward_hook(lambda _, __, out, s=slot: caught.__setitem__(f"y {s}", out[0]))
    logits_of(llama, windows[12:])  # the last quarter measures
    largest = genome.largest(space)
    for error in errors:
        layer = Layer(mixer=error.mixer, ffn=48)
        if error.mixer != "short_conv":
            layer = replace(layer, heads=4, kv_heads=2, window=12 if error.mixer == "sliding" else 0)
        layers = tuple(layer if i == error.slot else old for i, old in enumerate(largest.layers))
        weights = supernet.weights(replace(largest, layers=layers))
        name = f"layers.{error.slot}.mixer."
        block = {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}
        x, y = caught[f"x {error.slot}"], caught[f"y {error.slot}"]
        with torch.no_grad():
            out = mixer_block(block, x, layer, space.config)[0] - x
        measured = float((out - y).square().sum() / y.square().sum())
        assert measured == pytest.approx(error.after, rel=1e-3, abs=1e-9)

    mine = dict(supernet.named_parameters())
    if sharing == "qkvo":
        q = llama.model.layers[1].self_attn.q_proj.weight
        assert torch.equal(mine["layers.1.shared.q"], q)
    else:
        q = llama.model.layers[1].self_attn.q_proj.weight
        assert torch.equal(mine["layers.1.attention.q"], q)
        assert not torch.equal(mine["layers.1.kda.q"], start["layers.1.kda.q"])
        assert_close("inherited", mine["layers.1.kda.q"], q, 0.5)  # tuned from there, not from the start


def test_pretrained_start_is_deterministic(tmp_path: Path) -> None:
    space = a_space(mixer=["attention", "retnet", "kda"])
    a_llama(space).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = Supernet(space), Supernet(space)
    for supernet, folder in ((first, "a"), (second, "b")):
        load_pretrained(supernet, tmp_path / folder, text(space), steps=5)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"hidden_size": 48}, "width 48 (space: 32)"),
    "ffn": ({"intermediate_size": 64}, "attention/2+ffn64 (space: attention/2+ffn48"),
    "depth": ({"num_hidden_layers": 3}, "attention/2+ffn48 attention/2+ffn48 (space"),
    "heads": ({"num_attention_heads": 4}, "layers attention/4:2+ffn48"),
    "head size": ({"head_dim": 8}, "head_dim 8 (space: 16)"),
    "vocabulary": ({"vocab_size": 23}, "vocab_size 23 (space: 19)"),
    "head": ({"tie_word_embeddings": False}, "tie_embeddings False (space: True)"),
    "epsilon": ({"rms_norm_eps": 1e-6}, "norm_eps 1e-06 (space: 1e-05)"),
    "rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "theta=500000.0"),
    "context": ({"max_position_embeddings": 32}, "max_seq_len 32 (space: 64)"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_parent_is_one_line_error(name: str, tmp_path: Path) -> None:
    change, words = DIFFERENT[name]
    space = a_space()
    a_llama(space, **change).save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        load_pretrained(Supernet(space), tmp_path, text(space), steps=0)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: not the largest architecture of space tiny: it has ")
    assert words in message
    assert "\n" not in message
    assert message.count("(space: ") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True},
        {"mixer": ["linear"], "ratios": ["linear"]},
        {"ratios": [1]},
        {"ffn": [0]},
    ],
    ids=str,
)
def test_space_without_llama_is_error(changes: dict[str, Any], tmp_path: Path) -> None:
    a_llama(a_space()).save_pretrained(tmp_path)
    space = a_space(**changes)
    with pytest.raises(InputError, match="not the largest architecture of space tiny: it has "):
        load_pretrained(Supernet(space), tmp_path, text(space), steps=0)


def test_tokens_outside_vocabulary_are_error(tmp_path: Path) -> None:
    space = a_space()
    a_llama(space).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="tokens 19 to 19, space tiny has 0 to 18"):
        load_pretrained(Supernet(space), tmp_path, torch.full((2, 8), 19))


def test_trained_llama_is_better_start(text_folder: Path, tmp_path: Path) -> None:
    """Sorting lowers the loss of prefixes, and the supernet's loss is below that of a random start."""
    space = a_space(
        vocab_size=256,
        width=[16, 32, 64],
        depth=[2],
        heads=[2, 4],
        kv_group=2,
        ffn=[32, 64, 128],
        ratios=["full", 1],
    )
    data = DataConfig(path=text_folder, held_out=0.2)
    corpus = load_corpus(data)
    llama = a_llama(space, initializer_range=0.1).train()
    optimiser = torch.optim.AdamW(llama.parameters(), lr=5e-3)
    for step in range(120):
        optimiser.param_groups[0]["lr"] = 5e-3 * (1 - step / 120)
        tokens, targets = map(torch.from_numpy, train_batch(corpus, np.random.default_rng([1, step]), 8, 32))
        loss = F.cross_entropy(llama(tokens, use_cache=False).logits.flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    llama.save_pretrained(tmp_path)
    held_out = evaluation_set(corpus, 16, 32)

    def loss_of(supernet: Supernet, architectures: list[Architecture]) -> float:
        with torch.no_grad():
            return sum(
                evaluate(supernet.weights(a), a, space.config, held_out).loss_nats for a in architectures
            ) / len(architectures)

    drawn = torch.from_numpy(train_batch(corpus, np.random.default_rng(5), 16, 32)[0])
    ordered, unordered = Supernet(space), Supernet(space)
    load_pretrained(ordered, tmp_path, drawn, steps=0)
    load_pretrained(unordered, tmp_path, drawn, steps=0, order=False)
    attention = tiny_space(
        vocab_size=256,
        width=[32, 64],
        depth=[2],
        mixer=["attention"],
        heads=[2, 4],
        kv_group=2,
        ffn=[32, 64, 128],
        ratios=["full"],
    )
    small = sorted(every_architecture(attention) - {genome.largest(space)}, key=lambda a: a.key)
    assert loss_of(ordered, small) < loss_of(unordered, small) - 0.05

    sampled = genome.decode(space, variation.sample(space, np.random.default_rng(8), 8))
    config = TrainConfig(data=data, steps=10, batch=8, length=32, precision="fp32")
    scratch = Trainer(space, config, corpus)
    for step in range(config.steps):
        scratch.step(step)
    started = Trainer(space, config.model_copy(update={"init": tmp_path}), corpus)
    started.prepare()
    for step in range(config.steps - 2):  # fewer tokens
        started.step(step)
    assert isinstance(scratch.module, Supernet)
    assert isinstance(started.module, Supernet)
    assert loss_of(started.module, sampled) < loss_of(scratch.module, sampled)
