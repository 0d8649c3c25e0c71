"""Shared parts of several folders of tests: small spaces, and their members listed one by one."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Any, TypeVar

import numpy as np

from space.architecture import Architecture, Layer, ModelConfig
from space.genome import Genomes, decode
from space.io.config import parse
from space.io.errors import InputError
from space.mixers import MIXERS
from space.space import LayerChoices, Space

T = TypeVar("T")
LAYER_KEYS = ("mixer", "heads", "kv_heads", "ffn", "window")
HYBRID_KEYS = ("ratios", "max_linear_kinds", "full_layers", "local")


def tiny_value(**changes: Any) -> dict[str, Any]:
    """A small space as a YAML file would give it; a change of None takes its key away.

    Keys of ``layer`` and ``hybrid`` are given without their place: ``tiny_value(heads=[2])``.
    """
    value: dict[str, Any] = {
        "name": "tiny",
        "vocab_size": 19,
        "max_seq_len": 64,
        "head_dim": 16,
        "width": [16, 32],
        "depth": [1, 2],
        "layer": {"mixer": ["attention", "linear"], "heads": [1, 2], "ffn": [0, 16]},
        "hybrid": {"ratios": ["full", 1, "linear"]},
    }
    for key, change in changes.items():
        place = value["layer"] if key in LAYER_KEYS else value["hybrid"] if key in HYBRID_KEYS else value
        if change is None:
            place.pop(key, None)
        else:
            place[key] = change
    return value


def tiny_space(**changes: Any) -> Space:
    """The space of :func:`tiny_value`."""
    return parse(Space, tiny_value(**changes), "tiny")


def attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """The result of a call, or the message with which it refuses its input; all else is raised."""
    try:
        return call(), ""
    except InputError as error:
        return None, str(error)


# Between them: none or not, FFN 0 or not, windows, every way to choose kv heads, forced layers,
# one and two kinds of linear mixer, local mixers apart or not, ratios of every sort.
TINY_SPACES: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention only": {"mixer": ["attention"], "ratios": ["full"], "depth": [1, 3]},
    "linear only": {"mixer": ["linear", "retnet"], "ratios": ["linear"], "ffn": [16]},
    "kinds 1": {
        "mixer": ["attention", "linear", "retnet", "sliding"],
        "ratios": [1, 2, "linear"],
        "max_linear_kinds": 1,
        "window": [8],
        "heads": [1],
        "depth": [1, 2, 3],
    },
    "kinds 2": {
        "mixer": ["attention", "linear", "retnet", "gated_deltanet"],
        "max_linear_kinds": 2,
        "heads": [2],
        "ffn": [32],
        "depth": [2, 4],
        "width": [16],
    },
    "none": {"mixer": ["attention", "linear", "none"], "ffn": [16, 32], "depth": [1, 2, 3], "width": [16]},
    "none and no ffn": {"mixer": ["none", "attention", "retnet"], "ratios": [2, "full"], "depth": [1, 3]},
    "windows": {"mixer": ["sliding", "attention"], "window": [4, 16, 64], "ratios": ["full", 3]},
    "local apart": {
        "mixer": ["attention", "sliding", "linear"],
        "window": [4, 8],
        "local": "separate",
        "ratios": [1, "linear"],
        "heads": [1],
        "depth": [1, 2, 3],
        "width": [16],
    },
    "local apart, no linear": {
        "mixer": ["attention", "sliding", "none"],
        "window": [8],
        "local": "separate",
        "ratios": ["full"],
        "heads": [1],
        "depth": [2, 3],
    },
    "kv heads": {"heads": [1, 2, 4], "kv_heads": [1, 2], "width": [16]},
    "kv group": {"heads": [2, 4], "kv_group": 2, "ffn": [0]},
    "forced": {
        "mixer": ["attention", "linear", "none"],
        "heads": [1],
        "depth": [2, 3, 4],
        "ratios": [1, 2, "full"],
        "full_layers": [3, 0],
        "width": [16],
    },
    "forced, local apart": {
        "mixer": ["attention", "linear", "sliding", "none"],
        "window": [8],
        "local": "separate",
        "heads": [1],
        "ratios": [2, "linear"],
        "full_layers": [1],
        "depth": [1, 2, 3],
        "width": [16],
    },
    "any": {
        "mixer": ["attention", "linear", "retnet", "none"],
        "ratios": ["any"],
        "heads": [1],
        "depth": [1, 2, 3],
        "max_linear_kinds": 1,
        "width": [16],
    },
    "any, local apart": {
        "mixer": ["attention", "sliding", "linear", "none"],
        "window": [4, 8],
        "local": "separate",
        "ratios": ["any", 1],
        "full_layers": [1],
        "heads": [1],
        "ffn": [0, 16],
        "depth": [2, 3],
        "width": [16],
    },
    "any, no full": {"mixer": ["linear", "retnet"], "ratios": ["any"], "heads": [1], "depth": [1, 3]},
    "one": {
        "mixer": ["attention"],
        "ratios": ["full"],
        "heads": [1],
        "ffn": [0],
        "depth": [1],
        "width": [16],
    },
}


def every_layer(choices: LayerChoices, kv_group: int | None) -> list[Layer]:
    """The distinct layers that may stand in a slot; the first is the absent one."""
    layers = [Layer()]
    for mixer, ffn in product(choices.mixer, choices.ffn):
        if mixer == "none":
            layers += [Layer(ffn=ffn)] if ffn else []
            continue
        for heads, window in product(choices.heads, choices.window if mixer == "sliding" else (0,)):
            if kv_group:
                groups = [heads // kv_group]
            else:
                groups = [k for k in choices.kv_heads or (heads,) if heads % k == 0]
            layers += [Layer(mixer=mixer, heads=heads, kv_heads=k, window=window, ffn=ffn) for k in groups]
    return layers


def belongs(space: Space, architecture: Architecture) -> bool:
    """True for an architecture of the space, by the meaning of the words.

    Some layer must mix tokens; with m full and linear mixers, n_full = ceil(m / (r + 1)) are full.
    """
    allowed = every_layer(space.layer, space.kv_group)
    if architecture.width not in space.width or len(architecture.layers) != max(space.depth):
        return False
    if not all(layer in allowed for layer in architecture.layers):
        return False
    if sum(layer != Layer() for layer in architecture.layers) not in space.depth:
        return False
    if any(architecture.layers[slot].mixer != "attention" for slot in space.hybrid.full_layers):
        return False
    mixers = [layer.mixer for layer in architecture.layers if layer.mixer != "none"]
    apart = ("sliding", "short_conv") if space.hybrid.local == "separate" else ()
    linear = [mixer for mixer in mixers if mixer != "attention" and mixer not in apart]
    if space.hybrid.max_linear_kinds is not None and len(set(linear)) > space.hybrid.max_linear_kinds:
        return False
    full = mixers.count("attention")
    m = full + len(linear)
    if "any" in space.hybrid.ratios:
        return bool(mixers)
    wanted = {
        ratio: m if ratio == "full" else 0 if ratio == "linear" else math.ceil(Fraction(m, ratio + 1))
        for ratio in space.hybrid.ratios
    }
    return bool(mixers) and full in wanted.values()


@lru_cache(maxsize=64)
def every_architecture(space: Space) -> frozenset[Architecture]:
    """All members of a small space, found by trying every layer in every slot."""
    slots = product(every_layer(space.layer, space.kv_group), repeat=max(space.depth))
    tried = (Architecture(width, layers) for layers in slots for width in space.width)
    return frozenset(architecture for architecture in tried if belongs(space, architecture))


def every_row(space: Space) -> Genomes:
    """Every combination of genes, members or not, in rising order: [N, G]."""
    slot = [len(space.mixer_options), len(space.head_options), len(space.ffn_options)]
    sizes = [len(space.width), *slot * space.slots]
    return np.indices(sizes).reshape(len(sizes), -1).T.astype(np.int16)


@lru_cache(maxsize=64)
def every_genome(space: Space) -> Genomes:
    """The genomes of all members of a small space, one each, found by trying every row: [N, G]."""
    members = every_architecture(space)
    rows = every_row(space)
    first: dict[Architecture, int] = {}
    for i, architecture in enumerate(decode(space, rows)):
        if architecture in members:
            first.setdefault(architecture, i)  # the row whose genes without effect are all 0
    genomes = rows[sorted(first.values())]
    genomes.setflags(write=False)
    return genomes


def change_mixer(monkeypatch: Any, name: str, **changes: Any) -> None:
    """Replace fields of a registered mixer until the test ends."""
    monkeypatch.setitem(MIXERS._values, name, replace(MIXERS.get(name), **changes))


def uses_linear_attention(name: str) -> bool:
    """True for a mixer on the recurrence of `linear_attention`: q, k, v and the state s [B, Hkv, D, D]."""
    model_config, layer = ModelConfig(vocab_size=16, max_seq_len=16, head_dim=16), Layer(heads=4, kv_heads=2)
    entry = MIXERS.get(name)
    if not entry.has_heads or not {"q", "k", "v"} <= entry.shapes(48, 4, 2, model_config).keys():
        return False
    return entry.state_shapes(layer, 48, model_config, 1, 16).get("s") == (1, 2, 16, 16)


def unknown_operator(block: Any) -> tuple[str, dict[str, str]]:
    """An ONNX writer whose operator no runtime has."""
    out = block.graph.add("Nowhere", block.packed(), domain="com.microsoft")
    return out, {name: block.graph.add("Identity", value) for name, value in block.state.items()}


def scatter(module: Any, seed: int = 0) -> None:
    """Give every parameter distinct values at initialisation scale, so that a wrong slice shows.

    Norms and gates too: ones and zeros would hide it.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (0.1 * noise).to(parameter.dtype) * (1.0 if parameter.ndim == 1 else 0.3)
