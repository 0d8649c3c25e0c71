"""Trainings scheduled by Ray Tune, each in a process of its own."""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from space import InputError
from supernet.training.parallel import ray_session

if TYPE_CHECKING:
    from space.io.progress import Stage


RETRIES = 2  # of a training whose process was lost


Share = Callable[[float], None]  # is told which share of a training is done


Job = TypeVar("Job")


Shared = TypeVar("Shared")


@dataclass(frozen=True)
class Failure:
    """Why a training has no result, in one line."""

    reason: str
    refused: bool  # by the training, which would end alike again; else it failed again and again


def remove_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a training that is finished."""
    for old in folder.glob("step-*"):
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread, so that a result is the same wherever it is found."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def format_duration(seconds: float) -> str:
    """A duration as text: ``42 s``, ``12 min`` or ``1.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def run_trials(
    work: Callable[[Job, Shared, Share], None],
    jobs: Sequence[Job],
    shared: Shared,
    workers: int,
    storage: Path,
    stage: "Stage",
) -> list[Failure | None]:
    """Train, each in a process of its own on one CPU, so many at a time; with no workers, here.

    Tune's own notes are pickled, so they are never read and do not stay.

    Args:
        work: a function of a module; what it reaches it writes to files that this machine sees.
        jobs: what it is called with, one at a time.
        shared: what every call needs too.
        workers: trainings at a time; 0 trains in this process, where only what is refused is a failure.
        storage: a folder for Tune's notes, deleted before and after.
        stage: shown how far all are.

    Returns:
        What went wrong, if anything, by job.
    """
    progress = Progress(len(jobs), stage)
    if not workers:
        return [_refusal(work, job, shared, partial(progress, i)) for i, job in enumerate(jobs)]
    with _quiet_tune(), ray_session(workers):
        from ray import tune

        def trainable(config: dict[str, Any], everything: tuple[Any, Any]) -> None:
            jobs, shared = everything

            def tell(share: float) -> None:
                tune.report({"share": share, "refused": None})

            refused = _refusal(work, jobs[config["job"]], shared, tell)
            if refused:
                tune.report({"share": 1.0, "refused": refused.reason})

        class Told(tune.Callback):
            """Hears of all trainings."""

            def on_trial_result(
                self, iteration: int, trials: list[Any], trial: Any, result: dict[Any, Any], **info: Any
            ) -> None:
                progress(trial.config["job"], result["share"])

            def __getstate__(self) -> dict[str, Any]:
                return {}  # Tune keeps callbacks among its notes, and a stage cannot be kept

        shutil.rmtree(storage, ignore_errors=True)
        given = tune.with_parameters(trainable, everything=(list(jobs), shared))
        tuner = tune.Tuner(
            tune.with_resources(given, {"cpu": 1}),
            param_space={"job": tune.grid_search(list(range(len(jobs))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=workers, reuse_actors=True),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(storage),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[Told()],
            ),
        )
        try:
            grid = tuner.fit()
            return [_failure(grid[i]) for i in range(len(grid))]  # in the order of the jobs
        finally:
            shutil.rmtree(storage, ignore_errors=True)


class Progress:
    """Shows how far several trainings are together."""

    def __init__(self, count: int, stage: "Stage") -> None:
        self.stage, self.shares, self.began = stage, [0.0] * count, time.monotonic()

    def __call__(self, job: int, share: float) -> None:
        """Take note of how far one of them is."""
        self.shares[job] = share
        together = sum(self.shares) / len(self.shares)
        done = sum(value >= 1 for value in self.shares)
        left = (time.monotonic() - self.began) * (1 - together) / max(together, 1e-6)
        self.stage(together, f"{done} of {len(self.shares)} trained, about {format_duration(left)} left")


def _refusal(
    work: Callable[[Job, Shared, Share], None], job: Job, shared: Shared, tell: Share
) -> Failure | None:
    """Train; what the training refuses, another try would refuse too."""
    try:
        work(job, shared, tell)
    except InputError as error:
        return Failure(str(error), refused=True)
    return None


def _failure(item: Any) -> Failure | None:
    """What went wrong in one of Tune's trials."""
    if item.error:
        return Failure(str(item.error).strip().splitlines()[-1].strip(), refused=False)
    refused = (item.metrics or {}).get("refused")
    return Failure(refused, refused=True) if refused else None


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune without its own printing, loggers and handling of Ctrl-C."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # a failure is told in our own words
    try:
        yield
    finally:
        logger.setLevel(level)
