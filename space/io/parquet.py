"""Tables on disk: Parquet, written whole or not at all, with a header as JSON artefacts have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from space.io.artefact import atomic_path, canonical_json, parse_header, schema_version
from space.io.errors import InputError


def write_table(
    path: Path,
    kind: str,
    inputs: Mapping[str, str],
    table: pd.DataFrame,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a table atomically; ``extra`` is a JSON value kept beside its header."""
    header = {"kind": kind, "schema": schema_version(kind), "inputs": dict(inputs)}
    metadata = {"formfit": canonical_json({"header": header, **(extra or {})})}
    arrow = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(metadata)
    with atomic_path(path) as temporary:
        pq.write_table(arrow, temporary)


def read_table(path: Path, kind: str, made_by: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a table and the JSON value beside it, its header checked.

    Raises:
        InputError: the file is missing, truncated, of another kind or another schema version.
    """
    try:
        arrow = pq.read_table(path)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; `{made_by}` makes it") from None
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a whole {kind} file ({reason}); `{made_by}` makes it again") from None
    text = (arrow.schema.metadata or {}).get(b"formfit", b"null")
    return arrow.to_pandas(), parse_header(path, text, kind, made_by)
