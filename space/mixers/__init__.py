"""The mixers, one file each, and the registry that all lists of them derive from.

A mixer is a :class:`Mixer` value. Its file holds its parameter and state shapes, initialisation, torch
function, ONNX writer and cost; what several share stands in ``heads``, ``recurrent*`` and ``softmax*``. An
installed package adds mixers through an entry point of the group ``formfit.plugins`` whose module calls
:func:`register_mixer`. Importing this package does not import torch or onnx.
"""

import re
from typing import get_args

from space.io.errors import InputError
from space.layer import ModelConfig
from space.mixers.mixer import Mixer, MixerCall, MixerClass, Shapes, State, Weights
from space.registry import Registry

RESERVED = ("none", "embedding", "head", "ffn", "norm", "mixer", "shared")  # names of other ops and parts

# In the order in which messages list them.
MIXERS: Registry[Mixer] = Registry(
    "mixer",
    {
        name: f"{__name__}.{name}"
        for name in (
            "attention",
            "sliding",
            "short_conv",
            "linear",
            "retnet",
            "mamba2",
            "gla",
            "hgrn2",
            "deltanet",
            "gated_deltanet",
            "kda",
        )
    },
)


def register_mixer(mixer: Mixer) -> None:
    """Add a mixer under its name.

    Args:
        mixer: the value that describes it.

    Raises:
        InputError: the name is taken, reserved or malformed, the class is unknown, or ``projections``,
            ``matrices``, ``output``, ``full_precision`` or ``initial`` names no parameter.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", mixer.name) or mixer.name in RESERVED:
        raise InputError(
            f"mixer {mixer.name!r}: a name is lower-case letters, digits and underscores, "
            f"and none of {', '.join(RESERVED)}"
        )
    if mixer.mixer_class not in get_args(MixerClass):
        raise InputError(
            f"mixer {mixer.name}: class {mixer.mixer_class!r} is not one of {', '.join(get_args(MixerClass))}"
        )
    _check_parameters(mixer)
    MIXERS.register(mixer.name, mixer)


def _check_parameters(mixer: Mixer) -> None:
    """Raise an InputError where a field names a parameter that is not among the shapes."""
    heads, kv_heads = (2, 1) if mixer.has_heads else (0, 0)
    # Parameters that depend on the model's settings count.
    model_config = ModelConfig(vocab_size=16, max_seq_len=16, head_dim=16, qk_norm=True, qkv_bias=True)
    shapes = mixer.shapes(32, heads, kv_heads, model_config)
    fields = {
        "projections": mixer.projections,
        "matrices": mixer.matrices,
        "output": (mixer.output,),
        "full_precision": mixer.full_precision,
        "initial": tuple(mixer.initial),
    }
    for field, names in fields.items():
        for name in names:
            if name not in shapes:
                raise InputError(
                    f"mixer {mixer.name}: {field} names {name!r}, which is not among its shapes: "
                    f"{', '.join(shapes)}"
                )


def mixers_of_class(mixer_class: MixerClass) -> tuple[str, ...]:
    """The names of the registered mixers of a class, ``full``, ``linear`` or ``local``."""
    return tuple(name for name in MIXERS if MIXERS.get(name).mixer_class == mixer_class)


__all__ = [
    "MIXERS",
    "Mixer",
    "MixerCall",
    "MixerClass",
    "Shapes",
    "State",
    "Weights",
    "mixers_of_class",
    "register_mixer",
]
