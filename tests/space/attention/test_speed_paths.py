"""The forms chosen for speed, against the plain ones: convolution, sliding attention, rotation, kernels."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from space.attention import fla as cuda
from space.attention.convolution import causal_conv
from space.attention.linear import linear_attention
from space.attention.rotary import rotate
from space.attention.softmax import softmax_attention
from space.layer import Rope
from tests.numerics import TOLERANCE, assert_close
from tests.space import naive
from tests.space.attention.test_linear_attention import KINDS, make

ROPE = Rope()
SINGLE, HALF = TOLERANCE["float32"], TOLERANCE["bfloat16"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(ours: Any, plain: Any, inputs: tuple[Tensor, ...]) -> None:
    """Outputs and gradients of a function in float32 against another's in float64."""
    leaves = [
        tuple(x.to(dtype, copy=True).requires_grad_() for x in inputs)
        for dtype in (torch.float32, torch.float64)
    ]
    actual, expected = ours(*leaves[0]), plain(*leaves[1])
    assert_close("out", actual, expected, SINGLE)
    weights = drawn(*actual.shape, seed=9)
    actual.backward(weights)
    expected.backward(weights.double())
    largest = max(float(b.grad.abs().max()) for b in leaves[1] if b.grad.numel())
    for i, (a, b) in enumerate(zip(*leaves, strict=True)):
        if b.grad.any():
            assert_close(f"gradient of input {i}", a.grad, b.grad, SINGLE)
        elif b.grad.numel():  # a window of one token has no choice: only the rounding of larger terms is left
            assert float(a.grad.abs().max()) <= SINGLE * largest


# The convolution.


def conv1d(x: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    joined = torch.cat([past, x], dim=1).mT
    return F.conv1d(joined, taps[:, None], groups=len(taps)).mT


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_convolution_equals_conv1d(tokens: int, taps: int) -> None:
    inputs = drawn(2, tokens, 6), drawn(6, taps, seed=1), drawn(2, taps - 1, 6, seed=2)
    compare(lambda *given: causal_conv(*given)[0], conv1d, inputs)


@pytest.mark.parametrize("taps", [3, 4])
def test_convolution_in_pieces_equals_the_whole(taps: int) -> None:
    x, weights = drawn(2, 9, 6), drawn(6, taps, seed=1)
    whole, last = causal_conv(x, weights, None)
    assert torch.equal(whole, causal_conv(x, weights, torch.zeros(2, taps - 1, 6))[0])
    past, pieces = None, []
    for piece in torch.split(x, [1, 1, 5, 2], dim=1):
        out, past = causal_conv(piece, weights, past)
        pieces.append(out)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert past is not None
    assert torch.equal(past, last)
    assert torch.equal(last, x[:, 1 - taps :])


def test_convolution_of_bfloat16_sums_in_float32() -> None:
    x, taps = drawn(2, 33, 6).bfloat16(), drawn(6, 4, seed=1)
    out, past = causal_conv(x, taps, None)
    assert (out.dtype, past.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(out, causal_conv(x.float(), taps, None)[0].bfloat16())


# Sliding attention.


def windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Each sequence row by row, in the inputs' type."""
    return torch.stack([naive.naive_attention(*one, window) for one in zip(q, k, v, strict=True)])


@pytest.mark.parametrize("training_form", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize(
    ("window", "tokens"),
    [
        (1, 2),
        (1, 9),
        (2, 3),
        (5, 6),
        (5, 23),
        (31, 70),
        (32, 33),
        (32, 96),
        (33, 100),
        (48, 49),
        (48, 95),
        (0, 65),
        (0, 130),
    ],
)
def test_softmax_attention_at_any_length_equals_the_plain_form(
    window: int,
    tokens: int,
    heads: tuple[int, int],
    training_form: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not training_form:
        monkeypatch.setattr("space.attention.softmax._trains_by_blocks", lambda q, window: False)
    query, kv = heads
    inputs = tuple(drawn(2, tokens, h, 8, seed=i) for i, h in enumerate((query, kv, kv)))
    compare(
        lambda q, k, v: softmax_attention(q, k, v, window),
        lambda q, k, v: windowed(q, k, v, window),
        inputs,
    )


# The rotation, whose factors are kept from call to call.


@pytest.mark.parametrize("position", [0, 5, 4000])
def test_rotation_equals_complex_numbers(position: int) -> None:
    x = drawn(2, 7, 3, 16)
    plain = [[naive.rotate(row, position + t, ROPE) for t, row in enumerate(one)] for one in x.double()]
    assert_close(
        "rotated", rotate(x, position, ROPE), torch.stack([torch.stack(rows) for rows in plain]), SINGLE
    )


def test_rotation_in_training_after_inference() -> None:
    x = drawn(1, 11, 2, 16)
    with torch.inference_mode():
        first = rotate(x, 77, ROPE)
    leaf = x.clone().requires_grad_()
    second = rotate(leaf, 77, ROPE)
    second.square().sum().backward()
    assert torch.equal(first, second)
    assert leaf.grad is not None
    assert_close("gradient", leaf.grad, 2 * x, SINGLE)  # a rotation keeps lengths


# Gradients of the recurrence that only part of the results ask for.


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_single_results_add_up(kind: str) -> None:
    inputs = make(kind, 70, steps=(-1.0, -0.01))
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if isinstance(x, Tensor)}

    def gradients(*chosen: int) -> list[Tensor]:
        results = linear_attention(**inputs)
        total = torch.stack([results[i].square().sum() for i in chosen]).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves.values(), found, strict=True)]

    of_out, of_state, of_both = gradients(0), gradients(1), gradients(0, 1)
    for name, a, b, both in zip(leaves, of_out, of_state, of_both, strict=True):
        assert_close(f"gradient of {name}", a + b, both, SINGLE)


# The kernels of flash-linear-attention.


def in_half(inputs: dict[str, Any]) -> dict[str, Any]:
    """The queries, keys and values in bfloat16, as a model under autocast has them."""
    return {n: x.bfloat16() if n in ("q", "k", "v") else x for n, x in inputs.items()}


def parameters(family: str, kernel: str) -> set[str]:
    """The names that a kernel of the installed flash-linear-attention takes; its source is only read."""
    package = importlib.util.find_spec("fla")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("flash-linear-attention (fla-core) is not installed")
    folder = Path(package.submodule_search_locations[0]) / "ops" / family
    exported = ast.parse((folder / "__init__.py").read_text())
    assert kernel in {a.name for n in exported.body if isinstance(n, ast.ImportFrom) for a in n.names}
    source = ast.parse((folder / f"{kernel.removesuffix('_' + family)}.py").read_text())
    (found,) = (n for n in source.body if isinstance(n, ast.FunctionDef) and n.name == kernel)
    return {argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)}


@pytest.mark.parametrize("tokens", [1, 64, 65])
@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_called_with_their_parameters(
    kind: str, learning: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments of the kernels, and the use of their results; the kernels are stood in for."""
    inputs = in_half(make(kind, tokens, heads=(6, 2), steps=(-1.0, -0.01)))
    inputs["q"].requires_grad_(learning)
    called = []

    def kernel(family: str, fused: bool) -> Any:
        def stand_in(**given: Any) -> tuple[Tensor, Tensor]:
            name = f"{'fused_recurrent' if fused else 'chunk'}_{family}"
            assert given.keys() <= parameters(family, name)
            called.append(name)
            assert given.pop("output_final_state")
            decay = next((given.pop(key) for key in ("g", "gk") if key in given), None)
            assert {x.shape[2] for x in (given["q"], given["k"], given["v"])} == {6}
            assert {given[key].dtype for key in "qkv"} == {torch.bfloat16}
            assert decay is None or (decay.dtype == torch.float32 and decay.shape[2] == 6)
            assert given["initial_state"].dtype == torch.float32
            return linear_attention(
                rule=inputs["rule"], decay=decay, state=given.pop("initial_state"), **given
            )

        return stand_in

    monkeypatch.setattr(cuda, "_kernel", kernel)
    given = {**inputs, "scale": 0.5}
    out, state = cuda.fla_linear_attention(**given)
    expected, expected_state = linear_attention(**given)
    assert called[0].startswith("fused" if tokens <= 64 and not learning else "chunk")
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close("out", out, expected, 2 * HALF)
    assert_close("state", state, expected_state, 2 * HALF)


def test_kernels_are_not_used_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "installed", lambda: True)
    x = drawn(1, 3, 2, 8).bfloat16()
    assert not cuda.fla_takes(x, x, x)


needs_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() and cuda.installed()),
    reason="needs CUDA, flash-linear-attention and triton",
)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_equal_the_exact_form(kind: str, tokens: int) -> None:
    inputs = in_half(make(kind, tokens, heads=(4, 2), width=64, steps=(-3.0, -0.3, -0.01)))
    there = {n: x.cuda() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    assert cuda.fla_takes(there["q"], there["k"], there["v"])
    wide = {n: x.double() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    expected = linear_attention(**wide)
    for name, a, b in zip(("out", "state"), linear_attention(**there), expected, strict=True):
        assert a.is_cuda
        assert_close(name, a.float(), b, 4 * HALF)  # operands and, within a chunk, scores are rounded


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_gradients_equal_the_exact_form(kind: str) -> None:
    inputs = in_half(make(kind, 100, heads=(4, 2), width=64, steps=(-1.0, -0.1, -0.01)))

    def gradients(device: str, wide: bool) -> dict[str, Tensor]:
        moved = {
            n: x.detach().to(device, torch.float64 if wide else x.dtype).requires_grad_()
            for n, x in inputs.items()
            if isinstance(x, Tensor)
        }
        out, state = linear_attention(**{**inputs, **moved})
        (out.float().square().mean() + state.float().square().mean()).backward()
        return {n: x.grad.cpu() for n, x in moved.items() if x.grad is not None}

    expected = gradients("cpu", wide=True)
    for name, found in gradients("cuda", wide=False).items():
        assert_close(f"gradient of {name}", found.float(), expected[name], 8 * HALF)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_float32_on_a_gpu_uses_the_exact_form(kind: str) -> None:
    inputs = make(kind, 70)
    there = {n: x.cuda() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    for name, a, b in zip(
        ("out", "state"), linear_attention(**there), linear_attention(**inputs), strict=True
    ):
        assert_close(name, a, b, SINGLE)
