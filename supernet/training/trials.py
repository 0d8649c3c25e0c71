"""Stand-alone trainings scheduled by Ray Tune, each in a process of its own."""

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
    from ray.tune import Result

    from space.io.progress import Stage

MAX_RETRIES = 2  # of a training whose process died

Share = Callable[[float], None]
"""Called with the share of a training that is done, from 0 to 1."""

Job = TypeVar("Job")
Shared = TypeVar("Shared")


@dataclass(frozen=True)
class Failure:
    """A training without a result.

    Attributes:
        reason: the error in one line.
        refused: whether the training raised an :class:`InputError`, which another try would raise again.
    """

    reason: str
    refused: bool


def remove_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a finished training.

    Args:
        folder: the training's folder.
    """
    for checkpoint in folder.glob("step-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one torch thread inside the block, so that results are the same on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def format_duration(seconds: float) -> str:
    """Format a duration: ``42 s``, ``12 min`` or ``1.5 h``.

    Args:
        seconds: the duration.
    """
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
    """Run trainings in parallel, each in a process of its own on one CPU.

    Ray Tune's own files are pickles: they are never read, and deleted.

    Args:
        work: trains one job; a function of a module, which writes its result to files that this machine sees.
        jobs: argument of each call.
        shared: argument of every call.
        workers: number of parallel trainings; 0 trains in this process, where other errors than
            :class:`InputError` are raised.
        storage: folder for Tune's files, deleted before and after.
        stage: shows the progress of all trainings.

    Returns:
        The failure of each job; None for a job that succeeded.
    """
    progress = Progress(len(jobs), stage)
    if not workers:
        return [_refusal(work, job, shared, partial(progress, i)) for i, job in enumerate(jobs)]
    with _quiet_tune(), ray_session(workers):
        from ray import tune

        def trainable(config: dict[str, int], arguments: tuple[list[Job], Shared]) -> None:
            jobs, shared = arguments

            def report_share(share: float) -> None:
                tune.report({"share": share, "refused": None})

            failure = _refusal(work, jobs[config["job"]], shared, report_share)
            if failure:
                tune.report({"share": 1.0, "refused": failure.reason})

        class ShowProgress(tune.Callback):
            """Shows the progress of all trainings."""

            def on_trial_result(
                self, iteration: int, trials: list[Any], trial: Any, result: dict[Any, Any], **info: Any
            ) -> None:
                progress(trial.config["job"], result["share"])

            def __getstate__(self) -> dict[str, Any]:
                return {}  # Tune pickles callbacks, and a stage cannot be pickled

        shutil.rmtree(storage, ignore_errors=True)
        with_arguments = tune.with_parameters(trainable, arguments=(list(jobs), shared))
        tuner = tune.Tuner(
            tune.with_resources(with_arguments, {"cpu": 1}),
            param_space={"job": tune.grid_search(list(range(len(jobs))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=workers, reuse_actors=True),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(storage),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=MAX_RETRIES),
                callbacks=[ShowProgress()],
            ),
        )
        try:
            grid = tuner.fit()
            return [_failure(grid[i]) for i in range(len(grid))]  # Tune keeps the order of the jobs
        finally:
            shutil.rmtree(storage, ignore_errors=True)


class Progress:
    """Progress of several trainings in one stage.

    Args:
        count: number of trainings.
        stage: shows their progress.
        done: what it says of those that are done.
    """

    def __init__(self, count: int, stage: "Stage", done: str = "trained") -> None:
        self.stage, self.shares, self.began_s = stage, [0.0] * count, time.monotonic()
        self.done = done

    def __call__(self, job: int, share: float) -> None:
        """Show the progress of all trainings.

        Args:
            job: index of the training that has progressed.
            share: share of it that is done, from 0 to 1.
        """
        self.shares[job] = share
        overall = sum(self.shares) / len(self.shares)
        done = sum(value >= 1 for value in self.shares)
        text = f"{done} of {len(self.shares)} {self.done}"
        if overall:
            left_s = (time.monotonic() - self.began_s) * (1 - overall) / overall
            text += f", about {format_duration(left_s)} left"
        self.stage(overall, text)


def _refusal(
    work: Callable[[Job, Shared, Share], None], job: Job, shared: Shared, report_share: Share
) -> Failure | None:
    """Train; an :class:`InputError` becomes a failure, since another try would raise it again."""
    try:
        work(job, shared, report_share)
    except InputError as error:
        return Failure(str(error), refused=True)
    return None


def _failure(result: "Result") -> Failure | None:
    """The failure of one of Tune's trials, if any."""
    if result.error:
        return Failure(str(result.error).strip().splitlines()[-1].strip(), refused=False)
    reason = (result.metrics or {}).get("refused")
    return Failure(reason, refused=True) if reason else None


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Disable Tune's output, loggers and interrupt handler."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # run_trials reports failures itself
    try:
        yield
    finally:
        logger.setLevel(level)
