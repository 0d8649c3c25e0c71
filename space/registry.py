"""Registries of the names that a configuration may use, and plug-ins that add to them.

A registry lists built-in names with the modules that register them; such a module is imported when its name
is first looked up. An installed package adds names through an entry point of the group ``formfit.plugins``
whose module calls ``register_mixer``, ``register_metric`` and the like. Plug-ins are imported when an
unregistered name is looked up or all names are listed. A plug-in that cannot be imported logs one line of
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
_loaded: set[str] = set()  # entry points imported or tried, as name=value
_log = logging.getLogger("formfit")


class Registry(Generic[Value]):
    """Values by name; built-in ones are registered on first use.

    Args:
        kind: kind of the values, for error messages, such as ``mixer``.
        builtin: module that registers each built-in name, in the order of :meth:`names`.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str] | None = None) -> None:
        self.kind, self.builtin = kind, dict(builtin or {})
        self._values: dict[str, Value] = {}

    def register(self, name: str, value: Value) -> None:
        """Add a value.

        Args:
            name: its name.
            value: the value; registering the same object again is allowed.

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
        """Look up a value; plug-ins are loaded if the name is not registered yet.

        Args:
            name: its name.

        Raises:
            InputError: the name is not registered.
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
        """All names, built-in ones first; loads plug-ins."""
        load_plugins()
        return self.known_names()

    def known_names(self) -> tuple[str, ...]:
        """The names known so far, built-in ones first; loads no plug-ins."""
        return (*self.builtin, *(name for name in self._values if name not in self.builtin))


def load_plugins() -> None:
    """Import every plug-in, the modules of the entry point group ``formfit.plugins``, once."""
    for point in entry_points(group=GROUP):
        key = f"{point.name}={point.value}"
        if key in _loaded:
            continue
        _loaded.add(key)
        try:
            point.load()
        except Exception as error:  # third-party code may raise anything; continue without it
            reason = " ".join(str(error).split()) or type(error).__name__
            _log.warning("formfit: plug-in %s (%s) is not loaded: %s", point.name, point.value, reason)
