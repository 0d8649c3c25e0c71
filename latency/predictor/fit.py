"""Fitting a predictor to measured ops and models."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from latency.predictor.composition import (
    LEAST_NOISE,
    OpTimes,
    design_matrix,
    fit_composition,
    fit_saving,
    held_bytes,
    leave_one_out,
    op_sums,
)
from latency.predictor.op_latencies import OpLatencies
from latency.predictor.predictor import Array, Predictor, WorkloadModel, finite_seconds
from space import Space, Workload
from space.cost import flops_table, params_cost
from space.genome import Genomes
from space.ops import op_kinds


def accuracy(predicted: Array, measured: Array) -> dict[str, float | None]:
    """How well predictions hold: MAPE, shares within 5% and 10%, rank correlation, spread."""
    relative = np.abs(predicted / measured - 1)
    return {
        "models": len(measured),
        "mape_percent": 100 * float(relative.mean()),
        "worst_percent": 100 * float(relative.max()),
        "within_5_percent": float((relative <= 0.05).mean()),
        "within_10_percent": float((relative <= 0.10).mean()),
        "spearman": float(spearmanr(predicted, measured).statistic) if len(measured) > 2 else None,
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
    ops: OpLatencies,
    latencies: Mapping[Workload, OpTimes],
    fitted: Genomes,
    seconds: Mapping[Workload, Array],
    timing: Mapping[Workload, Array],
    held_out: Genomes,
    held_out_seconds: Mapping[Workload, Array],
    repeat_error: Mapping[Workload, float | None],
    drawn: int,
) -> Predictor:
    """Fit every workload and test it on whole models that no fit saw.

    ``timing`` are relative standard deviations of the ``seconds``. The last ``drawn`` of the fitted were
    drawn at random; the others were chosen to be unlike each other, and the residuals of extremes would say
    that all predictions are bad. So intervals come from the drawn ones.
    """
    models, residuals = {}, []
    for workload, times in latencies.items():
        design, held = design_matrix(space, times, fitted), held_bytes(space, workload, fitted)
        shape = fit_saving(design, held, seconds[workload], timing[workload])
        saved = shape.saved(held)
        left_out = leave_one_out(design, seconds[workload], timing[workload], saved)
        # The median, which no extreme moves; 1.48 times it is a normal's standard deviation.
        scale = max(LEAST_NOISE, 1.4826 * float(np.median(np.abs(left_out))))
        residuals += list(left_out[-drawn:] / scale)
        composed = fit_composition(design, seconds[workload], timing[workload], saved)
        errors: dict[str, Any] = {"leave_one_out_mape_percent": 100 * float(np.abs(left_out).mean())}
        if len(held_out):
            measured = held_out_seconds[workload]
            kept = shape.saved(held_bytes(space, workload, held_out))
            predicted = composed(design_matrix(space, times, held_out), kept)
            proxy = proxy_predictions(space, workload, fitted, seconds[workload], held_out)
            plain = op_sums(space, times, held_out).sum(axis=1)
            errors |= {
                "held_out": accuracy(predicted, measured),
                "plain_sum": accuracy(plain, measured),
                "flops_and_params": accuracy(proxy, measured),
                "repeatability_mape_percent": repeat_error[workload],
            }
        models[workload] = WorkloadModel(
            op_seconds=finite_seconds(times.by_key),
            kinds=dict(zip(op_kinds(space), composed.kinds, strict=True)),
            constant=composed.constant,
            attention_constant=composed.shared * times.shared,
            per_layer=composed.per_layer,
            hinges=tuple(composed.hinges),
            saving=replace(shape, rate=composed.rate),
            scale=scale,
            errors=errors,
        )
    return Predictor(space=space, ops=ops, models=models, residuals=[float(r) for r in residuals])
