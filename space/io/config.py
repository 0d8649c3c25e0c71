"""Strict reading of YAML configurations, with all errors in one message."""

import difflib
import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ValidationError

from space.io.errors import InputError
from space.io.filesystem import read_file
from space.io.names import RULE, is_name

Model = TypeVar("Model", bound=BaseModel)


MAX_YAML_BYTES = 4 * 2**20
MAX_YAML_NODES = 200_000  # values of a file, each alias counted as all that it stands for
MAX_ERRORS = 8  # that one message lists
MAX_VALUE_CHARACTERS = 80  # of a value that a message quotes
MERGE_TAG = "tag:yaml.org,2002:merge"
_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 6
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = MAX_VALUE_CHARACTERS


def _name(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"{shown(text)}: {RULE}")
    return text


Name = Annotated[str, AfterValidator(_name)]  # see space.io.names


class _Loader(yaml.SafeLoader):
    """The safe loader, with errors for duplicate keys and for aliases that expand without bound."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._count = 0
        self._sizes: dict[int, int] = {}  # of composed nodes with all below them

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, and count what an alias stands for.

        Args:
            parent: node that it belongs to.
            index: its place there.
        """
        is_alias, start = self.check_event(yaml.AliasEvent), self._count
        node = super().compose_node(parent, index)
        if not is_alias:
            self._count += 1
            self._sizes[id(node)] = self._count - start
        elif id(node) not in self._sizes:
            raise yaml.constructor.ConstructorError(None, None, "an alias of a value inside that value")
        else:
            self._count += self._sizes[id(node)]
        if self._count > MAX_YAML_NODES:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {MAX_YAML_NODES:,} values, aliases expanded"
            )
        return node


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == MERGE_TAG:  # of which the explicit keys take precedence
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be a plain value", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {shown(key)} is given twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _set(loader: _Loader, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(None, None, "a set has no order; give a list", node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:set", _set)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_yaml(path: Path) -> Any:
    """Read a YAML file of at most ``MAX_YAML_BYTES`` and ``MAX_YAML_NODES``.

    Args:
        path: path of the file.

    Raises:
        InputError: the file is missing, no regular file, too large, not text, or not YAML.
    """
    try:
        text = read_file(path, MAX_YAML_BYTES).decode("utf-8-sig")
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise InputError(f"{path}: not found") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid YAML: nested too deeply") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        # Raised by PyYAML's constructors for a date 2024-13-45, a number 0x_ or a wrong explicit tag.
        raise InputError(f"{path}: not valid YAML: a value does not match its type ({error})") from None


def shown(value: Any) -> str:
    """A value as a message quotes it, cut to ``MAX_VALUE_CHARACTERS``.

    Args:
        value: any value.
    """
    text = _SHORT.repr(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[: MAX_VALUE_CHARACTERS - 4]} ..."


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
        items = error.errors(include_url=False)
        lines = [_line(model, item) for item in items[:MAX_ERRORS]]
        if len(items) > MAX_ERRORS:
            lines.append(f"and {len(items) - MAX_ERRORS:,} more")
        raise InputError(f"{where}: " + "; ".join(lines)) from None


def _line(model: type[BaseModel], item: Any) -> str:
    place = "".join(
        f".{part}"
        if isinstance(part, str) and part.isprintable() and len(part) <= MAX_VALUE_CHARACTERS
        else f"[{shown(part)}]"
        for part in item["loc"]
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
    return f"{place}: {message}, found {shown(item['input'])}"


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The allowed keys at a path inside a nested model."""
    current: Any = model
    for part in path:
        if part not in current.model_fields:  # an index of a list, or a key of a dictionary
            continue
        annotation = current.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return []
        current = models[0]
    return sorted(current.model_fields)
