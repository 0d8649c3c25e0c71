"""Dataclasses from JSON objects that have a key for each field."""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from space.io.config import shown

Record = TypeVar("Record")
Reader = Callable[[Any], Any]


@lru_cache
def _adapter(kind: type, name: str) -> TypeAdapter[Any]:
    """Validator of a field."""
    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    hint = get_type_hints(kind)[name]
    try:
        return TypeAdapter(hint, config=config)
    except PydanticUserError:  # a dataclass or model, which has a configuration of its own
        return TypeAdapter(hint)


def read_record(kind: type[Record], value: Mapping[str, Any], **readers: Reader) -> Record:
    """A dataclass from a JSON object, whose values are of the types of the fields.

    Fields that the object lacks get their defaults; keys that are not fields are ignored.

    Args:
        kind: the dataclass.
        value: values by the name of the field; JSON, or of the field's own type.
        readers: functions of a JSON value by the name of the field; other fields take the value as it is.

    Raises:
        ValueError: a value is of another type, or one without a default is missing.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{kind.__name__}: expected an object, found {shown(value)}")
    found = {}
    for field in fields(kind):  # type: ignore[arg-type]
        name = field.name
        if name in value:
            item = value[name]
            found[name] = readers[name](item) if name in readers else _validated(kind, name, item)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{kind.__name__} has no {name}")
    return kind(**found)


def _validated(kind: type, name: str, item: Any) -> Any:
    if item is not None and not isinstance(item, str | int | float | list | tuple | dict):
        return item
    try:
        return _adapter(kind, name).validate_json(json.dumps(item), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{part!r}]" for part in first["loc"])
        message = f"{kind.__name__}.{name}{place}: {first['msg']}, found {shown(first['input'])}"
        raise ValueError(message) from None


def read_document(kind: type[Record], value: Mapping[str, Any], **readers: Reader) -> Record:
    """A dataclass with a field ``inputs`` from a JSON object with a header.

    Args:
        kind: the dataclass.
        value: the object of an artefact; its header gives ``inputs``, or it has none.
        readers: see :func:`read_record`.
    """
    header = value.get("header") or {}
    return read_record(kind, {**value, "inputs": header.get("inputs", {})}, **readers)


def tuple_of(read: Callable[[Any], Record]) -> Callable[[Any], tuple[Record, ...]]:
    """A reader of a list.

    Args:
        read: reader of one item.
    """
    return lambda items: tuple(map(read, items))


def mapping_of(read: Callable[[Any], Record]) -> Callable[[Any], dict[str, Record]]:
    """A reader of an object whose values are all of one kind.

    Args:
        read: reader of one value.
    """
    return lambda items: {name: read(item) for name, item in items.items()}


def optional(read: Callable[[Any], Record]) -> Callable[[Any], Record | None]:
    """A reader of a value that may be null.

    Args:
        read: reader of a value.
    """
    return lambda item: None if item is None else read(item)
