"""The problem of a search: a space, devices, objectives and limits."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from search.problem.limit import Constraint, Limit, check_no_duplicates
from search.problem.metric import Metric
from search.problem.objective import BUILTIN_QUALITIES, Objective
from space import InputError, Space, Workload, genome
from space.ops import Cost

if TYPE_CHECKING:  # its libraries take seconds to load
    from latency import Predictor


@dataclass(frozen=True, init=False)
class Problem:
    """A space to search, the objectives to minimise and the limits to keep.

    Attributes:
        space: the search space.
        objectives: minimised, in order; at least one is a quality where the problem is searched.
        limits: upper bounds on metrics.
        predictors: by device; the first is meant where a limit or objective names none. Empty where no
            objective or limit depends on a device.
        confidence: of the upper estimates that are compared with limits, between 0.5 and 1.
        reference_predictors: by device; a limit in percent is a share of their prediction for the largest
            architecture.
    """

    space: Space
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    predictors: "Mapping[str, Predictor]"
    confidence: float
    reference_predictors: "Mapping[str, Predictor]"

    def __init__(
        self,
        space: Space,
        *,
        objectives: Sequence[str | Objective] = (),
        limits: Sequence[str | Limit] = (),
        predictors: "Mapping[str, Predictor] | None" = None,
        confidence: float = 0.975,
        reference_predictors: "Mapping[str, Predictor] | None" = None,
    ) -> None:
        """State a problem.

        Args:
            space: the search space.
            objectives: texts such as ``loss`` and ``latency:decode@2048``, or parsed.
            limits: texts such as ``params<=60%`` and ``decode@2048<=2ms``, or parsed.
            predictors: by device; None where nothing depends on a device.
            confidence: of the upper estimates that are compared with limits, between 0.5 and 1.
            reference_predictors: by device; a limit in percent is a share of their prediction for the
                largest architecture; None: ``predictors``.

        Raises:
            InputError: a text is not understood, a device is unknown, or two limits bound one quantity.
        """
        values = {
            "space": space,
            "objectives": tuple(Objective.parse(o) if isinstance(o, str) else o for o in objectives),
            "limits": tuple(Limit.parse(limit) if isinstance(limit, str) else limit for limit in limits),
            "predictors": dict(predictors or {}),
            "confidence": confidence,
            "reference_predictors": dict(reference_predictors or predictors or {}),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # as the __init__ of a frozen dataclass does
        check_no_duplicates(self.limits, next(iter(self.predictors), None))
        for objective in self.objectives:
            self.objective_cost(objective)

    @property
    def names(self) -> tuple[str, ...]:
        """The texts of the objectives, which name the columns of evaluations."""
        return tuple(objective.text for objective in self.objectives)

    @property
    def qualities(self) -> tuple[str, ...]:
        """The qualities of every evaluation: the built-in ones, then the registered objectives."""
        return (*BUILTIN_QUALITIES, *self.registered_qualities)

    @property
    def registered_qualities(self) -> tuple[str, ...]:
        """The objectives that are qualities other than the built-in ones."""
        return tuple(o.text for o in self.objectives if o.is_quality and o.text not in BUILTIN_QUALITIES)

    def device(self, name: str | None) -> str:
        """The name of a device; the first where None is given.

        Args:
            name: as a limit or objective gives it.

        Raises:
            InputError: the problem has no such device.
        """
        found = name or next(iter(self.predictors), "")
        if not found:
            raise InputError("no device is given, and a limit or an objective needs one")
        if found not in self.predictors:
            known = ", ".join(self.predictors) or "none"
            raise InputError(f"device {found}: not among those given ({known})")
        return found

    def timed_device(self, limit: Limit) -> str | None:
        """The device whose latency a limit bounds; None for a limit on another metric.

        Args:
            limit: one of the problem's or another.
        """
        return self.device(limit.device) if limit.metric.measurement == "latency" else None

    def limit_cost(
        self, limit: Limit, predictors: "Mapping[str, Predictor]", confidence: float | None
    ) -> Cost:
        """The cost that a limit bounds.

        Args:
            limit: one of the problem's or another.
            predictors: by device.
            confidence: of an upper bound; None: the mean.

        Raises:
            InputError: the limit needs a device that is not given, or one that was not measured for it.
        """
        if not predictors and (limit.device or limit.metric.needs_device):
            raise InputError(f"limit {limit.text!r}: needs a device; say with --device which card is meant")
        return self._cost(limit.metric, limit.device, limit.workload, predictors, confidence)

    def _cost(
        self,
        metric: Metric,
        device: str | None,
        workload: Workload | None,
        predictors: "Mapping[str, Predictor]",
        confidence: float | None,
    ) -> Cost:
        name = self.device(device) if device or metric.needs_device else None
        predictor = predictors[name] if name and metric.needs_device else None
        return metric.cost(self.space, predictor, workload, confidence)

    def constraints(self) -> list[Constraint]:
        """The limits in absolute terms; percentages are of the largest architecture's mean prediction.

        Raises:
            InputError: a device cannot run the largest architecture that a percentage refers to.
        """
        top = genome.encode(self.space, [genome.largest(self.space)])
        constraints = []
        for limit in self.limits:
            reference = float(self.limit_cost(limit, self.reference_predictors, None)(top)[0])
            if limit.relative and not math.isfinite(reference):
                raise InputError(
                    f"limit {limit.text!r}: the device cannot run the largest architecture; give it in units"
                )
            cost = self.limit_cost(limit, self.predictors, self.confidence)
            constraints.append(Constraint(limit, cost, limit.resolve(reference)))
        return constraints

    def objective_cost(self, objective: Objective) -> Cost | None:
        """The cost of an objective; None for a quality, which has to be evaluated.

        Args:
            objective: one of the problem's or another.

        Raises:
            InputError: its device is not given, or was not measured for the workload.
        """
        if objective.metric is None:
            return None
        return self._cost(objective.metric, objective.device, objective.workload, self.predictors, None)


def required_precision(
    limits: Iterable[Limit], objectives: Iterable[Objective], device: str, first: str
) -> str | None:
    """The precision that limits and objectives ask of a device's models; None where they ask for none.

    Args:
        limits: of a problem.
        objectives: of the problem.
        device: whose models are meant.
        first: the device of limits and objectives that name none.

    Raises:
        InputError: they ask for several, while a model is deployed in one.
    """
    asked: dict[str, str] = {}
    subjects: list[Limit | Objective] = [*limits, *objectives]
    for one in subjects:
        if one.workload and one.metric and one.metric.needs_device and (one.device or first) == device:
            asked.setdefault(one.workload.precision, one.text)
    if len(asked) > 1:
        raise InputError(
            f"device {device}: {' and '.join(asked.values())} are of different precisions; give one"
        )
    return next(iter(asked), None)
