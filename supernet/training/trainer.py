"""Training steps, in one process or in one of several data-parallel workers.

A supernet and a plain model share batches, optimiser, schedule and checkpoints, so that a sub-network's
quality inside the supernet can be compared with that of a stand-alone training. Each of several workers takes
its rows of every batch, and gradients are summed before every update: the result is that of one worker with
the whole batch, up to rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from space import Architecture, InputError, Space, genome
from space.blocks import Model, forward
from supernet.data.corpus import Corpus, require_fits, train_batch, train_windows
from supernet.hf.pretrained import load_pretrained
from supernet.supernet import Sources, Supernet, add_gradients, leaves, prefix, sources
from supernet.training.checkpoint import Checkpoint
from supernet.training.optimiser import PrefixAdamW
from supernet.training.precision import cast_matrices, matrix_type
from supernet.training.recipe import TrainConfig, step_rate, step_subnets, subnet_count

Weights = Mapping[str, Tensor]
PRETRAINED_WINDOWS = 16  # of training text, by which a pretrained start orders and aligns weights


def distillation_loss(
    logits: Tensor, targets: Tensor, teacher_probs: Tensor | None, distillation: float
) -> Tensor:
    """Summed cross-entropy with the text, mixed with the cross-entropy with a teacher.

    Args:
        logits: logits [B, T, V].
        targets: token ids [B, T]; -100 is ignored.
        teacher_probs: the teacher's probabilities [B, T, V]; None is the text only.
        distillation: weight of the teacher; the text's is 1 minus it.
    """
    flat_logits, flat_targets = logits.float().flatten(0, 1), targets.flatten()
    text = F.cross_entropy(flat_logits, flat_targets, reduction="sum")
    if teacher_probs is None or distillation == 0:
        return text
    soft = F.cross_entropy(flat_logits, teacher_probs.flatten(0, 1), reduction="none")
    return (1 - distillation) * text + distillation * (soft * (flat_targets >= 0)).sum()


def _sandwich_metrics(losses: Sequence[float]) -> dict[str, float]:
    """The losses of a sandwich step by name; the order is that of :func:`step_subnets`."""
    row = {"loss_nats": losses[0], "smallest_nats": losses[1]}
    if len(losses) > 2:
        row["sampled_nats"] = sum(losses[2:]) / len(losses[2:])
    return row


@dataclass(frozen=True, eq=False)
class Teacher:
    """A fixed model whose probabilities are a second target of training.

    Attributes:
        architecture: the model's architecture.
        weights: its weights, named as in its sub-model.
    """

    architecture: Architecture
    weights: Weights


@dataclass(frozen=True, eq=False)
class Batch:
    """This worker's rows of a batch.

    Attributes:
        tokens: token ids [B, T].
        targets: token ids [B, T]; -100 is ignored.
        target_count: number of targets in all workers' rows.
        teacher_probs: probabilities [B, T, V] of a fixed teacher on ``tokens``; None without one.
    """

    tokens: Tensor
    targets: Tensor
    target_count: int
    teacher_probs: Tensor | None


class Trainer:
    """State of a training (weights and optimiser) and its steps.

    Args:
        space: the space of the supernet, or of the architecture.
        config: the training settings.
        corpus: the training text.
        architecture: train a plain model of this architecture; None trains the supernet.
        start: initial weights of the plain model, named as in its sub-model; None draws them.
        teacher: a fixed teacher of the plain model, weighted by ``config.distillation``.
        rank: index of this process; it takes every ``workers``-th row of a batch.
        workers: number of processes, connected by ``torch.distributed``.

    Raises:
        InputError: rows longer than the space's ``max_seq_len``, a batch that does not divide by the workers,
            or a corpus that does not fit the space.
    """

    def __init__(
        self,
        space: Space,
        config: TrainConfig,
        corpus: Corpus,
        architecture: Architecture | None = None,
        *,
        start: Weights | None = None,
        teacher: Teacher | None = None,
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        if (start or teacher) and not architecture:
            raise ValueError(
                "start and teacher are for a plain model; a supernet has config.init and config.teacher"
            )
        self.space, self.config, self.corpus, self.architecture = space, config, corpus, architecture
        self.start = start
        self.rank, self.workers = rank, workers
        self.length = config.length or space.max_seq_len
        if self.length > space.max_seq_len:
            raise InputError(
                f"train.length: {self.length} is more than the space's max_seq_len {space.max_seq_len}"
            )
        if config.batch % workers:
            raise InputError(f"train.batch: {config.batch} is not a multiple of the {workers} workers")
        require_fits(corpus, space.vocab_size, self.length)
        generator = torch.Generator().manual_seed(config.seed)
        self.module = (
            Model(architecture, space.config, generator) if architecture else Supernet(space, generator)
        )
        self.parameters = dict(self.module.named_parameters())
        self.optimiser = PrefixAdamW(self.parameters, config.weight_decay)
        # All gradients are views of one buffer, so that one call clears them.
        sizes = [p.numel() for p in self.parameters.values()]
        self.gradient = torch.zeros(sum(sizes))
        pieces = torch.split(self.gradient, sizes)
        self.gradients = {
            name: piece.view_as(p) for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)
        }
        self.dtype = matrix_type(config)
        self.teacher = None
        if teacher and config.distillation:
            weights = cast_matrices(teacher.weights, self.dtype, teacher.architecture)
            self.teacher = Teacher(teacher.architecture, weights)

    def prepare(self) -> None:
        """Load initial weights before the first step, if ``start`` or ``config.init`` gives any."""
        if self.start:
            self.module.load_state_dict(self.start)
        if self.config.init and isinstance(self.module, Supernet):
            rng = np.random.default_rng([self.config.seed, 4])
            windows = (
                train_windows(self.corpus.train, rng, PRETRAINED_WINDOWS, self.length)
                if self.corpus.recall < 1
                else train_batch(self.corpus, rng, PRETRAINED_WINDOWS, self.length)[0]
            )
            load_pretrained(self.module, self.config.init, torch.from_numpy(windows))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint by part and name; a parameter that was never updated has no moments."""
        moments = {
            f"{name}:{key}": value
            for name, state in self.optimiser.state.items()
            for key, value in state.items()
        }
        return {"model": dict(self.parameters), "optimizer": moments}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the weights and moments of a checkpoint.

        Args:
            checkpoint: a checkpoint of the same training.
        """
        checkpoint.load_into(self.module)
        for key, value in checkpoint.load("optimizer").items():
            name, _, leaf = key.rpartition(":")
            if name not in self.parameters:
                raise InputError(f"{checkpoint.folder}: the optimizer's {key[:80]!r} is of no parameter")
            self.optimiser.state.setdefault(name, {})[leaf] = value

    def step(self, step: int) -> dict[str, float]:
        """Take one training step.

        Args:
            step: the step, from 0; it determines the batch and the sub-networks.

        Returns:
            Losses in nats per token by name, for the metrics.

        Raises:
            InputError: a loss or gradient is not finite; the message names the step and the architecture.
        """
        weights = cast_matrices(self.parameters, self.dtype, self.architecture)
        subnets = self._subnets(step)
        sandwich = self.config.rule == "sandwich" and len(subnets) > 1
        teacher = self._step_teacher(subnets) if sandwich else None
        per_subnet = self.config.update == "per_subnet"
        losses: list[float] = []
        parts: dict[str, tuple[int, ...]] = {}  # shapes of the prefixes that have a gradient, by parameter
        for i, architecture in enumerate(subnets):
            if i == 0 or per_subnet:
                batch = self._batch(step, i)
            table = self._sources(architecture)
            for source, shape in table.values():
                parts[source] = tuple(map(max, parts.get(source, shape), shape))
            if teacher and architecture != teacher and batch.teacher_probs is None:
                # The teacher's forward pass without gradients, once for each batch of rows.
                teacher_weights = leaves(weights, self._sources(teacher))
                teacher_probs = self._teacher_probs(Teacher(teacher, teacher_weights), batch.tokens)
                batch = replace(batch, teacher_probs=teacher_probs)
            loss, logits = self._accumulate(weights, architecture, table, batch)
            if architecture == teacher:  # its probabilities are for the sub-networks that share its rows
                batch = replace(batch, teacher_probs=logits.softmax(-1))
            losses.append(self._summed(loss, step, architecture))
            if per_subnet or i == len(subnets) - 1:
                self._update(weights, parts, 1 if per_subnet else len(subnets), step, architecture)
                parts.clear()
        return _sandwich_metrics(losses) if sandwich else {"loss_nats": sum(losses) / len(losses)}

    def _subnets(self, step: int) -> list[Architecture]:
        """The architectures that a step trains."""
        if self.architecture:
            return [self.architecture]
        return step_subnets(self.space, self.config, step)

    def _step_teacher(self, subnets: Sequence[Architecture]) -> Architecture | None:
        """The sub-network whose probabilities the others of a step learn from; None without distillation."""
        if not self.config.distillation:
            return None
        return genome.largest(self.space) if self.config.teacher == "largest" else subnets[0]

    def _accumulate(
        self, weights: Weights, architecture: Architecture, table: Sources, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Add a sub-network's gradients; returns its loss [] and logits [B, T, V], detached."""
        slices = leaves(weights, table)
        logits = self._logits(slices, architecture, batch.tokens)
        total = distillation_loss(logits, batch.targets, batch.teacher_probs, self.config.distillation)
        loss = total / max(1, batch.target_count)
        loss.backward()  # type: ignore[no-untyped-call]
        add_gradients(slices, table, self.gradients)
        return loss.detach(), logits.detach()

    def tokens(self, step: int) -> int:
        """Number of tokens that a step draws, over all workers.

        Args:
            step: the step, from 0.
        """
        one_batch = self.architecture is not None or self.config.update == "accumulated"
        return self.config.batch * self.length * (1 if one_batch else subnet_count(self.config, step))

    def _batch(self, step: int, turn: int) -> Batch:
        """This worker's rows of the batch of a step's sub-network ``turn``."""
        rng = np.random.default_rng(
            [self.config.seed, step, 0, turn] if turn else [self.config.seed, step, 0]
        )
        drawn = train_batch(self.corpus, rng, self.config.batch, self.length)
        tokens, targets = (torch.from_numpy(x[self.rank :: self.workers]) for x in drawn)
        teacher_probs = self._teacher_probs(self.teacher, tokens) if self.teacher else None
        return Batch(tokens, targets, int((drawn[1] >= 0).sum()), teacher_probs)

    def _summed(self, loss: Tensor, step: int, architecture: Architecture) -> float:
        """A sub-network's loss summed over all workers.

        Raises:
            InputError: the loss is not finite.
        """
        if self.workers > 1:
            dist.all_reduce(loss)
        if not torch.isfinite(loss):
            raise self._not_finite(f"the loss became {float(loss)}", step, architecture)
        return float(loss)

    @staticmethod
    def _not_finite(what: str, step: int, architecture: Architecture) -> InputError:
        return InputError(
            f"training: {what} at step {step + 1} for {architecture.describe()}; "
            "the last checkpoint is kept; try a lower learning_rate, in another folder"
        )

    def _update(
        self,
        weights: Weights,
        parts: Mapping[str, tuple[int, ...]],
        count: int,
        step: int,
        architecture: Architecture,
    ) -> None:
        """Take one step of the optimiser with the mean gradient of ``count`` sub-networks.

        What no sub-network used keeps its weights and moments: no decay, no momentum. For accumulated
        updates, used is the smallest rectangle around the prefixes. Cast weights are updated too.

        Raises:
            InputError: a gradient is not finite.
        """
        if self.workers > 1:
            self._sum_over_workers([prefix(self.gradients[name], shape) for name, shape in parts.items()])
        if count > 1:
            self.gradient.div_(count)
        try:
            self.optimiser.step(parts, self.gradients, step_rate(self.config, step), self.config.clip)
        except FloatingPointError:
            raise self._not_finite("a gradient is not finite", step, architecture) from None
        self.gradient.zero_()
        with torch.no_grad():
            for name in parts:
                if weights[name].dtype != self.parameters[name].dtype:
                    weights[name].copy_(self.parameters[name])

    def _sum_over_workers(self, views: list[Tensor]) -> None:
        """Sum gradients over all workers, in one all-reduce."""
        message = torch.cat([view.reshape(-1) for view in views])
        dist.all_reduce(message)
        for view, piece in zip(views, torch.split(message, [view.numel() for view in views]), strict=True):
            view.copy_(piece.view_as(view))

    def _sources(self, architecture: Architecture) -> Sources:
        """For each weight of an architecture: the parameter it is a prefix of, and its shape."""
        if self.architecture:
            return {name: (name, tuple(p.shape)) for name, p in self.parameters.items()}
        return sources(self.space, architecture)

    @torch.no_grad()
    def _teacher_probs(self, teacher: Teacher, tokens: Tensor) -> Tensor:
        """A teacher's probabilities [B, T, V], without gradients."""
        return self._logits(teacher.weights, teacher.architecture, tokens).softmax(-1)

    def _logits(self, weights: Weights, architecture: Architecture, tokens: Tensor) -> Tensor:
        return forward(weights, architecture, self.space.config, tokens)[0].float()
