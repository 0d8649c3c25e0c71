"""Latency and memory of a device: measuring ops and models, the device card, the fitted predictor.

Public names are imported on first use: running a model needs no predictor, whose libraries take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latency.card import Card, load_card
    from latency.config import ProfileConfig
    from latency.predictor.predictor import Predictor, load_predictor
    from latency.profiling import profile
    from latency.runtimes.onnxruntime import OnnxRuntime
    from latency.runtimes.protocol import Runtime
    from latency.runtimes.registry import register_runtime

__all__ = [
    "Card",
    "OnnxRuntime",
    "Predictor",
    "ProfileConfig",
    "Runtime",
    "load_card",
    "load_predictor",
    "profile",
    "register_runtime",
]

_MODULES = {
    "Card": "latency.card",
    "OnnxRuntime": "latency.runtimes.onnxruntime",
    "Predictor": "latency.predictor.predictor",
    "ProfileConfig": "latency.config",
    "Runtime": "latency.runtimes.protocol",
    "load_card": "latency.card",
    "load_predictor": "latency.predictor.predictor",
    "profile": "latency.profiling",
    "register_runtime": "latency.runtimes.registry",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'latency' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
