"""Fitting a predictor to measured ops and models."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from latency.predictor.accuracy import HeldOutErrors, PredictorErrors, accuracy
from latency.predictor.composition import (
    MIN_NOISE,
    Composition,
    OpTimes,
    Saving,
    design_matrix,
    fit_composition,
    fit_saving,
    held_bytes,
    leave_one_out,
    op_sums,
)
from latency.predictor.op_latencies import OpLatencies
from latency.predictor.predictor import Predictor
from latency.predictor.workload_model import WorkloadModel, finite_seconds
from space import Space, Workload
from space.cost import flops_table, params_cost
from space.genome import Genomes
from space.ops import op_kinds

Array = NDArray[np.float64]
MAD_TO_STD = 1.4826  # ratio of a normal's standard deviation to its median absolute deviation


@dataclass(frozen=True, kw_only=True)
class MeasuredModels:
    """Whole models that were measured.

    Attributes:
        genomes: the models: [N, G].
        seconds: latency of each by workload: [N].
        spread: relative standard deviation of each timing by workload: [N]; needed of models to fit on.
        drawn: number of models, at the end, that were drawn at random rather than chosen.
    """

    genomes: Genomes
    seconds: Mapping[Workload, Array]
    spread: Mapping[Workload, Array] = field(default_factory=dict)
    drawn: int = 0


def proxy_predictions(
    space: Space, workload: Workload, fitted: Genomes, seconds: Array, genomes: Genomes
) -> Array:
    """Latencies predicted by a linear fit on FLOPs and parameters, a baseline.

    Args:
        space: the space.
        workload: the workload.
        fitted: models that the baseline is fitted to: [N, G].
        seconds: their latencies: [N].
        genomes: models to predict: [M, G].

    Returns:
        Seconds: [M].
    """
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
    fitted: MeasuredModels,
    held_out: MeasuredModels,
    repeatability: Mapping[Workload, float | None],
) -> Predictor:
    """Fit a predictor of every workload, and test it on models that no fit used.

    Intervals come from the models that were drawn at random. The others were chosen to be unlike each other,
    and the residuals of extremes would overestimate the error of a typical model.

    Args:
        space: the space.
        ops: fitted op latencies, for lengths between the workloads.
        latencies: latencies of all ops, by workload.
        fitted: models to fit on.
        held_out: models to test on; may be empty.
        repeatability: mean relative difference between two measurements of a model by workload, percent; None
            if it is unknown.
    """
    models: dict[Workload, WorkloadModel] = {}
    residuals: list[float] = []
    for workload, times in latencies.items():
        seconds, spread = fitted.seconds[workload], fitted.spread[workload]
        design = design_matrix(space, times, fitted.genomes)
        held = held_bytes(space, workload, fitted.genomes)
        saving = fit_saving(design, held, seconds, spread)
        saved = saving.saved(held)
        left_out = leave_one_out(design, seconds, spread, saved)
        # A robust standard deviation: an extreme model must not widen the intervals of all others.
        scale = max(MIN_NOISE, MAD_TO_STD * float(np.median(np.abs(left_out))))
        residuals += list(left_out[-fitted.drawn :] / scale)
        composed = fit_composition(design, seconds, spread, saved)
        tested = None
        if len(held_out.genomes):
            tested = _tested(space, times, composed, saving, fitted, held_out, repeatability[workload])
        models[workload] = WorkloadModel(
            op_seconds=finite_seconds(times.by_key),
            kinds=dict(zip(op_kinds(space), composed.kinds, strict=True)),
            constant=composed.constant,
            attention_constant=composed.attention_factor * times.attention_constant,
            per_layer=composed.per_layer,
            hinges=tuple(composed.hinges),
            saving=replace(saving, rate=composed.rate),
            scale=scale,
            errors=PredictorErrors(
                leave_one_out_mape_percent=100 * float(np.abs(left_out).mean()), test=tested
            ),
        )
    return Predictor(space=space, ops=ops, models=models, residuals=[float(r) for r in residuals])


def _tested(
    space: Space,
    times: OpTimes,
    composed: Composition,
    saving: Saving,
    fitted: MeasuredModels,
    held_out: MeasuredModels,
    repeatability: float | None,
) -> HeldOutErrors:
    """Accuracy of a composition and of two baselines on held-out models."""
    workload = times.workload
    measured = held_out.seconds[workload]
    saved = saving.saved(held_bytes(space, workload, held_out.genomes))
    predicted = composed(design_matrix(space, times, held_out.genomes), saved)
    proxy = proxy_predictions(space, workload, fitted.genomes, fitted.seconds[workload], held_out.genomes)
    plain = op_sums(space, times, held_out.genomes).sum(axis=1)
    return HeldOutErrors(
        held_out=accuracy(predicted, measured),
        plain_sum=accuracy(plain, measured),
        flops_and_params=accuracy(proxy, measured),
        repeatability_mape_percent=repeatability,
    )
