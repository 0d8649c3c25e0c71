"""The record of a search: what was evaluated, generation by generation.

``evaluations/part-NNNN.parquet`` is the truth; each part is written whole, and says which
search it belongs to. The Optuna study in ``study.log`` is its projection for dashboards and
plots: it is mended when a search goes on, since a process that is killed may leave half a
line, after which Optuna could not read the journal again, or a lock that nobody holds.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, create_trial

from space import Architecture, InputError, Space
from space.files import check_inputs, write_bytes
from space.tables import read_table, write_table

KIND = "evaluations"


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
        table, header = read_table(path, KIND, "formfit search")
        check_inputs(path, header, self.inputs)
        return table

    def write(self, part: str, table: pd.DataFrame) -> None:
        """Keep a part that was evaluated whole."""
        write_table(self.path(part), KIND, self.inputs, table)


def summary_params(space: Space, architecture: Architecture) -> dict[str, Any]:
    """A few readable numbers of an architecture, for plots: width, depth, mixes and sizes."""
    layers = [layer for layer in architecture.layers if layer.present]
    classes = [space.mixer_class(layer.mixer) for layer in layers if layer.mixer != "none"]
    linear = sorted({m.mixer for m in layers if m.mixer != "none" and space.mixer_class(m.mixer) == "linear"})
    return {
        "width": architecture.width,
        "depth": architecture.depth,
        "full_layers": classes.count("full"),
        "linear_layers": classes.count("linear"),
        "linear_kinds": "+".join(linear) or "none",
        "heads": sum(layer.heads for layer in layers),
        "ffn": sum(layer.ffn for layer in layers),
    }


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    """The ranges of :func:`summary_params` over a space."""
    from itertools import combinations

    kinds = sorted({m for m, _ in space.mixer_options[1:] if space.mixer_class(m) == "linear"})
    sets = [s for n in range(1, space.linear_kinds + 1) for s in combinations(kinds, n)]
    slots = space.slots
    return {
        "width": CategoricalDistribution(space.width),
        "depth": CategoricalDistribution(space.depth),
        "full_layers": IntDistribution(0, slots),
        "linear_layers": IntDistribution(0, slots),
        "linear_kinds": CategoricalDistribution(["none", *("+".join(s) for s in sets)]),
        "heads": IntDistribution(0, slots * max(h for h, _ in space.head_options)),
        "ffn": IntDistribution(0, slots * max(space.ffn_options)),
    }


def mend_journal(path: Path) -> None:
    """Cut a journal back to its last whole line and remove a lock left by a dead process."""
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    if not path.exists():
        return
    data = path.read_bytes()
    good = 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            json.loads(line)
        except ValueError:
            break
        good += len(line)
    if good < len(data):
        write_bytes(path, data[:good])


def open_study(path: Path, name: str, objectives: Sequence[str]) -> optuna.Study:
    """The study of a search, mended first.

    Raises:
        InputError: the study has other objectives.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    mend_journal(path)
    storage = JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
    study = optuna.create_study(
        storage=storage, study_name=name, directions=["minimize"] * len(objectives), load_if_exists=True
    )
    if len(study.directions) != len(objectives) or study.metric_names not in (None, list(objectives)):
        raise InputError(f"{path}: the study's objectives are {study.metric_names}, not {list(objectives)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(objectives))
    return study


def project(study: optuna.Study, space: Space, table: pd.DataFrame, objectives: Sequence[str]) -> None:
    """Add to the study the evaluations it lacks; a trial's number is its row."""
    have = len(study.get_trials(deepcopy=False))
    if have >= len(table):
        return
    distributions = _distributions(space)
    trials: list[FrozenTrial] = []
    for _, row in table.iloc[have:].iterrows():
        architecture = Architecture.from_json(json.loads(row["architecture"]))
        trials.append(
            create_trial(
                values=[float(row[name]) for name in objectives],
                params=summary_params(space, architecture),
                distributions=distributions,
                user_attrs={
                    "key": architecture.key,
                    "architecture": architecture.describe(),
                    "genome": [int(g) for g in row["genome"]],
                    "generation": int(row["generation"]),
                },
            )
        )
    study.add_trials(trials)


def genomes_of(table: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.int16]]:
    """The genomes [N, G] of a table of evaluations."""
    return np.stack([np.asarray(g, np.int16) for g in table["genome"]])
