"""Finalists: the best few of a search learn on for a while before one of them is chosen.

What an architecture reaches inside the supernet ranks it well, but not as it will rank once it has weights
of its own. So each finalist starts as the plain model that the supernet holds of it and learns from the text
and from the supernet's largest sub-network. Synchronous halving (Jamieson and Talwalkar 2016) spends little
on the worse ones: all train to the end of a rung, the better half by held-out loss goes on to twice as many
steps. Every finalist sees the same batches, at a learning rate that does not depend on how far it gets.

A rung's ``result.json`` and the checkpoints of a training make a killed run go on; the same seed chooses the
same finalist with the same weights, with any number of workers and with none.
"""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from search.select.finalist import MADE_BY, Finalist, FinalistsConfig, Stretch, rungs
from space import Architecture, InputError, Space, genome
from space.cost import row_flops
from space.io.artefact import (
    Artefact,
    atomic_path,
    canonical_json,
    check_inputs,
    digest,
    file_digest,
)
from supernet.data.corpus import Corpus
from supernet.evaluate import EvaluationSet, evaluate, evaluation_digest, losses
from supernet.extract import SUBMODEL, SubModel, extract, read_submodel, write_submodel
from supernet.training.checkpoint import Checkpoint
from supernet.training.distillation import distil, load_subnet, largest_teacher
from supernet.training.parallel import ray_session
from supernet.training.train import load_supernet, training_inputs
from supernet.training.trials import Share, one_thread, remove_checkpoints, run_trials

if TYPE_CHECKING:  # what the processes that train here need not import
    from space.io.progress import Reporter
    from supernet.training.train import Trained

FINALISTS = Artefact("finalists", "formfit search")


def distil_finalists(
    trained: "Trained",
    architectures: Sequence[Architecture],
    data: EvaluationSet,
    config: FinalistsConfig,
    quality: str,
    folder: Path,
    reporter: "Reporter",
    workers: int | None = None,
) -> list[Finalist]:
    """Distil the first ``config.count`` architectures and rank them by what they reach, the best first.

    Those that finished a later rung come first, of a rung those with the least loss. Also written to
    ``finalists.json``. What was stopped goes on; what is finished is read.

    Args:
        trained: the supernet that they inherit their weights from, and the text.
        architectures: members of its space, the best first.
        data: what they are evaluated on, before, and at the end of every rung.
        config: how.
        quality: ``loss`` or ``recall_loss``: what decides who goes on.
        folder: for ``finalists.json`` and ``KEY/rung-N/{model.safetensors,result.json}``.
        reporter: told how far it is, and of finalists that failed.
        workers: trainings at a time, in Ray Tune; None is one a core, 0 trains in this process.

    Raises:
        InputError: an architecture is not of the space, the quality is unknown or cannot be found on the
            evaluation's tokens, the folder holds what other inputs gave, or every finalist failed.
    """
    chosen = list(dict.fromkeys(architectures))[: config.count]
    if not chosen:
        return []
    genome.encode(trained.space, chosen)  # refuses those of another space
    folder = folder.resolve()
    training = config.training(len(chosen), trained.length)
    inputs = training_inputs(trained.space, training, trained.corpus)
    inputs |= {"supernet": trained.checkpoint.digest, "evaluation": evaluation_digest(data)}
    path, asked = folder / "finalists.json", digest(canonical_json([quality, sorted(a.key for a in chosen)]))
    if path.exists():
        value = FINALISTS.read(path)
        check_inputs(path, value, inputs | {"finalists": asked})
        reporter.skipped("finalists")
        return [Finalist.from_json(item, folder) for item in value["finalists"]]
    ranked = inherited(trained, chosen, data, quality)
    plan = rungs(len(chosen), config.steps)
    workers = (os.cpu_count() or 1) if workers is None else workers
    with ray_session(workers) if workers else nullcontext():  # one for all rungs
        for rung, (size, until) in enumerate(plan, start=1):
            stretches = [
                Stretch(
                    architecture=finalist.architecture,
                    config=training,
                    until=until,
                    folder=folder / finalist.architecture.key / f"rung-{rung}",
                    inputs=inputs | {"architecture": finalist.architecture.key},
                )
                for finalist in ranked
                if finalist.rung == rung - 1 and not finalist.failed
            ][:size]
            results = _results(trained, stretches, data, workers, reporter, folder / "tune")
            reached = {s.architecture: s.after(rung, r) for s, r in zip(stretches, results, strict=True)}
            ranked = [replace(finalist, **reached.get(finalist.architecture, {})) for finalist in ranked]
            ranked.sort(key=lambda finalist: finalist.standing(f"{quality}_nats"))
    for finalist in (f for f in ranked if f.failed):
        reporter.warn(f"finalist {finalist.architecture.key}: {finalist.failed}")
    if not ranked[0].rung:
        raise InputError(
            f"finalists: all {len(ranked)} failed; {ranked[0].architecture.key}: {ranked[0].failed}; "
            f"remove {folder} to try again"
        )
    for architecture in chosen:
        remove_checkpoints(folder / architecture.key)
    ranked = [replace(finalist, rank_after=rank) for rank, finalist in enumerate(ranked, start=1)]
    body = {
        "quality": quality,
        "rungs": [{"finalists": size, "steps": until} for size, until in plan],
        "finalists": [finalist.to_json(folder) for finalist in ranked],
    }
    FINALISTS.write(path, inputs | {"finalists": asked}, body)
    return ranked


def inherited(
    trained: "Trained", architectures: Sequence[Architecture], data: EvaluationSet, quality: str
) -> list[Finalist]:
    """Finalists before any training, with what they reach inside the supernet, the best first.

    Raises:
        InputError: the quality is not one, or not finite.
    """
    supernet = load_supernet(trained.space, trained.checkpoint)
    found = []
    with one_thread():
        for architecture in architectures:
            weights = supernet.weights(architecture)
            before = losses(evaluate(weights, architecture, trained.space.config, data))
            loss = before.get(f"{quality}_nats")
            if loss is None or not math.isfinite(loss):
                known = " and ".join(name.removesuffix("_nats") for name in before)
                raise InputError(
                    f"finalists: {quality} of {architecture.key} is {loss} inside the supernet, which ranks "
                    f"nothing; qualities are {known}, the second where tokens can be recalled"
                )
            found.append(Finalist(architecture=architecture, before=before, rank_before=0, rank_after=0))
    found.sort(key=lambda f: f.standing(f"{quality}_nats"))
    return [replace(f, rank_before=rank, rank_after=rank) for rank, f in enumerate(found, start=1)]


def _results(
    trained: "Trained",
    stretches: Sequence[Stretch],
    data: EvaluationSet,
    workers: int,
    reporter: "Reporter",
    storage: Path,
) -> list[dict[str, Any]]:
    """What the stretches of a rung reached, in their order; those without a result are trained."""
    left = [stretch for stretch in stretches if stretch.result() is None]
    if left:
        # The longest first, so that all end together.
        left.sort(key=lambda s: -row_flops(trained.space, s.architecture, trained.length))
        checkpoint = replace(trained.checkpoint, folder=trained.checkpoint.folder.resolve())
        shared = (trained.space, checkpoint, trained.corpus, data)
        with reporter.stage(f"finalists: {len(stretches)} to step {left[0].until}") as stage:
            failures = run_trials(train_stretch, left, shared, workers, storage, stage)
        for stretch, failure in zip(left, failures, strict=True):
            if failure:
                stretch.write(None, failure.reason)
    found = [stretch.result() for stretch in stretches]
    if None in found:
        raise RuntimeError(f"{storage.parent}: a result just written cannot be read back")
    return [value for value in found if value]


def train_stretch(
    stretch: Stretch, shared: tuple[Space, Checkpoint, Corpus, EvaluationSet], tell: Share
) -> None:
    """Train a finalist to the end of a rung, keep its weights there, and write what they reach.

    Raises:
        InputError: what the training refuses, a loss that is not finite say.
    """
    space, checkpoint, corpus, data = shared
    architecture, folder = stretch.architecture, stretch.folder
    supernet = load_supernet(space, checkpoint)
    with one_thread():
        start, teacher = extract(supernet, architecture), largest_teacher(supernet)
        found = distil(
            space, stretch.config, folder.parent, architecture, start, teacher, corpus,
            until=stretch.until, report=lambda row: tell(row["step"] / stretch.until),
        )  # fmt: skip
        weights = found.load("model")
        quality = evaluate(weights, architecture, space.config, data)
    if not math.isfinite(quality.loss_nats):
        raise InputError(f"the held-out loss at step {stretch.until} is {quality.loss_nats}")
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(weights, temporary)
    stretch.write(losses(quality))


def write_finalist(
    folder: Path, trained: "Trained", finalist: Finalist, inputs: Mapping[str, str], chosen: Mapping[str, Any]
) -> SubModel:
    """Write a finalist's tuned weights into a sub-model's folder, where they are not there already.

    Args:
        folder: the sub-model's.
        trained: what the finalist was distilled from.
        finalist: which one.
        inputs: the hashes of what it was chosen from; that of its weights is added.
        chosen: the limits and predictions it was chosen under.

    Raises:
        InputError: it has no weights, or their file is not whole.
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
        raise InputError(f"{path}: not the finalist's weights ({error}); `{MADE_BY}` makes them") from None
    return write_submodel(folder, supernet, finalist.architecture, inputs, chosen, trained.text)
