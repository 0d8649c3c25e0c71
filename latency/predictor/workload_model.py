"""The fitted latency model of one workload, and the cost that it gives every architecture."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from latency.device_runner.timing import JsonObject
from latency.predictor.accuracy import PredictorErrors
from latency.predictor.bounds import Spread
from latency.predictor.terms import CACHE_UNIT, CLASSES, op_bytes
from space import Space, Workload
from space.ops import Cost, Footprint, OpTables


@dataclass(frozen=True, kw_only=True)
class WorkloadModel:
    """Fitted terms of one workload; see :mod:`latency.predictor.terms`.

    Attributes:
        op_seconds: seconds by op key; ops that the device cannot run are missing.
        op_spreads: relative standard deviation of each; empty for a model that was interpolated.
        run: seconds that every model takes once.
        shared: seconds that a model with a mixer of a class takes once, in the order of ``Cost.shared``.
        caches: seconds per MiB read from beyond a cache, by its size in bytes.
        spread: how far measurements of the same runs are from the predictions.
        run_spread: relative standard deviation that all measurements of another run have in common.
        errors: errors of the fit; None for a model that was interpolated.
    """

    op_seconds: Mapping[str, float]
    op_spreads: Mapping[str, float] = field(default_factory=dict)
    run: float
    shared: tuple[float, float, float]
    caches: Mapping[int, float]
    spread: Spread
    run_spread: float
    errors: PredictorErrors | None = None

    def times(self, factor: float) -> "WorkloadModel":
        """The model with all predictions multiplied by a factor.

        Args:
            factor: the factor.
        """
        full, linear, local = self.shared
        return replace(
            self,
            op_seconds={key: factor * value for key, value in self.op_seconds.items()},
            run=factor * self.run,
            shared=(factor * full, factor * linear, factor * local),
            caches={size: factor * value for size, value in self.caches.items()},
        )

    def cost(self, space: Space, workload: Workload, factor: float = 1.0, constant: float = 0.0) -> Cost:
        """The predicted latency as a cost of the space.

        Args:
            space: the space.
            workload: the workload.
            factor: factor on the mean, 1 for the mean itself.
            constant: seconds to add.

        Returns:
            Seconds.
        """
        scaled = self.times(factor)
        footprint = None
        if scaled.caches:
            starts, slopes = pieces(scaled.caches)
            held = OpTables(space, lambda op: op_bytes(op, workload, space.config))
            footprint = Footprint(held, starts, slopes)
        return Cost(
            OpTables(space, lambda op: scaled.op_seconds.get(op.key, math.inf)),
            constant=scaled.run + constant,
            shared=scaled.shared,
            footprint=footprint,
        )

    def to_json(self) -> JsonObject:
        """The model as a JSON object."""
        return {
            "op_seconds": dict(self.op_seconds),
            "op_relative_spreads": dict(self.op_spreads),
            "run_seconds": self.run,
            "shared_seconds": dict(zip(CLASSES, self.shared, strict=True)),
            "cache_seconds_per_mib": {str(size): value for size, value in self.caches.items()},
            "spread": self.spread.to_json(),
            "run_relative_spread": self.run_spread,
            "errors": self.errors.to_json() if self.errors else {},
        }

    @staticmethod
    def from_json(value: JsonObject) -> "WorkloadModel":
        """Read a model; the inverse of :meth:`to_json`."""
        full, linear, local = (value["shared_seconds"][name] for name in CLASSES)
        return WorkloadModel(
            op_seconds=value["op_seconds"],
            op_spreads=value["op_relative_spreads"],
            run=value["run_seconds"],
            shared=(full, linear, local),
            caches={int(size): rate for size, rate in value["cache_seconds_per_mib"].items()},
            spread=Spread.from_json(value["spread"]),
            run_spread=value["run_relative_spread"],
            errors=PredictorErrors.from_json(value["errors"]) if value["errors"] else None,
        )


def pieces(caches: Mapping[int, float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The time of reading from beyond caches as a piecewise linear function of a model's bytes.

    Args:
        caches: seconds per MiB beyond each cache, by its size in bytes.

    Returns:
        Bytes at which each piece starts, and seconds per byte on it.
    """
    ends = sorted({float(place) for size in caches for place in (size, 2 * size)})
    starts = [0.0, *ends]
    slopes = [
        sum(
            rate / CACHE_UNIT * (0 if start < size else 2 if start < 2 * size else 1)
            for size, rate in caches.items()
        )
        for start in starts
    ]
    kept = [i for i in range(len(starts)) if i == 0 or slopes[i] != slopes[i - 1]]
    return tuple(starts[i] for i in kept), tuple(slopes[i] for i in kept)
