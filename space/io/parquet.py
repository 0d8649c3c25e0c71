"""Parquet tables with an artefact's header, written atomically."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from space.io.artefact import Artefact, atomic_path, canonical_json
from space.io.errors import InputError


def write_table(
    path: Path,
    artefact: Artefact,
    inputs: Mapping[str, str],
    table: pd.DataFrame,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a table atomically.

    Args:
        path: path of the file.
        artefact: its kind and schema version.
        inputs: sha256 of everything the table is made from, by name.
        table: the rows.
        extra: further JSON values of the metadata, by key.
    """
    metadata = {"formfit": canonical_json({"header": artefact.header(inputs), **(extra or {})})}
    arrow = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(metadata)
    with atomic_path(path) as temporary:
        pq.write_table(arrow, temporary)


def read_table(
    path: Path, artefact: Artefact, made_by: str | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a table and check its header.

    Args:
        path: path of the file.
        artefact: expected kind and schema version.
        made_by: command for error messages, if not the kind's own.

    Returns:
        The table, and the JSON object of its metadata with ``header``.

    Raises:
        InputError: the file is missing, truncated, of another kind or of another schema version.
    """
    command = made_by or artefact.made_by
    try:
        arrow = pq.read_table(path)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; `{command}` makes it") from None
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: not a whole {artefact.kind} file ({reason}); `{command}` makes it again"
        ) from None
    text = (arrow.schema.metadata or {}).get(b"formfit", b"null")
    return arrow.to_pandas(), artefact.parse(path, text, command)
