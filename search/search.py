"""The search: from a supernet, predictors and limits to a front of architectures.

The driver owns the algorithm. What generation g evaluates is a function of the seed, g and
the record so far, so that a search that was killed goes on as if it had not been, and gives
the same ``front.json``, byte for byte, with any number of workers.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from latency import Predictor
from search import evolution
from search.evaluators import Evaluator
from search.feasibility import Bounded, certify, feasible
from search.limits import Limit, check_limits
from search.record import Record, genomes_of, open_study, project
from space import Architecture, InputError, Space, Workload, genome
from space.cost import memory_cost, params_cost
from space.files import canonical_json, digest, write_json
from space.genome import Genomes
from space.ops import Cost
from supernet import Quality

QUALITIES = ("loss", "recall_loss")
FRONT_KIND = "front"
FRONT_LIMIT = 32  # architectures evaluated again on more tokens
Report = Callable[[int, int, str], None]  # evaluations done, evaluations in all, what is known


class SearchConfig(BaseModel):
    """How to search."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limits: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()  # none: loss and the latency of the first workload
    generations: Annotated[int, Field(gt=0)] = 12
    population: Annotated[int, Field(gt=1)] = 24
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.975
    windows: Annotated[int, Field(gt=0)] = 24
    front_windows: Annotated[int, Field(gt=0)] = 96
    workers: Annotated[int, Field(ge=0)] = 2
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Problem:
    """What is searched: a space, the predictors of one or more devices, objectives and limits."""

    space: Space
    predictors: Mapping[str, Predictor]  # by device; the first is meant where none is named
    objectives: tuple[str, ...]
    limits: tuple[Limit, ...]
    confidence: float

    def predictor(self, device: str | None) -> Predictor:
        """The predictor of a device.

        Raises:
            InputError: that device is not among those given.
        """
        name = device or next(iter(self.predictors))
        if name not in self.predictors:
            raise InputError(f"device {name}: not among those given ({', '.join(self.predictors)})")
        return self.predictors[name]

    def timed(self, limit: Limit) -> str | None:
        """The device whose latency a limit bears on."""
        if limit.metric not in ("prefill", "decode"):
            return None
        return limit.device or next(iter(self.predictors))

    def cost(self, limit: Limit, confidence: float | None) -> Cost:
        """What a limit bears on."""
        if limit.workload is not None and limit.metric in ("prefill", "decode"):
            return self.predictor(limit.device).cost(limit.workload, confidence)
        if limit.workload is not None and limit.metric == "rss":
            return self.predictor(limit.device).memory_cost(limit.workload, confidence)
        if limit.workload is not None:
            return memory_cost(self.space, limit.workload)
        return params_cost(self.space)

    def bounded(self) -> list[Bounded]:
        """The limits in absolute terms; percentages are of the largest architecture's prediction."""
        top = genome.encode(self.space, [genome.largest(self.space)])
        found = []
        for limit in self.limits:
            reference = float(self.cost(limit, None)(top)[0])
            if limit.relative and not math.isfinite(reference):
                raise InputError(
                    f"limit {limit.text!r}: the device cannot run the largest architecture; give it in units"
                )
            found.append(Bounded(limit, self.cost(limit, self.confidence), limit.resolve(reference)))
        return found

    def objective_cost(self, name: str) -> Cost | None:
        """The cost behind an objective; None for a quality, which has to be evaluated.

        Raises:
            InputError: there is no such objective.
        """
        if name in QUALITIES:
            return None
        metric, _, workload = name.partition(":")
        if metric == "latency" and workload:
            return self.predictor(None).cost(Workload.parse(workload))
        if metric == "memory" and workload:
            return memory_cost(self.space, Workload.parse(workload))
        if metric == "rss" and workload:
            return self.predictor(None).memory_cost(Workload.parse(workload))
        if name == "params":
            return params_cost(self.space)
        allowed = ", ".join([*QUALITIES, "latency:WORKLOAD", "memory:WORKLOAD", "rss:WORKLOAD", "params"])
        raise InputError(f"objective {name!r}: not one of {allowed}")


def make_problem(space: Space, predictors: Mapping[str, Predictor], config: SearchConfig) -> Problem:
    """The problem that a configuration states.

    Raises:
        InputError: a malformed or contradictory limit, an unknown objective or workload.
    """
    limits = tuple(Limit.parse(text) for text in config.limits)
    check_limits(limits)
    workload = next(iter(next(iter(predictors.values())).models))
    objectives = config.objectives or ("loss", f"latency:{workload}")
    problem = Problem(space, predictors, objectives, limits, config.confidence)
    if len(set(objectives)) < len(objectives):
        raise InputError(f"objectives: {', '.join(objectives)} names one twice")
    if not set(objectives) & set(QUALITIES):
        raise InputError(f"objectives: one of {', '.join(QUALITIES)} must be among {', '.join(objectives)}")
    for name in objectives:
        problem.objective_cost(name)
    problem.bounded()
    return problem


class Search:
    """One search over a problem, kept in a folder."""

    def __init__(
        self, problem: Problem, config: SearchConfig, folder: Path, inputs: Mapping[str, str]
    ) -> None:
        self.problem, self.config, self.folder = problem, config, folder
        self.inputs = {**inputs, "search": search_digest(problem, config)}
        self.record = Record(folder, self.inputs)
        self.bounded = problem.bounded()
        self.costs = {name: problem.objective_cost(name) for name in problem.objectives}

    def violations(self, genomes: Genomes) -> NDArray[np.float64]:
        """By how much genomes break the limits, as a sum of shares of the bounds: [N]."""
        total = np.zeros(len(genomes))
        for item in self.bounded:
            total += np.maximum(0.0, item.cost(genomes) / item.bound - 1)
        for predictor in self.problem.predictors.values():
            total[~np.isfinite(predictor.predict(genomes, next(iter(predictor.models))))] = np.inf
        return total

    def check(self) -> None:
        """Refuse limits that cannot be met.

        Raises:
            LimitError: names them, with the least that is possible and the architecture that has it.
        """
        certify(self.problem.space, self.bounded)

    def run(self, evaluate: Evaluator, report: Report | None = None) -> dict[str, Any]:
        """Search to the last generation, from the record if there is one, and write ``front.json``.

        Raises:
            LimitError: the limits cannot be met; names them, with what is possible.
            InputError: the record belongs to a search with other inputs.
        """
        self.check()
        config = self.config
        study = open_study(self.folder / "study.log", self.folder.name, self.problem.objectives)
        table = pd.DataFrame()
        total = config.generations * config.population
        for generation in range(config.generations):
            part = self.record.read(f"{generation:04d}")
            if part is None:
                part = self._evaluate(
                    self._propose(generation, table), evaluate, "search", generation, report, total
                )
                self.record.write(f"{generation:04d}", part)
            table = pd.concat([table, part], ignore_index=True)
            project(study, self.problem.space, table, self.problem.objectives)
        front = self._rescore(table, evaluate, report)
        return self._write(front, len(table))

    def _propose(self, generation: int, table: pd.DataFrame) -> Genomes:
        """The genomes that a generation evaluates."""
        space, count = self.problem.space, self.config.population
        rng = np.random.default_rng([self.config.seed, generation])
        if not len(table):
            seeds = [genome.smallest(space), genome.largest(space)]
            if self.bounded:
                witness = feasible(space, [b.cost for b in self.bounded], [b.bound for b in self.bounded])
                seeds += [witness] if witness else []
            return evolution.first_generation(space, rng, count, self.violations, genome.encode(space, seeds))
        known = genomes_of(table)
        best = evolution.survivors(self._objectives(table), self.violations(known), count)
        seen = {row.tobytes() for row in known}
        return evolution.next_generation(space, rng, known[best], count, self.violations, seen)

    def _objectives(self, table: pd.DataFrame) -> NDArray[np.float64]:
        return table[list(self.problem.objectives)].to_numpy(float)

    def _evaluate(
        self,
        genomes: Genomes,
        evaluate: Evaluator,
        data: str,
        generation: int,
        report: Report | None,
        total: int,
    ) -> pd.DataFrame:
        """Evaluate genomes on a set of windows: one row each."""
        architectures = genome.decode(self.problem.space, genomes)
        qualities: list[Quality] = []
        for quality in evaluate(architectures, data):
            qualities.append(quality)
            if report:
                done = generation * self.config.population + len(qualities)
                report(min(done, total), total, f"generation {generation + 1} of {self.config.generations}")
        columns: dict[str, Any] = {
            "generation": generation,
            "key": [a.key for a in architectures],
            "architecture": [canonical_json(a.to_json()) for a in architectures],
            "genome": [row.tolist() for row in genomes],
            "loss": [q.loss_nats for q in qualities],
            "recall_loss": [q.recall_loss_nats for q in qualities],
            "violation": self.violations(genomes),
        }
        for name, cost in self.costs.items():
            if cost is not None:
                columns[name] = cost(genomes)
        return pd.DataFrame(columns)

    def _rescore(self, table: pd.DataFrame, evaluate: Evaluator, report: Report | None) -> pd.DataFrame:
        """The front, after a second evaluation of its candidates on more tokens."""
        front = self.record.read("front")
        if front is None:
            genomes = genomes_of(table)
            order = evolution.survivors(self._objectives(table), self.violations(genomes), FRONT_LIMIT)
            order = order[table["violation"].to_numpy()[order] <= 0]
            last = self.config.generations - 1
            front = self._evaluate(genomes[order], evaluate, "front", last, report, len(table))
            self.record.write("front", front)
        kept = evolution.non_dominated(self._objectives(front))
        return front[kept].sort_values(list(self.problem.objectives), ignore_index=True)

    def _write(self, front: pd.DataFrame, evaluations: int) -> dict[str, Any]:
        """Write ``front.json``: nothing in it depends on time or on who evaluated."""
        members = [self._member(row) for _, row in front.iterrows()]
        body = {
            "space": self.problem.space.name,
            "objectives": list(self.problem.objectives),
            "confidence": self.config.confidence,
            "seed": self.config.seed,
            "evaluations": evaluations,
            "limits": [
                {"limit": b.limit.text, "bound": b.bound, "unit": unit_of(b.limit.metric)}
                for b in self.bounded
            ],
            "picks": picks(front, self.problem.objectives),
            "members": members,
        }
        write_json(self.folder / "front.json", FRONT_KIND, self.inputs, body)
        return body

    def _member(self, row: Any) -> dict[str, Any]:
        architecture = Architecture.from_json(json.loads(row["architecture"]))
        return {
            "key": architecture.key,
            "architecture": architecture.to_json(),
            "loss_nats": float(row["loss"]),
            "recall_loss_nats": None if math.isnan(row["recall_loss"]) else float(row["recall_loss"]),
            "predicted": predictions(self.problem, architecture),
        }


def unit_of(metric: str) -> str:
    """The base unit of a metric."""
    units = {"prefill": "seconds", "decode": "seconds", "memory": "bytes", "rss": "bytes"}
    return units.get(metric, "parameters")


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


def search_digest(problem: Problem, config: SearchConfig) -> str:
    """The hash of what determines a search's result, beside its space, supernet and predictors."""
    settings = config.model_dump(mode="json", exclude={"workers"})
    return digest(canonical_json([settings, list(problem.objectives), list(problem.predictors)]))
