"""The record of a search: what was evaluated, generation by generation.

``evaluations/part-NNNN.parquet`` is the truth; each part is written whole, and says which
search it belongs to. The Optuna study in ``study.log`` is its projection for dashboards and
plots: it is mended when a search goes on, since a process that is killed may leave half a
line, after which Optuna could not read the journal again, or a lock that nobody holds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from space import InputError
from space.io.artefact import Artefact, check_inputs
from space.io.parquet import read_table, write_table

EVALUATIONS = Artefact("evaluations", "formfit search", schema=2)


class Record:
    """The evaluations of one search."""

    def __init__(self, folder: Path, inputs: Mapping[str, str]) -> None:
        self.folder, self.inputs = folder / "evaluations", dict(inputs)

    def path(self, part: str) -> Path:
        """The file of a part."""
        return self.folder / f"part-{part}.parquet"

    def read(self, part: str) -> pd.DataFrame | None:
        """A part that was evaluated, or None.

        Raises:
            InputError: it is not whole, or belongs to a search with other inputs.
        """
        path = self.path(part)
        if not path.exists():
            return None
        table, header = read_table(path, EVALUATIONS)
        try:
            check_inputs(path, header, self.inputs)
        except InputError as error:
            raise InputError(f"{error}; `--name` keeps another search beside it") from None
        return table

    def write(self, part: str, table: pd.DataFrame) -> None:
        """Keep a part that was evaluated whole."""
        write_table(self.path(part), EVALUATIONS, self.inputs, table)


def genomes_of(table: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.int16]]:
    """The genomes [N, G] of a table of evaluations."""
    return np.stack([np.asarray(g, np.int16) for g in table["genome"]])
