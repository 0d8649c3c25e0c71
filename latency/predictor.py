"""Predicting a model's latency from the latencies of its ops.

``T = c0 + s * [has full attention] + sum over kinds k of a_k * (op latencies of kind k) + b * depth``,
a linear model with the prior a_k ~ N(1, 0.1), all coefficients >= 0, relative error; fitted on about
twenty whole models. ``s`` is what the full-attention layers of a model compute once together (their
places and lengths); its prior is the intercept of their stacks.

The upper bound multiplies the mean by one factor a workload, the conformal quantile of
leave-one-out relative residuals (Vovk, Gammerman and Shafer 2005) pooled over workloads, so
that it is monotone in the mean and limits on it stay additive.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear
from scipy.stats import spearmanr

from space import InputError, Space, Workload
from space.cost import flops_table, params_cost
from space.files import check_inputs, read_json, write_json
from space.genome import Genomes
from space.ops import Cost, Op, OpTables, depths, has_full, op_kinds

KIND = "latency predictor"
PRIOR_SPREAD = 0.1  # of a_k around 1
SHARED_SPREAD = 0.5  # of s around the measured intercept, as a share of it
OVERHEAD_SPREAD = 0.05  # of c0 and depth * b, as a share of the median latency
LEAST_NOISE = 0.005  # relative; below what any timing here repeats to
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class WorkloadModel:
    """What was fitted for one workload; times in seconds."""

    op_seconds: Mapping[str, float]  # by op key
    kinds: Mapping[str, float]  # a_k
    constant: float  # c0
    once_full: float  # s
    per_layer: float  # b
    scale: float  # spread of the relative residuals
    errors: Mapping[str, Any]  # see `accuracy`


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Latencies of a space's architectures on one device."""

    space: Space
    models: Mapping[Workload, WorkloadModel]
    residuals: Sequence[float]  # pooled, leave-one-out, each over its workload's scale

    def cost(self, workload: Workload, confidence: float | None = None) -> Cost:
        """The predicted latency in seconds as an additive cost: the mean, or an upper bound.

        Raises:
            InputError: the workload was not measured.
        """
        model = self.models.get(workload)
        if model is None:
            known = ", ".join(map(str, self.models))
            options = " ".join(f"--workload {w}" for w in [*self.models, workload])
            raise InputError(
                f"workload {workload}: not measured on this device (measured: {known}); "
                f"`formfit profile --space SPACE --device NAME {options}` measures it too"
            )
        factor = 1.0 if confidence is None else self.factor(workload, confidence)

        def seconds(op: Op) -> float:
            return factor * model.kinds[op.kind] * model.op_seconds[op.key]

        return Cost(
            OpTables(self.space, seconds),
            constant=factor * model.constant,
            per_layer=factor * model.per_layer,
            once_full=factor * model.once_full,
        )

    def factor(self, workload: Workload, confidence: float) -> float:
        """The factor on the mean that is exceeded with probability at most ``1 - confidence``."""
        ordered = np.sort(self.residuals)
        rank = min(math.ceil((len(ordered) + 1) * confidence), len(ordered))
        return 1.0 + max(0.0, float(ordered[rank - 1])) * self.models[workload].scale

    def identity(self) -> dict[str, Any]:
        """What determines its predictions, as a JSON value: fitted numbers without their errors."""
        models = {str(w): {**_to_json(m), "errors": None} for w, m in self.models.items()}
        return {"space": self.space.hash, "residuals": list(self.residuals), "workloads": models}

    def save(self, path: Path, inputs: Mapping[str, str]) -> None:
        """Write the predictor."""
        body = {
            "space": self.space.name,
            "residuals": list(self.residuals),
            "workloads": {str(w): _to_json(model) for w, model in self.models.items()},
        }
        write_json(path, KIND, {"space": self.space.hash, **inputs}, body)


def _to_json(model: WorkloadModel) -> dict[str, Any]:
    return {
        "op_seconds": dict(model.op_seconds),
        "kinds": dict(model.kinds),
        "constant_seconds": model.constant,
        "once_full_seconds": model.once_full,
        "per_layer_seconds": model.per_layer,
        "relative_scale": model.scale,
        "errors": dict(model.errors),
    }


def load_predictor(path: Path, space: Space, made_by: str) -> Predictor:
    """Read a predictor.

    Raises:
        InputError: it is missing, not whole, or made for another space.
    """
    value = read_json(path, KIND, made_by)
    check_inputs(path, value, {"space": space.hash})
    models = {
        Workload.parse(text): WorkloadModel(
            op_seconds=model["op_seconds"],
            kinds=model["kinds"],
            constant=model["constant_seconds"],
            once_full=model["once_full_seconds"],
            per_layer=model["per_layer_seconds"],
            scale=model["relative_scale"],
            errors=model["errors"],
        )
        for text, model in value["workloads"].items()
    }
    return Predictor(space=space, models=models, residuals=value["residuals"])


@dataclass(frozen=True)
class Composition:
    """The coefficients of one workload: c0, s over its prior, a_k in the order of `op_kinds`, b."""

    coefficients: Array

    def __call__(self, design: Array) -> Array:
        """Predicted seconds of rows of a design matrix: [N]."""
        return np.asarray(design @ self.coefficients)


@dataclass(frozen=True)
class OpLatencies:
    """What op measurements say of one workload, seconds."""

    by_key: Mapping[str, float]
    shared: float = 0.0  # by full-attention layers, once a model


def design_matrix(space: Space, ops: OpLatencies, genomes: Genomes) -> Array:
    """Rows (1, shared where there is full attention, op latency by kind, depth): [N, 3 + kinds]."""
    sums = op_sums(space, ops, genomes)
    shared = ops.shared * has_full(space, genomes)
    return np.column_stack([np.ones(len(genomes)), shared, sums, depths(genomes)])


def op_sums(space: Space, ops: OpLatencies, genomes: Genomes) -> Array:
    """Op latencies summed by kind: [N, kinds]."""
    return OpTables(space, lambda op: ops.by_key[op.key]).by_kind(genomes)


def fit_composition(design: Array, seconds: Array) -> Composition:
    """The maximum a posteriori coefficients under relative error, none below 0."""
    kinds = design.shape[1] - 3
    typical = float(np.median(seconds))
    depth = float(np.median(design[:, -1]))
    mean = np.concatenate([[0.0, 1.0], np.ones(kinds), [0.0]])
    overhead = OVERHEAD_SPREAD * typical
    ends = [overhead / max(depth, 1.0)]
    spread = np.concatenate([[overhead, SHARED_SPREAD], np.full(kinds, PRIOR_SPREAD), ends])
    noise = 0.02
    coefficients = mean
    for _ in range(4):  # the noise and the coefficients in turn
        rows = np.vstack([design / seconds[:, None] / noise, np.diag(1 / spread)])
        target = np.concatenate([np.full(len(seconds), 1 / noise), mean / spread])
        scaled = lsq_linear(rows * spread, target, bounds=(0, np.inf), method="bvls")
        coefficients = scaled.x * spread
        residuals = design @ coefficients / seconds - 1
        noise = max(LEAST_NOISE, float(np.sqrt(np.mean(residuals**2))))
    return Composition(coefficients)


def leave_one_out(design: Array, seconds: Array) -> Array:
    """Relative residuals, measured over predicted minus 1, each from a fit without its row."""
    keep = ~np.eye(len(seconds), dtype=bool)
    fits = (fit_composition(design[rows], seconds[rows]) for rows in keep)
    predicted = np.array([fit(row[None])[0] for fit, row in zip(fits, design, strict=True)])
    return np.asarray(seconds / predicted - 1)


def accuracy(predicted: Array, measured: Array) -> dict[str, float]:
    """How well predictions hold: MAPE, shares within 5% and 10%, rank correlation, spread."""
    relative = np.abs(predicted / measured - 1)
    return {
        "models": len(measured),
        "mape_percent": 100 * float(relative.mean()),
        "worst_percent": 100 * float(relative.max()),
        "within_5_percent": float((relative <= 0.05).mean()),
        "within_10_percent": float((relative <= 0.10).mean()),
        "spearman": float(spearmanr(predicted, measured).statistic) if len(measured) > 2 else math.nan,
        "span": float(measured.max() / measured.min()),
    }


def proxy_predictions(
    space: Space, workload: Workload, fitted: Genomes, seconds: Array, genomes: Genomes
) -> Array:
    """What a linear fit on FLOPs and parameters, from the same whole models, says of others."""
    flops, params = flops_table(space, workload), params_cost(space)

    def features(rows: Genomes) -> Array:
        return np.column_stack([np.ones(len(rows)), flops.totals(rows), params(rows)])

    known = features(fitted)
    scale = np.abs(known).max(axis=0)
    solution = np.linalg.lstsq(known / scale / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    return np.asarray(features(genomes) / scale @ solution)


def fit_predictor(
    space: Space,
    latencies: Mapping[Workload, OpLatencies],
    fitted: Genomes,
    seconds: Mapping[Workload, Array],
    held_out: Genomes,
    held_out_seconds: Mapping[Workload, Array],
    repeat_error: Mapping[Workload, float],
) -> Predictor:
    """Fit every workload and test it on whole models that no fit saw."""
    models, residuals = {}, []
    for workload, ops in latencies.items():
        design = design_matrix(space, ops, fitted)
        left_out = leave_one_out(design, seconds[workload])
        scale = max(LEAST_NOISE, float(np.sqrt(np.mean(left_out**2))))
        residuals += list(left_out / scale)
        coefficients = fit_composition(design, seconds[workload]).coefficients
        errors: dict[str, Any] = {"leave_one_out_mape_percent": 100 * float(np.abs(left_out).mean())}
        if len(held_out):
            measured = held_out_seconds[workload]
            predicted = design_matrix(space, ops, held_out) @ coefficients
            proxy = proxy_predictions(space, workload, fitted, seconds[workload], held_out)
            plain = op_sums(space, ops, held_out).sum(axis=1)
            errors |= {
                "held_out": accuracy(predicted, measured),
                "plain_sum": accuracy(plain, measured),
                "flops_and_params": accuracy(proxy, measured),
                "repeat_mape_percent": repeat_error[workload],
            }
        models[workload] = WorkloadModel(
            op_seconds=dict(ops.by_key),
            kinds=dict(zip(op_kinds(space), map(float, coefficients[2:-1]), strict=True)),
            constant=float(coefficients[0]),
            once_full=float(coefficients[1]) * ops.shared,
            per_layer=float(coefficients[-1]),
            scale=scale,
            errors=errors,
        )
    return Predictor(space=space, models=models, residuals=[float(r) for r in residuals])
