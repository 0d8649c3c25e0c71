"""Trainings scheduled by Ray Tune; those of an audit are of each architecture alone, from scratch.

Tune gives every training a CPU of its own, runs as many at a time as there is room for and tries
again what was lost. What makes trainings go on after they were killed is not Tune's record, which is
pickled and runs what it holds when it is read, but each training's own checkpoints and its
``result.json``.
"""

import contextlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from space import Architecture, InputError, Space, Workload
from space.cost import flops
from space.io.artefact import read_json, write_json
from supernet.data.corpus import Corpus
from supernet.evaluate import EvaluationSet, Quality, evaluate
from supernet.training.parallel import ray_session
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_alone, train
from supernet.training.trainer import Trainer

if TYPE_CHECKING:  # what the stages import, the processes that train here need not
    from search.progress import Reporter, Stage

KIND = "audit trial"
MADE_BY = "formfit audit"
RETRIES = 2  # of a training whose process was lost
Losses = dict[str, float | None]
Share = Callable[[float], None]  # is told which share of a training is done
Job = TypeVar("Job")
Shared = TypeVar("Shared")


@dataclass(frozen=True)
class Failure:
    """Why a training has no result, in one line."""

    reason: str
    refused: bool  # by the training, which would end alike again; else it failed again and again


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One architecture to be trained alone."""

    architecture: Architecture
    config: TrainConfig
    folder: Path  # absolute
    inputs: Mapping[str, str]  # the hashes of all that the result depends on

    def result(self) -> Losses | None:
        """What it reached; None where it was not finished or was made from other inputs."""
        try:
            value = read_json(self.folder / "result.json", KIND, MADE_BY)
        except InputError:
            return None
        if value["header"]["inputs"] != dict(self.inputs):
            return None
        return {name: value[name] for name in ("loss_nats", "recall_loss_nats")}


def losses(quality: Quality) -> Losses:
    """Losses in nats per token, as a JSON value; null where nothing can be recalled."""
    recall = quality.recall_loss_nats
    return {"loss_nats": quality.loss_nats, "recall_loss_nats": None if math.isnan(recall) else recall}


def train_alone(
    space: Space,
    trial: Trial,
    corpus: Corpus,
    data: EvaluationSet,
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> None:
    """Train one architecture from its last checkpoint on, evaluate it and write ``result.json``.

    The checkpoints go once the result is there: it is all that the audit keeps.
    """
    architecture, folder = trial.architecture, trial.folder
    with one_thread():
        checkpoint = train(space, trial.config, folder, report, corpus, architecture)
        model = load_alone(space, checkpoint, architecture)
        quality = evaluate(dict(model.named_parameters()), architecture, space.frame, data)
    write_json(folder / "result.json", KIND, trial.inputs, losses(quality))
    remove_checkpoints(folder)


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


def train_trials(
    space: Space,
    trials: Sequence[Trial],
    corpus: Corpus,
    data: EvaluationSet,
    workers: int,
    reporter: "Reporter",
) -> list[Losses]:
    """The results of all trials, in their order; those without one are trained, so many at a time.

    Raises:
        InputError: what a training refused, a loss that is not finite say.
        RuntimeError: a training failed again and again.
    """
    left = [trial for trial in trials if trial.result() is None]
    if left:
        left.sort(key=lambda trial: -_size(space, trial))  # the longest first, so that all end together
        seconds = expected_seconds(space, left, corpus) / min(workers, len(left))
        title = f"train {len(left)} alone for {left[0].config.steps} steps, about {_span(seconds)}"
        storage = left[0].folder.parent.parent / "tune"
        with reporter.stage(title) as stage:
            failures = run_trials(_train, left, (space, corpus, data), workers, storage, stage)
        failed = [failure for failure in failures if failure]
        for trial, failure in zip(left, failures, strict=True):
            if failure and failure.refused:
                raise InputError(f"audit: {trial.architecture.key}: {failure.reason}")
        if failed:
            many = f"{len(failed)} trainings failed, what is done is kept"
            raise RuntimeError(f"audit: {many}: {failed[0].reason}")
    found = [trial.result() for trial in trials]
    missing = [trial.folder for trial, result in zip(trials, found, strict=True) if result is None]
    if missing:
        raise RuntimeError(f"{missing[0]}: the result just written cannot be read back")
    return [result for result in found if result is not None]


def _train(trial: Trial, shared: tuple[Space, Corpus, EvaluationSet], tell: Share) -> None:
    space, corpus, data = shared
    train_alone(space, trial, corpus, data, lambda row: tell(row["step"] / row["steps"]))


def _size(space: Space, trial: Trial) -> int:
    """FLOPs of reading one row of its batches."""
    return row_flops(space, trial.architecture, trial.config.length or space.context)


def row_flops(space: Space, architecture: Architecture, length: int) -> int:
    """FLOPs of reading so many tokens."""
    return flops(architecture, Workload(phase="prefill", length=length), space.frame)


def expected_seconds(space: Space, trials: Sequence[Trial], corpus: Corpus) -> float:
    """About what trainings take on one thread: two steps of the middle one, scaled by everyone's FLOPs."""
    middle = trials[len(trials) // 2]
    with one_thread():
        trainer = Trainer(space, middle.config, corpus, middle.architecture)
        trainer.step(0)
        began = time.monotonic()
        trainer.step(1)
        trainer.step(2)
        step = (time.monotonic() - began) / 2
    return step / _size(space, middle) * sum(_size(space, trial) * trial.config.steps for trial in trials)


def _span(seconds: float) -> str:
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
        self.stage(together, f"{done} of {len(self.shares)} trained, about {_span(left)} left")


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
