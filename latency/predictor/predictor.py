"""Predicting a model's latency: the mean, an interval, and an upper bound with stated confidence.

The mean is a :mod:`latency.predictor.composition`. The upper bound multiplies it by one factor a workload,
the conformal quantile of leave-one-out relative residuals (Vovk, Gammerman and Shafer 2005) of the models
that were drawn at random, pooled over workloads, so that it is monotone in the mean and limits on it stay
exact.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latency.predictor.composition import (
    MOST_SAVED,
    NO_SAVING,
    Saving,
    conformal,
    hinge_bytes,
)
from latency.predictor.memory import MemoryModel
from latency.predictor.op_latencies import OpLatencies
from space import InputError, Space, Workload
from space.cost import op_held_bytes
from space.genome import Genomes
from space.io.artefact import Artefact, check_inputs
from space.onnx.graph import VERSION
from space.ops import Cost, Op, OpTables, space_ops

PREDICTOR = Artefact("latency predictor", "formfit profile", schema=3)
RUNS_APART = 0.02  # relative spread of what one machine says in runs of different hours; see docs/adr/0004
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class WorkloadModel:
    """What was fitted for one workload; times in seconds."""

    op_seconds: Mapping[str, float]  # by op key; those that the device cannot run are missing
    kinds: Mapping[str, float]  # a_k
    constant: float  # c0
    attention_constant: float  # s
    per_layer: float  # b
    hinges: tuple[float, ...]  # r_j, seconds for the median bytes
    saving: Saving = NO_SAVING
    scale: float  # spread of the relative residuals
    errors: Mapping[str, Any]  # see `accuracy`

    def times(self, factor: float) -> "WorkloadModel":
        """A model that predicts so many times as much."""
        return replace(
            self,
            kinds={kind: factor * value for kind, value in self.kinds.items()},
            constant=factor * self.constant,
            attention_constant=factor * self.attention_constant,
            per_layer=factor * self.per_layer,
            hinges=tuple(factor * value for value in self.hinges),
            saving=replace(self.saving, rate=factor * self.saving.rate),
        )


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Latencies of a space's architectures on one device."""

    space: Space
    ops: OpLatencies
    models: Mapping[Workload, WorkloadModel]
    residuals: Sequence[float]  # pooled, leave-one-out, each over its workload's scale
    memory: Mapping[Workload, MemoryModel] = field(default_factory=dict)  # by prefill workload

    def predict(self, genomes: Genomes, workload: Workload) -> Array:
        """Predicted seconds of each genome: [N]."""
        return self.cost(workload)(genomes)

    def upper(self, genomes: Genomes, workload: Workload, confidence: float) -> Array:
        """Seconds that each genome exceeds with probability at most ``1 - confidence``: [N]."""
        return self.cost(workload, confidence)(genomes)

    def interval(self, genomes: Genomes, workload: Workload, coverage: float) -> tuple[Array, Array]:
        """Seconds between which each genome lies with this probability, evenly on both sides: [N], [N]."""
        mean = self.predict(genomes, workload)
        low, high = np.quantile(self.residuals, [(1 - coverage) / 2, (1 + coverage) / 2])
        spread = self.spread(workload)
        return mean * (1 + low * spread), mean * (1 + high * spread)

    def spread(self, workload: Workload) -> float:
        """The relative spread of a measurement in another run around the prediction."""
        return math.hypot(self.model(workload).scale, RUNS_APART)

    def model(self, workload: Workload) -> WorkloadModel:
        """The model of a workload: fitted, or between those of the lengths around it.

        Raises:
            InputError: the workload is outside what was measured.
        """
        if workload in self.models:
            return self.models[workload]
        low, high, share = self._around(workload, self.models)
        first, second = self.models[low], self.models[high]

        def between(a: float, b: float) -> float:
            return (1 - share) * a + share * b

        # The cache is the same at both lengths; where only one saw it, what it saw.
        seen = max(first.saving, second.saving, key=lambda saving: saving.rate)
        ops = space_ops(self.space)
        seconds = self.ops.seconds([(op, workload) for op in ops])
        return WorkloadModel(
            op_seconds=finite_seconds({op.key: float(value) for op, value in zip(ops, seconds, strict=True)}),
            kinds={kind: between(value, second.kinds[kind]) for kind, value in first.kinds.items()},
            constant=between(first.constant, second.constant),
            attention_constant=between(first.attention_constant, second.attention_constant),
            per_layer=between(first.per_layer, second.per_layer),
            hinges=tuple(between(*pair) for pair in zip(first.hinges, second.hinges, strict=True)),
            saving=replace(seen, rate=between(first.saving.rate, second.saving.rate)),
            scale=max(first.scale, second.scale),
            errors={},
        )

    def _around(
        self, workload: Workload, measured: Mapping[Workload, Any]
    ) -> tuple[Workload, Workload, float]:
        """The measured workloads around one, and its place between their lengths."""
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
        """The peak resident bytes of a session that reads a workload's tokens at once.

        Raises:
            InputError: the workload is outside what was measured.
        """
        if not self.memory:
            raise InputError(
                "rss was not measured on this device; profiling with onnxruntime on Linux measures it, "
                "a kit does not"
            )
        return self.memory_model(workload).cost(self.space, workload, confidence)

    def memory_model(self, workload: Workload) -> MemoryModel:
        """The model of a workload's peak memory: fitted, or between those of the lengths around it.

        Raises:
            InputError: the workload is outside what was measured.
        """
        if workload in self.memory:
            return self.memory[workload]
        low, high, share = self._around(workload, self.memory)
        return self.memory[low].between(self.memory[high], share)

    def cost(self, workload: Workload, confidence: float | None = None) -> Cost:
        """The predicted latency in seconds as an additive cost: the mean, or an upper bound.

        Raises:
            InputError: the workload is outside what was measured.
        """
        model = self.model(workload)
        factor = 1.0 if confidence is None else self.factor(workload, confidence)

        typical, starts = hinge_bytes(self.space, workload)

        def piece(rate: float, free: float, share: float = 1.0) -> Cost:
            """A share of the cost with ``rate`` seconds a byte above ``free`` seconds' worth of them."""

            def seconds(op: Op) -> float:
                alone = model.kinds[op.kind] * model.op_seconds.get(op.key, math.inf)
                return factor * share * (alone + rate * op_held_bytes(op, workload, self.space.config))

            return Cost(
                OpTables(self.space, seconds),
                constant=factor * share * (model.constant - free),
                per_layer=factor * share * model.per_layer,
                attention_constant=factor * share * model.attention_constant,
            )

        rates = [(0.0, 0.0)]  # of bytes, and what is free: one for each stretch between hinges
        for start, hinge in zip(starts, model.hinges, strict=True):
            if hinge > 0:
                rate, free = rates[-1]
                rates.append((rate + hinge / typical, free + hinge / typical * start))
        first, *others = (piece(*pair) for pair in rates)
        plain = replace(first, max_with=tuple(others))
        saving = model.saving
        if not saving.rate:
            return plain
        # Less what is saved: all bytes, or what is left of them; and never more than a share.
        lost = saving.rate * saving.fall
        saved = [(rate - saving.rate, free) for rate, free in rates]
        saved += [(rate + lost, free + lost * saving.gone) for rate, free in rates]
        first, *others = [
            *(piece(*pair) for pair in saved),
            *(piece(*pair, 1 - MOST_SAVED) for pair in rates),
        ]
        return replace(plain, min_with=replace(first, max_with=tuple(others)))

    def recalibrated(
        self, genomes: Genomes, seconds: Mapping[Workload, Array], rss: Mapping[Workload, Array]
    ) -> "Predictor":
        """The predictor after some models [N, G] were measured: seconds [N], and peak bytes [N], by workload.

        Models that a search chose are alike, and what the composition misses of one it misses of the
        others: their mean relative residual moves every prediction, and what is left of the residuals is the
        new spread. Both are shrunk towards what was known before, which counts as much as one measurement.
        """
        models = dict(self.models)
        for workload, measured in seconds.items():
            model = self.model(workload)
            residuals = measured / self.predict(genomes, workload) - 1
            count = len(residuals)
            shift = float(residuals.sum()) / (count + 1)
            squares = float(((residuals - shift) ** 2).sum()) + model.scale**2
            models[workload] = replace(model.times(1 + shift), scale=math.sqrt(squares / (count + 1)))
        memory = dict(self.memory)
        for workload, measured in rss.items():
            predicted = self.memory_cost(workload)(genomes)
            shift = float((measured / predicted - 1).sum()) / (len(measured) + 1)
            memory[workload] = self.memory_model(workload).times(1 + shift)
        return replace(self, models=models, memory=memory)

    def factor(self, workload: Workload, confidence: float) -> float:
        """The factor on the mean that is exceeded with probability at most ``1 - confidence``."""
        return 1.0 + conformal(self.residuals, confidence) * self.spread(workload)

    def identity(self) -> dict[str, Any]:
        """What determines its predictions, as a JSON value: fitted numbers without their errors."""
        models = {str(w): {**_to_json(m), "errors": None} for w, m in self.models.items()}
        memory = {str(w): {**m.to_json(), "errors": None} for w, m in self.memory.items()}
        found = {"space": self.space.hash, "residuals": list(self.residuals), "workloads": models}
        return found | {"memory": memory}

    def save(self, path: Path, inputs: Mapping[str, str]) -> None:
        """Write the predictor."""
        body = {
            "space": self.space.name,
            "residuals": list(self.residuals),
            "workloads": {str(w): _to_json(model) for w, model in self.models.items()},
            "memory": {str(w): model.to_json() for w, model in self.memory.items()},
            "ops": self.ops.to_json(),
        }
        PREDICTOR.write(path, {"space": self.space.hash, **inputs}, body)


def finite_seconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """The finite latencies, by op."""
    return {key: value for key, value in seconds.items() if math.isfinite(value)}


def _to_json(model: WorkloadModel) -> dict[str, Any]:
    return {
        "op_seconds": dict(model.op_seconds),
        "kinds": dict(model.kinds),
        "constant_seconds": model.constant,
        "once_full_seconds": model.attention_constant,
        "per_layer_seconds": model.per_layer,
        "hinge_seconds": list(model.hinges),
        "saving": {
            "full_bytes": model.saving.full,
            "gone_bytes": model.saving.gone,
            "seconds_per_byte": model.saving.rate,
        },
        "relative_scale": model.scale,
        "errors": dict(model.errors),
    }


def _saving(value: Mapping[str, float] | None) -> Saving:
    """A saving of a predictor's file; older ones have none."""
    if value is None:
        return NO_SAVING
    return Saving(value["full_bytes"], value["gone_bytes"], value["seconds_per_byte"])


def load_predictor(path: Path, space: Space, made_by: str) -> Predictor:
    """Read a predictor.

    Raises:
        InputError: it is missing, not whole, or made for another space or other graphs than are written now.
    """
    value = PREDICTOR.read(path, made_by)
    check_inputs(path, value, {"space": space.hash})
    graphs = value["header"]["inputs"].get("graphs", "0")
    if "-onnxruntime-" in path.name and graphs != str(VERSION):
        found = f"fitted to graphs of version {graphs}, this formfit writes {VERSION}"
        raise InputError(f"{path}: {found}; `{made_by}` measures them")
    models = {
        Workload.parse(text): WorkloadModel(
            op_seconds=model["op_seconds"],
            kinds=model["kinds"],
            constant=model["constant_seconds"],
            attention_constant=model["once_full_seconds"],
            per_layer=model["per_layer_seconds"],
            hinges=tuple(model["hinge_seconds"]),
            saving=_saving(model.get("saving")),
            scale=model["relative_scale"],
            errors=model["errors"],
        )
        for text, model in value["workloads"].items()
    }
    ops = OpLatencies.from_json(space.config, value["ops"])
    memory = {Workload.parse(text): MemoryModel.from_json(item) for text, item in value["memory"].items()}
    return Predictor(space=space, ops=ops, models=models, residuals=value["residuals"], memory=memory)
