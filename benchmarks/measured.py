"""Tables of measurements that benchmarks read: their files, and columns that are checked.

Whatever cannot be used is an :class:`~space.InputError` of one line that names the file.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from space import InputError


def files(data: Path, pattern: str) -> list[Path]:
    """Return the files that ``--data`` names, in order of their names.

    Args:
        data: one file, or a folder.
        pattern: what names of files in a folder match.
    """
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise InputError(f"--data {data}: no such file or folder")
    found = sorted(path for path in data.glob(pattern) if path.is_file())
    if not found:
        raise InputError(f"--data {data}: holds no {pattern}")
    return found


def read(path: Path, reader: Callable[[Path], pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """Return the table of a file, which has at least some columns and one row.

    Args:
        path: the file.
        reader: reads a file of that type.
        columns: names of columns that are needed.
    """
    try:
        rows = reader(path)
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    missing = [name for name in columns if name not in rows.columns]
    if missing:
        raise InputError(f"{path}: no column {', '.join(missing)}; needed: {', '.join(columns)}")
    if not isinstance(rows.index, pd.RangeIndex):
        raise InputError(f"{path}: rows have more values than the header has names")
    if rows.empty:
        raise InputError(f"{path}: no rows")
    return rows


def above_zero(path: Path, rows: pd.DataFrame, name: str, gaps: bool = False) -> NDArray[np.float64]:
    """Return a column of finite numbers above 0.

    Args:
        path: the file, for messages.
        rows: its table.
        name: the column.
        gaps: whether values may be missing; they are NaN.
    """
    values = pd.to_numeric(rows[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    bad = ~(np.isfinite(values) & (values > 0))
    if gaps:
        bad &= rows[name].notna().to_numpy()
    if bad.any():
        row = int(bad.argmax())
        raise InputError(f"{path}: {name}, row {row + 1}: {rows[name].iloc[row]} is not a number above 0")
    return values


def names(path: Path, rows: pd.DataFrame, name: str) -> "pd.Series[str]":
    """Return a column of names, none of which is missing.

    Args:
        path: the file, for messages.
        rows: its table.
        name: the column.
    """
    bad = rows[name].isna().to_numpy()
    if bad.any():
        raise InputError(f"{path}: {name}, row {int(bad.argmax()) + 1}: no value")
    return rows[name].astype(str)
