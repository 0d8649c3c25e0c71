"""The front of a search as a record: ``front.json`` and the values in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search.engine.choice import BoundedLimit, Choice, JsonObject, Prediction
from search.strategies.strategy import ScoreAgreement
from space import Architecture, InputError
from space.io.artefact import Artefact
from space.io.config import shown
from space.io.record import mapping_of, read_document, read_record, tuple_of

PICKS = ("best", "knee", "fastest")
MIN_KEY_CHARACTERS = 4  # of the beginning of a key that names a member
# JSON keys of the qualities in nats per token; those of others are their names.
QUALITY_KEYS = {"loss": "loss_nats", "recall_loss": "recall_loss_nats", "kl": "kl_nats"}
FRONT = Artefact("front", "formfit search", schema=2)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One architecture of a front.

    Attributes:
        architecture: the architecture.
        qualities: values by the name of the quality; None where there was nothing to evaluate it on. The JSON
            keys are ``loss_nats``, ``recall_loss_nats``, ``kl_nats`` and the names of registered objectives.
        predicted: predicted costs.
    """

    architecture: Architecture
    qualities: Mapping[str, float | None]
    predicted: Prediction

    @property
    def key(self) -> str:
        """The architecture's key."""
        return self.architecture.key

    @property
    def loss_nats(self) -> float:
        """Held-out loss in nats per token."""
        return self.quality("loss")

    def quality(self, name: str) -> float:
        """The value of a quality; lower is better.

        Args:
            name: ``loss``, ``recall_loss``, ``kl`` or a registered one.

        Raises:
            InputError: the member was not evaluated on that quality.
        """
        value = self.qualities.get(name)
        if value is None:
            raise InputError(f"architecture {self.key}: {name} was not evaluated")
        return value

    def to_json(self) -> JsonObject:
        """The JSON object."""
        return {
            "key": self.key,
            "architecture": self.architecture.to_json(),
            **{QUALITY_KEYS.get(name, name): value for name, value in self.qualities.items()},
            "predicted": self.predicted.to_json(),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Member":
        """The inverse of :meth:`to_json`.

        Args:
            value: the JSON object.
        """
        names = {key: name for name, key in QUALITY_KEYS.items()}
        other = ("key", "architecture", "predicted")
        return Member(
            architecture=Architecture.from_json(value["architecture"]),
            qualities={names.get(key, key): item for key, item in value.items() if key not in other},
            predicted=Prediction.from_json(value["predicted"]),
        )


@dataclass(frozen=True, kw_only=True)
class FailedEvaluation:
    """An architecture whose evaluation failed.

    Attributes:
        key: the architecture's key.
        reason: the error in one line.
    """

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SurrogateAgreement:
    """Agreement of a surrogate's predictions of one quality with the evaluations that followed.

    Attributes:
        evaluations: architectures with a prediction and an evaluation.
        spearman: rank correlation of the two, between -1 and 1.
    """

    evaluations: int
    spearman: float


@dataclass(frozen=True, kw_only=True)
class Front:
    """The result of a search: its non-dominated architectures.

    Attributes:
        space: the name of the space.
        objectives: minimised, in order.
        strategy: the strategy's name.
        confidence: at which limits on predicted costs were held.
        seed: of the search.
        evaluations: architectures that were evaluated.
        failed: architectures that could not be.
        surrogate: agreement of the surrogate with the evaluations, by quality; empty without a surrogate.
        limits: with their bounds in base units.
        picks: by ``best``, ``knee`` and ``fastest``, a member's key.
        members: sorted by the objectives.
        inputs: sha256 of what the search was made from, by name.
        scores: agreement of the strategy's scores of blocks with the evaluations, by quality; empty where the
            strategy has none.
    """

    space: str
    objectives: tuple[str, ...]
    strategy: str
    confidence: float
    seed: int
    evaluations: int
    failed: tuple[FailedEvaluation, ...]
    surrogate: Mapping[str, SurrogateAgreement]
    limits: tuple[BoundedLimit, ...]
    picks: Mapping[str, str]
    members: tuple[Member, ...]
    inputs: Mapping[str, str]
    scores: Mapping[str, ScoreAgreement] = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """The JSON object, without its header."""
        scores = {name: dict(vars(item)) for name, item in self.scores.items()}
        return {
            "space": self.space,
            "objectives": list(self.objectives),
            "strategy": self.strategy,
            "confidence": self.confidence,
            "seed": self.seed,
            "evaluations": self.evaluations,
            "failed": [dict(vars(item)) for item in self.failed],
            "surrogate": {name: dict(vars(item)) for name, item in self.surrogate.items()},
            "limits": [item.to_json() for item in self.limits],
            "picks": dict(self.picks),
            "members": [member.to_json() for member in self.members],
            **({"scores": scores} if scores else {}),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Front":
        """The inverse of :meth:`to_json`.

        Args:
            value: the JSON object, with or without a file's header.
        """
        return read_document(
            Front,
            value,
            failed=tuple_of(lambda item: read_record(FailedEvaluation, item)),
            surrogate=mapping_of(lambda item: read_record(SurrogateAgreement, item)),
            scores=mapping_of(lambda item: read_record(ScoreAgreement, item)),
            limits=tuple_of(BoundedLimit.from_json),
            members=tuple_of(Member.from_json),
        )

    @staticmethod
    def read(path: Path) -> "Front":
        """The front of a ``front.json``.

        Args:
            path: the file.

        Raises:
            InputError: the file is missing, not whole, or of another kind or schema version.
        """
        with FRONT.checked(path):
            return Front.from_json(FRONT.read(path))

    def write(self, path: Path) -> None:
        """Write ``front.json`` atomically.

        Args:
            path: the file.
        """
        FRONT.write(path, self.inputs, self.to_json())

    @property
    def ranking_quality(self) -> str:
        """The first objective that is a quality; picks and finalists are ranked by it."""
        return next(name for name in self.objectives if name in self.members[0].qualities)

    def member(self, pick: str) -> Member:
        """A member by the name of a pick or by key.

        Args:
            pick: ``best``, ``knee``, ``fastest``, a key, or the beginning of one key only.

        Raises:
            InputError: there is no such member, or there are several.
        """
        key = self.picks.get(pick, pick)
        least = len(key) if pick in self.picks else MIN_KEY_CHARACTERS
        found = [m for m in self.members if m.key.startswith(key) and len(key) >= least]
        if len(found) > 1:
            keys = ", ".join(member.key for member in found[:8])
            raise InputError(f"pick {pick!r}: the beginning of several keys ({keys})")
        if not found:
            picks = ", ".join(self.picks)
            raise InputError(f"pick {shown(pick)}: not one of {picks}, nor a key of the front")
        return found[0]

    def choice(self, member: Member) -> Choice:
        """The limits and predictions that a member was chosen under, to be kept beside its sub-model.

        Args:
            member: of the front.
        """
        return Choice(
            limits=self.limits,
            confidence=self.confidence,
            predicted=member.predicted,
            loss_nats=member.qualities.get("loss"),
        )
