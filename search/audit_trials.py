"""The trainings of an audit: each architecture alone, from scratch, scheduled by Ray Tune.

Tune gives every training a CPU of its own, runs as many at a time as there is room for and tries
again what was lost. What makes an audit go on after it was killed is not Tune's record, which is
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from space import Architecture, InputError, Space, Workload
from space.cost import flops
from space.files import read_json, write_json
from supernet import Quality, evaluate, train
from supernet.corpus import Corpus
from supernet.evaluate import EvaluationSet
from supernet.parallel import ray_session
from supernet.recipe import TrainConfig
from supernet.train import load_alone
from supernet.trainer import Trainer

if TYPE_CHECKING:  # what the stages import, the processes that train here need not
    from search.run import Reporter, Stage

KIND = "audit trial"
MADE_BY = "formfit audit"
RETRIES = 2  # of a training whose process was lost
Losses = dict[str, float | None]


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
    torch.set_num_threads(1)
    architecture, folder = trial.architecture, trial.folder
    checkpoint = train(space, trial.config, folder, report, corpus, architecture)
    model = load_alone(space, checkpoint, architecture)
    quality = evaluate(dict(model.named_parameters()), architecture, space.frame, data)
    write_json(folder / "result.json", KIND, trial.inputs, losses(quality))
    for old in folder.glob("step-*"):
        shutil.rmtree(old, ignore_errors=True)


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
        with reporter.stage(title) as stage, ray_session(workers):
            _fit(space, left, corpus, data, workers, stage)
    found = [trial.result() for trial in trials]
    missing = [trial.folder for trial, result in zip(trials, found, strict=True) if result is None]
    if missing:
        raise RuntimeError(f"{missing[0]}: the result just written cannot be read back")
    return [result for result in found if result is not None]


def _size(space: Space, trial: Trial) -> int:
    """FLOPs of reading one row of its batches."""
    workload = Workload(phase="prefill", length=trial.config.length or space.context)
    return flops(trial.architecture, workload, space.frame)


def expected_seconds(space: Space, trials: Sequence[Trial], corpus: Corpus) -> float:
    """About what trainings take on one thread: two steps of the middle one, scaled by everyone's FLOPs."""
    middle = trials[len(trials) // 2]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer = Trainer(space, middle.config, corpus, middle.architecture)
        trainer.step(0)
        began = time.monotonic()
        trainer.step(1)
        trainer.step(2)
        step = (time.monotonic() - began) / 2
    finally:
        torch.set_num_threads(threads)
    return step / _size(space, middle) * sum(_size(space, trial) * trial.config.steps for trial in trials)


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _fit(
    space: Space, trials: Sequence[Trial], corpus: Corpus, data: EvaluationSet, workers: int, stage: "Stage"
) -> None:
    """Have Tune run the trials. Its own notes are pickled, so they are never read and do not stay."""
    with _quiet_tune():
        from ray import tune

        count = len(trials)

        def trainable(config: dict[str, Any], shared: tuple[Any, ...]) -> None:
            space, trials, corpus, data = shared
            trial: Trial = trials[config["trial"]]

            def report(row: Mapping[str, Any]) -> None:
                tune.report({"share": row["step"] / row["steps"], "refused": None})

            try:
                train_alone(space, trial, corpus, data, report)
            except InputError as error:  # another try would end alike
                tune.report({"share": 1.0, "refused": f"{trial.architecture.key}: {error}"})

        class Progress(tune.Callback):
            """Tells the stage how far all trials are."""

            def __init__(self) -> None:
                self.shares: dict[int, float] = {}
                self.began = time.monotonic()

            def on_trial_result(
                self, iteration: int, trials: list[Any], trial: Any, result: dict[Any, Any], **info: Any
            ) -> None:
                self.shares[trial.config["trial"]] = result["share"]
                share = sum(self.shares.values()) / count
                done = sum(value >= 1 for value in self.shares.values())
                left = (time.monotonic() - self.began) * (1 - share) / max(share, 1e-6)
                stage(share, f"{done} of {count} trained, about {_span(left)} left")

            def __getstate__(self) -> dict[str, Any]:
                return {}  # Tune keeps callbacks among its notes, and a stage cannot be kept

        storage = trials[0].folder.parent.parent / "tune"
        shutil.rmtree(storage, ignore_errors=True)
        shared = (space, list(trials), corpus, data)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(trainable, shared=shared), {"cpu": 1}),
            param_space={"trial": tune.grid_search(list(range(count)))},
            tune_config=tune.TuneConfig(max_concurrent_trials=workers, reuse_actors=True),
            run_config=tune.RunConfig(
                name="audit",
                storage_path=str(storage),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[Progress()],
            ),
        )
        try:
            grid = tuner.fit()
            found = [grid[i] for i in range(len(grid))]
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    refused = [item.metrics["refused"] for item in found if item.metrics and item.metrics.get("refused")]
    if refused:
        raise InputError(f"audit: {refused[0]}")
    failed = [item.error for item in found if item.error]
    if failed:
        raise RuntimeError(f"audit: {len(failed)} trainings failed, what is done is kept: {failed[0]}")


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
