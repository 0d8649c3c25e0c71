"""Records of a measured search: the finalists of its rounds, as ``measured_search.json`` holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.engine.choice import Choice
from search.engine.front import Member
from search.engine.verification import LimitResult, Verification, describe_unmeasured
from space import Space, Workload, genome
from space.io.artefact import Artefact, check_inputs
from space.io.record import read_document, read_record, tuple_of

MEASURED_SEARCH = Artefact("measured search", "formfit search --verify")
MEASURED_FINALISTS = Artefact("measured finalists", "formfit search --verify")
SAFETY_MARGIN = 0.02  # share of a limit that the chosen finalist leaves unused; see docs/adr/0004
MEASURED_NAMES = ("latency_ms", "rss_bytes", "limits", "used", "tightest", "kept", "choice")
JsonObject = dict[str, Any]
Values = Mapping[Workload, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class MeasuredFinalist:
    """A member of a front with its measurements on the device.

    Attributes:
        member: with its predicted costs.
        latency_ms: measured, by workload.
        rss_bytes: measured peak resident memory, by workload.
        limits: with their measured values.
        used: the largest share of a limit that the member uses, among latency and rss limits.
        tightest: that limit; None without any.
        passed: True if parity holds and no limit was missed; a limit that was not measured does not count.
        choice: the limits and predictions of the round.
    """

    member: Member
    latency_ms: Mapping[str, float]
    rss_bytes: Mapping[str, int]
    limits: tuple[LimitResult, ...]
    used: float
    tightest: str | None
    passed: bool
    choice: Choice

    @property
    def key(self) -> str:
        """The architecture's key."""
        return self.member.key

    @property
    def outcome(self) -> str:
        """``kept``, ``missed``, or ``parity`` if the exported model differs from the plain one."""
        missed = any(item.missed for item in self.limits)
        return "kept" if self.passed else "missed" if missed else "parity"

    @staticmethod
    def of(member: Member, choice: Choice, verification: Verification) -> "MeasuredFinalist":
        """The record of a member that was verified.

        Args:
            member: of a front.
            choice: the limits and predictions of that front.
            verification: of the member's sub-model.
        """
        measured = [item for item in verification.limits if item.used is not None and is_measured(item)]
        tightest = max(measured, key=lambda item: item.used or 0.0, default=None)
        return MeasuredFinalist(
            member=member,
            latency_ms={w: item.measured.latency_ms for w, item in verification.latency.items()},
            rss_bytes=verification.rss_bytes,
            limits=verification.limits,
            used=(tightest.used or 0.0) if tightest else 0.0,
            tightest=tightest.bounded.text if tightest else None,
            passed=verification.passed,
            choice=choice,
        )

    def to_json(self) -> JsonObject:
        """The JSON object; the member's keys come first."""
        return {
            **self.member.to_json(),
            "latency_ms": dict(self.latency_ms),
            "rss_bytes": dict(self.rss_bytes),
            "limits": [item.to_json() for item in self.limits],
            "used": self.used,
            "tightest": self.tightest,
            "kept": self.passed,
            "choice": self.choice.to_json(),
        }

    @staticmethod
    def from_json(value: JsonObject) -> "MeasuredFinalist":
        """The inverse of :meth:`to_json`."""
        member = Member.from_json({k: item for k, item in value.items() if k not in MEASURED_NAMES})
        return read_record(
            MeasuredFinalist,
            {**value, "member": member, "passed": value["kept"]},
            limits=tuple_of(LimitResult.from_json),
            choice=Choice.from_json,
        )


def is_measured(result: LimitResult) -> bool:
    """True for a limit on latency or rss, which only measuring on the device decides."""
    return result.bounded.parsed.metric.needs_device


@dataclass(frozen=True, kw_only=True)
class Round:
    """One search of a measured search and the finalists that were measured after it.

    Attributes:
        confidence: of the upper estimates that were compared with limits.
        evaluations: architectures that were evaluated, earlier rounds included.
        finalists: the members of its front that were measured, the best first.
    """

    confidence: float
    evaluations: int
    finalists: tuple[MeasuredFinalist, ...]

    def to_json(self) -> JsonObject:
        """The JSON object."""
        finalists = [finalist.to_json() for finalist in self.finalists]
        return {"confidence": self.confidence, "evaluations": self.evaluations, "finalists": finalists}

    @staticmethod
    def from_json(value: JsonObject) -> "Round":
        """The inverse of :meth:`to_json`."""
        return read_record(Round, value, finalists=tuple_of(MeasuredFinalist.from_json))


@dataclass(frozen=True, kw_only=True)
class MeasuredSearch:
    """The result of a measured search: the content of ``measured_search.json``.

    Attributes:
        device: that finalists were measured on.
        chosen: the best finalist that keeps the limits with a margin, or else the closest to that.
        rounds: in order.
        inputs: sha256 of what the search was made from, by name.
    """

    device: str
    chosen: MeasuredFinalist
    rounds: tuple[Round, ...]
    inputs: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """True if the chosen finalist passed its verification."""
        return self.chosen.passed

    @property
    def unmeasured(self) -> str:
        """One line that names the chosen finalist's limits that were not measured; empty if all were."""
        return describe_unmeasured(self.chosen.limits, self.chosen.choice, self.device)

    @property
    def finalists(self) -> dict[str, MeasuredFinalist]:
        """The finalists of all rounds, by key."""
        return {finalist.key: finalist for one in self.rounds for finalist in one.finalists}

    def to_json(self) -> JsonObject:
        """The JSON object, without its header."""
        return {
            "device": self.device,
            "kept": self.passed,
            "chosen": self.chosen.to_json(),
            "rounds": [one.to_json() for one in self.rounds],
        }

    def write(self, path: Path) -> None:
        """Write ``measured_search.json`` atomically.

        Args:
            path: the file.
        """
        MEASURED_SEARCH.write(path, self.inputs, self.to_json())

    @staticmethod
    def read(path: Path, front: str | None = None) -> "MeasuredSearch":
        """Read a ``measured_search.json``.

        Args:
            path: the file.
            front: sha256 of the ``front.json`` that it has to belong to; None for any.

        Raises:
            InputError: the file is missing, not whole, of another kind, or belongs to another front.
        """
        value = MEASURED_SEARCH.read(path)
        if front is not None:
            check_inputs(path, value, {"front": front})
        with MEASURED_SEARCH.checked(path):
            return read_document(
                MeasuredSearch, value, chosen=MeasuredFinalist.from_json, rounds=tuple_of(Round.from_json)
            )


class FinalistStore:
    """Finalists of all rounds; ``measured.json`` keeps them, so that none is measured twice.

    Args:
        path: of ``measured.json``.
        inputs: sha256 of what the measurements depend on, by name.

    Attributes:
        used: the finalists of this search, in order.
        stored: those in the file, by key.

    Raises:
        InputError: the file has other inputs.
    """

    def __init__(self, path: Path, inputs: Mapping[str, str]) -> None:
        self.path, self.inputs = path, dict(inputs)
        self.used: list[MeasuredFinalist] = []
        self.stored: dict[str, MeasuredFinalist] = {}
        if path.exists():
            value = MEASURED_FINALISTS.read(path)
            check_inputs(path, value, self.inputs)
            with MEASURED_FINALISTS.checked(path):
                finalists = map(MeasuredFinalist.from_json, value["measured"])
                self.stored = {finalist.key: finalist for finalist in finalists}

    @property
    def keys(self) -> set[str]:
        """Keys of the finalists of this search."""
        return {finalist.key for finalist in self.used}

    def add(self, finalist: MeasuredFinalist) -> None:
        """Add a finalist to this search, and to the file if it is new.

        Args:
            finalist: measured now or in an earlier run.
        """
        self.used.append(finalist)
        if finalist.key not in self.stored:
            self.stored[finalist.key] = finalist
            stored = [item.to_json() for item in self.stored.values()]
            MEASURED_FINALISTS.write(self.path, self.inputs, {"measured": stored})

    def measurements(self, space: Space) -> tuple[genome.Genomes, Values, Values]:
        """Measured costs of the finalists of this search.

        Args:
            space: that they are members of.

        Returns:
            Their genomes [N, G], latencies [N] in seconds by workload, and peak bytes [N] by workload.
        """
        first = self.used[0]
        seconds = {
            Workload.parse(w): np.array([1e-3 * f.latency_ms[w] for f in self.used]) for w in first.latency_ms
        }
        peak = {
            Workload.parse(w): np.array([1.0 * f.rss_bytes[w] for f in self.used]) for w in first.rss_bytes
        }
        return genome.encode(space, [f.member.architecture for f in self.used]), seconds, peak


def choose_finalist(finalists: Sequence[MeasuredFinalist], quality: str) -> MeasuredFinalist:
    """The best finalist that keeps the limits with a safety margin, or else the closest to that.

    Args:
        finalists: at least one.
        quality: that decides which is the best, such as ``loss``.
    """
    safe = [f for f in finalists if f.passed and f.used <= 1 - SAFETY_MARGIN]
    if safe:
        return min(safe, key=lambda f: (f.member.quality(quality), f.key))
    return min(finalists, key=lambda f: (not f.passed, f.used))
