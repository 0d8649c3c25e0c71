"""Predicting the latency of a model: the mean, an interval, and an upper bound with stated confidence.

The mean is a sum of terms, see :mod:`latency.predictor.terms`. The upper bound adds to it a multiple of the
spread of measurements around it: the conformal quantile of the leave-one-out residuals (Vovk, Gammerman and
Shafer 2005) of the models that were drawn at random, in units of their spread and pooled over workloads.
The spread is linear in the mean, see :mod:`latency.predictor.bounds`, and a bound that is monotone in the
mean keeps limits exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latency.card import PREDICTOR
from latency.device_runner.timing import JsonObject
from latency.predictor.bounds import Spread, conformal
from latency.predictor.memory import MemoryModel
from latency.predictor.op_latencies import OpLatencies, term_points
from latency.predictor.schema import read_predictor
from latency.predictor.terms import CLASSES, RUN, SHARED, cache_size, reads_most
from latency.predictor.workload_model import WorkloadModel
from space import InputError, Space, Workload
from space.genome import Genomes
from space.io.artefact import check_inputs
from space.onnx.graph import VERSION
from space.ops import Cost, space_ops

NO_GRAPHS = "0"  # graph version of a runtime that builds models in its own way
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Latencies and memory of a space's architectures on one device.

    Attributes:
        space: the space.
        ops: latencies of its ops.
        models: latency model by workload.
        residuals: leave-one-out residuals of all workloads, each in units of its workload's spread.
        memory: memory model by prefill workload; empty if memory was not measured.
    """

    space: Space
    ops: OpLatencies
    models: Mapping[Workload, WorkloadModel]
    residuals: Sequence[float]
    memory: Mapping[Workload, MemoryModel] = field(default_factory=dict)

    def predict(self, genomes: Genomes, workload: Workload) -> Array:
        """Predicted latencies.

        Args:
            genomes: the models: [N, G].
            workload: the workload.

        Returns:
            Seconds: [N].

        Raises:
            InputError: the workload is outside the measured range.
        """
        return self.cost(workload)(genomes)

    def upper(self, genomes: Genomes, workload: Workload, confidence: float) -> Array:
        """Upper bounds of latencies.

        Args:
            genomes: the models: [N, G].
            workload: the workload.
            confidence: probability with which a measurement stays below its bound.

        Returns:
            Seconds: [N].

        Raises:
            InputError: the workload is outside the measured range.
        """
        return self.cost(workload, confidence)(genomes)

    def interval(self, genomes: Genomes, workload: Workload, coverage: float) -> tuple[Array, Array]:
        """Central intervals of latencies.

        Args:
            genomes: the models: [N, G].
            workload: the workload.
            coverage: probability with which a measurement is in its interval.

        Returns:
            Lower and upper ends, s: [N], [N].

        Raises:
            InputError: the workload is outside the measured range.
        """
        mean = self.predict(genomes, workload)
        low, high = np.quantile(self.residuals, [(1 - coverage) / 2, (1 + coverage) / 2])
        deviation = self.spread(workload).at(mean)
        return mean + low * deviation, mean + high * deviation

    def spread(self, workload: Workload) -> Spread:
        """Standard deviation of a measurement in another run around the prediction.

        Args:
            workload: the workload.
        """
        model = self.model(workload)
        return model.spread.beside(model.run_spread)

    def model(self, workload: Workload) -> WorkloadModel:
        """The latency model of a workload: fitted, or interpolated between lengths.

        Args:
            workload: the workload.

        Raises:
            InputError: the workload is outside the measured range.
        """
        if workload in self.models:
            return self.models[workload]
        low, high, _ = self._around(workload, self.models)
        wider = max((self.models[w] for w in (low, high)), key=lambda model: model.spread.relative)
        return workload_model(self.space, self.ops, workload, wider.spread, wider.run_spread)

    def _around(
        self, workload: Workload, measured: Mapping[Workload, object]
    ) -> tuple[Workload, Workload, float]:
        """The measured workloads around one, and its position between their lengths."""
        alike = sorted(w for w in measured if replace(w, length=workload.length) == workload)
        if not alike or not alike[0].length < workload.length < alike[-1].length:
            known = ", ".join(map(str, measured)) or "nothing"
            text = f"workload {workload}: outside what was measured on this device (measured: {known})"
            if workload.length <= self.space.max_seq_len and self.models:
                alike = [w for w in self.models if w.precision == workload.precision]
                options = " ".join(f"--workload {w}" for w in [*alike, workload])
                options += "" if workload.precision == "fp32" else f" --precision {workload.precision}"
                text += f"; `formfit profile --space SPACE --device NAME {options}` measures it too"
            raise InputError(text)
        above = next(i for i, w in enumerate(alike) if w.length > workload.length)
        low, high = alike[above - 1], alike[above]
        return low, high, (workload.length - low.length) / (high.length - low.length)

    def memory_cost(self, workload: Workload, confidence: float | None = None) -> Cost:
        """Peak resident bytes of a session that reads a workload's tokens at once, as a cost of the space.

        Args:
            workload: a prefill workload.
            confidence: probability with which a model stays below the cost; None means the mean.

        Raises:
            InputError: the workload is outside the measured range, or memory was not measured.
        """
        if not self.memory:
            raise InputError(
                "rss was not measured on this device; profiling with onnxruntime on Linux measures it, "
                "a kit does not"
            )
        return self.memory_model(workload).cost(self.space, workload, confidence)

    def memory_model(self, workload: Workload) -> MemoryModel:
        """The memory model of a workload: fitted, or interpolated between lengths.

        Args:
            workload: a prefill workload.

        Raises:
            InputError: the workload is outside the measured range.
        """
        if workload in self.memory:
            return self.memory[workload]
        low, high, share = self._around(workload, self.memory)
        return self.memory[low].interpolate(self.memory[high], share)

    def cost(self, workload: Workload, confidence: float | None = None) -> Cost:
        """The latency in seconds as a cost of the space.

        Args:
            workload: the workload.
            confidence: probability with which a measurement stays below the cost; None means the mean.

        Raises:
            InputError: the workload is outside the measured range.
        """
        if confidence is None:
            return self.model(workload).cost(self.space, workload)
        spread, many = self.spread(workload), conformal(self.residuals, confidence)
        return self.model(workload).cost(
            self.space, workload, 1.0 + many * spread.relative, many * spread.seconds
        )

    def recalibrated(
        self, genomes: Genomes, seconds: Mapping[Workload, Array], rss: Mapping[Workload, Array]
    ) -> "Predictor":
        """The predictor after further models were measured.

        Models that a search chose resemble each other, and the terms miss the same of all of them.
        Their mean relative residual shifts every prediction, and the remaining residuals define the new
        spread, as a share of the prediction. Both are shrunk towards the earlier values, which count as much
        as one measurement.

        Args:
            genomes: the measured models: [N, G].
            seconds: their latencies by workload: [N].
            rss: their peak bytes by workload: [N].
        """
        models = dict(self.models)
        for workload, measured in seconds.items():
            model, predicted = self.model(workload), self.predict(genomes, workload)
            residuals = measured / predicted - 1
            count = len(residuals)
            shift = float(residuals.sum()) / (count + 1)
            known = float(np.mean(model.spread.at(predicted) / predicted))
            squares = float(((residuals - shift) ** 2).sum()) + known**2
            spread = Spread(0.0, float(np.sqrt(squares / (count + 1))))
            models[workload] = replace(model.times(1 + shift), spread=spread)
        memory = dict(self.memory)
        for workload, measured in rss.items():
            predicted = self.memory_cost(workload)(genomes)
            shift = float((measured / predicted - 1).sum()) / (len(measured) + 1)
            memory[workload] = self.memory_model(workload).times(1 + shift)
        return replace(self, models=models, memory=memory)

    def identity(self) -> JsonObject:
        """The fitted numbers that determine the predictions, without their errors, as a JSON object."""
        models = {str(w): {**m.to_json(), "errors": None} for w, m in self.models.items()}
        memory = {str(w): {**m.to_json(), "errors": None} for w, m in self.memory.items()}
        return {
            "space": self.space.hash,
            "residuals": list(self.residuals),
            "workloads": models,
            "memory": memory,
        }

    def save(self, path: Path, inputs: Mapping[str, str]) -> None:
        """Write the predictor.

        Args:
            path: the file.
            inputs: digests of the predictor's inputs by name, besides the space's; ``graphs`` is the version
                of the graphs that were timed.
        """
        body = {
            "space": self.space.name,
            "residuals": list(self.residuals),
            "workloads": {str(w): model.to_json() for w, model in self.models.items()},
            "memory": {str(w): model.to_json() for w, model in self.memory.items()},
            "ops": self.ops.to_json(),
        }
        PREDICTOR.write(path, {"space": self.space.hash, **inputs}, body)


def workload_model(
    space: Space,
    ops: OpLatencies,
    workload: Workload,
    spread: Spread,
    run_spread: float,
    *,
    spreads: bool = False,
) -> WorkloadModel:
    """The terms of a workload, from the latencies of ops.

    Args:
        space: the space.
        ops: fitted latencies.
        workload: the workload.
        spread: how far measurements of the same runs are from the predictions.
        run_spread: relative standard deviation that all measurements of another run have in common.
        spreads: True to add the spreads of the op latencies, which a fit that was read from a file lacks.
    """
    names = space_ops(space)
    points = term_points(names, workload, ops)
    seconds = ops.seconds(points)
    by_kind = {op.kind: float(value) for (op, _), value in zip(points, seconds, strict=True)}
    finite = [i for i in range(len(names)) if np.isfinite(seconds[i])]
    deviations = ops.spreads([points[i] for i in finite]) if spreads else np.zeros(0)
    full, linear, local = (by_kind.get(SHARED[name].kind, 0.0) for name in CLASSES)
    caches = {size: by_kind[op.kind] for op, _ in points if (size := cache_size(op)) is not None}
    return WorkloadModel(
        op_seconds={names[i].key: float(seconds[i]) for i in finite},
        op_spreads={names[i].key: float(d) for i, d in zip(finite, deviations, strict=False)},
        run=by_kind.get(RUN.kind, 0.0),
        shared=(full, linear, local),
        caches=caches if reads_most(workload) else {},
        spread=spread,
        run_spread=run_spread,
    )


def load_predictor(path: str | Path, space: Space, made_by: str = "formfit profile") -> Predictor:
    """Read a predictor.

    Args:
        path: the file.
        space: the space that it was fitted for.
        made_by: the command that makes it, for errors.

    Raises:
        InputError: the file is missing, not whole, or made for another space or another graph version.
    """
    path = Path(path)
    value = read_predictor(path, made_by)
    check_inputs(path, value, {"space": space.hash})
    graphs = value["header"]["inputs"].get("graphs", NO_GRAPHS)
    if graphs not in (NO_GRAPHS, str(VERSION)):
        raise InputError(
            f"{path}: fitted to graphs of version {graphs}, this formfit writes {VERSION}; "
            f"`{made_by}` measures them"
        )
    with PREDICTOR.checked(path, made_by):
        models = {
            Workload.parse(text): WorkloadModel.from_json(model) for text, model in value["workloads"].items()
        }
        memory = {Workload.parse(text): MemoryModel.from_json(item) for text, item in value["memory"].items()}
        ops = OpLatencies.from_json(space, value["ops"])
    return Predictor(space=space, ops=ops, models=models, residuals=value["residuals"], memory=memory)
