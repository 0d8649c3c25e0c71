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
from pathlib import Path
from typing import Any

from space.io.errors import InputError

_SCHEMAS = dict.fromkeys(
    ("device card", "device ops", "device models", "latency predictor", "verification"), 2
)  # every other kind is at 1


def schema_version(kind: str) -> int:
    """The version of a kind of artefact that this formfit writes and reads."""
    return _SCHEMAS.get(kind, 1)


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


def write_json(path: Path, kind: str, inputs: Mapping[str, str], body: Mapping[str, Any]) -> None:
    """Write an artefact: a header (kind, schema version, hashes of its inputs), then the body."""
    header = {"kind": kind, "schema": schema_version(kind), "inputs": dict(inputs)}
    if "header" in body:
        raise ValueError("a body has no key 'header'")
    text = json.dumps({"header": header, **body}, indent=1, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path, kind: str, made_by: str) -> dict[str, Any]:
    """Read an artefact and check its header.

    Args:
        path: the file.
        kind: the kind that its header must name.
        made_by: the command that makes such a file, for the error message.

    Raises:
        InputError: the file is missing, truncated, of another kind or another schema version.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: not found; `{made_by}` makes it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_header(path, text, kind, made_by)


def parse_header(path: Path, text: bytes, kind: str, made_by: str) -> dict[str, Any]:
    """The value of an artefact's JSON text, its header checked; see :func:`read_json`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a whole {kind} file ({error}); `{made_by}` makes it again") from None
    header = value.get("header") if isinstance(value, dict) else None
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise InputError(f"{path}: not a {kind} file; `{made_by}` makes one")
    if header.get("schema") != schema_version(kind):
        raise InputError(
            f"{path}: schema version {header.get('schema')!r}, this formfit reads {schema_version(kind)}; "
            f"`{made_by}` makes it again"
        )
    return dict(value)


def made_from(path: Path, kind: str, inputs: Mapping[str, str]) -> bool:
    """Whether a whole artefact is there that was made from these inputs."""
    try:
        header = read_json(path, kind, "formfit")["header"]
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
