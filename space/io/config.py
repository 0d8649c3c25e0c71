"""Strict reading of YAML configurations, with all errors in one message."""

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from space.io.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """The safe loader, with an error for duplicate keys."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be a plain value", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _set(loader: _Loader, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(None, None, "a set has no order; give a list", node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:set", _set)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_yaml(path: Path) -> Any:
    """Read a YAML file.

    Args:
        path: path of the file.

    Raises:
        InputError: the file is missing, not text, or not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise InputError(f"{path}: not found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid YAML: nested too deeply") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        # Raised by PyYAML's constructors for a date 2024-13-45, a number 0x_ or a wrong explicit tag.
        raise InputError(f"{path}: not valid YAML: a value does not match its type ({error})") from None


def parse(model: type[Model], value: Any, where: str) -> Model:
    """Validate a value against a pydantic model.

    Args:
        model: the model's class.
        value: keys and values, as read from YAML or JSON.
        where: name of the source, for error messages.

    Raises:
        InputError: the value is invalid; the message lists all errors with their paths and allowed values.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected keys and values, found {type(value).__name__}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        lines = [_line(model, item) for item in error.errors(include_url=False)]
        raise InputError(f"{where}: " + "; ".join(lines)) from None


def _line(model: type[BaseModel], item: Any) -> str:
    place = "".join(
        f".{part}" if isinstance(part, str) and part.isprintable() else f"[{part!r}]" for part in item["loc"]
    ).lstrip(".")
    if item["type"] == "extra_forbidden":
        known = _known_keys(model, item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{place}: unknown key{hint}; known are {', '.join(known)}"
    message = item["msg"].removeprefix("Value error, ").replace("Assertion failed, ", "")
    if item["type"] == "value_error":
        return f"{place}: {message}" if place else message
    if item["type"] == "missing":
        return f"{place}: missing"
    return f"{place}: {message}, found {item['input']!r}"


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The allowed keys at a path inside a nested model."""
    current: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return []
        current = models[0]
    return sorted(current.model_fields)
