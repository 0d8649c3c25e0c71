"""Latency of every op in any workload within the measured range, inferred from whole models.

There is one :class:`latency.predictor.op_model.OpModel` for each phase. Its observations are whole models
in the phase's workloads; :mod:`latency.predictor.terms` says what their times are sums of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latency.device_runner.timing import JsonObject
from latency.predictor.op_model import Observations, OpModel, fit_op_model, unmeasured
from latency.predictor.terms import (
    Point,
    as_ops,
    cache_size,
    caches,
    held_bytes,
    reads_most,
    terms,
)
from space import Architecture, Space, Workload
from space.ops import Op

Array = NDArray[np.float64]
# Latency of an op before anything is measured, s: a call, per FLOP, per byte of weights, states, activations.
EXPECTED_RATES = (2e-6, 1e-11, 3e-11, 3e-11, 3e-11)
MIN_SOURCE_SECONDS = 1e-9  # of a term that a known device was not seen to have


@dataclass(frozen=True)
class TimedModel:
    """A whole model that was timed.

    Attributes:
        architecture: the model.
        workload: the workload.
        seconds: its latency.
        noise: relative standard deviation of the timing.
        group: label of the run that it was timed in.
    """

    architecture: Architecture
    workload: Workload
    seconds: float
    noise: float
    group: str = ""


@dataclass(frozen=True)
class OpLatencies:
    """Latencies of ops on one device.

    Attributes:
        space: a space with the model configuration of the models.
        models: by phase.
        kinds: kinds of terms that are known, by phase; an op of another kind takes infinitely long.
        source: latencies of the known device that served as a prior; None if there was none.
    """

    space: Space
    models: Mapping[str, OpModel]
    kinds: Mapping[str, frozenset[str]]
    source: "OpLatencies | None" = None

    def seconds(self, points: Sequence[Point]) -> Array:
        """Latencies of terms.

        Args:
            points: N terms and workloads.

        Returns:
            Seconds, infinite for an op that the device cannot run: [N].
        """
        found = np.full(len(points), np.inf)
        for phase, places in self._known(points).items():
            ops, order = as_ops([points[i] for i in places], self.space.config, self._source(points, places))
            found[[places[i] for i in order]] = np.exp(self.models[phase].log_seconds(ops))
        return found

    def spreads(self, points: Sequence[Point]) -> Array:
        """Relative standard deviations of latencies.

        Args:
            points: N terms and workloads.

        Returns:
            Infinite for an op that the device cannot run: [N].
        """
        found = np.full(len(points), np.inf)
        for phase, places in self._known(points).items():
            ops, order = as_ops([points[i] for i in places], self.space.config, self._source(points, places))
            covariance = self.models[phase].predict(ops)[1]
            found[[places[i] for i in order]] = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        return found

    def covariance(self, architectures: Sequence[Architecture], workload: Workload) -> tuple[Array, Array]:
        """Predicted latencies of models, and the covariance of their logarithms from that of the terms.

        Args:
            architectures: N models of ops that are known.
            workload: the workload.

        Returns:
            Seconds: [N]; covariance: [N, N].
        """
        rows = [self._counts(architecture, workload) for architecture in architectures]
        points = list(dict.fromkeys(point for row in rows for point in row))
        counts = np.array([[row.get(point, 0.0) for point in points] for row in rows])
        everything = list(range(len(points)))
        ops, order = as_ops(points, self.space.config, self._source(points, everything))
        mean, covariance = self.models[workload.phase].predict(ops)
        parts = counts[:, order] * np.exp(mean)
        totals = parts.sum(axis=1)
        shares = parts / totals[:, None]
        return totals, np.asarray(shares @ covariance @ shares.T)

    def _counts(self, architecture: Architecture, workload: Workload) -> dict[Point, float]:
        known = self.kinds[workload.phase]
        counts = terms(architecture, workload, self.space)
        return {(op, workload): n for op, n in counts.items() if op.kind in known}

    def _known(self, points: Sequence[Point]) -> dict[str, list[int]]:
        """Indices of the points whose kind is known, by phase."""
        found: dict[str, list[int]] = {}
        for i, (op, workload) in enumerate(points):
            if op.kind in self.kinds.get(workload.phase, ()):
                found.setdefault(workload.phase, []).append(i)
        return found

    def _source(self, points: Sequence[Point], places: Sequence[int]) -> dict[Point, float] | None:
        """Seconds of points on the known device, if that model counts."""
        if self.source is None:
            return None
        some = [points[i] for i in places]
        return _source_seconds(self.source, some)

    def to_json(self) -> JsonObject:
        """The latencies as a JSON object, without the space."""
        return {
            "models": {phase: model.to_json() for phase, model in self.models.items()},
            "kinds": {phase: sorted(kinds) for phase, kinds in self.kinds.items()},
            "source": self.source.to_json() if self.source else None,
        }

    @staticmethod
    def from_json(space: Space, value: JsonObject) -> "OpLatencies":
        """Read latencies; the inverse of :meth:`to_json`.

        Args:
            space: a space with the model configuration of the models.
            value: a JSON object.
        """
        models = {phase: OpModel.from_json(model) for phase, model in value["models"].items()}
        kinds = {phase: frozenset(names) for phase, names in value["kinds"].items()}
        source = OpLatencies.from_json(space, value["source"]) if value["source"] else None
        return OpLatencies(space, models, kinds, source)


def _source_seconds(source: OpLatencies, points: Sequence[Point]) -> dict[Point, float] | None:
    """Seconds of points on a known device; None if it lacks one of them.

    A cache that the known device was not seen to have takes the time of none.
    """
    seconds = source.seconds(points)
    for i, (op, _) in enumerate(points):
        if cache_size(op) is not None and not np.isfinite(seconds[i]):
            seconds[i] = MIN_SOURCE_SECONDS
    return None if not np.isfinite(seconds).all() else dict(zip(points, seconds.tolist(), strict=True))


def fit_op_latencies(
    space: Space, timed: Sequence[TimedModel], source: OpLatencies | None = None
) -> OpLatencies:
    """Infer the latencies of ops from those of whole models.

    Args:
        space: a space with the model configuration of the models.
        timed: the measured models.
        source: latencies of a known device, as a prior.
    """
    models, kinds = {}, {}
    for phase in dict.fromkeys(item.workload.phase for item in timed):
        rows = [item for item in timed if item.workload.phase == phase]
        reading = [item for item in rows if reads_most(item.workload)]
        held = [held_bytes(item.architecture, item.workload, space.config) for item in reading]
        sizes = caches(np.array(held, dtype=np.float64))
        counts = []
        for item in rows:
            found = terms(item.architecture, item.workload, space)
            counts.append(
                {
                    (op, item.workload): n
                    for op, n in found.items()
                    if (size := cache_size(op)) is None or size in sizes
                }
            )
        points = sorted({point for row in counts for point in row})
        known = _source_seconds(source, points) if source and phase in source.models else None
        ops, order = as_ops(points, space.config, known)
        place = {points[i]: column for column, i in enumerate(order)}
        matrix = np.zeros((len(rows), len(points)))
        for i, row in enumerate(counts):
            for point, n in row.items():
                matrix[i, place[point]] = n
        seconds, noise = np.array([(item.seconds, item.noise) for item in rows]).T
        # The same model at another length tells nearly everything about it: it is left out too.
        groups = [item.architecture.key for item in rows]
        models[phase] = fit_op_model(Observations(ops, matrix, seconds, noise, groups))
        kinds[phase] = frozenset(ops)
    return OpLatencies(space, models, kinds, source)


def expected_latencies(
    space: Space, architectures: Sequence[Architecture], workloads: Sequence[Workload]
) -> OpLatencies:
    """Latencies of a device before anything was measured on it, for choosing what to measure.

    Args:
        space: a space with the model configuration of the models.
        architectures: models whose terms count.
        workloads: the workloads.
    """
    models, kinds = {}, {}
    for phase in dict.fromkeys(workload.phase for workload in workloads):
        points = {
            (op, w)
            for w in workloads
            if w.phase == phase
            for a in architectures
            for op in terms(a, w, space)
            if cache_size(op) is None
        }
        ops, _ = as_ops(sorted(points), space.config)
        models[phase] = unmeasured(ops, np.array(EXPECTED_RATES))
        kinds[phase] = frozenset(ops)
    return OpLatencies(space, models, kinds)


def term_points(ops: Sequence[Op], workload: Workload, latencies: OpLatencies) -> list[Point]:
    """Ops of a space and all other terms that are known in a workload's phase."""
    others = [
        Op(kind=kind)
        for kind in sorted(latencies.kinds.get(workload.phase, ()))
        if "." in kind or kind == "run"
    ]
    return [(op, workload) for op in (*ops, *others)]
