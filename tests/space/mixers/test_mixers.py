"""One contract for every mixer: what it computes, in one piece or in many, elastic, exported, in bf16."""

from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from latency import OnnxRuntime
from space import Architecture, InputError, Layer, ModelConfig, Space, genome
from space.architecture import has_heads, is_windowed
from space.blocks import Model, State, forward, mixer_block
from space.mixers import MIXERS, mixers_of_class
from space.onnx.model import model_graph
from space.shapes import is_half_precision, mixer_shapes, state_shapes
from supernet.extract import extract
from supernet.supernet import Supernet
from tests.contracts import change_mixer, scatter, tiny_space, uses_linear_attention
from tests.numerics import TOLERANCE, assert_close, relative_error
from tests.space.naive import naive_mixer

CONFIG = ModelConfig(vocab_size=37, max_seq_len=96, head_dim=16)
WIDTH = 48
EXACT, FP32, BF16 = 1e-11, TOLERANCE["float32"], 2**-5  # bf16: a dozen roundings of 2^-9, one on another
LENGTHS = [1, 2, 7, 15, 31, 33, 63, 64, 65]
HEADS = [(1, 1), (3, 3), (4, 2), (4, 1)]
Weights = dict[str, Tensor]


def layer_of(name: str, heads: int = 4, kv_heads: int = 2) -> Layer:
    if not has_heads(name):
        return Layer(mixer=name)
    return Layer(mixer=name, heads=heads, kv_heads=kv_heads, window=8 if is_windowed(name) else 0)


LAYERS = {
    "-".join([name, *(f"{h}:{k}" for _ in range(has_heads(name)))]): layer_of(name, h, k)
    for name in MIXERS
    for h, k in (HEADS if has_heads(name) else HEADS[:1])
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
each_mixer = pytest.mark.parametrize("name", MIXERS)
RECURRENCES = [name for name in MIXERS if uses_linear_attention(name)]
each_recurrence = pytest.mark.parametrize("name", RECURRENCES)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """These tensors are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(*layers: Layer, seed: int = 0) -> Model:
    made = Model(Architecture(WIDTH, layers), CONFIG, torch.Generator().manual_seed(seed))
    scatter(made, seed)
    return made.requires_grad_(False)


def weights_of(layer: Layer, seed: int = 0) -> Weights:
    """The weights of one block in fp64."""
    made = model_of(layer, seed=seed).double()
    return {key.removeprefix("layers.0.mixer."): p.detach() for key, p in made.named_parameters()}


def inputs(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=generator)


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.from_numpy(np.random.default_rng(length).integers(0, CONFIG.vocab_size, (batch, length)))


def to(weights: Weights, dtype: torch.dtype) -> Weights:
    return {key: weight.to(dtype) for key, weight in weights.items()}


# What it computes.


@each_layer
def test_block_equals_the_fp64_oracle(layer: Layer) -> None:
    weights, x = weights_of(layer), inputs(40, batch=2)
    found, state = mixer_block(weights, x, layer, CONFIG)
    single, _ = mixer_block(to(weights, torch.float32), x.float(), layer, CONFIG)
    for row in range(2):
        expected, memory = naive_mixer(weights, x[row], layer, CONFIG)
        assert_close("fp64", found[row], expected, EXACT)
        assert_close("fp32", single[row], expected, FP32)
        if memory is not None:
            assert_close("state", state["s"][row], memory, EXACT)


@each_mixer
def test_gradients_equal_the_oracle(name: str) -> None:
    layer, length = layer_of(name), 35  # more than a chunk
    aim = inputs(length, seed=1)[0]
    gradients = []
    for run in (
        lambda w, x: mixer_block(w, x[None], layer, CONFIG)[0][0],
        lambda w, x: naive_mixer(w, x, layer, CONFIG)[0],
    ):
        leaves = {key: weight.clone().requires_grad_() for key, weight in weights_of(layer).items()}
        x = inputs(length)[0].requires_grad_()
        (run(leaves, x) * aim).sum().backward()
        block = mixer_shapes(name, WIDTH, layer.heads, layer.kv_heads, CONFIG)
        gradients.append({"x": x.grad} | {key: leaves[key].grad for key in block})
    for key, expected in gradients[1].items():
        assert expected.abs().max() > 0, key
        assert_close(key, gradients[0][key], expected, 1e-9)


EXTREMES = {
    "dt_bias": 3.0,  # time steps of 3, as large a decay as the floor lets through
    "A_log": 3.0,
    "lower_bound": -40.0,
    "decay_bias": -400.0,
    "slope_log": 3.0,
    "k": 30.0,  # a factor: hgrn2's forget gates shut and open
}


@each_recurrence
def test_fast_decays_stay_exact(name: str) -> None:
    layer = layer_of(name)
    weights, x = weights_of(layer), inputs(70)
    for key, value in EXTREMES.items():
        if key in weights:
            weights[key] = weights[key] * value if key == "k" else weights[key] + value
    expected, memory = naive_mixer(weights, x[0], layer, CONFIG)
    leaves = {key: weight.float().requires_grad_() for key, weight in weights.items()}
    found, state = mixer_block(leaves, x.float(), layer, CONFIG)
    double, _ = mixer_block(weights, x, layer, CONFIG)
    assert_close("fp64", double[0], expected, EXACT)
    assert_close("fp32", found[0], expected, FP32)
    assert_close("state", state["s"][0], memory, FP32)
    found.square().sum().backward()
    for key in mixer_shapes(name, WIDTH, layer.heads, layer.kv_heads, CONFIG):
        assert torch.isfinite(leaves[key].grad).all(), key


def test_kda_with_equal_channels_equals_gated_deltanet_and_without_decay_deltanet() -> None:
    kda, scalar, plain = (layer_of(name) for name in ("kda", "gated_deltanet", "deltanet"))
    weights, x = weights_of(kda), inputs(50)
    rate = torch.tensor([0.3, 1.7], dtype=torch.float64)  # for each kv head, -g
    logits = torch.logit(rate / 5) / weights["slope_log"].exp()
    weights |= {
        "decay_up": torch.zeros_like(weights["decay_up"]),
        "dt_bias": logits.repeat_interleave(CONFIG.head_dim),
        "decay": torch.zeros(2, WIDTH, dtype=torch.float64),
    }
    steps = {"A_log": rate.log(), "dt_bias": torch.full_like(rate, float(np.log(np.e - 1)))}
    expected = mixer_block(weights, x, kda, CONFIG)[1]
    found = mixer_block(weights | steps, x, scalar, CONFIG)[1]
    assert_close("kda", found["s"], expected["s"], EXACT)
    assert_close("conv", found["conv"], expected["conv"], EXACT)
    still = mixer_block(weights | steps | {"A_log": rate * 0 - 60}, x, scalar, CONFIG)[1]
    assert_close("deltanet", still["s"], mixer_block(weights, x, plain, CONFIG)[1]["s"], EXACT)
    assert relative_error(still["s"], found["s"]) > 0.1


@each_mixer
def test_outputs_do_not_depend_on_later_tokens(name: str) -> None:
    made, text = model_of(layer_of(name)), tokens(60)
    changed = text.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % CONFIG.vocab_size
    before, after = made(text)[0], made(changed)[0]
    assert_close("before", after[:, :30], before[:, :30], FP32)
    assert (before - after)[:, 30:].abs().max() > 1e-2


# In one piece or in many.


def in_pieces(made: Model, text: Tensor, cuts: list[int]) -> tuple[Tensor, dict[int, State]]:
    states, logits = None, []
    for start, end in pairwise(cuts):
        out, states = made(text[:, start:end], start, states)
        logits.append(out)
    return torch.cat(logits, dim=1), states or {}


@each_mixer
@pytest.mark.parametrize("length", LENGTHS)
def test_split_prefill_and_single_tokens_equal_one_prefill(name: str, length: int) -> None:
    made, text = model_of(layer_of(name), Layer(), Layer(ffn=32)), tokens(length)
    expected, final = made(text)
    for cuts in ([0, *{length // 3} - {0}, length], list(range(length + 1))):
        logits, states = in_pieces(made, text, cuts)
        assert_close("logits", logits, expected, FP32)
        for key, value in final[0].items():
            assert_close(key, states[0][key], value, FP32)


@each_layer
@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_states_have_their_shapes(layer: Layer, length: int) -> None:
    _, states = model_of(layer)(tokens(length, batch=3))
    shapes = state_shapes(layer, WIDTH, CONFIG, 3, length)
    assert {key: tuple(value.shape) for key, value in states[0].items()} == shapes
    assert {value.dtype for value in states[0].values()} == {torch.float32}
    assert ("s" in shapes) == (layer.mixer in RECURRENCES)


# Elastic.


def space_of(name: str) -> Space:
    return tiny_space(
        mixer=[name],
        width=[16, 32, 48],
        depth=[2],
        heads=[1, 2, 4],
        kv_heads=[1, 2],
        ffn=[0],
        window=[8] if is_windowed(name) else None,
        ratios=["full" if MIXERS.get(name).mixer_class == "full" else "linear"],
    )


def uniform(space: Space, width: int, heads: int, kv_heads: int) -> Architecture:
    return Architecture(width, (layer_of(space.layer.mixer[0], heads, kv_heads),) * 2)


@each_mixer
def test_subnetwork_equals_submodel_in_outputs_states_and_gradients(name: str) -> None:
    space = space_of(name)
    supernet = Supernet(space)
    scatter(supernet)
    text = torch.from_numpy(np.random.default_rng(0).integers(0, space.vocab_size, (2, 21)))
    choices = {uniform(space, w, h, k) for w in space.width for h, k in space.head_options}
    assert len(choices) == (15 if has_heads(name) else 3)
    for architecture in choices:
        assert genome.decode(space, genome.encode(space, [architecture])) == [architecture]
        plain = Model(architecture, space.config)
        plain.load_state_dict(extract(supernet, architecture))
        supernet.zero_grad()
        found, states = supernet(text, architecture)
        expected, expected_states = plain(text)
        assert_close("logits", found, expected, FP32)
        for slot, state in expected_states.items():
            for key, value in state.items():
                assert_close(f"{slot}.{key}", states[slot][key], value, FP32)
        found.logsumexp(-1).sum().backward()
        expected.logsumexp(-1).sum().backward()
        views = supernet.weights(
            architecture, {n: p.grad for n, p in supernet.named_parameters() if p.grad is not None}
        )
        for key, parameter in plain.named_parameters():
            assert_close(key, views[key], parameter.grad, FP32)
        total = sum(float(p.grad.square().sum()) for p in supernet.parameters() if p.grad is not None)
        inside = sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None)
        assert total == pytest.approx(inside, rel=1e-4)  # nothing outside the prefixes


@pytest.mark.parametrize("name", [name for name in MIXERS if has_heads(name)])
def test_fewer_heads_equal_the_first_heads(name: str) -> None:
    """With the same grouping, a sub-network is the whole whose other heads are not listened to."""
    space = space_of(name)
    supernet, d = Supernet(space), space.head_dim
    scatter(supernet)
    large, small = uniform(space, 32, 4, 2), uniform(space, 32, 2, 1)
    weights = extract(supernet, large)
    for key in weights:
        if key.endswith(".o"):
            weights[key][:, 2 * d :] = 0
    text = torch.from_numpy(np.random.default_rng(1).integers(0, space.vocab_size, (2, 19)))
    with torch.no_grad():
        expected, _ = forward(weights, large, space.config, text)
        assert_close("logits", supernet(text, small)[0], expected, FP32)


# Exported.


def run_graph(
    graph: onnx.ModelProto, architecture: Architecture, text: NDArray[Any], cuts: list[int]
) -> dict[str, Any]:
    """Logits, and the states after the last token, of a graph fed piece by piece."""
    session = OnnxRuntime().session(graph)
    known = {item.name for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]
    states = {
        f"state.{slot}.{name}": np.zeros(shape, np.float32)
        for slot, layer in enumerate(architecture.layers)
        for name, shape in state_shapes(layer, WIDTH, CONFIG, len(text), 0).items()
    }
    logits = []
    for start, end in pairwise(cuts):
        feed = {"tokens": text[:, start:end], "position": np.array([start]), **states}
        values = session.run(names, {name: value for name, value in feed.items() if name in known})
        states = {name.removesuffix(".next"): v for name, v in zip(names, values, strict=True)}
        logits.append(states.pop("logits"))
    return {"logits": np.concatenate(logits, axis=1), **states}


@each_layer
def test_graph_equals_torch(layer: Layer) -> None:
    made = model_of(layer, Layer(ffn=32), layer)
    weights = {name: value.numpy() for name, value in made.named_parameters()}
    graph = model_graph(made.architecture, CONFIG, weights)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("LinearAttention") == (2 if layer.mixer in RECURRENCES else 0)
    assert kinds.count("GroupQueryAttention") == (2 if layer.mixer in ("attention", "sliding") else 0)
    text = tokens(50, batch=1)
    logits, states = made.double()(text)
    expected = {f"state.{i}.{name}": x for i, state in states.items() for name, x in state.items()}
    for cuts in ([0, 50], [0, 17, 50], list(range(51))):
        found = run_graph(graph, made.architecture, text.numpy(), cuts)
        for name, value in ({"logits": logits} | expected).items():
            assert_close(f"{name} in {len(cuts) - 1}", found[name], value, FP32)


def test_recurrences_of_the_package() -> None:
    """A built-in linear mixer is one node of its graph."""
    assert [name for name in RECURRENCES if name in MIXERS.builtin] == [
        "linear", "retnet", "mamba2", "gla", "hgrn2", "deltanet", "gated_deltanet", "kda",
    ]  # fmt: skip
    assert set(RECURRENCES) <= set(mixers_of_class("linear"))


def test_logits_are_the_first_output() -> None:
    made = model_of(layer_of("attention"), layer_of("gated_deltanet"), Layer(ffn=32))
    weights = {name: value.numpy() for name, value in made.named_parameters()}
    graph, text = model_graph(made.architecture, CONFIG, weights), tokens(20, batch=1)
    session = OnnxRuntime().session(graph)
    names = [item.name for item in session.get_outputs()]
    states = [
        f"state.{slot}.{name}.next"
        for slot, layer in enumerate(made.architecture.layers)
        for name in state_shapes(layer, WIDTH, CONFIG, 1, 0)
    ]
    assert len(states) > 2
    assert names == ["logits", *states]
    feed = {"tokens": text.numpy(), "position": np.zeros(1, np.int64)}
    for slot, layer in enumerate(made.architecture.layers):
        for name, shape in state_shapes(layer, WIDTH, CONFIG, 1, 0).items():
            feed[f"state.{slot}.{name}"] = np.zeros(shape, np.float32)
    first, expected = session.run(None, feed)[0], made.double()(text)[0]
    assert_close("logits", first, expected, FP32)


@each_recurrence
def test_graph_equals_torch_at_fast_decays(name: str) -> None:
    made = model_of(layer_of(name))
    for key, parameter in made.named_parameters():
        leaf = key.rsplit(".", 1)[-1]
        if ".mixer." in key and leaf in EXTREMES:
            parameter.copy_(parameter * EXTREMES[leaf] if leaf == "k" else parameter + EXTREMES[leaf])
    weights = {key: value.numpy() for key, value in made.named_parameters()}
    graph, text = model_graph(made.architecture, CONFIG, weights), tokens(60, batch=1)
    found = run_graph(graph, made.architecture, text.numpy(), [0, 40, *range(41, 61)])
    logits, states = made.double()(text)
    assert_close("logits", found["logits"], logits, FP32)
    assert_close("state", found["state.0.s"], states[0]["s"], FP32)


def test_mixer_without_a_graph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model_of(layer_of("gla"))
    weights = {name: value.numpy() for name, value in made.named_parameters()}
    change_mixer(monkeypatch, "gla", write=None)
    with pytest.raises(
        InputError, match=r"^mixer gla: no ONNX graph of it can be written; there are attention"
    ):
        model_graph(made.architecture, CONFIG, weights)


# In bf16.


@each_mixer
@pytest.mark.parametrize("way", ["matrices", "autocast"])
def test_bf16_is_finite_and_close(name: str, way: str) -> None:
    layer = layer_of(name)
    weights, x = to(weights_of(layer), torch.float32), inputs(65).float()
    expected, after = mixer_block(weights, x, layer, CONFIG)
    leaves = {
        key: weight.to(
            torch.bfloat16
            if way == "matrices" and is_half_precision(f"layers.0.{name}.{key}", tuple(weight.shape))
            else torch.float32
        ).requires_grad_()
        for key, weight in weights.items()
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        found, state = mixer_block(leaves, x, layer, CONFIG)
    assert found.dtype == torch.float32
    assert_close("block", found - x, expected - x, BF16)
    if "s" in state:
        assert state["s"].dtype == torch.float32
        assert_close("state", state["s"], after["s"], BF16)
    found.square().sum().backward()
    for key in mixer_shapes(name, WIDTH, layer.heads, layer.kv_heads, CONFIG):
        gradient = leaves[key].grad
        assert gradient is not None, key
        assert torch.isfinite(gradient).all(), key
        assert gradient.abs().max() > 0, key
