"""Limits: what a person asks of a model, as one line of text.

``[device:]metric[@N][,batch=B][,threads=T][,precision=P]<=value unit``, or ``<=P%`` of the
same quantity of the space's largest architecture, which works on any machine. Quantities are
kept in base units (seconds, bytes, parameters); units matter only here, where they are read
and printed. A limit knows no space: whether it can be met is :mod:`search.problem.feasibility`'s.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import NoReturn

from space import InputError, Workload
from space.ops import Cost
from space.precision import PRECISIONS

_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_BYTES = {"B": 1.0, "KB": 1e3, "KiB": 2.0**10, "MB": 1e6, "MiB": 2.0**20, "GB": 1e9, "GiB": 2.0**30}
_COUNT = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}
UNITS = {"prefill": _SECONDS, "decode": _SECONDS, "memory": _BYTES, "rss": _BYTES, "params": _COUNT}
METRICS = "prefill@N, decode@N, memory@N, rss@N, params"
_PRINTED = {
    "prefill": (" ns", " us", " ms", " s"),
    "decode": (" ns", " us", " ms", " s"),
    "memory": (" B", " KiB", " MiB", " GiB"),
    "rss": (" B", " KiB", " MiB", " GiB"),
    "params": (" parameters", "K parameters", "M parameters", "B parameters"),
}
_NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One upper limit on a metric of an architecture."""

    device: str | None
    metric: str
    workload: Workload | None  # None for params; memory and rss are those of reading N tokens at once
    bound: float  # seconds, bytes or parameters; where relative, percent
    relative: bool
    text: str  # canonical; Limit.parse(limit.text) == limit

    @property
    def subject(self) -> str:
        """What is limited: the text without the bound, such as ``decode@2048``."""
        return self.text.partition("<=")[0]

    def resolve(self, reference: float) -> float:
        """The bound in base units, where the largest architecture's own value is ``reference``."""
        return reference * self.bound / 100 if self.relative else self.bound

    @staticmethod
    def parse(text: str) -> "Limit":
        """Read a limit.

        Raises:
            InputError: the text has another form, or a value is not allowed.
        """
        match = re.fullmatch(r"(.*?)(<=|>=|==|=<|<|>|≤|≥)(.*)", text.strip(), re.DOTALL)
        if not match or match[2] != "<=":
            given = f"{match[2]!r} is not allowed" if match else "no '<=' is given"
            _refuse(text, f"{given}; expected METRIC<=VALUE, such as decode@2048<=2ms or params<=60%")
        device, metric, workload = _subject(text, match[1].strip())
        bound, number, unit = _bound(text, metric, match[3].strip())
        where = "params" if workload is None else str(workload).replace(workload.phase, metric, 1)
        return Limit(
            device=device,
            metric=metric,
            workload=workload,
            bound=bound,
            relative=unit == "%",
            text=f"{device + ':' if device else ''}{where}<={number}{unit}",
        )


def _refuse(text: str, why: str) -> NoReturn:
    raise InputError(f"limit {' '.join(text.split())!r}: {why}")


def _subject(text: str, given: str) -> tuple[str | None, str, Workload | None]:
    """Device, metric and workload of a limit's left side."""
    head, *options = [part.strip() for part in given.split(",")]
    device, colon, head = head.rpartition(":")
    if colon and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", device):
        _refuse(
            text, f"{device!r} is not a device name; one has letters, digits, '.', '_' and '-', then one ':'"
        )
    metric, at, length = [part.strip() for part in head.partition("@")]
    if metric not in UNITS:
        _refuse(text, f"metric {metric!r} is not one of {METRICS}")
    if metric == "params":
        if at or options:
            _refuse(
                text, f"params is the same for every workload; leave out {given.partition('params')[2]!r}"
            )
        return device or None, metric, None
    if not re.fullmatch(r"[0-9]{1,9}", length) or int(length) == 0:
        what = f"{length!r} is not a number of tokens" if at else f"{metric} needs a number of tokens"
        _refuse(text, f"{what}; expected {metric}@N, such as {metric}@512")
    values = _options(text, metric, options)
    workload = Workload(
        phase="prefill" if metric in ("memory", "rss") else metric,
        length=int(length),
        batch=int(values.get("batch", 1)),
        threads=int(values.get("threads", 1)),
        precision=values.get("precision", PRECISIONS[0]),
    )
    return device or None, metric, workload


def _options(text: str, metric: str, options: list[str]) -> dict[str, str]:
    """The values of batch, threads and precision that are given."""
    allowed = ("batch", "precision") if metric == "memory" else ("batch", "threads", "precision")
    values: dict[str, str] = {}
    for option in options:
        name, _, value = [part.strip() for part in option.partition("=")]
        if name not in allowed:
            _refuse(text, f"{option!r} is not understood; {metric}@N takes {', '.join(allowed)}")
        if name in values:
            _refuse(text, f"{name} is given twice")
        if name == "precision" and value not in PRECISIONS:
            _refuse(text, f"precision {value!r} is not one of {', '.join(PRECISIONS)}")
        if name != "precision" and (not re.fullmatch(r"[0-9]{1,9}", value) or int(value) == 0):
            _refuse(text, f"{name} {value!r} is not a whole number above 0")
        values[name] = value
    return values


def _bound(text: str, metric: str, given: str) -> tuple[float, str, str]:
    """The bound in base units (or percent), and its number and unit as text."""
    match = re.fullmatch(rf"({_NUMBER}|[-+]?inf|nan)\s*(\S*)", given)
    names = [unit for unit in UNITS[metric] if unit]
    allowed = f"{', '.join(names)}{' or nothing' if metric == 'params' else ''}, or % of the largest"
    if not match:
        _refuse(text, f"{given!r} is not a value; expected a number and a unit ({allowed})")
    value, unit = float(match[1]), match[2]
    if unit != "%" and unit not in UNITS[metric]:
        what = f"unit {unit!r} is not known" if unit else "the unit is missing"
        _refuse(text, f"{what}; for {metric} it is one of {allowed}")
    bound = value if unit == "%" else value * UNITS[metric][unit]
    if not isfinite(bound) or bound <= 0:
        _refuse(text, f"{given!r} is not above 0 and finite")
    if unit == "%" and value > 100:
        _refuse(text, f"above 100% of the largest architecture is no limit: {given!r}")
    return bound, repr(value).removesuffix(".0"), unit


def check_limits(limits: Iterable[Limit]) -> None:
    """Refuse two limits on one quantity.

    Raises:
        InputError: names both.
    """
    seen: dict[str, Limit] = {}
    for limit in limits:
        other = seen.setdefault(limit.subject, limit)
        if other is not limit:
            raise InputError(
                f"limits {other.text!r} and {limit.text!r}: both limit {limit.subject}; keep one"
            )


def format_quantity(metric: str, value: float, digits: int = 3) -> str:
    """A quantity in base units for people: ``3.21 ms``, ``5.1 MiB``, ``1.2M parameters``."""
    step = 1024.0 if UNITS[metric] is _BYTES else 1e3
    scales = [_SECONDS["ns"] if UNITS[metric] is _SECONDS else 1.0]
    scales += [scales[0] * step**i for i in (1, 2, 3)]
    rounded = float(f"{value:.{digits}g}")
    place = max([i for i, scale in enumerate(scales) if rounded >= scale * (1 - 1e-12)], default=0)
    number = float(f"{value / scales[place]:.{digits}g}")
    return f"{number:.15g}{_PRINTED[metric][place]}"


@dataclass(frozen=True)
class Constraint:
    """A limit as it stands on one space: the cost that it limits, and its bound in base units."""

    limit: Limit
    cost: Cost
    bound: float

    @property
    def text(self) -> str:
        """The limit; one in percent with what that is in units."""
        return f"{self.limit.text} ({self.show(self.bound)})" if self.limit.relative else self.limit.text

    def show(self, value: float) -> str:
        """A value of the cost, with digits enough to tell it from the bound."""
        for digits in range(3, 12):
            shown = format_quantity(self.limit.metric, value, digits)
            if value == self.bound or shown != format_quantity(self.limit.metric, self.bound, digits):
                break
        return shown


def unit_of(metric: str) -> str:
    """The base unit of a metric."""
    units = {"prefill": "seconds", "decode": "seconds", "memory": "bytes", "rss": "bytes"}
    return units.get(metric, "parameters")
