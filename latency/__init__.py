"""What a device costs: measuring ops and models, the device card, the fitted predictor.

The names of the door are loaded when they are asked for: who only runs a model needs no predictor, whose
libraries take seconds to load.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latency.card import Card, load_card
    from latency.predictor.predictor import Predictor, load_predictor
    from latency.profile import ProfileConfig
    from latency.runtimes.onnxruntime import OnnxRuntime

__all__ = ["Card", "OnnxRuntime", "Predictor", "ProfileConfig", "load_card", "load_predictor"]

_HOMES = {
    "Card": "latency.card",
    "OnnxRuntime": "latency.runtimes.onnxruntime",
    "Predictor": "latency.predictor.predictor",
    "ProfileConfig": "latency.profile",
    "load_card": "latency.card",
    "load_predictor": "latency.predictor.predictor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latency' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
