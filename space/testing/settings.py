"""Settings and inputs that the tests of a mixer share."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from space.blocks import initial
from space.layer import Layer, Llama3Scaling, ModelConfig, Rope
from space.mixers import MIXERS, Mixer, Shapes
from space.shapes import mixer_shapes

TOLERANCE = 1e-5  # of max|found - expected| / max|expected|
HEADS = ((4, 2), (3, 3), (4, 1))  # (heads, kv heads)


def require(condition: bool, message: str) -> None:
    """Raise an AssertionError with a message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def require_close(name: str, found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Fail unless a tensor or array is finite and close to another of the same shape.

    Args:
        name: for the message.
        found: tensor or array.
        expected: tensor or array.
        tolerance: largest max|found - expected| / max|expected|.
    """
    a, b = (
        x.detach().double().numpy() if isinstance(x, Tensor) else np.asarray(x) for x in (found, expected)
    )
    require(a.shape == b.shape, f"{name}: shape {a.shape}, expected {b.shape}")
    error, allowed = np.abs(a - b).max(initial=0.0), tolerance * np.abs(b).max(initial=0.0)
    close = bool(np.isfinite(a).all()) and error <= allowed
    require(close, f"{name}: largest error {error:.3g}, allowed {allowed:.3g}")


ROPE = Rope(
    theta=500.0,
    scaling=Llama3Scaling(
        factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
)

PLAIN = ModelConfig(vocab_size=37, max_seq_len=64, head_dim=16)
OTHER = replace(PLAIN, qk_norm=True, norm_eps=1e-3, qkv_bias=True, rope=ROPE)


class MixerSettings:
    """Layers, weights and inputs of one mixer.

    Attributes:
        mixer: its name; set by the subclass.
        model_configs: the settings that it is tested with.
        width: of the residual stream.
        window: of a windowed mixer.
        needs_graph: a mixer without an ONNX writer fails; False allows one that runs in torch only.
    """

    mixer: ClassVar[str]
    model_configs: ClassVar[tuple[ModelConfig, ...]] = (PLAIN, OTHER)
    width: ClassVar[int] = 48
    window: ClassVar[int] = 8
    needs_graph: ClassVar[bool] = True

    @property
    def entry(self) -> Mixer:
        """The registered mixer."""
        return MIXERS.get(self.mixer)

    def layers(self) -> Iterator[tuple[Layer, ModelConfig]]:
        """The layers, with numbers of heads, and settings that every test runs with."""
        window = self.window if self.entry.windowed else 0
        for model_config in self.model_configs:
            for heads, kv_heads in HEADS if self.entry.has_heads else ((0, 0),):
                layer = Layer(mixer=self.mixer, heads=heads, kv_heads=kv_heads, window=window)
                yield layer, model_config

    def shapes(self, layer: Layer, model_config: ModelConfig, width: int | None = None) -> Shapes:
        """The shapes of a layer's block."""
        return mixer_shapes(self.mixer, width or self.width, layer.heads, layer.kv_heads, model_config)

    def weights(self, layer: Layer, model_config: ModelConfig, seed: int = 1) -> dict[str, Tensor]:
        """Distinct fp64 values near the first ones, so that a wrong slice or order shows."""
        generator, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        found = {}
        for name, shape in self.shapes(layer, model_config).items():
            value = initial(name, shape, generator, mixer=self.mixer).double()
            scale = 0.1 if len(shape) == 1 else 0.03
            found[name] = value + scale * torch.randn(shape, generator=noise, dtype=torch.float64)
        return found

    def inputs(self, batch: int, length: int, seed: int = 2) -> Tensor:
        """A residual stream [B, T, width] in fp64."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length, self.width, dtype=torch.float64, generator=generator)
