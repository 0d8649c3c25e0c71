"""The record of a search as an Optuna study, for dashboards and plots.

The journal is repaired when a search continues: a killed process may leave half a line, after which Optuna
cannot read the journal, or a lock that no process holds.
"""

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from search.engine.evaluations import genomes_of
from space import Architecture, InputError, Space
from space.genome import decode
from space.io.artefact import write_bytes

_log = logging.getLogger("formfit")


def summary_params(space: Space, architecture: Architecture) -> dict[str, Any]:
    """Readable parameters of an architecture, for plots: width, depth, mixers and sizes.

    Args:
        space: gives the classes of mixers.
        architecture: to be summarised.
    """
    layers = [layer for layer in architecture.layers if layer.present]
    classes = [space.mixer_class(layer.mixer) for layer in layers if layer.mixer != "none"]
    linear = Counter(m.mixer for m in layers if m.mixer != "none" and space.mixer_class(m.mixer) == "linear")
    return {
        "width": architecture.width,
        "depth": architecture.depth,
        "full_layers": classes.count("full"),
        "linear_layers": classes.count("linear"),
        "linear_kind": max(sorted(linear), key=linear.__getitem__) if linear else "none",
        "heads": sum(layer.heads for layer in layers),
        "ffn": sum(layer.ffn for layer in layers),
    }


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    """The ranges of :func:`summary_params` in a space."""
    kinds = sorted({m for m, _ in space.mixer_options[1:] if space.mixer_class(m) == "linear"})
    slots = space.slots
    return {
        "width": IntDistribution(min(space.width), max(space.width)),
        "depth": IntDistribution(min(space.depth), max(space.depth)),
        "full_layers": IntDistribution(0, slots),
        "linear_layers": IntDistribution(0, slots),
        "linear_kind": CategoricalDistribution(["none", *kinds]),
        "heads": IntDistribution(0, slots * max(h for h, _ in space.head_options)),
        "ffn": IntDistribution(0, slots * max(space.ffn_options)),
    }


def repair_journal(path: Path) -> None:
    """Cut a journal back to its last whole line, and remove the lock of a dead process.

    Args:
        path: the journal, which need not exist.
    """
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    if not path.exists():
        return
    data = path.read_bytes()
    good = 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or not {"op_code", "worker_id"} <= entry.keys():
            break
        good += len(line)
    if good < len(data):
        write_bytes(path, data[:good])


class _Journal(BaseJournalBackend):
    """Optuna's journal in a file, written once a generation and not synced.

    A power cut may take trials, which are added again from the record. Optuna reads its entries back after
    every trial, so they are kept in memory until they are written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = JournalFileOpenLock(str(path))
        self.file = JournalFileBackend(str(path), lock_obj=self.lock)
        self.written = len(path.read_bytes().splitlines())
        self.pending: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        if log_number_from < self.written:
            yield from self.file.read_logs(log_number_from)
        yield from self.pending[max(0, log_number_from - self.written) :]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.pending += logs

    def write(self) -> None:
        """Append the entries in memory to the file."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in self.pending)
        self.lock.acquire()
        try:
            with self.path.open("ab") as file:
                file.write(text.encode())
        finally:
            self.lock.release()
        self.written += len(self.pending)
        self.pending.clear()


class Projection:
    """The Optuna study of a search, to which evaluations are added.

    Args:
        study: of the search.
        journal: the study's.
    """

    def __init__(self, study: optuna.Study, journal: _Journal) -> None:
        self.study, self._journal = study, journal
        self.count = len(study.get_trials(deepcopy=False))

    def add(self, space: Space, part: pd.DataFrame, objectives: Sequence[str], evaluated_before: int) -> None:
        """Add the evaluations of a part that the study does not have yet.

        Args:
            space: of the architectures.
            part: evaluations, a row each.
            objectives: columns of the part.
            evaluated_before: the number of evaluations in the parts before it.
        """
        lacking = part.iloc[max(self.count - evaluated_before, 0) :]
        if lacking.empty:
            return
        self.study.add_trials(_trials(space, lacking, objectives))
        self._journal.write()
        self.count += len(lacking)


def open_projection(path: Path, name: str, objectives: Sequence[str], space: str) -> Projection:
    """The projection of a search onto its study, whose journal is repaired first.

    Args:
        path: the journal; made if it does not exist.
        name: of the study.
        objectives: their names.
        space: the hash of the search space.

    Raises:
        InputError: the study has other objectives, or is of another space.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    repair_journal(path)
    try:
        study, journal = _open_study(path, name, len(objectives))
    except Exception as error:  # whatever Optuna raises at entries that are none
        _log.warning("formfit: %s: not a journal of Optuna (%s); it is made again", path, str(error)[:80])
        path.unlink()
        study, journal = _open_study(path, name, len(objectives))
    if len(study.directions) != len(objectives) or study.metric_names not in (None, list(objectives)):
        raise InputError(f"{path}: the study's objectives are {study.metric_names}, not {list(objectives)}")
    if study.user_attrs.get("space", space) != space:
        raise InputError(f"{path}: made for space {study.user_attrs['space'][:12]}, not {space[:12]}")
    study.set_user_attr("space", space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(objectives))
    journal.write()
    return Projection(study, journal)


def _open_study(path: Path, name: str, objectives: int) -> tuple[optuna.Study, _Journal]:
    """The study of a journal, whose entries are all read."""
    journal = _Journal(path)
    study = optuna.create_study(
        storage=JournalStorage(journal),
        study_name=name,
        directions=["minimize"] * objectives,
        load_if_exists=True,
    )
    study.get_trials(deepcopy=False)
    return study, journal


def _trials(space: Space, rows: pd.DataFrame, objectives: Sequence[str]) -> list[FrozenTrial]:
    """Evaluations as trials."""
    distributions = _distributions(space)
    trials: list[FrozenTrial] = []
    now = datetime.now()  # as Optuna writes them: local and naive
    for row, architecture in zip(rows.to_dict("records"), decode(space, genomes_of(rows)), strict=True):
        failed = row["failed"]
        trials.append(
            FrozenTrial(  # create_trial checks at length what is right by construction
                number=-1,
                trial_id=-1,
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
                value=None,
                values=None if failed else [float(row[name]) for name in objectives],
                datetime_start=now,
                datetime_complete=now,
                intermediate_values={},
                system_attrs={},
                params=summary_params(space, architecture),
                distributions=distributions,
                user_attrs={
                    "key": row["key"],
                    "architecture": architecture.describe(),
                    "genome": row["genome"].tolist(),
                    "generation": int(row["generation"]),
                    **({"failed": failed} if failed else {}),
                },
            )
        )
    return trials
