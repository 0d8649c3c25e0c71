"""What a device costs: measuring ops and models, the device card, the fitted predictor."""

from latency.card import Card, load_card
from latency.predictor import Predictor, load_predictor
from latency.profile import ProfileConfig, profile
from latency.runtime import OnnxRuntime

__all__ = [
    "Card",
    "OnnxRuntime",
    "Predictor",
    "ProfileConfig",
    "load_card",
    "load_predictor",
    "profile",
]
