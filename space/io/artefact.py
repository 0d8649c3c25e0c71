"""Artefacts on disk: written whole or not at all, read with their header checked.

Every JSON artefact is an object whose first key, ``header``, names its kind, its
schema version and the hashes of what it was made from. A file is written beside
its final name, synced and renamed, so that a reader never sees half of it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from space.io.errors import InputError


def digest(data: bytes | str) -> str:
    """The sha256 of some bytes or text, as 64 hexadecimal digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """The one compact JSON form of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write text atomically, as UTF-8."""
    write_bytes(path, text.encode())


@dataclass(frozen=True)
class Artefact:
    """A kind of file that formfit writes and reads: JSON or Parquet with a header.

    The header names the kind, its schema version and the sha256 of every input, by name.

    Attributes:
        kind: the kind that the header names.
        made_by: the command that makes such a file, for error messages.
        schema: the schema version that is written and read; it rises with every change of keys.
    """

    kind: str
    made_by: str
    schema: int = 1

    def header(self, inputs: Mapping[str, str]) -> dict[str, Any]:
        """The header of a file that was made from these inputs (sha256 by name)."""
        return {"kind": self.kind, "schema": self.schema, "inputs": dict(inputs)}

    def write(self, path: Path, inputs: Mapping[str, str], body: Mapping[str, Any]) -> None:
        """Write a JSON file atomically: the header, then the body.

        Args:
            path: the file.
            inputs: sha256 of what it was made from, by name.
            body: JSON values by key; ``header`` is reserved.
        """
        if "header" in body:
            raise ValueError("a body has no key 'header'")
        text = json.dumps({"header": self.header(inputs), **body}, indent=1, allow_nan=False)
        write_text(path, text + "\n")

    def read(self, path: Path, made_by: str | None = None) -> dict[str, Any]:
        """The JSON object of a file, its header checked.

        Args:
            path: the file.
            made_by: the command named in errors, where it is more specific than the kind's own.

        Raises:
            InputError: the file is missing, truncated, of another kind or of another schema version.
        """
        command = made_by or self.made_by
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{path}: not found; `{command}` makes it") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        return self.parse(path, text, command)

    def parse(self, path: Path, text: bytes, made_by: str | None = None) -> dict[str, Any]:
        """The JSON object of a file's text, its header checked; see :meth:`read`."""
        command = made_by or self.made_by
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: not a whole {self.kind} file ({error}); `{command}` makes it again"
            ) from None
        header = value.get("header") if isinstance(value, dict) else None
        if not isinstance(header, dict) or header.get("kind") != self.kind:
            raise InputError(f"{path}: not a {self.kind} file; `{command}` makes one")
        if header.get("schema") != self.schema:
            raise InputError(
                f"{path}: schema version {header.get('schema')!r}, this formfit reads {self.schema}; "
                f"`{command}` makes it again"
            )
        return dict(value)

    def made_from(self, path: Path, inputs: Mapping[str, str]) -> bool:
        """Whether a complete file is there whose header has these inputs (sha256 by name)."""
        try:
            header = self.read(path)["header"]
        except InputError:
            return False
        return all(header["inputs"].get(name) == value for name, value in inputs.items())


def check_inputs(path: Path, artefact: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    """Refuse an artefact that was made from other inputs, naming both sides.

    Raises:
        InputError: an input named in ``expected`` has another hash in the artefact's header.
    """
    inputs = artefact["header"].get("inputs")
    inputs = inputs if isinstance(inputs, dict) else {}
    for name, wanted in expected.items():
        found = inputs.get(name)
        if found != wanted:
            raise InputError(
                f"{path}: made for {name} {str(found)[:12]}, but the {name} given is {wanted[:12]}"
            )
