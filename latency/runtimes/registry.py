"""Runtimes by name."""

from latency.card import Card
from latency.runtimes.onnxruntime import OnnxRuntime
from latency.runtimes.protocol import Runtime
from space import InputError


def open_runtime(name: str, threads: int, precision: str = "fp32") -> Runtime:
    """A runtime by its name, for models of a precision.

    Raises:
        InputError: this machine does not have it, or it does not have the precision.
    """
    if name == "onnxruntime":
        return OnnxRuntime(threads, precision)
    if precision != "fp32":
        raise InputError(f"runtime {name}: precision {precision} is for onnxruntime; torch runs fp32")
    from latency.runtimes.torch import TorchRuntime  # torch takes seconds to load

    return TorchRuntime(threads, "cuda" if "cuda" in name else "cpu", compiled=name.endswith("compiled"))


def open_card_runtime(card: Card, threads: int = 1) -> Runtime:
    """The runtime that a card is of, on this machine."""
    return open_runtime(str(card.fingerprint.get("runtime")), threads)
