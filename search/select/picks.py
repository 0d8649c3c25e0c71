"""Selection of one architecture: a member of a search's front, or one from a file."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search.config import Run
from search.engine.choice import Choice
from search.engine.front import Front
from search.select.measurements import MeasuredSearch
from space import Architecture, InputError, Workload, genome
from space.io.artefact import file_digest
from space.io.config import load_yaml


@dataclass(frozen=True, kw_only=True)
class Selection:
    """An architecture to extract.

    Attributes:
        architecture: of the run's space.
        choice: the limits and predictions that it was chosen under; None for an architecture from a file.
    """

    architecture: Architecture
    choice: Choice | None = None

    @property
    def chosen(self) -> dict[str, Any]:
        """The choice as the JSON object that is kept in ``architecture.json``."""
        return self.choice.to_json() if self.choice else {}

    def precisions(self, device: str | None = None) -> list[str]:
        """The precisions to export: fp32, and those of the predicted workloads.

        Args:
            device: whose workloads count; None for all devices.
        """
        predicted = self.choice.predicted.latency if self.choice and self.choice.predicted else {}
        names = predicted if device is None else [device]
        workloads = [Workload.parse(text) for name in names for text in predicted.get(name, {})]
        return sorted({"fp32", *(workload.precision for workload in workloads)})


def read_architecture(run: Run, file: Path) -> Selection:
    """An architecture from a JSON file.

    Args:
        run: whose space it has to be a member of.
        file: with an architecture, or a JSON object that has one under ``architecture``.

    Raises:
        InputError: the file cannot be read, or the architecture is not a member of the space.
    """
    value = load_yaml(file)  # JSON is a subset of YAML
    value = value.get("architecture", value) if isinstance(value, dict) else value
    architecture = Architecture.from_json(value, str(file))
    rows = genome.encode(run.space, [architecture])
    if not genome.contains(run.space, rows)[0]:
        why = genome.reasons_outside(run.space, rows[0])
        raise InputError(f"{file}: not an architecture of space {run.space.name}: {why}")
    return Selection(architecture=architecture)


def select_member(run: Run, search: str, pick: str | None) -> Selection:
    """A member of a search's front, or a finalist of its measured search.

    Args:
        run: the search's.
        search: its name.
        pick: ``chosen`` (after a measured search), ``best``, ``knee``, ``fastest`` or a key; None for the
            first of these.

    Raises:
        InputError: there is no such search or member, or the measured search belongs to another front.
    """
    folder = run.search_folder(search)
    front = Front.read(folder / "front.json")
    finalists = {}
    if (folder / "measured_search.json").exists():
        front_digest = file_digest(folder / "front.json")
        measured = MeasuredSearch.read(folder / "measured_search.json", front_digest)
        finalists = measured.finalists
        members = {m.key: m for m in front.members} | {key: f.member for key, f in finalists.items()}
        picks = {"chosen": measured.chosen.key, **front.picks}
        front = replace(front, picks=picks, members=tuple(members.values()))
    member = front.member(pick or next(iter(front.picks)))
    finalist = finalists.get(member.key)
    choice = finalist.choice if finalist else front.choice(member)
    return Selection(architecture=member.architecture, choice=choice)
