"""Architectures: points of a search space.

An architecture is a value: frozen, hashable, with one canonical JSON form and a key derived from it. It does
not include weights. A layer's slot matters, because the supernet shares weights by slot.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from space.io.artefact import canonical_json, digest
from space.io.errors import InputError
from space.layer import Layer, ModelConfig
from space.mixers import MIXERS

__all__ = ["Architecture", "Layer", "ModelConfig", "has_heads", "is_windowed"]


def has_heads(mixer: str) -> bool:
    """True if layers with this mixer have heads.

    Args:
        mixer: name of a registered mixer, or ``none``.
    """
    return mixer != "none" and MIXERS.get(mixer).has_heads


def is_windowed(mixer: str) -> bool:
    """True if layers with this mixer have a window.

    Args:
        mixer: name of a registered mixer, or ``none``.
    """
    return mixer != "none" and MIXERS.get(mixer).windowed


@dataclass(frozen=True)
class Architecture:
    """A residual width and one layer per slot.

    Attributes:
        width: residual width.
        layers: one layer for each slot; absent layers are empty.
    """

    width: int
    layers: tuple[Layer, ...]

    @property
    def depth(self) -> int:
        """Number of layers that are not empty."""
        return sum(layer.present for layer in self.layers)

    @property
    def pattern(self) -> tuple[str, ...]:
        """Mixers of the layers that are not empty, in order."""
        return tuple(layer.mixer for layer in self.layers if layer.present)

    @cached_property
    def text(self) -> str:
        """The canonical JSON form."""
        return canonical_json(self.to_json())

    @cached_property
    def key(self) -> str:
        """The first 12 hexadecimal digits of the sha256 of the canonical JSON form."""
        return digest(self.text)[:12]

    def describe(self) -> str:
        """Short readable form, such as ``width 96: attention/4:2+ffn256 -``."""
        return f"width {self.width}: " + " ".join(layer.describe() for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """The canonical JSON value; zero fields of a layer are omitted."""
        layers = [
            {name: value for name, value in vars(layer).items() if value or name in ("mixer", "ffn")}
            for layer in self.layers
        ]
        return {"width": self.width, "layers": layers}

    @staticmethod
    def from_json(value: object, where: str = "architecture") -> "Architecture":
        """Read an architecture; the inverse of :meth:`to_json`.

        Args:
            value: a JSON value.
            where: its place, for error messages.

        Raises:
            InputError: a field is missing, unknown, of another type, or contradicts another.
        """
        if not isinstance(value, Mapping) or set(value) != {"width", "layers"}:
            raise InputError(f"{where}: expected an object with exactly 'width' and 'layers'")
        width, layers = value["width"], value["layers"]
        if not _is_count(width) or width == 0 or not isinstance(layers, list) or not layers:
            raise InputError(f"{where}: 'width' must be a positive integer and 'layers' a list")
        return Architecture(
            width, tuple(_layer(item, f"{where}.layers[{i}]") for i, item in enumerate(layers))
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _layer(item: object, where: str) -> Layer:
    known = ("mixer", "heads", "kv_heads", "window", "ffn")
    if not isinstance(item, Mapping) or set(item) - set(known) or not {"mixer", "ffn"} <= set(item):
        raise InputError(
            f"{where}: expected an object with mixer, ffn and, where they apply, heads, kv_heads, window"
        )
    layer = Layer(**item)
    if not isinstance(layer.mixer, str) or (layer.mixer != "none" and layer.mixer not in MIXERS):
        raise InputError(f"{where}.mixer: {layer.mixer!r} is not one of {', '.join(MIXERS)}, none")
    for name in known[1:]:
        if not _is_count(getattr(layer, name)):
            raise InputError(f"{where}.{name}: {getattr(layer, name)!r} is not a whole number >= 0")
    if (layer.heads > 0) != has_heads(layer.mixer):
        raise InputError(f"{where}.heads: {layer.heads} does not go with mixer {layer.mixer}")
    if bool(layer.heads) != bool(layer.kv_heads) or (layer.heads and layer.heads % layer.kv_heads):
        raise InputError(f"{where}.kv_heads: {layer.kv_heads} does not divide heads {layer.heads}")
    if (layer.window > 1) != is_windowed(layer.mixer) or layer.window == 1:
        raise InputError(f"{where}.window: {layer.window} does not go with mixer {layer.mixer}")
    return layer
