"""Distances of tensors, and their bounds."""

from typing import Any

import numpy as np
import torch

# The largest |actual - expected| allowed, as a share of the largest |expected|.
TOLERANCE = {
    "float64": 1e-12,  # eps 2.2e-16: sums over a few hundred tokens, amplified by a triangular solve
    "float32": 1e-5,  # eps 1.2e-7: the same, about a hundred roundings of the largest term
    "bfloat16": 2**-8,  # computed in float32, rounded once: half a unit in the last of 8 bits, doubled
}


def relative_error(a: Any, b: Any) -> float:
    """max|a - b| / max|b| of two tensors or arrays of one shape; 0 where both are zero or empty."""
    a, b = _array(a), _array(b)
    difference = np.abs(a - b).max(initial=0.0)
    largest = np.abs(b).max(initial=0.0)
    if difference == 0:
        return 0.0
    return float(difference / largest) if largest else float("inf")


def assert_close(name: str, actual: Any, expected: Any, tolerance: float) -> None:
    """Fail unless the relative error is within the tolerance and all of ``actual`` is finite.

    The message gives the largest absolute and relative error and the first index that is off.
    """
    actual, expected = _array(actual), _array(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    error = relative_error(actual, expected)
    if np.isfinite(actual).all() and error <= tolerance:
        return
    difference = np.abs(actual - expected)
    bad = ~np.isfinite(actual) | ~(difference <= tolerance * np.abs(expected).max(initial=0.0))
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    raise AssertionError(
        f"{name}: largest error {difference.max():.3g}, relative {error:.3g}, allowed {tolerance:.3g}; "
        f"{int(bad.sum())} of {bad.size} elements off, the first at {first}: {actual[first]:.9g}, "
        f"expected {expected[first]:.9g}"
    )


def _array(x: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    if isinstance(x, torch.Tensor):
        x = x.detach().double().cpu().numpy()
    return np.asarray(x, dtype=np.float64)
