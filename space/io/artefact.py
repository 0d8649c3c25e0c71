"""Artefacts: files with a header, written atomically and validated when read.

Every JSON artefact is an object whose first key, ``header``, holds its kind, its schema version and the
sha256 of its inputs. A file is written beside its final path, synced and renamed, so that a reader never sees
an incomplete one.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from space.io.errors import InputError
from space.io.filesystem import make_readable, naming, read_file, require_regular, sync_file, sync_folder


def digest(data: bytes | str) -> str:
    """The sha256 of bytes or text, as 64 hexadecimal digits.

    Args:
        data: bytes, or text that is encoded as UTF-8.
    """
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file's content, as 64 hexadecimal digits.

    Args:
        path: path of the file.
    """
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """The canonical compact JSON text of a value: sorted keys, no spaces, no NaN.

    Args:
        value: a JSON value.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to ``path`` if the block ends without an exception.

    Args:
        path: the final path; missing folders are created.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            sync_file(temporary)
            make_readable(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically.

    Args:
        path: path of the file.
        data: its content.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write text atomically, as UTF-8.

    Args:
        path: path of the file.
        text: its content.
    """
    write_bytes(path, text.encode())


@dataclass(frozen=True)
class Artefact:
    """A kind of file with a header, JSON or Parquet.

    Attributes:
        kind: the header's kind.
        made_by: command that writes such a file, for error messages.
        schema: the header's schema version; it increases with every change of keys.
    """

    kind: str
    made_by: str
    schema: int = 1

    def header(self, inputs: Mapping[str, str]) -> dict[str, Any]:
        """The header of a file.

        Args:
            inputs: sha256 of everything the file is made from, by name.
        """
        return {"kind": self.kind, "schema": self.schema, "inputs": dict(inputs)}

    def write(self, path: Path, inputs: Mapping[str, str], body: Mapping[str, Any]) -> None:
        """Write a JSON file atomically: the header, then the body.

        Args:
            path: path of the file.
            inputs: sha256 of everything the file is made from, by name.
            body: JSON values by key, without ``header``.
        """
        if "header" in body:
            raise ValueError("a body has no key 'header'")
        text = json.dumps({"header": self.header(inputs), **body}, indent=1, allow_nan=False)
        write_text(path, text + "\n")

    def read(self, path: Path, made_by: str | None = None) -> dict[str, Any]:
        """Read a JSON file and check its header.

        Args:
            path: path of the file.
            made_by: command for error messages, if not the kind's own.

        Raises:
            InputError: the file is missing, truncated, of another kind or of another schema version.
        """
        command = made_by or self.made_by
        try:
            text = read_file(path)
        except FileNotFoundError:
            raise InputError(f"{path}: not found; `{command}` makes it") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        return self.parse(path, text, command)

    def parse(self, path: Path, text: bytes, made_by: str | None = None) -> dict[str, Any]:
        """Parse the text of a JSON file and check its header.

        Args:
            path: path of the file, for error messages.
            text: the file's content.
            made_by: command for error messages, if not the kind's own.

        Raises:
            InputError: the text is truncated, of another kind or of another schema version.
        """
        command = made_by or self.made_by
        try:
            value = json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: not a whole {self.kind} file ({str(error)[:200]}); `{command}` makes it again"
            ) from None
        header = value.get("header") if isinstance(value, dict) else None
        if not isinstance(header, dict) or header.get("kind") != self.kind:
            raise InputError(f"{path}: not a {self.kind} file; `{command}` makes one")
        if header.get("schema") != self.schema:
            found = repr(header.get("schema"))[:20]
            raise InputError(
                f"{path}: schema version {found}, this formfit reads {self.schema}; "
                f"`{command}` makes it again"
            )
        inputs = header.get("inputs")
        if not isinstance(inputs, dict) or not all(isinstance(item, str) for item in inputs.values()):
            raise InputError(
                f"{path}: not a whole {self.kind} file (its header has no inputs); `{command}` makes it again"
            )
        return dict(value)

    @contextmanager
    def checked(self, path: Path, made_by: str | None = None) -> Iterator[None]:
        """Refuse a body that cannot be read, in a block that reads one.

        Args:
            path: path of the file, for error messages.
            made_by: command for error messages, if not the kind's own.

        Raises:
            InputError: a value of the body is missing, of another type or impossible.
        """
        try:
            yield
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
            raise InputError(
                f"{path}: not a whole {self.kind} file ({reason}); `{made_by or self.made_by}` makes it again"
            ) from None

    def made_from(self, path: Path, inputs: Mapping[str, str]) -> bool:
        """True if a complete file exists whose header has the given inputs.

        Args:
            path: path of the file.
            inputs: sha256 by name; other inputs of the header are ignored.
        """
        try:
            header = self.read(path)["header"]
        except InputError:
            return False
        return all(header["inputs"].get(name) == value for name, value in inputs.items())


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text} is no finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text[:20])


def check_inputs(path: Path, artefact: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    """Check that an artefact was made from given inputs.

    Args:
        path: path of the file, for the error message.
        artefact: the artefact, as read.
        expected: sha256 by name; other inputs of the header are ignored.

    Raises:
        InputError: an input has another hash in the artefact's header; the message names both.
    """
    inputs = artefact["header"].get("inputs")
    inputs = inputs if isinstance(inputs, dict) else {}
    for name, wanted in expected.items():
        found = inputs.get(name)
        if found != wanted:
            raise InputError(
                f"{path}: made for {name} {str(found)[:12]}, but the {name} given is {wanted[:12]}"
            )
