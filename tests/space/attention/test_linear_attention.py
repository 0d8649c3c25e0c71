import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from space.attention.linear import linear_attention
from tests.numerics import TOLERANCE, assert_close

Inputs = dict[str, Any]  # the tensors of linear_attention by name, None where there is none, and the rule
KINDS = ["linear", "gated per head", "gated per channel"]
KINDS += ["delta", "gated_delta per head", "gated_delta per channel"]
LENGTHS = [1, 2, 7, 15, 31, 33, 63, 64, 65]  # about the chunk of 32
EXACT, SINGLE = TOLERANCE["float64"], TOLERANCE["float32"]


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Token by token, as the papers write it."""
    (batch, tokens, heads, width), kv_heads = q.shape, k.shape[2]
    s = q.new_zeros(batch, kv_heads, width, width) if state is None else state
    outs = []
    for t in range(tokens):
        key, value = k[:, t, :, :, None], v[:, t, :, None]  # [B, Hkv, D, 1], [B, Hkv, 1, D]
        if decay is not None:
            s = decay[:, t].reshape(batch, kv_heads, -1, 1).exp() * s
        if beta is not None:
            value = beta[:, t, :, None, None] * (value - key.mT @ s)
        s = s + key * value
        outs.append(scale * (q[:, t, :, None] @ s.repeat_interleave(heads // kv_heads, 1))[:, :, 0])
    return torch.stack(outs, 1), s


def make(
    kind: str,
    tokens: int,
    *,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    width: int = 16,
    keys: str = "random",
    steps: tuple[float, ...] = (-20.0, -1.0, -0.01, 0.0),
    with_state: bool = True,
    seed: int = 0,
) -> Inputs:
    """Inputs in float32: keys as named, each step of decay one of ``steps``."""
    random = torch.Generator().manual_seed(seed)
    rule, _, by = kind.partition(" per ")
    shape = (batch, tokens, heads[1])
    k = torch.randn(*shape, width, generator=random)
    if keys == "correlated":  # positive and near one direction, as silu makes them
        k = F.silu(k + 2)
    if keys == "repeated":  # two keys, in a random order
        k = k[:, :1].where(torch.rand(*shape, 1, generator=random) < 0.5, k[:, -1:])
    if "delta" in rule:
        k = F.normalize(k, dim=-1)
    pick = torch.randint(len(steps), (*shape, width) if by == "channel" else shape, generator=random)
    return {
        "rule": rule,
        "q": torch.randn(batch, tokens, heads[0], width, generator=random),
        "k": k,
        "v": torch.randn(*shape, width, generator=random),
        "decay": torch.tensor(steps)[pick] if by else None,
        "beta": torch.rand(*shape, generator=random) if "delta" in rule else None,
        "state": torch.randn(batch, heads[1], width, width, generator=random) if with_state else None,
    }


def over(inputs: Inputs, tokens: slice) -> Inputs:
    """The inputs of some of the tokens."""
    along = ("q", "k", "v", "decay", "beta")
    return {name: x[:, tokens] if name in along and x is not None else x for name, x in inputs.items()}


def with_gradients(function: Any, dtype: torch.dtype, inputs: Inputs) -> dict[str, Tensor]:
    """Both results, and the gradients of a fixed random weighing of them."""
    leaves = {
        name: x.to(dtype, copy=True).requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor)
    }
    results = function(**{**inputs, **leaves})
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=random).to(dtype) for x in results]
    torch.autograd.backward(results, weights)
    gradients = {f"gradient of {name}": x.grad for name, x in leaves.items() if x.grad is not None}
    return dict(zip(("out", "state"), results, strict=True)) | gradients


def apart(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


def compare(inputs: Inputs, scale: float | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Results and gradients against the recurrence in float64, as a share of each one's largest element.

    Where that largest element is small by cancellation, the recurrence itself in the dtype misses the
    tolerance as well, and three times its error is allowed.
    """

    def exact(rule: str, **tensors: Any) -> tuple[Tensor, Tensor]:
        return recurrence(**tensors, scale=tensors["q"].shape[3] ** -0.5 if scale is None else scale)

    def ours(**given: Any) -> tuple[Tensor, Tensor]:
        return linear_attention(**given, scale=scale)

    expected = with_gradients(exact, torch.float64, inputs)
    actual = with_gradients(ours, dtype, inputs)
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        if x.abs().max() > 1e-30:
            allowed = TOLERANCE[str(dtype).removeprefix("torch.")]
            if apart(actual[name], x) > allowed:
                allowed = max(allowed, 3 * apart(with_gradients(exact, dtype, inputs)[name], x))
            assert_close(name, actual[name], x, allowed)
        else:  # the gradients of decay and state at steps of -100: e^-100 is less than float32 resolves
            assert actual[name].abs().max() < 1e-29, name


random_inputs = given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 200),
    batch=st.sampled_from([1, 2]),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    width=st.sampled_from([8, 16, 32]),
    keys=st.sampled_from(["random", "correlated", "repeated"]),
    steps=st.lists(st.sampled_from([-100.0, -20.0, -5.0, -0.3, -0.01, -1e-4, 0.0]), min_size=1, max_size=3),
    with_state=st.booleans(),
    scale=st.sampled_from([None, 1.0]),
    seed=st.integers(0, 2**16),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@random_inputs
def test_results_and_gradients_equal_the_recurrence(
    kind: str, tokens: int, scale: float | None, **shape: Any
) -> None:
    compare(make(kind, tokens, **shape), scale)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True)
@random_inputs
def test_results_equal_the_recurrence_on_random_inputs(
    kind: str, tokens: int, scale: float | None, **shape: Any
) -> None:
    compare(make(kind, tokens, **shape), scale)


@pytest.mark.parametrize("steps", [(-20.0,), (-20.0, -0.01), (-20.0, -0.01, 0.0)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "gated" in kind])
def test_fast_and_mixed_decays_equal_the_recurrence(kind: str, steps: tuple[float, ...]) -> None:
    compare(make(kind, 70, steps=steps, keys="repeated"))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_computed_in_float64(kind: str) -> None:
    compare(make(kind, 70), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_sequence_longer_than_the_cache(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("space.attention.linear.CACHED", 64 * 2 * 4 * 16)  # 64 tokens of the inputs below
    compare(make(kind, 150))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_computed_in_float32(kind: str) -> None:
    inputs = {
        n: x.bfloat16() if isinstance(x, Tensor) and n != "state" else x for n, x in make(kind, 70).items()
    }
    out, state = linear_attention(**inputs)
    wide = {name: x.float() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    expected, expected_state = linear_attention(**wide)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close("out", out, expected, TOLERANCE["bfloat16"])
    assert torch.equal(state, expected_state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_attention(**wide)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_split_prefill_and_single_tokens_equal_one_prefill(kind: str) -> None:
    inputs = make(kind, max(LENGTHS), steps=(-20.0, -0.3, -0.01, 0.0))
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
    with torch.inference_mode():
        outs, states = [], [inputs["state"]]
        for t in range(max(LENGTHS)):
            out, state = linear_attention(**{**over(inputs, slice(t, t + 1)), "state": states[-1]})
            outs.append(out)
            states.append(state)
        for length in LENGTHS:
            out, state = linear_attention(**over(inputs, slice(length)))
            assert_close(f"{length} tokens", torch.cat(outs[:length], 1), out, SINGLE)
            assert_close(f"state after {length}", states[length], state, SINGLE)
        for length in LENGTHS[:-1]:
            rest, last = linear_attention(**{**over(inputs, slice(length, None)), "state": states[length]})
            assert_close(f"the rest after {length}", rest, out[:, length:], SINGLE)
            assert_close(f"last state by {length}", last, state, SINGLE)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
def test_equal_channel_decays_equal_a_head_decay(rule: str) -> None:
    inputs = make(f"{rule} per head", 70)
    widened = inputs["decay"][..., None].expand(inputs["k"].shape)
    for a, b in zip(
        linear_attention(**{**inputs, "decay": widened}), linear_attention(**inputs), strict=True
    ):
        assert_close(rule, a, b, SINGLE)


@pytest.mark.parametrize("by", ["head", "channel"])
@pytest.mark.parametrize(("gated", "plain"), [("gated", "linear"), ("gated_delta", "delta")])
def test_zero_decay_equals_the_rule_without_decay(gated: str, plain: str, by: str) -> None:
    inputs = make(f"{gated} per {by}", 70, steps=(0.0,))
    ungated = {**inputs, "rule": plain, "decay": None}
    for a, b in zip(linear_attention(**inputs), linear_attention(**ungated), strict=True):
        assert_close(plain, a, b, SINGLE)


def test_transposed_inputs() -> None:
    inputs = make("gated_delta per channel", 70)
    turned = {
        n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in inputs.items() if isinstance(x, Tensor)
    }
    turned["state"] = inputs["state"].mT.contiguous().mT
    for tokens in (slice(1), slice(None)):
        ours, expected = over({**inputs, **turned}, tokens), over(inputs, tokens)
        assert_close("out", linear_attention(**ours)[0], linear_attention(**expected)[0], SINGLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "gate"}, "gate"),
        ({"rule": "gated"}, "beta"),
        ({"rule": "delta"}, "decay"),
        ({"decay": None}, "decay"),
        ({"beta": None}, "beta"),
        ({"q": torch.zeros(2, 5, 3, 16)}, "3 query heads"),
    ],
)
def test_invalid_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**make("gated_delta per head", 5), **change})


def naive(family: str) -> ModuleType:
    """A reference file of flash-linear-attention, loaded by path: importing its package needs triton."""
    package = importlib.util.find_spec("fla")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("flash-linear-attention (fla-core) is not installed")
    path = Path(package.submodule_search_locations[0]) / "ops" / family / "naive.py"
    spec = importlib.util.spec_from_file_location(f"naive_{family}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def head_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("linear_attn", "linear"),
        ("simple_gla", "gated per head"),
        ("gla", "gated per channel"),
        ("delta_rule", "delta"),
        ("gated_delta_rule", "gated_delta per head"),
        ("kda", "gated_delta per channel"),
    ],
)
def test_results_equal_flash_linear_attention(family: str, kind: str) -> None:
    inputs = make(kind, 70, heads=(2, 2), steps=(-3.0, -0.3, -0.01, 0.0))
    q, k, v, g, beta, s = (inputs[name] for name in ("q", "k", "v", "decay", "beta", "state"))
    module = naive(family)
    keep = {"initial_state": s, "output_final_state": True}
    match family:
        case "linear_attn":
            out, state = module.naive_recurrent_linear_attn(q, k, v, **keep)
        case "simple_gla":
            out, state = module.naive_recurrent_simple_gla(q, k, v, g, **keep)
        case "gla":
            out, state = module.naive_recurrent_gla(q, k, v, g, **keep)
        case "delta_rule":
            out, state = module.delta_rule_recurrence(*head_first(q, k, v, beta), **keep)
            (out,) = head_first(out)
        case "gated_delta_rule":
            out, state = module.naive_recurrent_gated_delta_rule(q, k, v, beta, g, **keep)
        case _:
            out, state = module.naive_recurrent_kda(q, k, v, g, beta, **keep)
    ours, our_state = linear_attention(**inputs)
    assert_close("out", ours, out, SINGLE)
    assert_close("state", our_state, state, SINGLE)


def test_results_equal_retention() -> None:
    inputs = make("gated per head", 70, heads=(4, 4), with_state=False)
    q, k, v = (inputs[name] for name in "qkv")
    by_head = torch.log1p(-(2.0 ** (-5 - torch.arange(4.0))))
    ours, _ = linear_attention(q, k, v, rule="gated", decay=by_head.expand(2, 70, 4))
    (expected,) = head_first(naive("retention").naive_retention(*head_first(q, k, v)))
    assert_close("out", ours, expected, SINGLE)
