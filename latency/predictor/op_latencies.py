"""Latency of every op in any workload within the measured range, from the ops that were measured.

There is one :class:`latency.predictor.op_model.OpModel` for each kind of op and phase. Its features are the
sizes of the op and the workload. The terms of its roofline are one call, FLOPs, and bytes of weights, states
and activations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latency.device_runner.timing import JsonObject
from latency.predictor.initial_design import Point, features, grouped
from latency.predictor.op_model import Observations, OpModel, Process, fit_op_model
from space import ModelConfig, Workload
from space.cost import op_activation_bytes, op_flops, op_state_bytes, op_weight_bytes
from space.ops import Op
from space.precision import matrix_bytes

Array = NDArray[np.float64]
MEASURED_EFFECT_VARIANCE = 0.1  # of an op's effect once it was measured, as a share of that before


def work(points: Sequence[Point], model_config: ModelConfig) -> Array:
    """Terms of the roofline of ops.

    Args:
        points: N ops and workloads.
        model_config: vocabulary, context and heads.

    Returns:
        1 (a call), FLOPs, and bytes of weights, states and activations: [N, 5].
    """
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
    """Bytes of weights; a head's matrix is read even if its parameters are those of the embedding."""
    head = matrix_bytes(model_config.vocab_size, op.width, workload.precision) if op.kind == "head" else 0
    return op_weight_bytes(op, model_config, workload.precision) + head


@dataclass(frozen=True)
class OpLatencies:
    """Latencies of ops on one device.

    Attributes:
        model_config: model configuration of the space.
        models: by kind of op and phase.
        op_effect: deviation of a measured op from its model in log seconds, by op key and workload.
        source: latencies of the known device that served as a prior; None if there was none.
    """

    model_config: ModelConfig
    models: Mapping[tuple[str, str], OpModel]
    op_effect: Mapping[tuple[str, str], float]
    source: "OpLatencies | None" = None

    def posterior(self, points: Sequence[Point]) -> tuple[Array, Array]:
        """Mean and covariance of log seconds, without the ops' own effects.

        Args:
            points: N ops and workloads.

        Returns:
            Mean: [N]; covariance: [N, N], 0 between different kinds or phases.
        """
        mean, covariance = np.empty(len(points)), np.zeros((len(points), len(points)))
        for key, places in grouped(points).items():
            group = [points[i] for i in places]
            known = self.source.seconds(group) if self.source else None
            mean[places], block = self.models[key].predict(
                features(group), work(group, self.model_config), known
            )
            covariance[np.ix_(places, places)] = block
        return mean, covariance

    def seconds(self, points: Sequence[Point]) -> Array:
        """Latencies of ops.

        Args:
            points: N ops and workloads.

        Returns:
            Seconds, infinite for an op that the device cannot run: [N].
        """
        places = [i for i, (op, w) in enumerate(points) if (op.kind, w.phase) in self.models]
        supported = [points[i] for i in places]
        mean, _ = self.posterior(supported)
        found = np.full(len(points), np.inf)
        found[places] = np.exp(mean + [self.op_effect.get((op.key, str(w)), 0.0) for op, w in supported])
        return found

    def op_effect_variance(self, point: Point) -> float:
        """Variance of an op's effect, in squared log seconds.

        Args:
            point: op and workload.
        """
        op, workload = point
        white = self.models[op.kind, workload.phase].white
        return white * (MEASURED_EFFECT_VARIANCE if (op.key, str(workload)) in self.op_effect else 1.0)

    def timing_noise(self, point: Point) -> float:
        """Variance of a timing of an op in squared log seconds, the median over its kind and phase.

        Args:
            point: op and workload.
        """
        op, workload = point
        return self.models[op.kind, workload.phase].timing

    def to_json(self) -> JsonObject:
        """The latencies as a JSON object, without the model configuration."""
        return {
            "models": [
                {"kind": kind, "phase": phase, "processes": [p.to_json() for p in model.processes]}
                for (kind, phase), model in self.models.items()
            ],
            "op_effect": [[op, workload, value] for (op, workload), value in self.op_effect.items()],
            "source": self.source.to_json() if self.source else None,
        }

    @staticmethod
    def from_json(model_config: ModelConfig, value: JsonObject) -> "OpLatencies":
        """Read latencies; the inverse of :meth:`to_json`.

        Args:
            model_config: model configuration of the space.
            value: a JSON object.
        """
        models = {
            (item["kind"], item["phase"]): OpModel(tuple(map(Process.from_json, item["processes"])))
            for item in value["models"]
        }
        op_effect = {(op, workload): effect for op, workload, effect in value["op_effect"]}
        source = OpLatencies.from_json(model_config, value["source"]) if value["source"] else None
        return OpLatencies(model_config, models, op_effect, source)


def fit_op_latencies(
    model_config: ModelConfig, timed: Mapping[Point, tuple[float, float]], source: OpLatencies | None = None
) -> OpLatencies:
    """Fit the latencies of every kind of op and phase.

    Args:
        model_config: model configuration of the space.
        timed: seconds and their relative standard deviation, by op and workload.
        source: latencies of a known device, as a prior.
    """
    points = list(timed)
    models: dict[tuple[str, str], OpModel] = {}
    op_effect: dict[tuple[str, str], float] = {}
    for key, places in grouped(points).items():
        group = [points[i] for i in places]
        seconds, noise = np.array([timed[point] for point in group]).T
        known = source.seconds(group) if source and key in source.models else None
        models[key] = fit_op_model(
            Observations(features(group), work(group, model_config), seconds, noise, known)
        )
        for (op, workload), value in zip(group, models[key].op_effect(), strict=True):
            op_effect[op.key, str(workload)] = float(value)
    return OpLatencies(model_config, models, op_effect, source)
