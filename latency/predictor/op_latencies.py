"""What every op takes in any workload within the measured box, from the ops that were measured.

One :class:`latency.predictor.op_model.OpModel` for each kind of op and phase. Its features are the sizes of
op and workload, its roofline one call, FLOPs, and bytes of weights, states and activations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latency.predictor.op_model import Observations, OpModel, Process, fit_op_model
from space import ModelConfig, Workload
from space.cost import op_activation_bytes, op_flops, op_state_bytes, op_weight_bytes
from space.ops import Op
from space.precision import matrix_bytes

Array = NDArray[np.float64]
Point = tuple[Op, Workload]


def features(points: Sequence[Point]) -> Array:
    """Logarithms to base 2 of the sizes: [N, 7]. A size that an op does not have counts as 1."""
    sizes = [
        (op.width, op.heads, op.kv_heads, op.window, op.ffn, workload.length, workload.batch)
        for op, workload in points
    ]
    return np.asarray(np.log2(np.maximum(np.array(sizes, dtype=np.float64), 1.0)))


def work(points: Sequence[Point], model_config: ModelConfig) -> Array:
    """What each op does: a call, FLOPs, bytes of weights, of states and of activations: [N, 5]."""
    rows = [
        (
            1.0,
            op_flops(op, workload, model_config),
            _read_bytes(op, workload, model_config),
            op_state_bytes(op, workload, model_config),
            op_activation_bytes(op, workload, model_config),
        )
        for op, workload in points
    ]
    return np.array(rows, dtype=np.float64)


def _read_bytes(op: Op, workload: Workload, model_config: ModelConfig) -> int:
    """Bytes of weights; a head's matrix is read whether or not its parameters are the embedding's."""
    head = matrix_bytes(model_config.vocab_size, op.width, workload.precision) if op.kind == "head" else 0
    return op_weight_bytes(op, model_config, workload.precision) + head


@dataclass(frozen=True)
class OpLatencies:
    """The latency of ops on one device.

    Attributes:
        model_config: of the space.
        models: by kind of op and phase.
        own: by op key and workload, what a measured op deviates from its model by, in log seconds.
        source: of the known device that the models start from, where there is one.
    """

    model_config: ModelConfig
    models: Mapping[tuple[str, str], OpModel]
    own: Mapping[tuple[str, str], float]
    source: "OpLatencies | None" = None

    def posterior(self, points: Sequence[Point]) -> tuple[Array, Array]:
        """Mean [N] and covariance [N, N] of log seconds, without what is an op's own."""
        mean, covariance = np.empty(len(points)), np.zeros((len(points), len(points)))
        for key, places in grouped(points).items():
            some = [points[i] for i in places]
            known = self.source.seconds(some) if self.source else None
            mean[places], block = self.models[key].predict(
                features(some), work(some, self.model_config), known
            )
            covariance[np.ix_(places, places)] = block
        return mean, covariance

    def seconds(self, points: Sequence[Point]) -> Array:
        """Seconds of ops in workloads: [N]; infinite where the device cannot run an op."""
        places = [i for i, (op, w) in enumerate(points) if (op.kind, w.phase) in self.models]
        runs = [points[i] for i in places]
        mean, _ = self.posterior(runs)
        found = np.full(len(points), np.inf)
        found[places] = np.exp(mean + [self.own.get((op.key, str(w)), 0.0) for op, w in runs])
        return found

    def own_variance(self, point: Point) -> float:
        """How uncertain it is what an op has of its own, in squared log seconds."""
        op, workload = point
        white = self.models[op.kind, workload.phase].white
        return white * (0.1 if (op.key, str(workload)) in self.own else 1.0)

    def timing_noise(self, point: Point) -> float:
        """The variance of a timing of an op, as those of its kind had it."""
        op, workload = point
        return self.models[op.kind, workload.phase].timing

    def to_json(self) -> dict[str, Any]:
        """As a plain JSON value, without the frame."""
        return {
            "models": [
                {"kind": kind, "phase": phase, "processes": [p.to_json() for p in model.processes]}
                for (kind, phase), model in self.models.items()
            ],
            "own": [[op, workload, value] for (op, workload), value in self.own.items()],
            "source": self.source.to_json() if self.source else None,
        }

    @staticmethod
    def from_json(model_config: ModelConfig, value: Mapping[str, Any]) -> "OpLatencies":
        """Read what :meth:`to_json` gave."""
        models = {
            (item["kind"], item["phase"]): OpModel(tuple(map(Process.from_json, item["processes"])))
            for item in value["models"]
        }
        own = {(op, workload): off for op, workload, off in value["own"]}
        source = OpLatencies.from_json(model_config, value["source"]) if value["source"] else None
        return OpLatencies(model_config, models, own, source)


def grouped(points: Sequence[Point]) -> dict[tuple[str, str], list[int]]:
    """The places of points by kind of op and phase."""
    found: dict[tuple[str, str], list[int]] = {}
    for i, (op, workload) in enumerate(points):
        found.setdefault((op.kind, workload.phase), []).append(i)
    return found


def fit_op_latencies(
    model_config: ModelConfig, timed: Mapping[Point, tuple[float, float]], source: OpLatencies | None = None
) -> OpLatencies:
    """Fit every kind of op and phase from seconds and their relative standard deviation."""
    points = list(timed)
    models: dict[tuple[str, str], OpModel] = {}
    own: dict[tuple[str, str], float] = {}
    for key, places in grouped(points).items():
        some = [points[i] for i in places]
        seconds, noise = np.array([timed[point] for point in some]).T
        known = source.seconds(some) if source and key in source.models else None
        models[key] = fit_op_model(
            Observations(features(some), work(some, model_config), seconds, noise, known)
        )
        for (op, workload), value in zip(some, models[key].own(), strict=True):
            own[op.key, str(workload)] = float(value)
    return OpLatencies(model_config, models, own, source)
