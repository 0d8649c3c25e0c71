"""Distances of measurements from predictions: scale, conformal bounds, intervals."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import t as student

from latency.device_runner.timing import JsonObject

Array = NDArray[np.float64]
MIN_RELATIVE = 0.005  # below the repeatability of any timing here
MIN_GROUPS = 4  # from which their deviations can be told
MIN_BETWEEN = 0.015  # relative deviation between processes on a quiet machine; see docs/adr/0004
MEAN_TO_STD = math.sqrt(math.pi / 2)  # ratio of a normal's standard deviation to its mean absolute deviation


@dataclass(frozen=True)
class Spread:
    """Standard deviation of measurements around predictions: ``seconds + relative * prediction``.

    A part in seconds is the same for all models. Small models therefore have the larger relative errors. The
    sum rises with the prediction, so a bound on it bounds the prediction, which keeps limits exact.

    Attributes:
        seconds: part that does not depend on the prediction.
        relative: part that is proportional to it.
    """

    seconds: float
    relative: float

    def at(self, predicted: Array) -> Array:
        """Standard deviations.

        Args:
            predicted: predictions, s: [N].

        Returns:
            Seconds: [N].
        """
        return np.asarray(self.seconds + self.relative * predicted)

    def beside(self, relative: float) -> "Spread":
        """The spread with a further independent relative deviation.

        Args:
            relative: its relative standard deviation.
        """
        return Spread(self.seconds, math.hypot(self.relative, relative))

    def to_json(self) -> JsonObject:
        """The spread as a JSON object."""
        return asdict(self)

    @staticmethod
    def from_json(value: JsonObject) -> "Spread":
        """Read a spread; the inverse of :meth:`to_json`."""
        return Spread(**value)


def fit_spread(predicted: Array, measured: Array) -> Spread:
    """Scale of the residuals of models that no prediction used.

    Args:
        predicted: seconds: [N].
        measured: seconds: [N].
    """
    off = np.abs(measured / predicted - 1)
    rows = np.column_stack([1 / predicted, np.ones(len(predicted))])
    scale = rows.max(axis=0)
    seconds, relative = MEAN_TO_STD * nnls(rows / scale, off)[0] / scale
    return Spread(float(seconds), max(MIN_RELATIVE, float(relative)))


def between_groups(off: Array, groups: Sequence[str]) -> float:
    """Standard deviation of what the values of a group have in common.

    Args:
        off: values: [N].
        groups: label of each: [N].

    Returns:
        At least :data:`MIN_BETWEEN`; the variance within groups is subtracted from that of their means.
    """
    labels = np.unique(groups, return_inverse=True)[1]
    some = [off[labels == label] for label in np.unique(labels)]
    some = [values for values in some if len(values) > 1]
    if len(some) < MIN_GROUPS:
        return MIN_BETWEEN
    means = np.array([values.mean() for values in some])
    within = float(np.mean([values.var(ddof=1) / len(values) for values in some]))
    return max(MIN_BETWEEN, math.sqrt(max(0.0, float(means.var(ddof=1)) - within)))


def conformal(residuals: Sequence[float], confidence: float) -> float:
    """Bound that a further residual exceeds with probability at most ``1 - confidence``; at least 0.

    This is the split-conformal quantile (Vovk, Gammerman and Shafer 2005). With too few residuals for the
    confidence, it is the larger of the maximum residual and Student's t quantile.

    Args:
        residuals: exchangeable residuals in units of their standard deviation.
        confidence: between 0 and 1.
    """
    ordered = np.sort(residuals)
    count = len(ordered)
    rank = math.ceil((count + 1) * confidence)
    found = float(ordered[min(rank, count) - 1])
    if rank > count > 1:
        found = max(found, float(student.ppf(confidence, count - 1)))
    return max(0.0, found)
