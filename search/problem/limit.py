"""Limits: upper bounds on metrics, each one line of text.

``[device:]metric[@N][,batch=B][,threads=T][,precision=P]<=value unit``, or ``<=P%`` of the space's largest
architecture's mean prediction of the same metric, which works on any machine. Quantities are kept in base
units (seconds, bytes, parameters); other units are only read and printed. A limit depends on no space;
:mod:`search.problem.feasibility` decides if an architecture of a space can keep it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from search.problem.metric import METRICS, Metric
from space import InputError, Workload
from space.io.names import MAX_NAME_CHARACTERS, RULE, is_name
from space.ops import Cost
from space.precision import PRECISIONS

ROUNDING_TOLERANCE = 1e-9  # relative: the order in which a sum is taken changes its last digits
_NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A metric of a workload on a device: the left side of a limit.

    Attributes:
        device: None: the first of the problem.
        metric: the metric.
        workload: None for a metric that takes none.
    """

    device: str | None
    metric: Metric
    workload: Workload | None

    def __str__(self) -> str:
        name, device = self.metric.name, f"{self.device}:" if self.device else ""
        return device + (
            name if self.workload is None else str(self.workload).replace(self.workload.phase, name, 1)
        )


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One upper limit on a metric of an architecture.

    Attributes:
        device: None: the first of the problem.
        metric: the metric that is limited.
        workload: None for a metric that takes none, such as ``params``.
        bound: in the metric's base unit; in percent where relative.
        relative: the bound is in percent of the largest architecture's mean prediction.
        text: the canonical text: ``Limit.parse(limit.text) == limit``.
    """

    device: str | None
    metric: Metric
    workload: Workload | None
    bound: float
    relative: bool
    text: str

    @property
    def subject(self) -> str:
        """The text without the bound, such as ``decode@2048``."""
        return self.text.partition("<=")[0]

    def resolve(self, reference: float) -> float:
        """The bound in base units.

        Args:
            reference: the value of the space's largest architecture.
        """
        return reference * self.bound / 100 if self.relative else self.bound

    @staticmethod
    def parse(text: str) -> "Limit":
        """The limit of a text.

        Args:
            text: such as ``decode@2048<=2ms`` or ``phone:params<=60%``.

        Raises:
            InputError: the text has another form, or a value is not allowed.
        """
        match = re.fullmatch(r"(.*?)(<=|>=|==|=<|<|>|≤|≥)(.*)", text.strip(), re.DOTALL)
        if not match or match[2] != "<=":
            given = f"{match[2]!r} is not allowed" if match else "no '<=' is given"
            _refuse(text, f"{given}; expected METRIC<=VALUE, such as decode@2048<=2ms or params<=60%")
        subject = parse_subject(match[1].strip(), f"limit {' '.join(text.split())!r}")
        bound, number, unit = _bound(text, subject.metric, match[3].strip())
        return Limit(
            device=subject.device,
            metric=subject.metric,
            workload=subject.workload,
            bound=bound,
            relative=unit == "%",
            text=f"{subject}<={number}{unit}",
        )


def _refuse(text: str, why: str) -> NoReturn:
    raise InputError(f"limit {' '.join(text.split())!r}: {why}")


def parse_subject(text: str, where: str) -> Subject:
    """The device, metric and workload of ``[device:]metric[@N][,option=value ...]``.

    Args:
        text: to be read.
        where: the start of error messages.

    Raises:
        InputError: the text has another form, or a value is not allowed.
    """

    def refuse(why: str) -> NoReturn:
        raise InputError(f"{where}: {why}")

    head, *options = [part.strip() for part in text.split(",")]
    device, colon, head = head.rpartition(":")
    if colon and not is_name(device):
        refuse(f"{device[:MAX_NAME_CHARACTERS]!r} is not a device name; one has {RULE}, then one ':'")
    name, at, length = [part.strip() for part in head.partition("@")]
    if name not in METRICS:
        forms = ", ".join(METRICS.get(known).form for known in METRICS)
        refuse(f"metric {name!r} is not one of {forms}")
    metric = METRICS.get(name)
    if metric.phase is None:
        if at or options:
            refuse(f"{name} is the same for every workload; leave out {text.partition(name)[2]!r}")
        return Subject(device=device or None, metric=metric, workload=None)
    if not re.fullmatch(r"[0-9]{1,9}", length) or int(length) == 0:
        what = f"{length!r} is not a number of tokens" if at else f"{name} needs a number of tokens"
        refuse(f"{what}; expected {name}@N, such as {name}@512")
    values = _options(where, metric, options)
    workload = Workload(
        phase=metric.phase,
        length=int(length),
        batch=int(values.get("batch", 1)),
        threads=int(values.get("threads", 1)),
        precision=values.get("precision", PRECISIONS[0]),
    )
    return Subject(device=device or None, metric=metric, workload=workload)


def _options(where: str, metric: Metric, options: list[str]) -> dict[str, str]:
    """The values of the options that are given, by name."""
    values: dict[str, str] = {}
    for option in options:
        name, _, value = [part.strip() for part in option.partition("=")]
        if name not in metric.options:
            takes = f"takes {', '.join(metric.options)}" if metric.options else "takes no options"
            raise InputError(f"{where}: {option!r} is not understood; {metric.form} {takes}")
        if name in values:
            raise InputError(f"{where}: {name} is given twice")
        if name == "precision" and value not in PRECISIONS:
            raise InputError(f"{where}: precision {value!r} is not one of {', '.join(PRECISIONS)}")
        if name != "precision" and (not re.fullmatch(r"[0-9]{1,9}", value) or int(value) == 0):
            raise InputError(f"{where}: {name} {value!r} is not a whole number above 0")
        values[name] = value
    return values


def _bound(text: str, metric: Metric, given: str) -> tuple[float, str, str]:
    """The bound in base units (or percent), and its number and unit as text."""
    match = re.fullmatch(rf"({_NUMBER}|[-+]?inf|nan)\s*(\S*)", given)
    units = metric.unit.parsed
    allowed = f"{', '.join(filter(None, units))}{' or nothing' if '' in units else ''}, or % of the largest"
    if not match:
        _refuse(text, f"{given!r} is not a value; expected a number and a unit ({allowed})")
    value, unit = float(match[1]), match[2]
    if unit != "%" and unit not in units:
        what = f"unit {unit!r} is not known" if unit else "the unit is missing"
        _refuse(text, f"{what}; for {metric.name} it is one of {allowed}")
    bound = value if unit == "%" else value * units[unit]
    if not isfinite(bound) or bound <= 0:
        _refuse(text, f"{given!r} is not above 0 and finite")
    if unit == "%" and value > 100:
        _refuse(text, f"above 100% of the largest architecture is no limit: {given!r}")
    return bound, repr(value).removesuffix(".0"), unit


def check_no_duplicates(limits: Iterable[Limit], first_device: str | None = None) -> None:
    """Refuse two limits on one quantity.

    Args:
        limits: of one problem.
        first_device: that of limits that name none; None if it is not known.

    Raises:
        InputError: names both.
    """
    seen: dict[str, Limit] = {}
    for limit in limits:
        explicit = limit.subject if limit.device or not first_device else f"{first_device}:{limit.subject}"
        other = seen.setdefault(explicit, limit)
        if other is not limit:
            raise InputError(
                f"limits {other.text!r} and {limit.text!r}: both limit {limit.subject}; keep one"
            )


@overload
def within(value: float, bound: float) -> bool: ...


@overload
def within(value: NDArray[np.float64], bound: float) -> NDArray[np.bool_]: ...


def within(value: float | NDArray[np.float64], bound: float) -> bool | NDArray[np.bool_]:
    """True where a cost keeps a bound (above 0), but for rounding.

    Args:
        value: of the cost, or values [N].
        bound: in the same unit.
    """
    return value <= bound * (1 + ROUNDING_TOLERANCE)


@dataclass(frozen=True)
class Constraint:
    """A limit on one space, as a bounded cost.

    Attributes:
        limit: the limit.
        cost: of every architecture of the space.
        bound: in base units.
    """

    limit: Limit
    cost: Cost
    bound: float

    @property
    def text(self) -> str:
        """The limit; one in percent with its bound in units."""
        return f"{self.limit.text} ({self.show(self.bound)})" if self.limit.relative else self.limit.text

    def show(self, value: float) -> str:
        """A value of the cost for people, with enough digits to tell it from the bound.

        Args:
            value: in base units.
        """
        unit = self.limit.metric.unit
        for digits in range(3, 12):
            shown = unit.format(value, digits)
            if value == self.bound or shown != unit.format(self.bound, digits):
                break
        return shown
