"""Objectives: what a search minimises, a quality that is evaluated or a cost that is predicted.

A quality is ``loss``, ``recall_loss``, ``kl`` or a registered one. A cost is
``[DEVICE:]QUANTITY:WORKLOAD``, such as ``latency:decode@2048`` or ``phone:rss:prefill@512``, or a metric as
in limits, such as ``memory@64``.
A plug-in adds a quality by :func:`register_objective`::

    def worst_loss(model, data):  # model: tokens [B, T] -> logits [B, T, V]; data: an EvaluationSet
        ...
        return float(losses.max())

    register_objective("worst_loss", worst_loss)
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from search.problem.limit import Subject, parse_subject
from search.problem.metric import METRICS, Metric, metric_named
from space import InputError, Workload
from space.io.names import check_name
from space.registry import Registry, load_plugins

if TYPE_CHECKING:  # it needs torch
    from supernet.evaluate import QualityFunction

BUILTIN_QUALITIES = ("loss", "recall_loss")  # which every evaluation gives


@dataclass(frozen=True, kw_only=True)
class QualityObjective:
    """A registered quality, which a search can minimise.

    Attributes:
        name: in objectives, and of the column in the evaluations.
        evaluate: ``evaluate(model, data)`` gives the value; lower is better. None for the built-in losses,
            and for qualities that only the caller's evaluator gives.
        needs_parent: the value compares a model with the largest architecture of its supernet.
    """

    name: str
    evaluate: "QualityFunction | None" = None
    needs_parent: bool = False


QUALITIES: Registry[QualityObjective] = Registry("objective")
for _name in BUILTIN_QUALITIES:
    QUALITIES.register(_name, QualityObjective(name=_name))
QUALITIES.register("kl", QualityObjective(name="kl", needs_parent=True))


def register_objective(name: str, evaluate: "QualityFunction | None" = None) -> None:
    """Make a quality known as an objective.

    Args:
        name: letters, digits and ``_``.
        evaluate: ``evaluate(model, data) -> float``, minimised. ``model`` is a function of token ids [B, T]
            that gives logits [B, T, V]; ``data`` is a :class:`supernet.evaluate.EvaluationSet`. None: the
            value comes from the evaluator given to :func:`search.engine.entry.run_search`.

    Raises:
        InputError: the name is taken, or is a metric's, or has other characters.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in METRICS:
        raise InputError(f"objective {name!r}: give letters, digits and '_', and not the name of a metric")
    QUALITIES.register(name, QualityObjective(name=name, evaluate=evaluate))


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One objective of a search, minimised.

    Attributes:
        text: as it was given; it names the column of the evaluations.
        metric: the cost; None for a quality.
        device: whose predictor gives the cost; None: the first of the problem.
        workload: of the cost; None for a quality, or a metric that takes none.
    """

    text: str
    metric: Metric | None = None
    device: str | None = None
    workload: Workload | None = None

    @property
    def is_quality(self) -> bool:
        """True for a quality, which has to be evaluated; False for a predicted cost."""
        return self.metric is None

    @staticmethod
    def parse(text: str) -> "Objective":
        """The objective of a text.

        Args:
            text: such as ``loss``, ``latency:decode@2048``, ``desk:rss:prefill@64`` or ``params``.

        Raises:
            InputError: there is no such objective or workload.
        """
        text = text.strip()
        objective = _known_objective(text)
        if objective is None:
            load_plugins()
            objective = _known_objective(text)
        if objective is None:
            raise InputError(f"objective {text!r}: not one of {objective_forms()}")
        return objective


def _known_objective(text: str) -> Objective | None:
    """The objective of a text by the names known so far; None if there is none."""
    if text in QUALITIES.known_names():
        return Objective(text=text)
    subject = _quantity_of_workload(text) or _subject(text)
    if subject is None or (subject.device and not subject.metric.needs_device):
        return None
    return Objective(text=text, metric=subject.metric, device=subject.device, workload=subject.workload)


def _quantity_of_workload(text: str) -> Subject | None:
    """The cost of ``[DEVICE:]QUANTITY:WORKLOAD``; None where the text has another form."""
    match = re.fullmatch(r"(?:([^:]*):)?(\w+):([^:]+)", text)
    known = map(METRICS.get, METRICS.known_names())
    if not match or not any(match[2] == (m.quantity or m.name) for m in known):
        return None
    if match[1] is not None:
        check_name(match[1], f"objective {text!r}: device")
    workload = Workload.parse(match[3])
    metric = metric_named(match[2], workload.phase)
    return Subject(device=match[1], metric=metric, workload=workload) if metric else None


def _subject(text: str) -> Subject | None:
    """The cost of a text as limits name it, ``[DEVICE:]METRIC[@N]``; None where it names no metric."""
    match = re.match(r"(?:[^:]*:)?\s*(\w+)", text)
    known = match is not None and match[1] in METRICS.known_names()
    return parse_subject(text, f"objective {text!r}") if known else None


def objective_forms() -> str:
    """The forms of objectives, for error messages and help texts."""
    costs: dict[str, None] = {}
    for metric in map(METRICS.get, METRICS):
        name = metric.quantity or metric.name
        device, workload = "[DEVICE:]" * metric.needs_device, ":WORKLOAD" * (metric.phase is not None)
        costs[f"{device}{name}{workload}"] = None
    return ", ".join([*QUALITIES, *costs])


def check_objectives(objectives: Iterable[Objective]) -> None:
    """Refuse objectives that no search can minimise together.

    Args:
        objectives: of one problem.

    Raises:
        InputError: one is given twice, or none is a quality.
    """
    found = list(objectives)
    texts = ", ".join(one.text for one in found)
    costs = [(one.device, one.metric.name, one.workload) if one.metric else one.text for one in found]
    if len(set(costs)) < len(costs):
        raise InputError(f"objectives: {texts} names one twice")
    if not any(one.is_quality for one in found):
        raise InputError(f"objectives: one of {', '.join(QUALITIES)} must be among {texts}")
