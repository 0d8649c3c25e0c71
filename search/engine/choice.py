"""The limits and predictions under which an architecture was chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from search.problem.limit import Limit
from space.io.record import mapping_of, read_record, tuple_of

JsonObject = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LatencyPrediction:
    """Predicted latency of one workload on one device.

    Attributes:
        latency_ms: the mean.
        upper_ms: the upper estimate at the search's confidence, which is compared with limits.
    """

    latency_ms: float
    upper_ms: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted costs of an architecture.

    Attributes:
        params: parameters.
        latency: by device and workload.
        costs: metrics of plug-ins that objectives and limits name, by their text, in base units.
    """

    params: int
    latency: Mapping[str, Mapping[str, LatencyPrediction]]
    costs: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """The JSON object."""
        latency = {d: {w: dict(vars(p)) for w, p in of.items()} for d, of in self.latency.items()}
        costs = {"costs": dict(self.costs)} if self.costs else {}
        return {"params": self.params, "latency": latency, **costs}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Prediction":
        """The inverse of :meth:`to_json`.

        Args:
            value: the JSON object.
        """
        by_workload = mapping_of(lambda item: read_record(LatencyPrediction, item))
        return read_record(Prediction, value, latency=mapping_of(by_workload))


@dataclass(frozen=True, kw_only=True)
class BoundedLimit:
    """A limit with its bound in base units.

    Attributes:
        text: the limit as given, such as ``decode@256<=60%``.
        bound: in ``unit``.
        unit: the metric's base unit, such as ``seconds``, ``bytes`` or ``parameters``.
    """

    text: str
    bound: float
    unit: str

    @property
    def parsed(self) -> Limit:
        """The limit as a value."""
        return Limit.parse(self.text)

    def to_json(self) -> JsonObject:
        """The JSON object; the text is its ``limit``."""
        return {"limit": self.text, "bound": self.bound, "unit": self.unit}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "BoundedLimit":
        """The inverse of :meth:`to_json`.

        Args:
            value: the JSON object; other keys are ignored.
        """
        return read_record(BoundedLimit, {**value, "text": value["limit"]})

    def format(self, value: float) -> str:
        """A value of the limited metric for people, such as ``3.21 ms``.

        Args:
            value: in ``unit``.
        """
        return self.parsed.metric.unit.format(value)


@dataclass(frozen=True, kw_only=True)
class FamilyPick:
    """The rule by which a member of an architecture's family was picked.

    Attributes:
        how: the rule, such as ``mix'n'match``.
        base: the key of the architecture whose family it is.
        family: the number of members.
    """

    how: str
    base: str
    family: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The limits and predictions under which a sub-model was chosen.

    Its JSON object is kept beside the sub-model, in ``architecture.json``.

    Attributes:
        limits: the limits of the search.
        confidence: of the upper estimates of latency and rss that were compared with limits.
        predicted: predicted costs; None where no device was given.
        loss_nats: held-out loss inside the supernet, in nats per token; None where it was not evaluated.
        picked: the rule that gave the architecture; None where it is a front's member.
    """

    limits: tuple[BoundedLimit, ...] = ()
    confidence: float | None = None
    predicted: Prediction | None = None
    loss_nats: float | None = None
    picked: FamilyPick | None = None

    def to_json(self) -> JsonObject:
        """The JSON object; fields that are None are left out."""
        value: JsonObject = {
            "limits": [limit.to_json() for limit in self.limits],
            "confidence": self.confidence,
            "predicted": self.predicted and self.predicted.to_json(),
            "loss_nats": self.loss_nats,
            "picked": self.picked and dict(vars(self.picked)),
        }
        return {name: item for name, item in value.items() if item is not None}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Choice":
        """The inverse of :meth:`to_json`.

        Args:
            value: the JSON object; an empty one is a choice without limits.
        """
        return read_record(
            Choice,
            value,
            limits=tuple_of(BoundedLimit.from_json),
            predicted=lambda item: Prediction.from_json(item) if item else None,
            picked=lambda item: read_record(FamilyPick, item),
        )

    def device_of(self, limit: Limit, measured: str) -> str:
        """The device that a limit is on.

        Args:
            limit: one of the limits.
            measured: the device where no device was given to the search.
        """
        predicted = self.predicted.latency if self.predicted else {}
        return limit.device or next(iter(predicted), measured)

    def workloads(self, device: str) -> dict[str, LatencyPrediction]:
        """Predicted latencies by workload; empty without predictions.

        Args:
            device: the name of the device.
        """
        return dict(self.predicted.latency.get(device, {})) if self.predicted else {}
