"""The record of a search: its evaluations, generation by generation.

A generation is one file, ``evaluations/part-NNNN.parquet``, written atomically, whose header names the inputs
of the search. A search continues from these files alone; the Optuna study in ``study.log`` only projects them
(see :mod:`search.engine.optuna_study`).
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
    """The evaluations of one search.

    Args:
        folder: the search's.
        inputs: sha256 of what the search is made from, by name.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, str]) -> None:
        self.folder, self.inputs = folder / "evaluations", dict(inputs)

    def path(self, part: str) -> Path:
        """The file of a part.

        Args:
            part: four digits of the generation, ``probes-`` and four digits of the round, or ``middle`` or
                ``front``, the two re-evaluations.
        """
        return self.folder / f"part-{part}.parquet"

    def read(self, part: str) -> pd.DataFrame | None:
        """The evaluations of a part, a row each; None if it was not evaluated.

        Args:
            part: see :meth:`path`.

        Raises:
            InputError: the file is not whole, or belongs to a search with other inputs.
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
        """Write the evaluations of a whole part.

        Args:
            part: see :meth:`path`.
            table: a row for each evaluation.
        """
        write_table(self.path(part), EVALUATIONS, self.inputs, table)


def genomes_of(table: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.int16]]:
    """The genomes [N, G] of evaluations.

    Args:
        table: N rows with a column ``genome``.
    """
    return np.stack([np.asarray(g, np.int16) for g in table["genome"]])
