"""Fitting a predictor to measured models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from latency.predictor.accuracy import HeldOutErrors, PredictorErrors, accuracy
from latency.predictor.bounds import between_groups, fit_spread
from latency.predictor.op_latencies import OpLatencies, TimedModel, fit_op_latencies
from latency.predictor.predictor import Predictor, workload_model
from space import Architecture, Space, Workload, genome
from space.cost import flops_table, params_cost
from space.genome import Genomes

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class HeldOutModels:
    """Whole models that no fit used.

    Attributes:
        architectures: the models: N of them; may be none.
        seconds: latency of each by workload: [N].
        repeatability: mean relative difference between two measurements of a model by workload, percent; None
            if it is unknown.
    """

    architectures: Sequence[Architecture]
    seconds: Mapping[Workload, Array]
    repeatability: Mapping[Workload, float | None]


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
    workloads: Sequence[Workload],
    timed: Sequence[TimedModel],
    roles: Mapping[str, str],
    held_out: HeldOutModels,
    source: OpLatencies | None = None,
) -> Predictor:
    """Fit a predictor, and test it on models that no fit used.

    Bounds come from the models that were drawn at random. The others were chosen to be unlike each other, and
    the residuals of extremes would overestimate the error of a typical model.

    Args:
        space: the space.
        workloads: workloads of the predictor.
        timed: models to fit on, of this space or of others with its model configuration.
        roles: role of each model of this space, by key; ``random`` for those that were drawn.
        held_out: models to test on.
        source: op latencies of a known device, as a prior.
    """
    ops = fit_op_latencies(space, timed, source)
    left_out: dict[str, Array] = {phase: model.left_out()[0] for phase, model in ops.models.items()}
    models, residuals = {}, []
    for workload in workloads:
        rows = [item for item in timed if item.workload.phase == workload.phase]
        relative = {
            item.architecture.key: (item, float(np.exp(off) - 1))
            for item, off in zip(rows, left_out[workload.phase], strict=True)
            if item.workload == workload
        }
        measured = np.array([item.seconds for item, _ in relative.values()])
        off = np.array([value for _, value in relative.values()])
        random = [i for i, key in enumerate(relative) if roles.get(key) == "random"] or list(range(len(off)))
        predicted = measured / (1 + off)
        spread = fit_spread(predicted[random], measured[random])
        residuals += ((measured - predicted) / spread.at(predicted))[random].tolist()
        between = between_groups(off, [item.group for item, _ in relative.values()])
        models[workload] = replace(
            workload_model(space, ops, workload, spread, between, spreads=True),
            errors=PredictorErrors(leave_one_out_mape_percent=100 * float(np.abs(off).mean())),
        )
    predictor = Predictor(space=space, ops=ops, models=models, residuals=residuals)
    if not held_out.architectures:
        return predictor
    tested = {
        w: _tested(predictor, w, [t for t in timed if t.architecture.key in roles], held_out)
        for w in workloads
    }
    return replace(
        predictor,
        models={
            w: replace(model, errors=replace(model.errors, test=tested[w]))
            for w, model in models.items()
            if model.errors is not None
        },
    )


def _tested(
    predictor: Predictor, workload: Workload, timed: Sequence[TimedModel], held_out: HeldOutModels
) -> HeldOutErrors:
    """Accuracy of a predictor and of a baseline on held-out models."""
    space = predictor.space
    measured, rows = held_out.seconds[workload], genome.encode(space, held_out.architectures)
    known = [item for item in timed if item.workload == workload]
    proxy = proxy_predictions(
        space,
        workload,
        genome.encode(space, [item.architecture for item in known]),
        np.array([item.seconds for item in known]),
        rows,
    )
    return HeldOutErrors(
        held_out=accuracy(predictor.predict(rows, workload), measured),
        flops_and_params=accuracy(proxy, measured),
        repeatability_mape_percent=held_out.repeatability[workload],
    )
