"""Records of a verified sub-model, as ``verify.json`` holds them: parity, latencies, precisions, limits."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from search.engine.choice import BoundedLimit, Choice, LatencyPrediction
from search.problem.limit import Limit, within
from space.io.artefact import Artefact
from space.io.record import mapping_of, read_document, read_record, tuple_of

JsonObject = dict[str, Any]
VERIFICATION = Artefact("verification", "formfit verify", schema=3)
UNMEASURED = "UNMEASURED"  # stands in JSON for a value that was not measured
COMPARISON_PREFIXES = ("predicted_", "measured_")


@dataclass(frozen=True, kw_only=True)
class LatencyMeasurement:
    """Measured latency of one workload, in the units of the device's card.

    Attributes:
        latency_ms: the median over rounds, of the middle copy.
        interval_ms: its 95% interval, lower and upper end.
        copies_ms: the medians of all copies of the session.
        clock_ms: the middle copy's median on the clock, without the card's scale factor.
        problems: reasons why the timings are unstable; empty if they are not.
    """

    latency_ms: float
    interval_ms: tuple[float, float]
    copies_ms: tuple[float, ...]
    clock_ms: float
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LatencyComparison:
    """Predicted and measured latency of one workload.

    Attributes:
        predicted: on the device that the sub-model was chosen for.
        measured: on that device.
    """

    predicted: LatencyPrediction
    measured: LatencyMeasurement

    @property
    def error_percent(self) -> float:
        """Relative error of the prediction, in percent; positive if it is too high."""
        return 100 * (self.predicted.latency_ms / self.measured.latency_ms - 1)

    def to_json(self) -> JsonObject:
        """The JSON object, with ``error_percent``."""
        measured = asdict(self.measured)
        problems = list(measured.pop("problems"))
        return {
            **{f"predicted_{name}": value for name, value in vars(self.predicted).items()},
            **{f"measured_{name}": list(v) if isinstance(v, tuple) else v for name, v in measured.items()},
            "problems": problems,
            "error_percent": self.error_percent,
        }

    @staticmethod
    def from_json(value: JsonObject) -> "LatencyComparison":
        """The inverse of :meth:`to_json`."""
        predicted, measured = (
            {name.removeprefix(prefix): v for name, v in value.items() if name.startswith(prefix)}
            for prefix in COMPARISON_PREFIXES
        )
        problems = value.get("problems", [])
        return LatencyComparison(
            predicted=read_record(LatencyPrediction, predicted),
            measured=read_record(LatencyMeasurement, {**measured, "problems": problems}),
        )


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Errors of every form of a sub-model against the plain model in fp64.

    Attributes:
        errors: ``max|a-b| / max|b|`` by form and way of reading, such as ``onnx_decode``.
        bound: errors up to it count as rounding.
        tokens: length of the sequence that was read.
        unmeasured: forms that could not be run, with the reason.
    """

    errors: Mapping[str, float]
    bound: float
    tokens: int
    unmeasured: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """The largest error."""
        return max(self.errors.values())

    @property
    def kept(self) -> bool:
        """True if no error exceeds the bound."""
        return self.worst <= self.bound

    def to_json(self) -> JsonObject:
        """The JSON object, with ``kept``."""
        return {
            "errors": dict(self.errors),
            "bound": self.bound,
            "tokens": self.tokens,
            "kept": self.kept,
            UNMEASURED: list(self.unmeasured),
        }

    @staticmethod
    def from_json(value: JsonObject) -> "Parity":
        """The inverse of :meth:`to_json`."""
        return read_record(Parity, {**value, "unmeasured": tuple(value[UNMEASURED])})


@dataclass(frozen=True, kw_only=True)
class PrecisionResult:
    """An exported graph of one precision.

    Attributes:
        bytes: size of the file.
        loss_nats: held-out loss in nats per token; None if it was not measured.
        latency_ms: measured latency by workload.
    """

    bytes: int
    loss_nats: float | None
    latency_ms: Mapping[str, float]

    def to_json(self) -> JsonObject:
        """The JSON object; a loss that was not measured is ``UNMEASURED``."""
        loss = UNMEASURED if self.loss_nats is None else self.loss_nats
        return {"bytes": self.bytes, "loss_nats": loss, "latency_ms": dict(self.latency_ms)}

    @staticmethod
    def from_json(value: JsonObject) -> "PrecisionResult":
        """The inverse of :meth:`to_json`."""
        return read_record(PrecisionResult, value, loss_nats=lambda x: None if x == UNMEASURED else x)


@dataclass(frozen=True, kw_only=True)
class LimitResult:
    """A limit beside the measured value.

    Attributes:
        bounded: the user's limit with its bound in base units.
        found: the measured or counted value in the same unit; None if it was not measured.
    """

    bounded: BoundedLimit
    found: float | None

    @property
    def status(self) -> str:
        """``kept``, ``missed`` or ``UNMEASURED``."""
        if self.found is None:
            return UNMEASURED
        return "kept" if within(self.found, self.bounded.bound) else "missed"

    @property
    def missed(self) -> bool:
        """True if the measured value exceeds the bound."""
        return self.status == "missed"

    @property
    def used(self) -> float | None:
        """The measured value as a share of the bound; None if it was not measured."""
        return None if self.found is None else self.found / self.bounded.bound

    def to_json(self) -> JsonObject:
        """The JSON object, with ``status`` and, if it was measured, ``used``."""
        value = {**self.bounded.to_json(), "found": self.found, "status": self.status}
        return value if self.found is None else {**value, "used": self.used}

    @staticmethod
    def from_json(value: JsonObject) -> "LimitResult":
        """The inverse of :meth:`to_json`."""
        return read_record(LimitResult, {**value, "bounded": BoundedLimit.from_json(value)})


def describe_unmeasured(limits: Sequence[LimitResult], choice: Choice, device: str) -> str:
    """One line that names the limits that were not measured and why; empty if all were.

    Args:
        limits: of a verification.
        choice: that the sub-model was chosen by.
        device: that was measured on.
    """
    parts = [
        f"{item.bounded.text} ({_unmeasured_reason(item.bounded.parsed, choice, device)})"
        for item in limits
        if item.found is None
    ]
    return f"limits that were not measured: {'; '.join(parts)}" if parts else ""


def _unmeasured_reason(limit: Limit, choice: Choice, device: str) -> str:
    metric, limited = limit.metric, choice.device_of(limit, device)
    if metric.needs_device and limited != device:
        return f"it is on device {limited}"
    if metric.measurement == "rss":
        return "kits and some runtimes cannot measure rss"
    if metric.measurement == "latency":
        return f"{limit.workload} was not timed on {device}"
    return f"the metric {metric.name} has no measurement"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of verifying a sub-model on a device: the content of ``verify.json``.

    Attributes:
        key: the architecture's key.
        device: the name of the device's card.
        runtime: name and version of the runtime that ran the model.
        parity: errors of its forms.
        latency: predicted and measured latencies by workload.
        precisions: exported graphs by precision.
        rss_bytes: measured peak resident memory by workload.
        limits: the limits that the sub-model was chosen under.
        inputs: sha256 of what was verified, by name.
    """

    key: str
    device: str
    runtime: str
    parity: Parity
    latency: Mapping[str, LatencyComparison]
    precisions: Mapping[str, PrecisionResult]
    rss_bytes: Mapping[str, int]
    limits: tuple[LimitResult, ...]
    inputs: Mapping[str, str]

    @property
    def missed(self) -> tuple[str, ...]:
        """The limits that were missed, as the user wrote them."""
        return tuple(item.bounded.text for item in self.limits if item.missed)

    @property
    def passed(self) -> bool:
        """True if parity holds and no limit was missed; a limit that was not measured does not count."""
        return not self.missed and self.parity.kept

    def to_json(self) -> JsonObject:
        """The JSON object, without its header."""
        return {
            "key": self.key,
            "device": self.device,
            "runtime": self.runtime,
            "parity": self.parity.to_json(),
            "latency": {name: item.to_json() for name, item in self.latency.items()},
            "precisions": {name: item.to_json() for name, item in self.precisions.items()},
            "rss_bytes": dict(self.rss_bytes),
            "limits": [item.to_json() for item in self.limits],
        }

    def document(self) -> JsonObject:
        """The JSON object with its header, as ``verify.json`` holds it."""
        return {"header": VERIFICATION.header(self.inputs), **self.to_json()}

    @staticmethod
    def read(path: Path) -> "Verification":
        """Read a ``verify.json``.

        Args:
            path: the file.

        Raises:
            InputError: the file is missing, not whole, or of another kind or schema version.
        """
        with VERIFICATION.checked(path):
            return Verification.from_json(VERIFICATION.read(path))

    @staticmethod
    def from_json(value: JsonObject) -> "Verification":
        """The record of an object that :meth:`document` gave."""
        return read_document(
            Verification,
            value,
            parity=Parity.from_json,
            latency=mapping_of(LatencyComparison.from_json),
            precisions=mapping_of(PrecisionResult.from_json),
            limits=tuple_of(LimitResult.from_json),
        )
