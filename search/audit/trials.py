"""Stand-alone trainings of an audit, scheduled by Ray Tune.

Tune gives every training a CPU of its own, runs as many in parallel as there are CPUs, and repeats lost ones.
Killed audits resume from each training's own checkpoints and ``result.json``, not from Tune's record: that is
pickled, and reading it would execute its content.
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
from supernet.training.loop import row_share
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_stand_alone, train
from supernet.training.trainer import Trainer
from supernet.training.trials import Share, format_duration, one_thread, remove_checkpoints, run_trials

if TYPE_CHECKING:  # not needed by the processes that train
    from space.io.progress import Reporter

AUDIT_TRIAL = Artefact("audit trial", "formfit audit")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The stand-alone training of one architecture.

    Attributes:
        architecture: the architecture.
        config: of the training.
        folder: of its files, absolute.
        inputs: sha256 of everything that the result depends on, by name.
    """

    architecture: Architecture
    config: TrainConfig
    folder: Path
    inputs: Mapping[str, str]

    def result(self) -> Losses | None:
        """Losses in nats per token; None if the training is not finished or has other inputs."""
        try:
            value = AUDIT_TRIAL.read(self.folder / "result.json")
        except InputError:
            return None
        header = value.pop("header")
        return value if header["inputs"] == dict(self.inputs) else None


def train_stand_alone(
    space: Space,
    trial: Trial,
    corpus: Corpus,
    data: EvaluationSet,
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> None:
    """Train one architecture from scratch or from its last checkpoint, evaluate it and write ``result.json``.

    The checkpoints are deleted afterwards.

    Args:
        space: of the architecture.
        trial: the training.
        corpus: that it reads.
        data: that it is evaluated on.
        report: called with every row of the training's metrics.
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
    """Results of all trials, in their order; trials without one are trained.

    Args:
        space: of the architectures.
        trials: the trainings.
        corpus: that they read.
        data: that they are evaluated on.
        workers: parallel trainings.
        reporter: shows the progress.

    Raises:
        InputError: a training refused, because of a loss that is not finite for example.
        RuntimeError: a training failed repeatedly.
    """
    left = [trial for trial in trials if trial.result() is None]
    if left:
        _run(space, left, corpus, data, workers, reporter)
    results = [trial.result() for trial in trials]
    missing = [trial.folder for trial, result in zip(trials, results, strict=True) if result is None]
    if missing:
        raise RuntimeError(f"{missing[0]}: the result just written cannot be read back")
    return [result for result in results if result is not None]


def _run(
    space: Space,
    trials: Sequence[Trial],
    corpus: Corpus,
    data: EvaluationSet,
    workers: int,
    reporter: "Reporter",
) -> None:
    """Train trials in Ray Tune.

    Raises:
        InputError: a training refused.
        RuntimeError: a training failed repeatedly.
    """
    left = sorted(trials, key=lambda trial: -_size(space, trial))  # longest first: all end at about one time
    seconds = expected_seconds(space, left, corpus) / min(workers, len(left))
    title = (
        f"train {len(left)} stand-alone for {left[0].config.steps} steps, about {format_duration(seconds)}"
    )
    storage = left[0].folder.parent.parent / "tune"
    with reporter.stage(title) as stage:
        failures = run_trials(_train, left, (space, corpus, data), workers, storage, stage)
    failed = [(trial, failure) for trial, failure in zip(left, failures, strict=True) if failure]
    for trial, failure in failed:
        if failure.refused:
            raise InputError(f"audit: {trial.architecture.key}: {failure.reason}")
    if failed:
        reason = failed[0][1].reason
        raise RuntimeError(f"audit: {len(failed)} trainings failed, finished ones are kept: {reason}")


def _train(trial: Trial, shared: tuple[Space, Corpus, EvaluationSet], tell: Share) -> None:
    space, corpus, data = shared
    train_stand_alone(space, trial, corpus, data, lambda row: tell(row_share(row)))


def _size(space: Space, trial: Trial) -> int:
    """FLOPs of a forward pass over one row of a trial's batches."""
    return row_flops(space, trial.architecture, trial.config.length or space.max_seq_len)


def expected_seconds(space: Space, trials: Sequence[Trial], corpus: Corpus) -> float:
    """Estimated duration of trainings on one thread: steps of one, scaled by the FLOPs of all.

    Args:
        space: of the architectures.
        trials: by descending size; the middle one is timed.
        corpus: that they read.
    """
    middle = trials[len(trials) // 2]
    with one_thread():
        trainer = Trainer(space, middle.config, corpus, middle.architecture)
        trainer.step(0)  # warm-up
        began = time.monotonic()
        trainer.step(1)
        trainer.step(2)
        step = (time.monotonic() - began) / 2
    return step / _size(space, middle) * sum(_size(space, trial) * trial.config.steps for trial in trials)
