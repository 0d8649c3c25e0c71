"""Dataclasses from JSON objects that have a key for each field."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

Record = TypeVar("Record")
Reader = Callable[[Any], Any]


def read_record(kind: type[Record], value: Mapping[str, Any], **readers: Reader) -> Record:
    """A dataclass from a JSON object.

    Fields that the object lacks get their defaults; keys that are not fields are ignored.

    Args:
        kind: the dataclass.
        value: values by the name of the field.
        readers: functions of a JSON value by the name of the field; other fields take the value as it is.
    """
    names = [field.name for field in fields(kind) if field.name in value]  # type: ignore[arg-type]
    return kind(**{name: readers[name](value[name]) if name in readers else value[name] for name in names})


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
