"""Settings of profiling. Importing them loads no runtime and no numerical library."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from latency.runtimes.registry import RUNTIMES
from space import InputError, Space, Workload

if TYPE_CHECKING:
    from latency.device_runner.timer import TimerConfig
    from latency.predictor.design import ModelCounts

MINUTES = {"s": 1 / 60, "m": 1.0, "h": 60.0}


class ProfileConfig(BaseModel):
    """Settings of profiling a device.

    Attributes:
        workloads: workloads to measure; none means prefill and decode at the space's context.
        threads: number of threads of the runtime.
        optimal_models: maximum number of models that are chosen to tell op latencies apart, for the fit.
        random_models: models that are drawn at random, for the fit and its intervals.
        held_out_models: models that the predictor is tested on.
        repeated_models: held-out models that are measured twice, for the repeatability.
        block_ms: minimum length of a timed block, ms.
        min_rounds: minimum rounds of every timing. Few are enough: the fit averages over models.
        max_rounds: maximum rounds of every timing.
        group: models that are in memory at once, and between two saves. Where a process puts its memory
            shifts all models of a group by about a percent, so several groups are better than one.
        error: expected relative error of a latency at which no more models are chosen.
        budget_minutes: time for everything; choosing stops in time for the other models. None: no limit.
        seed: seed of all choices.
        runtime: registered name of the runtime.
        precision: precision of the models that will be shipped.
        rss: True to measure memory as well, if the runtime supports it.
        rss_fit_models: models whose memory is measured to fit it.
        rss_models: held-out models whose memory is measured to test the fit.
        max_noise: maximum relative difference between two timings of the same work; None: any.
        max_error: relative error on held-out models above which a predictor that is not clearly better than
            FLOPs and parameters is refused; None: any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    workloads: tuple[str, ...] = ()
    threads: Annotated[int, Field(gt=0)] = 1
    optimal_models: Annotated[int, Field(ge=4)] = 60
    random_models: Annotated[int, Field(ge=2)] = 30
    held_out_models: Annotated[int, Field(ge=3)] = 30
    repeated_models: Annotated[int, Field(ge=1)] = 8
    block_ms: Annotated[float, Field(gt=0)] = 3.0
    min_rounds: Annotated[int, Field(ge=2)] = 20
    max_rounds: Annotated[int, Field(ge=2)] = 40
    group: Annotated[int, Field(gt=1)] = 16
    error: Annotated[float, Field(gt=0)] = 0.005
    budget_minutes: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    runtime: str = "onnxruntime"
    precision: Literal["fp32", "int8", "int8-dynamic"] = "fp32"
    rss: bool = True
    rss_fit_models: Annotated[int, Field(ge=6)] = 20
    rss_models: Annotated[int, Field(ge=1)] = 10
    max_noise: Annotated[float, Field(gt=0)] | None = 0.1
    max_error: Annotated[float, Field(gt=0)] | None = 0.05

    @field_validator("runtime")
    @classmethod
    def _registered(cls, name: str) -> str:
        # A built-in name is accepted without importing the library behind it.
        if name not in RUNTIMES.builtin and name not in RUNTIMES:
            raise ValueError(f"{name!r} is not one of {', '.join(RUNTIMES)}")
        return name

    def timer(self) -> TimerConfig:
        """Settings of the timer."""
        from latency.device_runner.timer import TimerConfig

        maximum = max(self.min_rounds, self.max_rounds)
        return TimerConfig(
            block_ms=self.block_ms, min_rounds=self.min_rounds, max_rounds=maximum, seed=self.seed
        )

    def counts(self) -> ModelCounts:
        """Numbers of whole models to measure."""
        from latency.predictor.design import ModelCounts

        return ModelCounts(
            optimal=self.optimal_models,
            random=self.random_models,
            held_out=self.held_out_models,
            repeated=self.repeated_models,
            seed=self.seed,
        )

    def parsed(self, space: Space) -> list[Workload]:
        """The workloads to profile.

        Args:
            space: its context bounds the workloads, and is the default.

        Raises:
            InputError: a workload is malformed, longer than the context, or names other threads or another
                precision than the settings.
        """
        texts = self.workloads or tuple(f"{phase}@{space.max_seq_len}" for phase in ("prefill", "decode"))
        found = []
        for text in texts:
            for name, value in (("threads", self.threads), ("precision", self.precision)):
                text += "" if f"{name}=" in text else f",{name}={value}"
            workload = Workload.parse(text)
            if workload.length > space.max_seq_len:
                raise InputError(
                    f"workload {text}: longer than the context {space.max_seq_len} of space {space.name}"
                )
            if workload.threads != self.threads:
                raise InputError(f"workload {text}: profiling runs on {self.threads} threads")
            if workload.precision != self.precision:
                raise InputError(f"workload {text}: profiling is of {self.precision}; give --precision")
            found.append(workload)
        return found


def minutes(text: str) -> float:
    """Parse a duration.

    Args:
        text: a number with a unit, such as ``90s``, ``10m`` or ``1.5h``.

    Returns:
        Minutes.

    Raises:
        InputError: the text has another form, or the duration is 0.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh])", text.strip())
    if not match or not float(match[1]):
        raise InputError(f"budget {text!r}: expected a time above 0 such as 90s, 10m or 1.5h")
    return float(match[1]) * MINUTES[match[2]]
