"""The front of a search as a record."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from search.problem.problem import QUALITIES, Problem
from space import Architecture, InputError, genome
from space.cost import params_cost
from space.io.artefact import Artefact

FRONT = Artefact("front", "formfit search", schema=2)


def surrogate_agreement(table: pd.DataFrame) -> dict[str, Any]:
    """How the qualities that a surrogate predicted rank beside those found afterwards, by quality."""
    found = {}
    for name in QUALITIES:
        if f"predicted_{name}" in table:
            some = table[table[f"predicted_{name}"].notna() & table[name].notna()]
            if len(some) > 2:
                rho = float(spearmanr(some[f"predicted_{name}"], some[name]).statistic)
                found[name] = {"evaluations": len(some), "spearman": rho}
    return found


def predictions(problem: Problem, architecture: Architecture) -> dict[str, Any]:
    """What is predicted of an architecture: parameters, and by device the latency of every workload.

    Those that were profiled, and those that limits ask for.
    """
    row = genome.encode(problem.space, [architecture])
    latency = {}
    for device, predictor in problem.predictors.items():
        asked = [limit.workload for limit in problem.limits if problem.timed(limit) == device]
        latency[device] = {
            str(w): {
                "latency_ms": 1e3 * float(predictor.cost(w)(row)[0]),
                "upper_ms": 1e3 * float(predictor.cost(w, problem.confidence)(row)[0]),
            }
            for w in dict.fromkeys([*predictor.models, *filter(None, asked)])
        }
    return {"params": int(params_cost(problem.space)(row)[0]), "latency": latency}


def picks(front: pd.DataFrame, objectives: Sequence[str]) -> dict[str, str]:
    """The keys of three members: ``best`` in quality, ``fastest`` in cost, and the ``knee`` between.

    The knee lies farthest below the line between the other two, on axes scaled to the front.
    """
    quality = next(name for name in objectives if name in QUALITIES)
    costs = [name for name in objectives if name not in QUALITIES]
    cost = costs[0] if costs else quality
    values = front[[cost, quality]].to_numpy(float)
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1)
    keys = list(front["key"])
    return {
        "best": keys[int(values[:, 1].argmin())],
        "knee": keys[int(scaled.sum(axis=1).argmin())],
        "fastest": keys[int(values[:, 0].argmin())],
    }


def pick_key(front: Mapping[str, Any], pick: str) -> str:
    """The key of a front's member by name (``best``, ``knee``, ``fastest``) or by key.

    Raises:
        InputError: there is no such member.
    """
    keys = [m["key"] for m in front["members"]]
    key = front["picks"].get(pick, pick)
    if key not in keys:
        raise InputError(f"pick {pick!r}: not one of {', '.join(front['picks'])}, nor a key of the front")
    return str(key)


def member_choice(front: Mapping[str, Any], member: Mapping[str, Any]) -> dict[str, Any]:
    """What a front's member was chosen under, to be kept beside its sub-model."""
    return {
        "limits": front["limits"],
        "confidence": front["confidence"],
        "predicted": member["predicted"],
        "loss_nats": member["loss_nats"],
    }
