"""Linear attention on a GPU by the kernels of flash-linear-attention, if it is installed.

The kernels multiply in half precision or TF32, so they take only inputs of half precision; float32 keeps
the exact form of :mod:`space.attention.linear`, which runs on a GPU too.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FUSED = 64  # tokens up to which the fused recurrence takes one after the other, if no gradient is needed

# The kernels by rule and by whether decays are per channel. They take [B, T, H, D], return the output
# and a state [B, H, K, V], as ours is, and see grouped heads as repeated ones.
FAMILIES = {
    ("linear", False): "simple_gla",
    ("gated", False): "simple_gla",
    ("gated", True): "gla",
    ("delta", False): "delta_rule",
    ("gated_delta", False): "gated_delta_rule",
    ("gated_delta", True): "kda",
}


def fla_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True for inputs on a GPU, at least one of them of half precision, if the kernels are installed.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, T, Hkv, D].
        v: values [B, T, Hkv, D].
    """
    return q.is_cuda and _half(q, k, v) is not None and installed()


@functools.cache
def installed() -> bool:
    """True if flash-linear-attention can be imported, and triton, in which its kernels are written."""
    return all(importlib.util.find_spec(name) is not None for name in ("fla", "triton"))


def fla_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: str,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The kernels' form of :func:`space.attention.linear.linear_attention`.

    Args:
        q: queries [B, T, H, D]; products run in the first type of half precision among q, k and v.
        k: keys [B, T, Hkv, D].
        v: values [B, T, Hkv, D].
        rule: the recurrence.
        decay: log decay of the gated rules [B, T, Hkv] or [B, T, Hkv, D].
        beta: write strength of the delta rules [B, T, Hkv].
        state: S before the first token [B, Hkv, D, D].
        scale: multiplies the queries.

    Returns:
        The output [B, T, H, D] in the dtype of q, and S after the last token [B, Hkv, D, D].
    """
    (_, tokens, heads, _), kv_heads = q.shape, k.shape[2]
    half = _half(q, k, v)
    repeats = heads // kv_heads

    def spread(x: Tensor, dim: int = 2) -> Tensor:
        return x.repeat_interleave(repeats, dim) if repeats > 1 else x

    family = FAMILIES[rule, decay is not None and decay.ndim == 4]
    learning = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, decay, beta, state)
    )
    # Of the fused recurrences, those of the gated delta rules have no gradient.
    fused = tokens <= FUSED and not learning
    inputs: dict[str, Any] = {"q": q.to(half), "k": spread(k.to(half)), "v": spread(v.to(half))}
    if decay is not None:
        inputs["gk" if family == "gla" and fused else "g"] = spread(decay.float())
    if beta is not None:
        inputs["beta"] = spread(beta.to(half if family == "delta_rule" else torch.float32))
    out, after = _kernel(family, fused)(
        **inputs, scale=scale, initial_state=spread(state.float(), 1), output_final_state=True
    )
    return out.to(q.dtype), after[:, ::repeats].to(state.dtype)


def _half(*tensors: Tensor) -> torch.dtype | None:
    """The first type of half precision among these."""
    return next((x.dtype for x in tensors if x.dtype in (torch.bfloat16, torch.float16)), None)


@functools.cache
def _kernel(family: str, fused: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """``chunk_*`` or ``fused_recurrent_*`` of a family of flash-linear-attention's ops."""
    module = importlib.import_module(f"fla.ops.{family}")
    kernel: Callable[..., tuple[Tensor, Tensor]] = getattr(
        module, f"{'fused_recurrent' if fused else 'chunk'}_{family}"
    )
    return kernel
