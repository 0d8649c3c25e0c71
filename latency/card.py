"""The device card: everything known of one device, as plain files in one folder.

``device.json`` holds the fingerprint and the times of the reference work that define the units of its
latencies. ``models.parquet`` and ``memory.parquet`` hold measurements of whole models, and ``predictors/``
fitted predictors with the latency of every op. Measurements of all spaces accumulate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat

from latency.device_runner.fingerprint import Fingerprint
from space import InputError
from space.io.artefact import Artefact, canonical_json, digest
from space.io.config import parse
from space.io.names import check_name

if TYPE_CHECKING:
    import pandas as pd

DEVICE_CARD = Artefact("device card", "formfit profile", schema=3)
TABLES = {
    name: Artefact(f"device {name}", "formfit profile", schema=schema)
    for name, schema in (("models", 3), ("memory", 1))
}
PREDICTOR = Artefact("latency predictor", "formfit profile", schema=4)
MEASURED_COLUMNS = ("seconds", "half_width", "timing", "group", "bytes")  # all others identify a row
MAX_PROBLEMS = 50  # that a card keeps, the latest


def _time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without its zone")
    return text


class CardForm(BaseModel):
    """Form of ``device.json``; fields as of :class:`Card`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    header: dict[str, object]
    name: str
    fingerprint: dict[str, str]
    reference_seconds: dict[str, PositiveFloat]
    measured: Annotated[str, AfterValidator(_time)] | None
    problems: list[str]
    unsupported: dict[str, str]
    aa_difference: NonNegativeFloat | None


@dataclass
class Card:
    """One device.

    Attributes:
        folder: folder of the card.
        fingerprint: identity of the device and its runtime.
        references: seconds of the reference work by phase, threads and graph version; the card's units.
        measured: when the card was last extended, UTC, ISO 8601; None before that.
        problems: reasons to distrust measurements, the latest ones.
        unsupported: reason by mixer that the runtime on the device lacks.
        aa_difference: relative difference between timings of the same work, see
            :mod:`latency.runtimes.reference`; None if it was not measured.
    """

    folder: Path
    fingerprint: Fingerprint
    references: dict[str, float] = field(default_factory=dict)
    measured: str | None = None
    problems: list[str] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)
    aa_difference: float | None = None

    @property
    def name(self) -> str:
        """The device's name, which is that of the folder."""
        return self.folder.name

    @property
    def digest(self) -> str:
        """Sha256 of the fingerprint and the units, on which all its latencies depend."""
        return digest(canonical_json([self.fingerprint.to_json(), self.references]))

    def scale(self, threads: int, graph_version: int, seconds: Mapping[str, float]) -> dict[str, float]:
        """Factor that converts a run's seconds to the card's reference units, by phase.

        The first run defines the units.

        Args:
            threads: number of threads of the run.
            graph_version: version of the graphs that the runtime runs, 0 for none.
            seconds: of the reference work in the run, by phase.
        """
        return {
            phase: self.references.setdefault(f"{phase}-t{threads}-graphs{graph_version}", value) / value
            for phase, value in seconds.items()
        }

    def save(self) -> None:
        """Write ``device.json``."""
        self.problems = self.problems[-MAX_PROBLEMS:]
        self.measured = datetime.now(UTC).isoformat(timespec="seconds")
        body = {
            "name": self.name,
            "fingerprint": self.fingerprint.to_json(),
            "reference_seconds": self.references,
            "measured": self.measured,
            "problems": self.problems,
            "unsupported": self.unsupported,
            "aa_difference": self.aa_difference,
        }
        DEVICE_CARD.write(self.folder / "device.json", {}, body)

    def table(self, name: str) -> pd.DataFrame:
        """Read a table of measurements; empty if nothing was measured.

        Args:
            name: ``models`` or ``memory``.

        Raises:
            InputError: the file is not whole, or of another schema version.
        """
        import pandas as pd  # half a second, and a card is often read for its fingerprint alone

        from space.io.parquet import read_table

        path = self.folder / f"{name}.parquet"
        if not path.exists():
            return pd.DataFrame()
        return read_table(path, TABLES[name], profile_command(self.name))[0]

    def append(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Add rows to a table; a row that measures the same replaces the older one.

        Args:
            name: ``models`` or ``memory``.
            rows: values by column, at least one row; all have the same columns.
        """
        import pandas as pd

        from space.io.parquet import write_table

        identity = [column for column in rows[0] if column not in MEASURED_COLUMNS]
        table = pd.concat([self.table(name), pd.DataFrame(rows)], ignore_index=True)
        table = table.drop_duplicates(identity, keep="last", ignore_index=True)
        write_table(self.folder / f"{name}.parquet", TABLES[name], {}, table)

    def predictor_path(self, space: str, runtime: str, threads: int, precision: str) -> Path:
        """File of a predictor.

        Args:
            space: name of the space.
            runtime: name of the runtime.
            threads: number of threads.
            precision: precision of the models.
        """
        return self.folder / "predictors" / f"{space}-{runtime}-t{threads}-{precision}.json"


def profile_command(device: str) -> str:
    """The command that measures a card.

    Args:
        device: name of the card.
    """
    return f"formfit profile --space SPACE --device {device}"


def load_card(devices: str | Path, name: str) -> Card:
    """Read a card.

    Args:
        devices: folder of all cards.
        name: name of the card.

    Raises:
        InputError: there is no card of that name, or it is not whole.
    """
    devices = Path(devices)
    path = devices / check_name(name, "device") / "device.json"
    if not path.exists():
        known = sorted(p.parent.name for p in devices.glob("*/device.json"))
        have = f"there are {', '.join(known)}" if known else "there is none yet"
        raise InputError(f"device {name}: no card in {devices} ({have}); `{profile_command(name)}` makes it")
    value = DEVICE_CARD.read(path, f"mv {path.parent} ELSEWHERE` and then `{profile_command(name)}")
    parse(CardForm, value, str(path))
    try:
        fingerprint = Fingerprint.from_json(value["fingerprint"])
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return Card(
        folder=path.parent,
        fingerprint=fingerprint,
        references=value["reference_seconds"],
        measured=value["measured"],
        problems=value["problems"],
        unsupported=value["unsupported"],
        aa_difference=value["aa_difference"],
    )


def open_card(devices: Path, name: str, fingerprint: Fingerprint) -> Card:
    """Open a card to add measurements to it: the existing one, or a new one.

    Args:
        devices: folder of all cards.
        name: name of the card.
        fingerprint: identity of the device that will be measured.

    Raises:
        InputError: the card was measured on another device or with another runtime version.
    """
    if not (devices / check_name(name, "device") / "device.json").exists():
        return Card(devices / name, fingerprint)
    card = load_card(devices, name)
    other = differences(card.fingerprint, fingerprint)
    if other:
        raise InputError(
            f"{card.folder}: measured on another device ({'; '.join(other)}); choose another --device name"
        )
    return card


def outdated(card: Card, here: Fingerprint) -> str | None:
    """Warning for a card whose runtime has another version than this machine's; None if none applies.

    Args:
        card: the card.
        here: fingerprint of this machine.
    """
    if list(card.fingerprint.differences(here)) != ["runtime_version"]:
        return None
    then, now = card.fingerprint.runtime_version, here.runtime_version
    return (
        f"device {card.name}: measured with {card.fingerprint.runtime} {then}, here is {now}; "
        f"`{profile_command(f'{card.name}-{now}')}` measures again"
    )


def differences(card: Fingerprint, here: Fingerprint) -> list[str]:
    """Fields in which a card's fingerprint differs from this machine's, one line each.

    Args:
        card: the card's fingerprint.
        here: this machine's.
    """
    return [f"{name}: card {then}, here {now}" for name, (then, now) in card.differences(here).items()]
