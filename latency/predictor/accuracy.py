"""Accuracy of predictions on measured models."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latency.device_runner.timing import JsonObject
from latency.predictor.schema import read_predictor

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Agreement of predicted with measured latencies.

    Attributes:
        models: number of models.
        mape_percent: mean absolute relative error.
        standard_error_percent: standard error of that mean.
        worst_percent: maximum absolute relative error.
        within_5_percent: share of models with an error of at most 5%.
        within_10_percent: share of models with an error of at most 10%.
        spearman: rank correlation; None for fewer than three models.
        span: largest over smallest measured latency.
    """

    models: int
    mape_percent: float
    standard_error_percent: float
    worst_percent: float
    within_5_percent: float
    within_10_percent: float
    spearman: float | None
    span: float


def accuracy(predicted: Array, measured: Array) -> Accuracy:
    """Compare predictions with measurements.

    Args:
        predicted: predicted latencies: [N].
        measured: measured latencies, in the same unit: [N].
    """
    from scipy.stats import spearmanr  # half a second, and errors that were read need it not

    relative = np.abs(predicted / measured - 1)
    return Accuracy(
        models=len(measured),
        mape_percent=100 * float(relative.mean()),
        standard_error_percent=100 * float(relative.std() / np.sqrt(len(relative))),
        worst_percent=100 * float(relative.max()),
        within_5_percent=float((relative <= 0.05).mean()),
        within_10_percent=float((relative <= 0.10).mean()),
        spearman=float(spearmanr(predicted, measured).statistic) if len(measured) > 2 else None,
        span=float(measured.max() / measured.min()),
    )


@dataclass(frozen=True, kw_only=True)
class HeldOutErrors:
    """Accuracy on models that no fit used, beside a simpler predictor.

    Attributes:
        held_out: accuracy of the predictor.
        flops_and_params: accuracy of a linear fit on FLOPs and parameters.
        repeatability_mape_percent: mean relative difference between two measurements of a model, the lower
            bound of any error; None if no model was measured twice.
    """

    held_out: Accuracy
    flops_and_params: Accuracy
    repeatability_mape_percent: float | None


@dataclass(frozen=True, kw_only=True)
class PredictorErrors:
    """Errors of the fit of one workload.

    Attributes:
        leave_one_out_mape_percent: mean absolute relative error on the models of the fit, each predicted by a
            fit to the others.
        test: accuracy on other models; None if none were held out.
    """

    leave_one_out_mape_percent: float
    test: HeldOutErrors | None = None

    def to_json(self) -> JsonObject:
        """The errors as one flat JSON object."""
        tested = asdict(self.test) if self.test else {}
        return {"leave_one_out_mape_percent": self.leave_one_out_mape_percent, **tested}

    @staticmethod
    def from_json(value: JsonObject) -> "PredictorErrors":
        """Read errors; the inverse of :meth:`to_json`."""
        tested = None
        if "held_out" in value:
            tested = HeldOutErrors(
                held_out=Accuracy(**value["held_out"]),
                flops_and_params=Accuracy(**value["flops_and_params"]),
                repeatability_mape_percent=value["repeatability_mape_percent"],
            )
        return PredictorErrors(leave_one_out_mape_percent=value["leave_one_out_mape_percent"], test=tested)


@dataclass(frozen=True, kw_only=True)
class MemoryErrors:
    """Errors of predicted peak memory on models that no fit used.

    Attributes:
        models: number of models.
        mape_percent: mean absolute relative error.
        worst_percent: maximum absolute relative error.
    """

    models: int
    mape_percent: float
    worst_percent: float


def read_predictor_errors(path: Path) -> dict[str, PredictorErrors]:
    """The errors of a fitted predictor by workload, from its file; workloads without errors are left out.

    Args:
        path: the file.

    Raises:
        InputError: the file is missing or not whole.
    """
    models = read_predictor(path)["workloads"]
    return {
        workload: PredictorErrors.from_json(model["errors"])
        for workload, model in models.items()
        if model["errors"]
    }


def read_op_latencies(path: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Seconds of each op and their relative standard deviation, by workload, from a predictor's file.

    Args:
        path: the file.

    Raises:
        InputError: the file is missing or not whole.
    """
    return {
        workload: {
            op: (seconds, model["op_relative_spreads"].get(op, math.nan))
            for op, seconds in model["op_seconds"].items()
        }
        for workload, model in read_predictor(path)["workloads"].items()
    }
