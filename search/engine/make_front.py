"""A search's front, made of the tables of its evaluations."""

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from search.engine.choice import BoundedLimit, LatencyPrediction, Prediction
from search.engine.config import SearchConfig
from search.engine.front import FailedEvaluation, Front, Member, SurrogateAgreement
from search.problem.metric import BUILTIN_METRICS
from search.problem.problem import Problem
from search.strategies.strategy import ScoreAgreement
from space import Architecture, genome
from space.cost import params_cost
from space.ops import Cost


def make_front(
    problem: Problem,
    config: SearchConfig,
    members: pd.DataFrame,
    evaluated: pd.DataFrame,
    failed: pd.DataFrame,
    inputs: Mapping[str, str],
    agreement: Mapping[str, ScoreAgreement],
) -> Front:
    """The front of a search; nothing in it depends on time or on the workers that evaluated.

    Args:
        problem: what was searched.
        config: of the search.
        members: the non-dominated evaluations, sorted by the objectives.
        evaluated: all evaluations, a row each.
        failed: those that failed, in a generation or a re-evaluation.
        inputs: sha256 of what the search was made from, by name.
        agreement: of the strategy's scores of blocks with the evaluations, by quality.
    """
    return Front(
        space=problem.space.name,
        objectives=problem.names,
        strategy=config.strategy,
        confidence=config.confidence,
        seed=config.seed,
        evaluations=len(evaluated),
        failed=tuple(
            FailedEvaluation(key=key, reason=reason)
            for key, reason in zip(failed["key"], failed["failed"], strict=True)
        ),
        surrogate=surrogate_agreement(evaluated, problem.qualities),
        limits=tuple(
            BoundedLimit(text=c.limit.text, bound=c.bound, unit=c.limit.metric.unit.name)
            for c in problem.constraints()
        ),
        picks=picks(members, problem),
        members=tuple(_member(problem, row) for row in members.to_dict("records")),
        inputs=inputs,
        scores=agreement,
    )


def _member(problem: Problem, row: Mapping[Hashable, Any]) -> Member:
    architecture = Architecture.from_json(json.loads(row["architecture"]))
    values = {name: float(row[name]) for name in problem.qualities}
    return Member(
        architecture=architecture,
        qualities={name: None if math.isnan(value) else value for name, value in values.items()},
        predicted=predictions(problem, architecture),
    )


def surrogate_agreement(evaluated: pd.DataFrame, qualities: Sequence[str]) -> dict[str, SurrogateAgreement]:
    """Agreement of the surrogate's predictions with the evaluations that followed, by quality.

    Args:
        evaluated: evaluations, with a column ``predicted_QUALITY`` where a surrogate predicted.
        qualities: names of the qualities.
    """
    agreement = {}
    for name in qualities:
        if f"predicted_{name}" in evaluated:
            pairs = evaluated[evaluated[f"predicted_{name}"].notna() & evaluated[name].notna()]
            if len(pairs) > 2:
                rho = float(spearmanr(pairs[f"predicted_{name}"], pairs[name]).statistic)
                agreement[name] = SurrogateAgreement(evaluations=len(pairs), spearman=rho)
    return agreement


def predictions(problem: Problem, architecture: Architecture) -> Prediction:
    """Predicted costs of an architecture: parameters, and the latency of every workload by device.

    The workloads are those that were profiled and those that limits name.

    Args:
        problem: its space, devices and limits.
        architecture: a member of the space.
    """
    row = genome.encode(problem.space, [architecture])
    latency = {}
    for device, predictor in problem.predictors.items():
        limited = [limit.workload for limit in problem.limits if problem.timed_device(limit) == device]
        latency[device] = {
            str(w): LatencyPrediction(
                latency_ms=1e3 * float(predictor.cost(w)(row)[0]),
                upper_ms=1e3 * float(predictor.cost(w, problem.confidence)(row)[0]),
            )
            for w in dict.fromkeys([*predictor.models, *filter(None, limited)])
        }
    return Prediction(
        params=int(params_cost(problem.space)(row)[0]),
        latency=latency,
        costs={text: float(cost(row)[0]) for text, cost in _registered_costs(problem).items()},
    )


def _registered_costs(problem: Problem) -> dict[str, Cost]:
    """The costs of metrics of plug-ins, by the text of the objective or the subject of the limit."""
    costs = {
        limit.subject: problem.limit_cost(limit, problem.predictors, None)
        for limit in problem.limits
        if limit.metric.name not in BUILTIN_METRICS
    }
    for objective in problem.objectives:
        cost = problem.objective_cost(objective)
        if cost is not None and objective.metric and objective.metric.name not in BUILTIN_METRICS:
            costs[objective.text] = cost
    return costs


def picks(members: pd.DataFrame, problem: Problem) -> dict[str, str]:
    """The keys of three members: ``best`` in quality, ``fastest`` in cost, and the ``knee`` between.

    The knee lies farthest below the line between the other two, on axes scaled to the front.

    Args:
        members: the front, with a column for every objective.
        problem: the first quality and the first cost among its objectives count.
    """
    quality = next(o.text for o in problem.objectives if o.is_quality)
    costs = [o.text for o in problem.objectives if not o.is_quality]
    cost = costs[0] if costs else quality
    values = members[[cost, quality]].to_numpy(float)
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1)
    keys = list(members["key"])
    return {
        "best": keys[int(values[:, 1].argmin())],
        "knee": keys[int(scaled.sum(axis=1).argmin())],
        "fastest": keys[int(values[:, 0].argmin())],
    }
