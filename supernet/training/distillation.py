"""Distillation: an architecture learns on as a plain model, from the text and from a fixed teacher.

Where it starts and who teaches it are given as tensors: what the supernet holds of it and the supernet's
largest sub-network for a search's finalists, or a sub-model's own weights for fine-tuning. It goes as every
training does, in steps that a kill does not change, and it may be stopped after any of them to see how far
it got. Footgun: the learning rate follows ``config.steps``, wherever a call stops.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from space import Architecture, InputError, Space, genome
from supernet.data.corpus import Corpus
from supernet.extract import extract
from supernet.supernet import Supernet
from supernet.training.checkpoint import Checkpoint, sole_writer
from supernet.training.loop import take_steps
from supernet.training.recipe import TrainConfig
from supernet.training.train import trained_until, training_inputs
from supernet.training.trainer import Teacher, Trainer, Weights


def largest_teacher(supernet: Supernet) -> Teacher:
    """The largest sub-network of a supernet, with weights of its own."""
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
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> Checkpoint:
    """Train an architecture from given weights on, or go on from the newest whole checkpoint.

    Args:
        space: the space whose frame the architecture and the teacher share.
        config: how to train; ``distillation`` is the weight of the teacher against the text, and what says
            which members of a supernet are trained does not matter.
        root: the folder for checkpoints, ``metrics.jsonl`` and ``tensorboard/``.
        architecture: what is trained.
        start: its weights, named as in its sub-model; they are copied.
        teacher: what it learns from beside the text; None learns from the text alone.
        corpus: the text.
        until: the step after which to stop; None is ``config.steps``.
        report: called with each row of the metrics.

    Returns:
        The checkpoint of step ``until``: its model is what :func:`supernet.training.train.load_stand_alone` reads.

    Raises:
        InputError: text that does not fit the space, a checkpoint of other inputs or of a later step, a loss
            that is not finite, or a folder that another training writes to.
    """
    if config.workers:
        raise InputError(f"workers: {config.workers}, but a distillation runs in one process: give 0")
    config = config.model_copy(update={"init": None})
    last = min(until or config.steps, config.steps)
    inputs = distil_inputs(space, config, architecture, start, teacher, corpus)

    def take() -> None:
        with sole_writer(root):
            trainer = Trainer(space, config, corpus, architecture, start=start, teacher=teacher)
            take_steps(trainer, root, inputs, report, last)

    found = trained_until(last, root, inputs, take)
    if found.step > last:
        raise InputError(f"{root}: trained to step {found.step}, {last} was asked; remove it to start again")
    return found


def distil_inputs(
    space: Space,
    config: TrainConfig,
    architecture: Architecture,
    start: Weights,
    teacher: Teacher | None,
    corpus: Corpus,
) -> dict[str, str]:
    """The hashes that identify a distillation: another value is another result."""
    inputs = training_inputs(space, config, corpus, architecture)
    inputs["start"] = weights_digest(start)
    if teacher:
        inputs["teacher"] = f"{teacher.architecture.key}-{weights_digest(teacher.weights)}"
    return inputs


def weights_digest(weights: Weights) -> str:
    """The sha256 of named tensors, whatever their order, as 64 hexadecimal digits."""
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@torch.no_grad()
def load_subnet(supernet: Supernet, architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """Give a sub-network the weights of a plain model of its architecture: the opposite of extracting it.

    Raises:
        ValueError: the tensors are not that architecture's.
    """
    views = supernet.weights(architecture)
    if {n: t.shape for n, t in views.items()} != {n: t.shape for n, t in tensors.items()}:
        raise ValueError(f"not the weights of architecture {architecture.key}")
    for name, view in views.items():
        view.copy_(tensors[name])
