"""Records of an audit, as ``audit.json`` holds them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.audit.rank_correlation import RankCorrelations
from space import Architecture
from space.io.artefact import Artefact
from space.io.record import mapping_of, optional, read_document, read_record, tuple_of
from supernet.evaluate import Losses

AUDIT = Artefact("audit", "formfit audit", schema=2)
SETS = {"axes": "over the axes", "equal_latency": "at equal latency"}
LOSSES = ("loss", "recall_loss")
JsonObject = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """Settings of an audit.

    Attributes:
        steps: of each training.
        batch: rows of a step.
        length: tokens of a row.
        seeds: of the trainings of each architecture.
        windows: sequences of an evaluation.
        architectures_per_set: asked for; a small space may have fewer.
        device: whose predicted latencies are equal in the second set.
        workload: at which they are.
        within_percent: largest relative difference to the common latency.
        choice_seed: of the choice of architectures and of the bootstrap.
    """

    steps: int
    batch: int
    length: int
    seeds: tuple[int, ...]
    windows: int
    architectures_per_set: int
    device: str
    workload: str
    within_percent: float
    choice_seed: int

    def to_json(self) -> JsonObject:
        """The JSON object."""
        return {**vars(self), "seeds": list(self.seeds)}

    @staticmethod
    def from_json(value: JsonObject) -> "AuditSettings":
        """The inverse of :meth:`to_json`."""
        return read_record(AuditSettings, value)


@dataclass(frozen=True, kw_only=True)
class StandAlone:
    """The result of training an architecture from scratch.

    Attributes:
        seed: of the training.
        losses: in nats per token.
    """

    seed: int
    losses: Losses

    def to_json(self) -> JsonObject:
        """The JSON object."""
        return {"seed": self.seed, **self.losses}

    @staticmethod
    def from_json(value: JsonObject) -> "StandAlone":
        """The inverse of :meth:`to_json`."""
        losses = dict(value)
        return StandAlone(seed=losses.pop("seed"), losses=losses)


@dataclass(frozen=True, kw_only=True)
class AuditedArchitecture:
    """An architecture with its losses inside the supernet and after stand-alone training.

    Attributes:
        architecture: the architecture.
        sets: names of the sets that it is in.
        params: parameters.
        flops: of the audit's workload.
        predicted_latency_ms: at the audit's workload.
        supernet: losses inside the supernet, in nats per token.
        stand_alone: results of its trainings.
    """

    architecture: Architecture
    sets: tuple[str, ...]
    params: int
    flops: int
    predicted_latency_ms: float
    supernet: Losses
    stand_alone: tuple[StandAlone, ...]

    @property
    def key(self) -> str:
        """The architecture's key."""
        return self.architecture.key

    @property
    def supernet_loss_nats(self) -> float:
        """Loss inside the supernet in nats per token."""
        return self.supernet["loss_nats"] or 0.0

    @property
    def stand_alone_loss_nats(self) -> list[float]:
        """Stand-alone losses in nats per token, by seed."""
        return [item.losses["loss_nats"] or 0.0 for item in self.stand_alone]

    @property
    def description(self) -> str:
        """Its layers in one line."""
        return self.architecture.describe()

    def to_json(self) -> JsonObject:
        """The JSON object."""
        return {
            "key": self.key,
            "architecture": self.architecture.to_json(),
            "sets": list(self.sets),
            "params": self.params,
            "flops": self.flops,
            "predicted_latency_ms": self.predicted_latency_ms,
            "supernet": dict(self.supernet),
            "stand_alone": [item.to_json() for item in self.stand_alone],
        }

    @staticmethod
    def from_json(value: JsonObject) -> "AuditedArchitecture":
        """The inverse of :meth:`to_json`."""
        return read_record(
            AuditedArchitecture,
            value,
            architecture=Architecture.from_json,
            stand_alone=tuple_of(StandAlone.from_json),
        )


@dataclass(frozen=True, kw_only=True)
class SetResult:
    """The result of one set of architectures.

    Attributes:
        architectures: keys.
        loss: rank correlations with the stand-alone loss.
        verdict: one word; see :func:`search.audit.rank_correlation.verdict`.
        text: the verdict as a sentence.
        recall_loss: rank correlations with the stand-alone recall loss; None if nothing can be recalled.
    """

    architectures: tuple[str, ...]
    loss: RankCorrelations
    verdict: str
    text: str
    recall_loss: RankCorrelations | None = None

    def to_json(self) -> JsonObject:
        """The JSON object."""
        return {
            "architectures": list(self.architectures),
            "loss": self.loss.to_json(),
            "verdict": self.verdict,
            "text": self.text,
            "recall_loss": self.recall_loss and self.recall_loss.to_json(),
        }

    @staticmethod
    def from_json(value: JsonObject) -> "SetResult":
        """The inverse of :meth:`to_json`."""
        return read_record(
            SetResult,
            value,
            loss=RankCorrelations.from_json,
            recall_loss=optional(RankCorrelations.from_json),
        )


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """The result of an audit: the content of ``audit.json``.

    Attributes:
        space: the name of the space.
        supernet_step: training steps of the supernet.
        settings: of the audit.
        recall_share: share of the targets that can be recalled from the context.
        equal_latency_ms: the common latency of the second set.
        sets: results by set.
        architectures: of both sets.
        inputs: sha256 of what the audit was made from, by name.
    """

    space: str
    supernet_step: int
    settings: AuditSettings
    recall_share: float
    equal_latency_ms: float
    sets: Mapping[str, SetResult]
    architectures: tuple[AuditedArchitecture, ...]
    inputs: Mapping[str, str]

    @property
    def verdict(self) -> str:
        """The verdicts on both sets, as sentences."""
        return " ".join(self.sets[name].text for name in SETS)

    def to_json(self) -> JsonObject:
        """The JSON object, without its header."""
        return {
            "verdict": self.verdict,
            "space": self.space,
            "supernet_step": self.supernet_step,
            "settings": self.settings.to_json(),
            "recall_share": self.recall_share,
            "equal_latency_ms": self.equal_latency_ms,
            "sets": {name: item.to_json() for name, item in self.sets.items()},
            "architectures": [item.to_json() for item in self.architectures],
        }

    def document(self) -> JsonObject:
        """The JSON object with its header, as ``audit.json`` holds it."""
        return {"header": AUDIT.header(self.inputs), **self.to_json()}

    def write(self, path: Path) -> None:
        """Write ``audit.json`` atomically.

        Args:
            path: the file.
        """
        AUDIT.write(path, self.inputs, self.to_json())

    @staticmethod
    def read(path: Path) -> "AuditResult":
        """Read an ``audit.json``.

        Args:
            path: the file.

        Raises:
            InputError: the file is missing, not whole, or of another kind or schema version.
        """
        with AUDIT.checked(path):
            return AuditResult.from_json(AUDIT.read(path))

    @staticmethod
    def from_json(value: JsonObject) -> "AuditResult":
        """The record of an object that :meth:`document` gave."""
        return read_document(
            AuditResult,
            value,
            settings=AuditSettings.from_json,
            sets=mapping_of(SetResult.from_json),
            architectures=tuple_of(AuditedArchitecture.from_json),
        )
