"""The registry of mixers in the file that a Hugging Face folder ships: a dictionary of what runs a model.

The functions that graphs and costs are made by are left out, and with them all that they import.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from space.io.errors import InputError
from space.mixers import MIXERS, Mixer

VALUES = (
    "name",
    "mixer_class",
    "projections",
    "matrices",
    "output",
    "full_precision",
    "has_heads",
    "windowed",
)
FUNCTIONS = ("shapes", "forward")


def mixer_table(names: Iterable[str]) -> tuple[str, set[str]]:
    """A text in place of ``space/mixers/__init__.py``, and the packages that its functions are of.

    Args:
        names: the mixers in it, in order.

    Raises:
        InputError: a function of a mixer does not stand at the top of a module.
    """
    imports: set[tuple[str, str]] = {
        ("space.mixers.mixer", name) for name in ("MixerCall", "Shapes", "State", "Weights")
    }

    def reference(mixer: Mixer, field: str, function: Callable[..., Any]) -> str:
        place, name = function.__module__, getattr(function, "__qualname__", "")
        if getattr(sys.modules.get(place), name, None) is not function:
            raise InputError(
                f"mixer {mixer.name}: its {field} is not a function at the top of a module, "
                "which a Hugging Face folder needs; extract it with --format onnx"
            )
        imports.add((place, name))
        return _alias(place, name)

    lines = []
    for mixer in map(MIXERS.get, names):
        values = [f"{name}={getattr(mixer, name)!r}" for name in VALUES]
        values += [f"{name}={reference(mixer, name, getattr(mixer, name))}" for name in FUNCTIONS]
        initial = [f"{name!r}: {reference(mixer, 'initial', f)}" for name, f in mixer.initial.items()]
        fields = [*values, f"initial={{{', '.join(initial)}}}"]
        lines += [f"    {mixer.name!r}: SimpleNamespace(", *(f"        {item}," for item in fields), "    ),"]
    text = [
        '"""The mixers of this file by name: the part of formfit\'s registry that runs a model."""',
        "from types import SimpleNamespace",
        *(f"from {place} import {name} as {_alias(place, name)}" for place, name in sorted(imports)),
        *("MIXERS = {", *lines, "}"),
    ]
    return "\n".join(text) + "\n", {place.split(".")[0] for place, _ in imports}


def _alias(place: str, name: str) -> str:
    """A name that functions of two modules do not share; MixerCall and the types keep theirs."""
    return name if place == "space.mixers.mixer" else f"{place.replace('.', '_')}_{name}"
