"""Trainings scheduled by Ray Tune; those of an audit are of each architecture alone, from scratch.

Tune gives every training a CPU of its own, runs as many at a time as there is room for and tries
again what was lost. What makes trainings go on after they were killed is not Tune's record, which is
pickled and runs what it holds when it is read, but each training's own checkpoints and its
``result.json``.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from space import Architecture, InputError, Space
from space.cost import row_flops
from space.io.artefact import Artefact
from supernet.data.corpus import Corpus
from supernet.evaluate import EvaluationSet, Losses, evaluate, losses
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_stand_alone, train
from supernet.training.trainer import Trainer
from supernet.training.trials import Share, format_duration, one_thread, remove_checkpoints, run_trials

if TYPE_CHECKING:  # what the stages import, the processes that train here need not
    from space.io.progress import Reporter

AUDIT_TRIAL = Artefact("audit trial", "formfit audit")
MADE_BY = "formfit audit"


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
            value = AUDIT_TRIAL.read(self.folder / "result.json")
        except InputError:
            return None
        if value["header"]["inputs"] != dict(self.inputs):
            return None
        return {name: value[name] for name in ("loss_nats", "recall_loss_nats")}


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
        model = load_stand_alone(space, checkpoint, architecture)
        quality = evaluate(dict(model.named_parameters()), architecture, space.config, data)
    AUDIT_TRIAL.write(folder / "result.json", trial.inputs, losses(quality))
    remove_checkpoints(folder)


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
        title = f"train {len(left)} alone for {left[0].config.steps} steps, about {format_duration(seconds)}"
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
    return row_flops(space, trial.architecture, trial.config.length or space.max_seq_len)


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
