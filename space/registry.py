"""Registries: names that a configuration may use, and the plug-ins that add to them.

A registry knows its built-in names and the modules that register them, which are imported when a name is
first asked for. An installed package adds its own through an entry point of the group ``formfit.plugins``,
whose module calls ``register_mixer``, ``register_metric`` and the like. Plug-ins are imported when a name is
asked for that is not registered, or when all names are listed; one that cannot be imported gives one line of
warning.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from space.io.errors import InputError

GROUP = "formfit.plugins"
Value = TypeVar("Value")
_loaded: set[str] = set()  # entry points that were tried, by name and value
_log = logging.getLogger("formfit")


class Registry(Generic[Value]):
    """Values by name, some of them registered only when they are asked for.

    Args:
        kind: what is registered, for error messages, such as ``mixer``.
        builtin: by built-in name, in the order in which names are listed, the module that registers it.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str] | None = None) -> None:
        self.kind, self.builtin = kind, dict(builtin or {})
        self._values: dict[str, Value] = {}

    def register(self, name: str, value: Value) -> None:
        """Add a value under a name.

        Raises:
            InputError: the name is taken.
        """
        module = self.builtin.get(name)
        if module and module not in sys.modules:
            import_module(module)  # a built-in name is taken even before its module is needed
        if self._values.get(name, value) is not value:
            raise InputError(f"{self.kind} {name!r} is registered already")
        self._values[name] = value

    def get(self, name: str) -> Value:
        """The value of a name; plug-ins are loaded if it is not a built-in one.

        Raises:
            InputError: nothing is registered under that name.
        """
        if name not in self:
            raise InputError(f"{self.kind} {name!r}: not one of {', '.join(self.names())}")
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._values and name in self.builtin:
            import_module(self.builtin[str(name)])
        if name not in self._values:
            load_plugins()
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def names(self) -> tuple[str, ...]:
        """All names: the built-in ones first, then those of plug-ins."""
        load_plugins()
        return (*self.builtin, *(name for name in self._values if name not in self.builtin))


def load_plugins() -> None:
    """Import the modules of the entry point group ``formfit.plugins``, once each."""
    for point in entry_points(group=GROUP):
        key = f"{point.name}={point.value}"
        if key in _loaded:
            continue
        _loaded.add(key)
        try:
            point.load()
        except Exception as error:  # a stranger's code: whatever it raises, formfit goes on without it
            reason = " ".join(str(error).split()) or type(error).__name__
            _log.warning("formfit: plug-in %s (%s) is not loaded: %s", point.name, point.value, reason)
