"""Records of a finished run, as ``summary.json`` holds them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latency.predictor.accuracy import PredictorErrors
from search.engine.front import Member
from search.engine.verification import LatencyComparison, LimitResult, Parity, Verification
from space.io.artefact import Artefact
from space.io.record import mapping_of, read_document, read_record, tuple_of

SUMMARY = Artefact("summary", "formfit run", schema=2)
MEASURED_NAMES = ("latency", "limits", "parity")
JsonObject = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class VerifiedMember:
    """A member of a front with the results of its verification.

    Attributes:
        member: with its predicted costs.
        latency: predicted and measured latencies by workload.
        limits: with their measured values.
        parity: errors of the sub-model's forms.
    """

    member: Member
    latency: Mapping[str, LatencyComparison]
    limits: tuple[LimitResult, ...]
    parity: Parity

    @property
    def key(self) -> str:
        """The architecture's key."""
        return self.member.key

    @staticmethod
    def of(member: Member, verification: Verification) -> "VerifiedMember":
        """The record of a member that was verified.

        Args:
            member: of a front.
            verification: of its sub-model.
        """
        return VerifiedMember(
            member=member,
            latency=verification.latency,
            limits=verification.limits,
            parity=verification.parity,
        )

    def to_json(self) -> JsonObject:
        """The JSON object; the member's keys come first."""
        return {
            **self.member.to_json(),
            "latency": {workload: item.to_json() for workload, item in self.latency.items()},
            "limits": [item.to_json() for item in self.limits],
            "parity": self.parity.to_json(),
        }

    @staticmethod
    def from_json(value: JsonObject) -> "VerifiedMember":
        """The inverse of :meth:`to_json`."""
        member = Member.from_json({k: item for k, item in value.items() if k not in MEASURED_NAMES})
        return read_record(
            VerifiedMember,
            {**value, "member": member},
            latency=mapping_of(LatencyComparison.from_json),
            limits=tuple_of(LimitResult.from_json),
            parity=Parity.from_json,
        )


@dataclass(frozen=True, kw_only=True)
class TextQuality:
    """Quality of the trained supernet on held-out text, beside baselines on the same text.

    Attributes:
        source: of the text.
        held_out_bytes: bytes of text that the targets stand for; None if unknown.
        recall_share: share of the targets that can be recalled from the context.
        largest_bits_per_byte: of the largest sub-network; None if the number of bytes is unknown.
        largest_recall_loss_nats: of the largest sub-network; None if nothing can be recalled.
        largest_mqar_accuracy: of the largest sub-network; None if MQAR was not part of the training.
        chosen_bits_per_byte: of the chosen architecture, inside the supernet.
        gzip_bits_per_byte: of ``gzip -9``; None if bytes are not the tokens.
        order2_bits_per_byte: of an order-2 model of bytes; None if bytes are not the tokens.
    """

    source: str
    held_out_bytes: int | None
    recall_share: float
    largest_bits_per_byte: float | None
    largest_recall_loss_nats: float | None
    largest_mqar_accuracy: float | None
    chosen_bits_per_byte: float | None
    gzip_bits_per_byte: float | None
    order2_bits_per_byte: float | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of a run: the content of ``summary.json``.

    Attributes:
        space: the name of the space.
        architectures: their number in the space.
        device: the name of the device's card.
        fingerprint: the card's machine and runtime.
        text: quality on held-out text.
        predictor: errors of the predictor by workload.
        front: members of the first round's front.
        rounds: of the measured search.
        chosen: the member that was chosen.
        verified: the chosen and picked members, by pick.
        distilled: the finalists that were distilled, as in ``finalists.json``, and the sub-model of the best
            one; None if none was.
        inputs: sha256 of what the summary was made from, by name.
    """

    space: str
    architectures: int
    device: str
    fingerprint: Mapping[str, Any]
    text: TextQuality
    predictor: Mapping[str, PredictorErrors]
    front: tuple[Member, ...]
    rounds: int
    chosen: VerifiedMember
    verified: Mapping[str, VerifiedMember]
    distilled: Mapping[str, Any] | None = None
    inputs: Mapping[str, str]

    @property
    def limits(self) -> tuple[LimitResult, ...]:
        """The limits with the values measured of the chosen member."""
        return self.chosen.limits

    def to_json(self) -> JsonObject:
        """The JSON object, without its header."""
        return {
            "space": {"name": self.space, "architectures": self.architectures},
            "device": {"name": self.device, **self.fingerprint},
            "text": dict(vars(self.text)),
            "predictor": {workload: errors.to_json() for workload, errors in self.predictor.items()},
            "front": [member.to_json() for member in self.front],
            "rounds": self.rounds,
            "limits": [item.to_json() for item in self.limits],
            "chosen": self.chosen.to_json(),
            "verified": {pick: member.to_json() for pick, member in self.verified.items()},
            **({"distilled": dict(self.distilled)} if self.distilled else {}),
        }

    def document(self) -> JsonObject:
        """The JSON object with its header, as ``summary.json`` holds it."""
        return {"header": SUMMARY.header(self.inputs), **self.to_json()}

    def write(self, path: Path) -> None:
        """Write ``summary.json`` atomically.

        Args:
            path: the file.
        """
        SUMMARY.write(path, self.inputs, self.to_json())

    @staticmethod
    def read(path: Path) -> "Summary":
        """Read a ``summary.json``.

        Args:
            path: the file.

        Raises:
            InputError: the file is missing, not whole, or of another kind or schema version.
        """
        with SUMMARY.checked(path):
            return Summary.from_json(SUMMARY.read(path))

    @staticmethod
    def from_json(value: JsonObject) -> "Summary":
        """The record of an object that :meth:`document` gave."""
        space, fingerprint = value["space"], dict(value["device"])
        flat = {"space": space["name"], "architectures": space["architectures"]}
        flat |= {"device": fingerprint.pop("name"), "fingerprint": fingerprint}
        return read_document(
            Summary,
            {**value, **flat},
            text=lambda item: TextQuality(**item),
            predictor=mapping_of(PredictorErrors.from_json),
            front=tuple_of(Member.from_json),
            chosen=VerifiedMember.from_json,
            verified=mapping_of(VerifiedMember.from_json),
        )
