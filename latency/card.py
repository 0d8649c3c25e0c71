"""The device card: everything known of one device, as plain files in one folder.

``device.json`` holds the fingerprint and the times of the reference work that its latencies refer to,
``ops.parquet``, ``models.parquet`` and ``memory.parquet`` what was measured, ``predictors/`` what was fitted.
Ops of every space accumulate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from latency.device_runner.timing import Timing
from latency.runtimes.reference import reference_seconds
from space import InputError
from space.io.artefact import Artefact
from space.io.parquet import read_table, write_table
from space.onnx.graph import version_for

DEVICE_CARD = Artefact("device card", "formfit profile", schema=3)
TABLES = {
    name: Artefact(f"device {name}", "formfit profile", schema=schema)
    for name, schema in (("ops", 3), ("models", 2), ("memory", 1))
}


@dataclass
class Card:
    """One device."""

    folder: Path
    fingerprint: dict[str, Any]
    references: dict[str, float] = field(default_factory=dict)  # s, by phase and threads: the card's units
    measured: str | None = None  # when, UTC
    problems: list[str] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)  # mixers that its runtime lacks, and why
    aa_difference: float | None = (
        None  # relative difference between timings of the same work; see latency.reference
    )

    @property
    def name(self) -> str:
        """The device's name: that of its folder."""
        return self.folder.name

    def scale(self, threads: int, timings: Mapping[str, Timing]) -> dict[str, float]:
        """What a run's seconds are times to be the card's, by phase; the first run gives the units."""
        version = version_for(str(self.fingerprint.get("runtime")))
        return {
            phase: self.references.setdefault(f"{phase}-t{threads}-graphs{version}", seconds) / seconds
            for phase, seconds in reference_seconds(timings).items()
        }

    def save(self) -> None:
        """Write ``device.json``."""
        self.problems = self.problems[-50:]
        self.measured = datetime.now(UTC).isoformat(timespec="seconds")
        body = {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "reference_seconds": self.references,
            "measured": self.measured,
            "problems": self.problems,
            "unsupported": self.unsupported,
            "aa_difference": self.aa_difference,
        }
        DEVICE_CARD.write(self.folder / "device.json", {}, body)

    def table(self, name: str) -> pd.DataFrame:
        """``ops``, ``models`` or ``memory``; empty where nothing was measured."""
        path = self.folder / f"{name}.parquet"
        return (
            read_table(path, TABLES[name], profile_command(self.name))[0] if path.exists() else pd.DataFrame()
        )

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add rows to a table; a row of the same identity replaces the older one."""
        identity = [k for k in rows[0] if k not in ("seconds", "half_width", "intercept", "timing", "bytes")]
        table = pd.concat([self.table(name), pd.DataFrame(rows)], ignore_index=True)
        table = table.drop_duplicates(identity, keep="last", ignore_index=True)
        write_table(self.folder / f"{name}.parquet", TABLES[name], {}, table)

    def predictor_path(self, space: str, runtime: str, threads: int, precision: str) -> Path:
        """Where the predictor of a space stands."""
        return self.folder / "predictors" / f"{space}-{runtime}-t{threads}-{precision}.json"


def profile_command(device: str) -> str:
    """The command that makes a card."""
    return f"formfit profile --space SPACE --device {device}"


def load_card(devices: Path, name: str) -> Card:
    """Read a card.

    Raises:
        InputError: there is none of that name, or it is not whole.
    """
    path = devices / name / "device.json"
    if not path.exists():
        known = sorted(p.parent.name for p in devices.glob("*/device.json"))
        have = f"there are {', '.join(known)}" if known else "there is none yet"
        raise InputError(f"device {name}: no card in {devices} ({have}); `{profile_command(name)}` makes it")
    value = DEVICE_CARD.read(path, f"mv {path.parent} ELSEWHERE` and then `{profile_command(name)}")
    return Card(
        folder=path.parent,
        fingerprint=value["fingerprint"],
        references=value["reference_seconds"],
        measured=value["measured"],
        problems=value["problems"],
        unsupported=value["unsupported"],
        aa_difference=value["aa_difference"],
    )


def open_card(devices: Path, name: str, fingerprint: Mapping[str, Any]) -> Card:
    """The card to add measurements to: the one there is, or a new one.

    Raises:
        InputError: the card was measured on another device or with another runtime version.
    """
    if not (devices / name / "device.json").exists():
        return Card(devices / name, dict(fingerprint))
    card = load_card(devices, name)
    other = differences(card.fingerprint, fingerprint)
    if other:
        raise InputError(
            f"{card.folder}: measured on another device ({'; '.join(other)}); choose another --device name"
        )
    return card


def outdated(card: Card, here: Mapping[str, Any]) -> str | None:
    """What to tell a person whose runtime is of another version than the card's, on the same machine."""
    other = [key for key in here if card.fingerprint.get(key) != here.get(key)]
    if other != ["runtime_version"]:
        return None
    then, now = card.fingerprint["runtime_version"], here["runtime_version"]
    return (
        f"device {card.name}: measured with {card.fingerprint['runtime']} {then}, here is {now}; "
        f"`{profile_command(f'{card.name}-{now}')}` measures again"
    )


def differences(card: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In what a card's fingerprint is not that of this machine."""
    return [
        f"{key}: card {card.get(key)}, here {here.get(key)}" for key in here if card.get(key) != here.get(key)
    ]
