"""Successive halving: the best members of a front are trained for a short time before one is chosen.

The loss inside the supernet ranks architectures well, but not exactly as they rank with weights of their own.
So each finalist starts from its weights in the supernet and learns from the text and from the supernet's
largest sub-network. Synchronous halving (Jamieson and Talwalkar 2016) saves training on the worse ones: all
train to the end of a rung, and the better half by held-out loss continues to twice as many steps. Every
finalist sees the same batches, at a learning rate that does not depend on the number of rungs it reaches.

A rung's ``result.json`` and the training's checkpoints let a killed run resume. The same seed selects the
same finalist with the same weights, with any number of workers or with none.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from search.engine.config import FinalistsConfig, rungs
from search.select.finalist import Finalist, RungResult, RungTraining
from space import Architecture, InputError, Space, genome
from space.cost import row_flops
from space.cpus import available_cpus
from space.io.artefact import (
    Artefact,
    atomic_path,
    canonical_json,
    check_inputs,
    digest,
    file_digest,
)
from supernet.data.corpus import Corpus
from supernet.evaluate import KL, EvaluationSet, evaluate, evaluation_digest, loss_name, losses, run_parent
from supernet.extract import SUBMODEL, SubModel, extract, read_submodel, write_submodel
from supernet.training.checkpoint import Checkpoint
from supernet.training.distillation import distil, largest_teacher, load_subnet
from supernet.training.parallel import ray_session
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_supernet, training_inputs
from supernet.training.trials import Share, one_thread, remove_checkpoints, run_trials

if TYPE_CHECKING:  # not needed by the processes that train
    from space.io.progress import Reporter
    from supernet.training.train import Trained

FINALISTS = Artefact("finalists", "formfit search")
BASELINES = Artefact("baselines", "formfit search")


def distil_finalists(
    trained: "Trained",
    architectures: Sequence[Architecture],
    data: EvaluationSet,
    config: FinalistsConfig,
    quality: str,
    folder: Path,
    reporter: "Reporter",
    workers: int | None = None,
    seed: int = 0,
) -> list[Finalist]:
    """Distil the first ``config.count`` architectures, rank them and write ``finalists.json``.

    Finalists of later rungs rank first, those of the same rung by loss. A run that was stopped resumes; a
    finished one is read.

    Args:
        trained: the supernet that finalists inherit their weights from, and the text.
        architectures: members of its space, the best first.
        data: that finalists are evaluated on, before and at the end of every rung.
        config: settings.
        quality: ``loss``, ``recall_loss`` or ``kl``: decides which finalists continue.
        folder: for ``finalists.json`` and ``KEY/rung-N/{model.safetensors,result.json}``.
        reporter: shows the progress, and warns of finalists whose training failed.
        workers: parallel trainings in Ray Tune; None for one a core, 0 to train in this process.
        seed: of the batches.

    Returns:
        The finalists, the best first.

    Raises:
        InputError: an architecture is not of the space; the quality is unknown or undefined on the data; the
            folder belongs to other inputs; or every finalist failed.
    """
    chosen = list(dict.fromkeys(architectures))[: config.count]
    if not chosen:
        return []
    genome.encode(trained.space, chosen)  # refuses architectures of another space
    folder = folder.resolve()
    training = config.training(len(chosen), trained.length, seed)
    inputs = _inputs(trained, training, data)
    keys = sorted(architecture.key for architecture in chosen)
    all_inputs = inputs | {"finalists": digest(canonical_json([quality, keys]))}
    path = folder / "finalists.json"
    if path.exists():
        reporter.skipped("finalists")
        return _read_finalists(path, all_inputs)
    ranked = inherited(trained, chosen, data, quality)
    plan = rungs(len(chosen), config.steps)
    workers = one_a_core() if workers is None else workers
    with ray_session(workers) if workers else nullcontext():  # one session for all rungs
        for rung, (size, until) in enumerate(plan, start=1):
            continuing = [f.architecture for f in ranked if f.rung == rung - 1 and not f.failed]
            trainings = [
                RungTraining(
                    architecture=architecture,
                    config=training,
                    until=until,
                    rung=rung,
                    folder=folder / architecture.key / f"rung-{rung}",
                    inputs=inputs | {"architecture": architecture.key},
                )
                for architecture in continuing[:size]
            ]
            results = _results(trained, trainings, data, quality, workers, reporter, folder / "tune")
            ranked = _apply(ranked, trainings, results, quality)
    _report_failures(ranked, folder, reporter)
    for architecture in chosen:
        remove_checkpoints(folder / architecture.key)
    ranked = [replace(finalist, rank_after=rank) for rank, finalist in enumerate(ranked, start=1)]
    body = {
        "quality": quality,
        "rungs": [{"finalists": size, "steps": until} for size, until in plan],
        "finalists": [finalist.to_json(folder) for finalist in ranked],
    }
    FINALISTS.write(path, all_inputs, body)
    return ranked


def distil_baselines(
    trained: "Trained",
    architectures: Mapping[str, Architecture],
    finalists: int,
    data: EvaluationSet,
    config: FinalistsConfig,
    quality: str,
    folder: Path,
    reporter: "Reporter",
    workers: int | None = None,
    seed: int = 0,
) -> dict[str, Finalist]:
    """Train baselines as long as the best finalist, from the same batches, and write ``baselines.json``.

    A run that was stopped resumes; a finished one is read.

    Args:
        trained: the supernet that they inherit their weights from, and the text.
        architectures: by name.
        finalists: their number, which gives the number of steps.
        data: that baselines are evaluated on, before and after.
        config: settings of the finalists.
        quality: ``loss``, ``recall_loss`` or ``kl``, which ranks them among each other.
        folder: of the finalists.
        reporter: shows the progress.
        workers: see :func:`distil_finalists`.
        seed: of the batches.

    Returns:
        The baselines by name, the best first.
    """
    folder = folder.resolve()
    training = config.training(finalists, trained.length, seed)
    inputs = _inputs(trained, training, data)
    keys = {name: architecture.key for name, architecture in architectures.items()}
    all_inputs = inputs | {"baselines": digest(canonical_json([quality, finalists, keys]))}
    path = folder / "baselines.json"
    if path.exists():
        reporter.skipped("baselines")
        value = BASELINES.read(path)
        check_inputs(path, value, all_inputs)
        with BASELINES.checked(path):
            return {item.pop("name"): Finalist.from_json(item, folder) for item in value["baselines"]}
    distinct = list(dict.fromkeys(architectures.values()))
    ranked = inherited(trained, distinct, data, quality)
    rung = len(rungs(finalists, config.steps))
    trainings = [
        RungTraining(
            architecture=one.architecture, config=training, until=training.steps, rung=rung,
            folder=folder / one.architecture.key / f"rung-{rung}",
            inputs=inputs | {"architecture": one.architecture.key},
        )
        for one in ranked
    ]  # fmt: skip
    workers = one_a_core() if workers is None else workers
    with ray_session(workers) if workers else nullcontext():
        results = _results(trained, trainings, data, quality, workers, reporter, folder / "tune", "baselines")
    ranked = [
        replace(one, rank_after=rank)
        for rank, one in enumerate(_apply(ranked, trainings, results, quality), start=1)
    ]
    names = {architecture: name for name, architecture in reversed([*architectures.items()])}
    found = {names[one.architecture]: one for one in ranked}
    for one in ranked:
        remove_checkpoints(folder / one.architecture.key)
        if one.failed:
            reporter.warn(f"baseline {names[one.architecture]}: {one.failed}")
    body = {"quality": quality, "baselines": [{"name": n, **one.to_json(folder)} for n, one in found.items()]}
    BASELINES.write(path, all_inputs, body)
    return found


def _inputs(trained: "Trained", training: TrainConfig, data: EvaluationSet) -> dict[str, str]:
    """The sha256 of what every finalist's training depends on."""
    inputs = training_inputs(trained.space, training, trained.corpus)
    return inputs | {"supernet": trained.checkpoint.digest, "evaluation": evaluation_digest(data)}


def one_a_core() -> int:
    """The number of parallel trainings by default."""
    return available_cpus()


def _read_finalists(path: Path, inputs: Mapping[str, str]) -> list[Finalist]:
    """The finalists of a ``finalists.json``.

    Raises:
        InputError: it has other inputs.
    """
    value = FINALISTS.read(path)
    check_inputs(path, value, inputs)
    with FINALISTS.checked(path):
        return [Finalist.from_json(item, path.parent) for item in value["finalists"]]


def _apply(
    ranked: Sequence[Finalist],
    trainings: Sequence[RungTraining],
    results: Sequence[RungResult],
    quality: str,
) -> list[Finalist]:
    """Finalists after a rung, the best first."""
    by_architecture = {t.architecture: (t, r) for t, r in zip(trainings, results, strict=True)}
    after = []
    for finalist in ranked:
        training, result = by_architecture.get(finalist.architecture, (None, None))
        after.append(training.applied(finalist, result) if training and result else finalist)
    return sorted(after, key=lambda finalist: finalist.sort_key(quality))


def _report_failures(ranked: Sequence[Finalist], folder: Path, reporter: "Reporter") -> None:
    """Warn of finalists that failed.

    Raises:
        InputError: all of them did.
    """
    for finalist in ranked:
        if finalist.failed:
            reporter.warn(f"finalist {finalist.architecture.key}: {finalist.failed}")
    if not ranked[0].rung:
        raise InputError(
            f"finalists: all {len(ranked)} failed; {ranked[0].architecture.key}: {ranked[0].failed}; "
            f"remove {folder} to try again"
        )


def inherited(
    trained: "Trained", architectures: Sequence[Architecture], data: EvaluationSet, quality: str
) -> list[Finalist]:
    """Finalists before any training, with their losses inside the supernet, the best first.

    Args:
        trained: the supernet.
        architectures: of its space.
        data: that they are evaluated on.
        quality: by which they are ranked.

    Raises:
        InputError: the quality is unknown, or not finite.
    """
    supernet, config = load_supernet(trained.space, trained.checkpoint), trained.space.config
    finalists = []
    with one_thread():
        largest = genome.largest(trained.space)
        parent = run_parent(supernet.weights(largest), largest, config, data) if quality == KL else None
        for architecture in architectures:
            before = losses(
                evaluate(supernet.weights(architecture), architecture, config, data, parent=parent)
            )
            loss = before.get(loss_name(quality))
            if loss is None or not math.isfinite(loss):
                known = " and ".join(name.removesuffix("_nats") for name in before)
                raise InputError(
                    f"finalists: {quality} of {architecture.key} is {loss} inside the supernet, which cannot "
                    f"be ranked; qualities are {known}, the second only where tokens can be recalled"
                )
            finalists.append(Finalist(architecture=architecture, before=before, rank_before=0, rank_after=0))
    finalists.sort(key=lambda f: f.sort_key(quality))
    return [replace(f, rank_before=rank, rank_after=rank) for rank, f in enumerate(finalists, start=1)]


def _results(
    trained: "Trained",
    trainings: Sequence[RungTraining],
    data: EvaluationSet,
    quality: str,
    workers: int,
    reporter: "Reporter",
    storage: Path,
    title: str = "finalists",
) -> list[RungResult]:
    """Results of the trainings of a rung, in their order; those without a result are trained."""
    left = [training for training in trainings if training.result() is None]
    if left:
        # Longest first, so that all end at about the same time.
        left.sort(key=lambda t: -row_flops(trained.space, t.architecture, trained.length))
        checkpoint = replace(trained.checkpoint, folder=trained.checkpoint.folder.resolve())
        shared = (trained.space, checkpoint, trained.corpus, data, quality)
        with reporter.stage(f"{title}: {len(trainings)} to step {left[0].until}") as stage:
            failures = run_trials(train_rung, left, shared, workers, storage, stage)
        for training, failure in zip(left, failures, strict=True):
            if failure:
                training.write(None, failure.reason)
    results = [training.result() for training in trainings]
    if None in results:
        raise RuntimeError(f"{storage.parent}: a result just written cannot be read back")
    return [result for result in results if result]


def train_rung(
    training: RungTraining, shared: tuple[Space, Checkpoint, Corpus, EvaluationSet, str], tell: Share
) -> None:
    """Train a finalist to the end of a rung, and write its weights and its result.

    Args:
        training: the rung's.
        shared: the space, the supernet's checkpoint, the corpus, the sequences of the evaluation, and the
            quality that ranks.
        tell: called with the share of the steps that is done.

    Raises:
        InputError: the training refuses, because of a loss that is not finite for example.
    """
    space, checkpoint, corpus, data, quality = shared
    architecture, folder = training.architecture, training.folder
    supernet = load_supernet(space, checkpoint)
    with one_thread():
        start, teacher = extract(supernet, architecture), largest_teacher(supernet)
        del supernet  # a library of private blocks is many times as large as a model
        trained = distil(
            space, training.config, folder.parent, architecture, start, teacher, corpus,
            until=training.until, report=lambda row: tell(row["step"] / training.until),
        )  # fmt: skip
        weights = trained.load("model")
        parent = (
            run_parent(teacher.weights, teacher.architecture, space.config, data) if quality == KL else None
        )
        found = evaluate(weights, architecture, space.config, data, parent=parent)
    if not math.isfinite(found.loss_nats):
        raise InputError(f"the held-out loss at step {training.until} is {found.loss_nats}")
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(weights, temporary)
    training.write(losses(found))


def write_finalist(
    folder: Path, trained: "Trained", finalist: Finalist, inputs: Mapping[str, str], chosen: Mapping[str, Any]
) -> SubModel:
    """Write a finalist's tuned weights into a sub-model's folder, unless they are there already.

    Args:
        folder: the sub-model's.
        trained: the supernet that the finalist was distilled from.
        finalist: with weights.
        inputs: sha256 of what it was chosen from, by name; that of its weights is added.
        chosen: the limits and predictions that it was chosen under.

    Raises:
        InputError: it has no weights, or their file cannot be read.
    """
    if finalist.folder is None:
        raise InputError(f"finalist {finalist.architecture.key} has no weights: {finalist.failed}")
    path = finalist.folder / "model.safetensors"
    if path.exists():
        inputs = {**inputs, "finalist": file_digest(path), "chosen": digest(canonical_json(dict(chosen)))}
        if SUBMODEL.made_from(folder / "architecture.json", inputs):
            return read_submodel(folder)
    supernet = load_supernet(trained.space, trained.checkpoint)
    try:
        load_subnet(supernet, finalist.architecture, load_file(path))
    except (FileNotFoundError, SafetensorError, ValueError) as error:
        raise InputError(
            f"{path}: not the finalist's weights ({error}); `{FINALISTS.made_by}` makes them"
        ) from None
    return write_submodel(folder, supernet, finalist.architecture, inputs, chosen, trained.text)
