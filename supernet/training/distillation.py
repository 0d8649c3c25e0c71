"""Distillation: training of one architecture as a plain model, from the text and a fixed teacher.

Initial weights and the teacher are given as tensors: for a search's finalists, the supernet's sub-network and
its largest sub-network; for fine-tuning, a sub-model's own weights. Checkpoints are the same as in other
trainings. A call may stop after any step, to compare candidates early. Footgun: the learning rate follows
``config.steps``, wherever a call stops.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from space import Architecture, InputError, Space, genome
from supernet.data.corpus import Corpus
from supernet.extract import extract
from supernet.supernet import Supernet
from supernet.training.checkpoint import Checkpoint, sole_writer
from supernet.training.loop import Report, take_steps
from supernet.training.recipe import TrainConfig
from supernet.training.train import trained_until, training_inputs
from supernet.training.trainer import Teacher, Trainer, Weights


def largest_teacher(supernet: Supernet) -> Teacher:
    """The largest sub-network of a supernet as a teacher, with a copy of its weights.

    Args:
        supernet: the supernet.
    """
    largest = genome.largest(supernet.space)
    return Teacher(largest, extract(supernet, largest))


def distil(
    space: Space,
    config: TrainConfig,
    root: Path,
    architecture: Architecture,
    start: Weights,
    teacher: Teacher | None,
    corpus: Corpus,
    *,
    until: int | None = None,
    report: Report | None = None,
) -> Checkpoint:
    """Train an architecture from given weights, or from the newest complete checkpoint.

    Args:
        space: the space of the architecture and the teacher.
        config: the training settings; ``distillation`` is the weight of the teacher, and the settings that
            choose a supernet's sub-networks have no effect.
        root: the folder for checkpoints, ``metrics.jsonl`` and ``tensorboard/``.
        architecture: the architecture to train.
        start: its initial weights, named as in its sub-model; they are copied.
        teacher: the fixed teacher; None learns from the text only.
        corpus: the training text.
        until: the step to stop after; None is ``config.steps``.
        report: called with each row of the metrics.

    Returns:
        The checkpoint of step ``until``, for :func:`supernet.training.train.load_stand_alone`.

    Raises:
        InputError: ``config.workers`` is not 0, the text does not fit the space, the checkpoint has other
            inputs or a later step, a loss is not finite, or another training writes to the folder.
    """
    if config.workers:
        raise InputError(f"workers: {config.workers}, but distillation runs in one process; set workers: 0")
    config = config.model_copy(update={"init": None})
    last = min(until or config.steps, config.steps)
    inputs = distil_inputs(space, config, architecture, start, teacher, corpus)

    def take() -> None:
        with sole_writer(root):
            trainer = Trainer(space, config, corpus, architecture, start=start, teacher=teacher)
            take_steps(trainer, root, inputs, report, last)

    checkpoint = trained_until(last, root, inputs, take)
    if checkpoint.step > last:
        raise InputError(
            f"{root}: trained to step {checkpoint.step}, past step {last}; remove the folder to start again"
        )
    return checkpoint


def distil_inputs(
    space: Space,
    config: TrainConfig,
    architecture: Architecture,
    start: Weights,
    teacher: Teacher | None,
    corpus: Corpus,
) -> dict[str, str]:
    """The sha256 of everything that a distillation's result depends on, by name.

    Args:
        space: the space of the architecture and the teacher.
        config: the training settings.
        architecture: the architecture to train.
        start: its initial weights.
        teacher: the fixed teacher, if any.
        corpus: the training text.
    """
    inputs = training_inputs(space, config, corpus, architecture)
    inputs["start"] = weights_digest(start)
    if teacher:
        inputs["teacher"] = f"{teacher.architecture.key}-{weights_digest(teacher.weights)}"
    return inputs


def weights_digest(weights: Weights) -> str:
    """The sha256 of named tensors in the order of their names, as 64 hexadecimal digits.

    Args:
        weights: tensors by name.
    """
    sha256 = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().contiguous()
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


@torch.no_grad()
def load_subnet(supernet: Supernet, architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """Copy a plain model's weights into the supernet; the inverse of :func:`supernet.extract.extract`.

    Args:
        supernet: the supernet, changed in place; other sub-networks share these weights.
        architecture: the plain model's architecture.
        tensors: its weights, named as in its sub-model.

    Raises:
        ValueError: names or shapes are not those of the architecture.
    """
    views = supernet.weights(architecture)
    if {n: t.shape for n, t in views.items()} != {n: t.shape for n, t in tensors.items()}:
        raise ValueError(f"not the weights of architecture {architecture.key}")
    for name, view in views.items():
        view.copy_(tensors[name])
