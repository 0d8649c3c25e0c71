"""The fitted latency model of one workload, and the cost that it gives every architecture."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from latency.device_runner.timing import JsonObject
from latency.predictor.accuracy import PredictorErrors
from latency.predictor.composition import MAX_SAVED_SHARE, NO_SAVING, Saving, hinge_bytes
from space import Space, Workload
from space.cost import op_held_bytes
from space.ops import Cost, Op, OpTables


def finite_seconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """The finite latencies by op key; an op that the device cannot run has none."""
    return {key: value for key, value in seconds.items() if math.isfinite(value)}


@dataclass(frozen=True, kw_only=True)
class WorkloadModel:
    """Fitted coefficients of one workload; see :mod:`latency.predictor.composition`.

    Attributes:
        op_seconds: seconds by op key; ops that the device cannot run are missing.
        kinds: a_k, by op kind.
        constant: c0, seconds.
        attention_constant: s, seconds.
        per_layer: b, seconds.
        hinges: r_j, seconds per median bytes.
        saving: saving of models that fit into a cache.
        scale: standard deviation of the relative residuals.
        errors: errors of the fit; None for a model that was interpolated.
    """

    op_seconds: Mapping[str, float]
    kinds: Mapping[str, float]
    constant: float
    attention_constant: float
    per_layer: float
    hinges: tuple[float, ...]
    saving: Saving = NO_SAVING
    scale: float
    errors: PredictorErrors | None = None

    def times(self, factor: float) -> "WorkloadModel":
        """The model with all predictions multiplied by a factor.

        Args:
            factor: the factor.
        """
        return replace(
            self,
            kinds={kind: factor * value for kind, value in self.kinds.items()},
            constant=factor * self.constant,
            attention_constant=factor * self.attention_constant,
            per_layer=factor * self.per_layer,
            hinges=tuple(factor * value for value in self.hinges),
            saving=replace(self.saving, rate=factor * self.saving.rate),
        )

    def interpolate(
        self, other: "WorkloadModel", share: float, op_seconds: Mapping[str, float]
    ) -> "WorkloadModel":
        """The model of a length between those of two models.

        Args:
            other: the model of the greater length.
            share: position between the lengths, from 0 (this model) to 1 (the other).
            op_seconds: latencies of the ops at that length, by op key.
        """

        def between(a: float, b: float) -> float:
            return (1 - share) * a + share * b

        # The cache has the same size at both lengths; if only one fit found it, that size counts.
        saving = max(self.saving, other.saving, key=lambda saving: saving.rate)
        return WorkloadModel(
            op_seconds=op_seconds,
            kinds={kind: between(value, other.kinds[kind]) for kind, value in self.kinds.items()},
            constant=between(self.constant, other.constant),
            attention_constant=between(self.attention_constant, other.attention_constant),
            per_layer=between(self.per_layer, other.per_layer),
            hinges=tuple(between(*pair) for pair in zip(self.hinges, other.hinges, strict=True)),
            saving=replace(saving, rate=between(self.saving.rate, other.saving.rate)),
            scale=max(self.scale, other.scale),
        )

    def cost(self, space: Space, workload: Workload, factor: float) -> Cost:
        """The predicted latency as a cost of the space.

        Args:
            space: the space.
            workload: the workload.
            factor: factor on the mean, 1 for the mean itself.

        Returns:
            Seconds, as a maximum of additive costs, capped by another one if there is a saving.
        """
        typical, starts = hinge_bytes(space, workload)

        def piece(rate: float, free: float, share: float = 1.0) -> Cost:
            """A share of the latency, plus ``rate`` seconds per byte held, minus ``free`` seconds."""

            def seconds(op: Op) -> float:
                op_seconds = self.kinds[op.kind] * self.op_seconds.get(op.key, math.inf)
                return factor * share * (op_seconds + rate * op_held_bytes(op, workload, space.config))

            return Cost(
                OpTables(space, seconds),
                constant=factor * share * (self.constant - free),
                per_layer=factor * share * self.per_layer,
                attention_constant=factor * share * self.attention_constant,
            )

        # A sum of hinges is the maximum of its linear pieces, one for each stretch between hinges: the rate
        # of bytes there, and the value of that line at 0 bytes.
        rates = [(0.0, 0.0)]
        for start, hinge in zip(starts, self.hinges, strict=True):
            if hinge > 0:
                rate, free = rates[-1]
                rates.append((rate + hinge / typical, free + hinge / typical * start))
        first, *others = (piece(*pair) for pair in rates)
        plain = replace(first, max_with=tuple(others))
        saving = self.saving
        if not saving.rate:
            return plain
        # The saved bytes are the minimum of two lines, so the latency less the saving is the maximum of two
        # sets of pieces. Never is more saved than a share of the latency, which is a third set. Beyond the
        # size from which nothing is saved, the second line exceeds the latency without a saving, which
        # caps it.
        lost = saving.rate * saving.fall
        saved = [(rate - saving.rate, free) for rate, free in rates]
        saved += [(rate + lost, free + lost * saving.gone) for rate, free in rates]
        first, *others = [
            *(piece(*pair) for pair in saved),
            *(piece(*pair, 1 - MAX_SAVED_SHARE) for pair in rates),
        ]
        return replace(plain, min_with=replace(first, max_with=tuple(others)))

    def to_json(self) -> JsonObject:
        """The model as a JSON object."""
        return {
            "op_seconds": dict(self.op_seconds),
            "kinds": dict(self.kinds),
            "constant_seconds": self.constant,
            "attention_constant_seconds": self.attention_constant,
            "per_layer_seconds": self.per_layer,
            "hinge_seconds": list(self.hinges),
            "saving": {
                "full_bytes": self.saving.full,
                "gone_bytes": self.saving.gone,
                "seconds_per_byte": self.saving.rate,
            },
            "relative_scale": self.scale,
            "errors": self.errors.to_json() if self.errors else {},
        }

    @staticmethod
    def from_json(value: JsonObject) -> "WorkloadModel":
        """Read a model; the inverse of :meth:`to_json`."""
        saving = value["saving"]
        return WorkloadModel(
            op_seconds=value["op_seconds"],
            kinds=value["kinds"],
            constant=value["constant_seconds"],
            attention_constant=value["attention_constant_seconds"],
            per_layer=value["per_layer_seconds"],
            hinges=tuple(value["hinge_seconds"]),
            saving=Saving(saving["full_bytes"], saving["gone_bytes"], saving["seconds_per_byte"]),
            scale=value["relative_scale"],
            errors=PredictorErrors.from_json(value["errors"]) if value["errors"] else None,
        )
