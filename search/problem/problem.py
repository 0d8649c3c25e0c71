"""What is searched: a space, devices, objectives and limits, as a person's configuration states them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from latency import Predictor
from search.problem.limit import Constraint, Limit, check_limits
from space import InputError, Space, Workload, genome
from space.cost import memory_cost, params_cost
from space.ops import Cost

QUALITIES = ("loss", "recall_loss")
OBJECTIVES = "loss, recall_loss, [DEVICE:]latency:WORKLOAD, memory:WORKLOAD, [DEVICE:]rss:WORKLOAD, params"
SIZES = {"hat": (125, 30)}  # population and generations; of all other strategies:
SIZE = (24, 12)


class SearchConfig(BaseModel):
    """How to search."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limits: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()  # none: loss and the latency of the first workload; of hat: loss
    strategy: Literal["evolution", "hat", "random", "optuna-nsga2", "optuna-tpe"] = "evolution"
    surrogate: bool = True  # evolution's children are screened by predicted quality
    generations: Annotated[int, Field(gt=0)] | None = None  # None: 12; of hat 30
    population: Annotated[int, Field(gt=1)] | None = None  # None: 24; of hat 125
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.975
    windows: Annotated[int, Field(gt=0)] = 24
    front_windows: Annotated[int, Field(gt=0)] = 96
    compare: bool = False  # random search at equal evaluations too, for the report
    workers: Annotated[int, Field(ge=0)] = 2
    ray_address: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def size(self) -> tuple[int, int]:
        """Population and generations."""
        population, generations = SIZES.get(self.strategy, SIZE)
        return self.population or population, self.generations or generations

    def windows_of(self) -> dict[str, int]:
        """How many windows each evaluation uses, by its name."""
        middle = round(math.sqrt(self.windows * self.front_windows))
        return {"search": self.windows, "middle": middle, "front": self.front_windows}


@dataclass(frozen=True)
class Problem:
    """What is searched: a space, the predictors of one or more devices, objectives and limits."""

    space: Space
    predictors: Mapping[str, Predictor]  # by device; the first is meant where none is named
    objectives: tuple[str, ...]
    limits: tuple[Limit, ...]
    confidence: float
    units: Mapping[str, Predictor]  # by device; whose predictions percentages are of

    def device(self, name: str | None) -> str:
        """A device's name; the first where none is given.

        Raises:
            InputError: that device is not among those given.
        """
        name = name or next(iter(self.predictors))
        if name not in self.predictors:
            raise InputError(f"device {name}: not among those given ({', '.join(self.predictors)})")
        return name

    def predictor(self, device: str | None) -> Predictor:
        """The predictor of a device.

        Raises:
            InputError: that device is not among those given.
        """
        return self.predictors[self.device(device)]

    def timed(self, limit: Limit) -> str | None:
        """The device whose latency a limit bears on."""
        if limit.metric not in ("prefill", "decode"):
            return None
        return limit.device or next(iter(self.predictors))

    def cost(self, limit: Limit, predictors: Mapping[str, Predictor], confidence: float | None) -> Cost:
        """What a limit bears on, as some predictors see it."""
        counted = limit.workload is None or limit.metric == "memory"
        if not predictors and (limit.device or not counted):
            raise InputError(f"limit {limit.text!r}: needs a device; say with --device which card is meant")
        if limit.device:
            self.device(limit.device)
        if limit.workload is None:
            return params_cost(self.space)
        if limit.metric == "memory":
            return memory_cost(self.space, limit.workload)
        predictor = predictors[self.device(limit.device)]
        if limit.metric == "rss":
            return predictor.memory_cost(limit.workload, confidence)
        return predictor.cost(limit.workload, confidence)

    def constraints(self) -> list[Constraint]:
        """The limits in absolute terms; percentages are of the largest architecture's prediction."""
        top = genome.encode(self.space, [genome.largest(self.space)])
        found = []
        for limit in self.limits:
            reference = float(self.cost(limit, self.units, None)(top)[0])
            if limit.relative and not math.isfinite(reference):
                raise InputError(
                    f"limit {limit.text!r}: the device cannot run the largest architecture; give it in units"
                )
            cost = self.cost(limit, self.predictors, self.confidence)
            found.append(Constraint(limit, cost, limit.resolve(reference)))
        return found

    def objective_cost(self, name: str) -> Cost | None:
        """The cost behind an objective; None for a quality, which has to be evaluated.

        Raises:
            InputError: there is no such objective.
        """
        if name in QUALITIES:
            return None
        *device, metric, workload = name.split(":") if ":" in name else (name, "")
        if len(device) < 2 and metric == "latency":
            return self.predictor(*device or (None,)).cost(Workload.parse(workload))
        if not device and metric == "memory":
            return memory_cost(self.space, Workload.parse(workload))
        if len(device) < 2 and metric == "rss":
            return self.predictor(*device or (None,)).memory_cost(Workload.parse(workload))
        if name == "params":
            return params_cost(self.space)
        raise InputError(f"objective {name!r}: not one of {OBJECTIVES}")


def precision_of(config: SearchConfig, device: str, first: str) -> str | None:
    """The precision that limits and objectives ask of a device's models; None where they ask for nothing.

    Raises:
        InputError: they ask for several, while a model is shipped in one.
    """
    asked: dict[str, str] = {}
    for limit in map(Limit.parse, config.limits):
        if limit.workload and limit.metric != "memory" and (limit.device or first) == device:
            asked.setdefault(limit.workload.precision, limit.text)
    for name in config.objectives:
        *of, metric, workload = name.split(":") if ":" in name else (name, "")
        if metric in ("latency", "rss") and (of or [first]) == [device]:
            asked.setdefault(Workload.parse(workload).precision, name)
    if len(asked) > 1:
        raise InputError(
            f"device {device}: {' and '.join(asked.values())} are of different precisions; give one"
        )
    return next(iter(asked), None)


def make_problem(
    space: Space,
    predictors: Mapping[str, Predictor],
    config: SearchConfig,
    units: Mapping[str, Predictor] | None = None,
) -> Problem:
    """The problem that a configuration states; without ``units`` percentages are of the predictors' own.

    Raises:
        InputError: a malformed or contradictory limit, an unknown objective or workload.
    """
    limits = tuple(Limit.parse(text) for text in config.limits)
    check_limits(limits)
    workload = next(iter(next(iter(predictors.values())).models))
    alone = config.strategy == "hat"
    objectives = config.objectives or ("loss", f"latency:{workload}")[: 1 if alone else 2]
    if alone and len(objectives) > 1:
        raise InputError(f"strategy hat: it has one objective, not {', '.join(objectives)}")
    problem = Problem(space, predictors, objectives, limits, config.confidence, units or predictors)
    if len(set(objectives)) < len(objectives):
        raise InputError(f"objectives: {', '.join(objectives)} names one twice")
    if not set(objectives) & set(QUALITIES):
        raise InputError(f"objectives: one of {', '.join(QUALITIES)} must be among {', '.join(objectives)}")
    for name in objectives:
        problem.objective_cost(name)
    problem.constraints()
    return problem
