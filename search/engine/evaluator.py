"""Evaluators: they give the qualities of architectures, or the reason why there are none.

Results come back in the order of submission. An architecture whose evaluation raises is tried again, then
recorded as failed. An evaluator of a supernet is :mod:`search.engine.supernet_evaluator`; one that works in
several processes is made by :func:`search.engine.workers.pool`.
"""

import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import torch

from latency.device_runner.fingerprint import cpu_model
from search.problem.objective import BUILTIN_QUALITIES
from space import Architecture, InputError
from supernet.evaluate import Quality

RETRIES = 2


@dataclass(frozen=True)
class Failed:
    """An architecture that could not be evaluated.

    Attributes:
        reason: in one line.
    """

    reason: str


Outcome = Quality | Failed
EvaluateOne = Callable[[Architecture, str], Quality]  # an architecture, on the windows of a stage
EvaluateArchitecture = Callable[[Architecture], float | Mapping[str, float]]


class EvaluateMany(Protocol):
    """A function that evaluates architectures; a search needs one."""

    def __call__(self, architectures: Sequence[Architecture], stage: str) -> Iterator[Outcome]:
        """Evaluate architectures in order.

        Args:
            architectures: to be evaluated.
            stage: ``search``, ``middle`` or ``front``, which names the set of windows.
        """
        ...


@dataclass(frozen=True)
class Machine:
    """The versions that the last bits of a loss depend on, beside the weights and the text.

    Attributes:
        cpu: the processor's name.
        torch: torch's version.
    """

    cpu: str
    torch: str

    @staticmethod
    def here() -> "Machine":
        """The machine of this process."""
        return Machine(cpu_model() or platform.machine(), torch.__version__)


def quality_value(quality: Quality, name: str) -> float:
    """The value of a quality by name; NaN where it was not evaluated.

    Args:
        quality: of an architecture.
        name: ``loss``, ``recall_loss`` or a registered objective.
    """
    values = {"loss": quality.loss_nats, "recall_loss": quality.recall_loss_nats, **quality.extra}
    return values.get(name, math.nan)


def make_quality(values: Mapping[str, float]) -> Quality:
    """A quality of values by name; the inverse of :func:`quality_value`.

    Args:
        values: of the qualities; NaN for a loss that is missing.
    """
    return Quality(
        loss_nats=float(values.get("loss", math.nan)),
        recall_loss_nats=float(values.get("recall_loss", math.nan)),
        extra={name: float(value) for name, value in values.items() if name not in BUILTIN_QUALITIES},
    )


def attempt(
    evaluate_one: EvaluateOne, architecture: Architecture, stage: str, required: Sequence[str] = ("loss",)
) -> Outcome:
    """Evaluate one architecture, again where it raises.

    Args:
        evaluate_one: gives its quality.
        architecture: to be evaluated.
        stage: the name of the set of windows.
        required: qualities that must be finite.
    """
    reason = ""
    for _ in range(1 + RETRIES):
        try:
            quality = evaluate_one(architecture, stage)
        except Exception as error:  # of any kind: the search continues
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            values = {name: quality_value(quality, name) for name in required}
            wrong = [f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)]
            return Failed(wrong[0]) if wrong else quality
    return Failed(reason)


class FunctionEvaluator:
    """Evaluates architectures by a caller's function.

    Args:
        evaluate: gives a value of the first quality, or values by the names of qualities.
        qualities: that are objectives.
    """

    def __init__(self, evaluate: EvaluateArchitecture, qualities: Sequence[str]) -> None:
        self.evaluate, self.qualities = evaluate, tuple(qualities)

    def __call__(self, architecture: Architecture, stage: str) -> Quality:
        """The quality of an architecture, on whatever the function evaluates it.

        Raises:
            InputError: the function gives no value of a quality that is an objective.
        """
        value = self.evaluate(architecture)
        values = {self.qualities[0]: float(value)} if isinstance(value, Real) else dict(value)  # type: ignore[arg-type]
        missing = [name for name in self.qualities if name not in values]
        if missing:
            raise InputError(f"the evaluator gives no {missing[0]}, but {', '.join(values) or 'nothing'}")
        return make_quality(values)
