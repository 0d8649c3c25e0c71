"""One block as a function of its weights: what it computes before its output matrix, and its contribution.

Shapes: B windows, T tokens, W width, P inputs of the output matrix; x is the residual stream [B, T, W].
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from space import Architecture, Layer, ModelConfig
from space.attention.projection import project, rms_norm
from space.mixers import MIXERS, MixerCall, Shapes
from space.shapes import ffn_shapes, is_half_precision, mixer_shapes

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Block:
    """A mixer block or an FFN, without weights.

    Attributes:
        layer: a layer with either a mixer or an FFN.
        width: of the residual stream.
        model_config: the constants of the space.
    """

    layer: Layer
    width: int
    model_config: ModelConfig

    @property
    def is_ffn(self) -> bool:
        """True for an FFN."""
        return self.layer.mixer == "none"

    @property
    def output(self) -> str:
        """Name of the matrix that writes to the residual stream."""
        return "down" if self.is_ffn else MIXERS.get(self.layer.mixer).output

    @property
    def shapes(self) -> Shapes:
        """Shape of every parameter by name."""
        if self.is_ffn:
            return ffn_shapes(self.width, self.layer.ffn)
        layer = self.layer
        return mixer_shapes(layer.mixer, self.width, layer.heads, layer.kv_heads, self.model_config)

    def features(self, weights: Weights, x: Tensor) -> Tensor:
        """The inputs of the output matrix [B, T, P].

        Args:
            weights: of the block by name.
            x: the residual stream before the block.
        """
        hidden = rms_norm(x, weights["pre_norm"], self.model_config.norm_eps)
        if self.is_ffn:
            return F.silu(project(hidden, weights["gate"])) * project(hidden, weights["up"])
        call = MixerCall(self.layer, self.model_config, 0, {}, None)
        return MIXERS.get(self.layer.mixer).forward(weights, hidden, call)[0]

    def contribution(self, weights: Weights, x: Tensor) -> Tensor:
        """The block's contribution to the residual stream [B, T, W].

        Args:
            weights: of the block by name.
            x: the residual stream before the block.
        """
        return project(self.features(weights, x), weights[self.output]).to(x.dtype)

    def cast(self, weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights with large matrices in another type; gradients reach the originals.

        Args:
            weights: of the block by name.
            dtype: of the matrices that may be in half precision.
        """
        part = "ffn" if self.is_ffn else "mixer"
        alone = Architecture(self.width, (self.layer,))
        return {
            name: value.to(dtype)
            if is_half_precision(f"layers.0.{part}.{name}", tuple(value.shape), alone)
            else value
            for name, value in weights.items()
        }
