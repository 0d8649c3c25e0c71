import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from space.linear_attention import linear_attention
from tests.numerics import TOLERANCE, assert_close

Inputs = dict[str, Tensor | None]
HEADS = [(1, 1), (2, 1), (4, 2)]
LENGTHS = [1, 2, 7, 15, 31, 33, 63, 64, 65]  # about the chunk of 32
KINDS = ["linear", "delta", *(f"{rule} per {by}" for rule in ("gated", "gated_delta") for by in ("head", "channel"))]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These tensors are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Token by token, as the papers write it."""
    group = q.shape[2] // k.shape[2]
    s = k.new_zeros(*k.shape[::2], k.shape[3], k.shape[3]) if state is None else state
    outs = []
    for t in range(q.shape[1]):
        key, value = k[:, t, :, :, None], v[:, t, :, None]  # [B, Hkv, D, 1], [B, Hkv, 1, D]
        if decay is not None:
            s = decay[:, t].reshape(*k.shape[::2], -1, 1).exp() * s
        if beta is not None:
            value = beta[:, t, :, None, None] * (value - key.mT @ s)
        s = s + key * value
        outs.append(scale * (q[:, t, :, None] @ s.repeat_interleave(group, 1))[:, :, 0])
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
) -> tuple[str, Inputs]:
    """The rule and float32 inputs of a kind: keys as named, each step of decay drawn from ``steps``."""
    rule, _, by = kind.partition(" per ")
    random = torch.Generator().manual_seed(seed)
    heads_q, heads_kv = heads
    shape = (batch, tokens, heads_kv)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    k = normal(*shape, width)
    if keys == "correlated":  # positive and close to one direction, as silu makes them
        k = F.silu(k + 2)
    elif keys == "repeated":  # two keys in turn, at random
        k = k[:, :1].where(torch.rand(*shape, 1, generator=random) < 0.5, k[:, -1:])
    if "delta" in rule:
        k = F.normalize(k, dim=-1)
    pick = torch.randint(len(steps), (*shape, width) if by == "channel" else shape, generator=random)
    return rule, {
        "q": normal(batch, tokens, heads_q, width),
        "k": k,
        "v": normal(*shape, width),
        "decay": torch.tensor(steps)[pick] if by else None,
        "beta": torch.rand(*shape, generator=random) if "delta" in rule else None,
        "state": normal(batch, heads_kv, width, width) if with_state else None,
    }


def run(inputs: tuple[str, Inputs], *, tokens: slice = slice(None), **options: Any) -> tuple[Tensor, Tensor]:
    """linear_attention on some of the tokens, without gradients."""
    rule, tensors = inputs
    given = {name: x if x is None or name == "state" else x[:, tokens] for name, x in tensors.items()}
    with torch.inference_mode():
        return linear_attention(rule=rule, **{**given, **options})


def with_gradients(function: Any, inputs: Inputs, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Both results, and the gradients of the inputs under a fixed random weighing of the results."""
    leaves = {name: x if x is None else x.to(dtype).requires_grad_() for name, x in inputs.items()}
    out, state = function(**leaves, **options)
    random = torch.Generator().manual_seed(1)
    weighing = [torch.randn(x.shape, generator=random).to(x.dtype) for x in (out, state)]
    torch.autograd.backward((out, state), weighing)
    gradients = {f"gradient of {name}": x.grad for name, x in leaves.items() if x is not None}
    return {"out": out, "state": state, **gradients}


def compare(
    kind: str, inputs: tuple[str, Inputs], scale: float | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Results and gradients against the recurrence in float64, each within 1e-5 of its largest element."""
    rule, tensors = inputs
    exact_scale = tensors["q"].shape[-1] ** -0.5 if scale is None else scale  # type: ignore[union-attr]
    expected = with_gradients(recurrence, tensors, torch.float64, scale=exact_scale)
    actual = with_gradients(linear_attention, tensors, dtype, rule=rule, scale=scale)
    for name, x in expected.items():
        assert actual[name].dtype == dtype
        # Where every step is -100, the gradients of decay and state are e^-100, which float32 holds
        # with two digits: there they must be as small as that.
        representable = x.abs().max() > torch.finfo(dtype).tiny / torch.finfo(dtype).eps
        close_to = x if representable else torch.zeros_like(x)
        assert_close(f"{kind}: {name}", actual[name] * (1 if representable else 0), close_to, 1e-5)


