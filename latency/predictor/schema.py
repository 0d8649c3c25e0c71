"""The form of a predictor's file: finite numbers in their ranges, before anything is computed from them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt

from latency.card import PREDICTOR
from latency.device_runner.timing import JsonObject
from space.io.config import parse

MAX_SECONDS = 3600.0  # of anything that is predicted
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
Digits = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class AccuracyForm(_Strict):
    """Form of :class:`latency.predictor.accuracy.Accuracy`."""

    models: NonNegativeInt
    mape_percent: NonNegativeFloat
    standard_error_percent: NonNegativeFloat
    worst_percent: NonNegativeFloat
    within_5_percent: Annotated[float, Field(ge=0, le=1)]
    within_10_percent: Annotated[float, Field(ge=0, le=1)]
    spearman: float | None
    span: NonNegativeFloat


class ErrorsForm(_Strict):
    """Form of :class:`latency.predictor.accuracy.PredictorErrors`; empty without errors."""

    leave_one_out_mape_percent: NonNegativeFloat | None = None
    held_out: AccuracyForm | None = None
    flops_and_params: AccuracyForm | None = None
    repeatability_mape_percent: NonNegativeFloat | None = None


class SpreadForm(_Strict):
    """Form of :class:`latency.predictor.bounds.Spread`."""

    seconds: Seconds
    relative: NonNegativeFloat


class WorkloadForm(_Strict):
    """Form of :class:`latency.predictor.workload_model.WorkloadModel`."""

    op_seconds: dict[str, Seconds] = Field(min_length=1)
    op_relative_spreads: dict[str, NonNegativeFloat]
    run_seconds: Seconds
    shared_seconds: dict[Literal["full", "linear", "local"], Seconds] = Field(min_length=3)
    cache_seconds_per_mib: dict[Digits, Seconds]
    spread: SpreadForm
    run_relative_spread: NonNegativeFloat
    errors: ErrorsForm


class MemoryErrorsForm(_Strict):
    """Form of :class:`latency.predictor.accuracy.MemoryErrors`; empty without errors."""

    models: NonNegativeInt | None = None
    mape_percent: NonNegativeFloat | None = None
    worst_percent: NonNegativeFloat | None = None


class MemoryForm(_Strict):
    """Form of :class:`latency.predictor.memory.MemoryModel`."""

    constant: NonNegativeFloat
    per_layer: NonNegativeFloat
    weights: NonNegativeFloat
    states: NonNegativeFloat
    activations: NonNegativeFloat
    residuals: list[float] = Field(min_length=1)
    errors: MemoryErrorsForm


class KindForm(_Strict):
    """Form of :class:`latency.predictor.op_model.KindModel`."""

    rates: list[float]
    theta: list[float]
    inputs: list[list[float]]
    weights: list[float]


class ProcessForm(_Strict):
    """Form of :class:`latency.predictor.op_model.Process`."""

    from_source: bool
    white: NonNegativeFloat
    kinds: dict[str, KindForm]


class OpModelForm(_Strict):
    """Form of :class:`latency.predictor.op_model.OpModel`."""

    weights: list[NonNegativeFloat]
    processes: list[ProcessForm]


class OpsForm(_Strict):
    """Form of :class:`latency.predictor.op_latencies.OpLatencies`."""

    models: dict[str, OpModelForm]
    kinds: dict[str, list[str]]
    source: "OpsForm | None"


class PredictorForm(_Strict):
    """Form of a predictor's file."""

    header: JsonObject
    space: str
    residuals: list[float] = Field(min_length=1)
    workloads: dict[str, WorkloadForm] = Field(min_length=1)
    memory: dict[str, MemoryForm]
    ops: OpsForm


def read_predictor(path: Path, made_by: str | None = None) -> JsonObject:
    """Read a predictor's file and check its form.

    Args:
        path: the file.
        made_by: the command that makes it, for errors.

    Raises:
        InputError: the file is missing, not whole, or a value is missing or outside its range.
    """
    value = PREDICTOR.read(path, made_by)
    parse(PredictorForm, value, str(path))
    return value
