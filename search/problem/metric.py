"""Metrics: the costs of an architecture that a search may limit or minimise.

A metric says all that the rest of the package needs to know of a cost: the units in which it is read and
printed, the workload and device that it depends on, how it is computed for a whole space, and how it is
measured when a sub-model is verified. A plug-in adds one by :func:`register_metric`; it then works in limits,
objectives, feasibility checks, reports and verification::

    JOULES = Unit(name="joules", parsed={"mJ": 1e-3, "J": 1.0}, printed=(" uJ", " mJ", " J"), smallest=1e-6)
    register_metric(Metric(name="energy", unit=JOULES, phase="decode", cost=energy_cost))
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from space import Architecture, ModelConfig, Space, Workload
from space.cost import memory_bytes, memory_cost, params, params_cost
from space.ops import Cost
from space.registry import Registry
from space.workload import PHASES

if TYPE_CHECKING:  # the predictor's libraries take seconds to load
    from latency import Predictor

CostFunction = Callable[[Space, "Predictor | None", Workload | None, float | None], Cost]
CountFunction = Callable[[Architecture, ModelConfig, Workload | None], float]
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A base unit, with the multiples of it that are read and printed.

    Attributes:
        name: the base unit in words, such as ``seconds``.
        parsed: base units in one of each unit that a limit may name; the name "" allows a bare number.
        printed: what follows the number, from the smallest unit on; each is ``step`` times the one before.
        smallest: base units in the first printed one.
        step: the factor between printed units.
    """

    name: str
    parsed: Mapping[str, float]
    printed: tuple[str, ...]
    smallest: float = 1.0
    step: float = 1e3

    def format(self, value: float, digits: int = 3) -> str:
        """A value for people: ``3.21 ms``, ``5.1 MiB``, ``1.2M parameters``.

        Args:
            value: in base units.
            digits: significant digits.
        """
        scales = [self.smallest, *(self.smallest * self.step**i for i in range(1, len(self.printed)))]
        rounded = float(f"{value:.{digits}g}")
        place = max([i for i, scale in enumerate(scales) if rounded >= scale * (1 - 1e-12)], default=0)
        number = float(f"{value / scales[place]:.{digits}g}")
        return f"{number:.15g}{self.printed[place]}"


SECONDS = Unit(
    name="seconds",
    parsed={"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0},
    printed=(" ns", " us", " ms", " s"),
    smallest=1e-9,
)
BYTES = Unit(
    name="bytes",
    parsed={"B": 1.0, "KB": 1e3, "KiB": 2.0**10, "MB": 1e6, "MiB": 2.0**20, "GB": 1e9, "GiB": 2.0**30},
    printed=(" B", " KiB", " MiB", " GiB"),
    step=1024.0,
)
PARAMETERS = Unit(
    name="parameters",
    parsed={"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9},
    printed=(" parameters", "K parameters", "M parameters", "B parameters"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Metric:
    """A cost of an architecture that can be limited or minimised.

    Attributes:
        name: in limits, followed by ``@N`` where the metric takes a workload.
        unit: of its values.
        cost: ``cost(space, predictor, workload, confidence)`` gives the cost of a space's architectures.
            ``predictor`` is None for a metric that needs no device, ``workload`` is None for one that takes
            none. ``confidence`` is that of an upper bound, between 0.5 and 1; None asks for the mean.
        phase: of the workload that ``NAME@N`` stands for, ``prefill`` or ``decode``; None where the metric is
            the same for every workload.
        options: of the workload that limits may give: ``batch``, ``threads``, ``precision``.
        needs_device: the cost depends on a device's predictor, and is known for certain only when measured.
        measurement: the value that verification measures on the device: ``latency`` or ``rss``; None: none.
        count: ``count(architecture, model_config, workload)`` gives the value at verification, in base units,
            of a metric that need not be measured. Limits on a metric with neither stay unmeasured.
        quantity: the name in objectives of the form ``QUANTITY:WORKLOAD``; the metric's name where it is "".
    """

    name: str
    unit: Unit
    cost: CostFunction
    phase: str | None = None
    options: tuple[str, ...] = ("batch", "threads", "precision")
    needs_device: bool = False
    measurement: Literal["latency", "rss"] | None = None
    count: CountFunction | None = None
    quantity: str = ""

    @property
    def form(self) -> str:
        """The metric as limits name it: ``decode@N``, ``params``."""
        return self.name if self.phase is None else f"{self.name}@N"


BUILTIN_METRICS = ("prefill", "decode", "memory", "rss", "params")
METRICS: Registry[Metric] = Registry("metric")


def register_metric(metric: Metric) -> None:
    """Make a metric known to limits and objectives.

    Args:
        metric: under its name, which has letters, digits and ``_``.

    Raises:
        InputError: another metric has the name.
    """
    METRICS.register(metric.name, metric)


def metric_named(quantity: str, phase: str | None) -> Metric | None:
    """The metric of an objective; None where there is none.

    Args:
        quantity: such as ``latency``, which is two metrics.
        phase: of the objective's workload; None where no workload is given.
    """
    metrics = [METRICS.get(name) for name in METRICS.known_names()]
    found = [
        m for m in metrics if (m.quantity or m.name) == quantity and (m.phase is None) == (phase is None)
    ]
    return next((m for m in found if m.phase == phase), found[0] if found else None)


def format_quantity(metric: Metric | str, value: float, digits: int = 3) -> str:
    """A metric's value for people: ``3.21 ms``, ``5.1 MiB``, ``1.2M parameters``.

    Args:
        metric: or its name.
        value: in base units.
        digits: significant digits.
    """
    found = METRICS.get(metric) if isinstance(metric, str) else metric
    return found.unit.format(value, digits)


def _given(value: Value | None) -> Value:
    if value is None:
        raise TypeError("the metric needs a predictor or a workload")  # its declaration promises it
    return value


def _latency_cost(
    _space: Space, predictor: "Predictor | None", workload: Workload | None, confidence: float | None
) -> Cost:
    return _given(predictor).cost(_given(workload), confidence)


def _rss_cost(
    _space: Space, predictor: "Predictor | None", workload: Workload | None, confidence: float | None
) -> Cost:
    return _given(predictor).memory_cost(_given(workload), confidence)


def _memory_cost(
    space: Space, _predictor: "Predictor | None", workload: Workload | None, _confidence: float | None
) -> Cost:
    return memory_cost(space, _given(workload))


def _memory_bytes(architecture: Architecture, config: ModelConfig, workload: Workload | None) -> float:
    return memory_bytes(architecture, _given(workload), config)


def _params_cost(
    space: Space, _predictor: "Predictor | None", _workload: Workload | None, _confidence: float | None
) -> Cost:
    return params_cost(space)


def _params(architecture: Architecture, config: ModelConfig, _workload: Workload | None) -> float:
    return params(architecture, config)


for _phase in PHASES:
    register_metric(
        Metric(
            name=_phase,
            quantity="latency",
            unit=SECONDS,
            phase=_phase,
            needs_device=True,
            cost=_latency_cost,
            measurement="latency",
        )
    )
register_metric(
    Metric(
        name="memory",
        unit=BYTES,
        phase="prefill",  # of N tokens at once
        options=("batch", "precision"),
        cost=_memory_cost,
        count=_memory_bytes,
    )
)
register_metric(
    Metric(name="rss", unit=BYTES, phase="prefill", needs_device=True, cost=_rss_cost, measurement="rss")
)
register_metric(Metric(name="params", unit=PARAMETERS, options=(), cost=_params_cost, count=_params))
