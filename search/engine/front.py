"""The front of a search as a record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from search.problem.problem import QUALITIES, Problem
from space import Architecture, InputError, genome
from space.cost import params_cost
from space.io.artefact import Artefact

JsonObject = dict[str, Any]
QUALITY_KEYS = {"loss": "loss_nats", "recall_loss": "recall_loss_nats"}  # JSON keys of the built-in qualities
FRONT = Artefact("front", "formfit search", schema=2)


@dataclass(frozen=True, kw_only=True)
class LatencyPrediction:
    """Predicted latency of one workload on one device.

    Attributes:
        latency_ms: the mean.
        upper_ms: the upper bound at the search's confidence; limits are held against it.
    """

    latency_ms: float
    upper_ms: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted costs of an architecture.

    Attributes:
        params: parameters.
        latency: by device and workload.
    """

    params: int
    latency: Mapping[str, Mapping[str, LatencyPrediction]]

    def to_json(self) -> JsonObject:
        """The JSON object."""
        latency = {d: {w: vars(p) for w, p in by_workload.items()} for d, by_workload in self.latency.items()}
        return {"params": self.params, "latency": latency}

    @staticmethod
    def from_json(value: JsonObject) -> "Prediction":
        """The inverse of :meth:`to_json`."""
        latency = {
            device: {workload: LatencyPrediction(**item) for workload, item in by_workload.items()}
            for device, by_workload in value["latency"].items()
        }
        return Prediction(params=value["params"], latency=latency)


@dataclass(frozen=True, kw_only=True)
class BoundedLimit:
    """A limit with its bound in base units.

    Attributes:
        limit: the user's text, such as ``decode@256<=60%``.
        bound: in ``unit``.
        unit: ``seconds``, ``bytes`` or ``parameters``.
    """

    limit: str
    bound: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The limits and predictions under which a sub-model was chosen.

    Attributes:
        limits: the limits of the search.
        confidence: at which latency limits were held.
        predicted: predicted costs; None where no device was given.
        loss_nats: held-out loss inside the supernet, in nats per token; None where it was not evaluated.
        picked: how it was picked, where that was not from a front.
    """

    limits: tuple[BoundedLimit, ...] = ()
    confidence: float | None = None
    predicted: Prediction | None = None
    loss_nats: float | None = None
    picked: JsonObject | None = None

    def to_json(self) -> JsonObject:
        """The JSON object; fields that are None are left out."""
        value: JsonObject = {"limits": [vars(limit) for limit in self.limits]}
        if self.confidence is not None:
            value["confidence"] = self.confidence
        if self.predicted is not None:
            value["predicted"] = self.predicted.to_json()
        for name in ("loss_nats", "picked"):
            if getattr(self, name) is not None:
                value[name] = getattr(self, name)
        return value

    @staticmethod
    def from_json(value: JsonObject) -> "Choice":
        """The inverse of :meth:`to_json`; an empty object is a choice without limits."""
        predicted = value.get("predicted")
        return Choice(
            limits=tuple(BoundedLimit(**item) for item in value.get("limits", ())),
            confidence=value.get("confidence"),
            predicted=Prediction.from_json(predicted) if predicted else None,
            loss_nats=value.get("loss_nats"),
            picked=value.get("picked"),
        )

    def workloads(self, device: str) -> dict[str, LatencyPrediction]:
        """Predicted latencies on a device, by workload; empty where nothing was predicted."""
        return dict(self.predicted.latency.get(device, {})) if self.predicted else {}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One architecture of a front.

    Attributes:
        architecture: the architecture.
        qualities: by the name of a quality, its value; None where nothing could be evaluated. The JSON keys are
            ``loss_nats``, ``recall_loss_nats`` and the names of registered qualities.
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
        return float(self.qualities["loss"] or 0.0)

    def to_json(self) -> JsonObject:
        """The JSON object."""
        return {
            "key": self.key,
            "architecture": self.architecture.to_json(),
            **{QUALITY_KEYS.get(name, name): value for name, value in self.qualities.items()},
            "predicted": self.predicted.to_json(),
        }

    @staticmethod
    def from_json(value: JsonObject) -> "Member":
        """The inverse of :meth:`to_json`."""
        names = {key: name for name, key in QUALITY_KEYS.items()}
        other = ("key", "architecture", "predicted")
        return Member(
            architecture=Architecture.from_json(value["architecture"]),
            qualities={names.get(key, key): item for key, item in value.items() if key not in other},
            predicted=Prediction.from_json(value["predicted"]),
        )


@dataclass(frozen=True, kw_only=True)
class FailedEvaluation:
    """An architecture that could not be evaluated, and the reason in one line."""

    key: str
    reason: str


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
        surrogate: by quality, the rank correlation of the surrogate's predictions with the evaluations.
        limits: with their bounds in base units.
        picks: by ``best``, ``knee`` and ``fastest``, a member's key.
        members: sorted by the objectives.
        inputs: sha256 of what the search was made from, by name.
    """

    space: str
    objectives: tuple[str, ...]
    strategy: str
    confidence: float
    seed: int
    evaluations: int
    failed: tuple[FailedEvaluation, ...]
    surrogate: JsonObject
    limits: tuple[BoundedLimit, ...]
    picks: Mapping[str, str]
    members: tuple[Member, ...]
    inputs: Mapping[str, str]

    def to_json(self) -> JsonObject:
        """The JSON object, without its header."""
        return {
            "space": self.space,
            "objectives": list(self.objectives),
            "strategy": self.strategy,
            "confidence": self.confidence,
            "seed": self.seed,
            "evaluations": self.evaluations,
            "failed": [vars(item) for item in self.failed],
            "surrogate": self.surrogate,
            "limits": [vars(item) for item in self.limits],
            "picks": dict(self.picks),
            "members": [member.to_json() for member in self.members],
        }

    @staticmethod
    def from_json(value: JsonObject) -> "Front":
        """The front of an object that :meth:`to_json` gave, with or without its header."""
        return Front(
            space=value["space"],
            objectives=tuple(value["objectives"]),
            strategy=value["strategy"],
            confidence=value["confidence"],
            seed=value["seed"],
            evaluations=value["evaluations"],
            failed=tuple(FailedEvaluation(**item) for item in value["failed"]),
            surrogate=value["surrogate"],
            limits=tuple(BoundedLimit(**item) for item in value["limits"]),
            picks=value["picks"],
            members=tuple(Member.from_json(item) for item in value["members"]),
            inputs=value.get("header", {}).get("inputs", {}),
        )

    @staticmethod
    def read(path: Path) -> "Front":
        """The front of a ``front.json``.

        Raises:
            InputError: the file is missing, not whole, or of another kind or schema version.
        """
        return Front.from_json(FRONT.read(path))

    def write(self, path: Path) -> None:
        """Write ``front.json`` atomically."""
        FRONT.write(path, self.inputs, self.to_json())

    @property
    def quality(self) -> str:
        """The first objective that is a quality: what picks and finalists are ranked by."""
        return next(name for name in self.objectives if name in self.members[0].qualities)

    def member(self, pick: str) -> Member:
        """A member by the name of a pick (``best``, ``knee``, ``fastest``) or by key.

        Raises:
            InputError: there is no such member.
        """
        key = self.picks.get(pick, pick)
        for member in self.members:
            if member.key == key:
                return member
        raise InputError(f"pick {pick!r}: not one of {', '.join(self.picks)}, nor a key of the front")

    def choice(self, member: Member) -> Choice:
        """The limits and predictions that a member was chosen under, to be kept beside its sub-model."""
        return Choice(
            limits=self.limits,
            confidence=self.confidence,
            predicted=member.predicted,
            loss_nats=member.loss_nats,
        )


def surrogate_agreement(table: pd.DataFrame) -> dict[str, Any]:
    """How the qualities that a surrogate predicted rank beside those found afterwards, by quality."""
    found = {}
    for name in QUALITIES:
        if f"predicted_{name}" in table:
            some = table[table[f"predicted_{name}"].notna() & table[name].notna()]
            if len(some) > 2:
                rho = float(spearmanr(some[f"predicted_{name}"], some[name]).statistic)
                found[name] = {"evaluations": len(some), "spearman": rho}
    return found


def predictions(problem: Problem, architecture: Architecture) -> dict[str, Any]:
    """What is predicted of an architecture: parameters, and by device the latency of every workload.

    Those that were profiled, and those that limits ask for.
    """
    row = genome.encode(problem.space, [architecture])
    latency = {}
    for device, predictor in problem.predictors.items():
        asked = [limit.workload for limit in problem.limits if problem.timed(limit) == device]
        latency[device] = {
            str(w): {
                "latency_ms": 1e3 * float(predictor.cost(w)(row)[0]),
                "upper_ms": 1e3 * float(predictor.cost(w, problem.confidence)(row)[0]),
            }
            for w in dict.fromkeys([*predictor.models, *filter(None, asked)])
        }
    return {"params": int(params_cost(problem.space)(row)[0]), "latency": latency}


def picks(front: pd.DataFrame, objectives: Sequence[str]) -> dict[str, str]:
    """The keys of three members: ``best`` in quality, ``fastest`` in cost, and the ``knee`` between.

    The knee lies farthest below the line between the other two, on axes scaled to the front.
    """
    quality = next(name for name in objectives if name in QUALITIES)
    costs = [name for name in objectives if name not in QUALITIES]
    cost = costs[0] if costs else quality
    values = front[[cost, quality]].to_numpy(float)
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1)
    keys = list(front["key"])
    return {
        "best": keys[int(values[:, 1].argmin())],
        "knee": keys[int(scaled.sum(axis=1).argmin())],
        "fastest": keys[int(values[:, 0].argmin())],
    }


def pick_key(front: Mapping[str, Any], pick: str) -> str:
    """The key of a front's member by name (``best``, ``knee``, ``fastest``) or by key.

    Raises:
        InputError: there is no such member.
    """
    keys = [m["key"] for m in front["members"]]
    key = front["picks"].get(pick, pick)
    if key not in keys:
        raise InputError(f"pick {pick!r}: not one of {', '.join(front['picks'])}, nor a key of the front")
    return str(key)


def member_choice(front: Mapping[str, Any], member: Mapping[str, Any]) -> dict[str, Any]:
    """What a front's member was chosen under, to be kept beside its sub-model."""
    return {
        "limits": front["limits"],
        "confidence": front["confidence"],
        "predicted": member["predicted"],
        "loss_nats": member["loss_nats"],
    }
