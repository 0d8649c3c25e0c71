"""The steps of a training, in one process or as one of several workers.

A supernet and a plain model go the same way: the same batches, optimiser, schedule and checkpoints, so
that what a sub-network reaches inside the supernet can be compared with what it reaches alone. With several
workers each takes its rows of every batch and gradients are summed before every update, so that the
result is that of one worker with the whole batch, up to rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
from supernet.training.recipe import TrainConfig, step_rate, step_subnets, subnet_count

Weights = Mapping[str, Tensor]
FULL_PRECISION = ("beta", "decay", "decay_down", "decay_up")  # what makes the recurrence's gates stays fp32
LOG_EVERY = 20  # steps between two rows of the metrics


def member_loss(logits: Tensor, targets: Tensor, teacher: Tensor | None, distillation: float) -> Tensor:
    """The summed cross-entropy with the text, mixed with that to the teacher's probabilities.

    logits [B, T, V], targets [B, T] with -100 where nothing is to be learned, teacher [B, T, V].
    """
    flat, wanted = logits.float().flatten(0, 1), targets.flatten()
    text = F.cross_entropy(flat, wanted, reduction="sum")
    if teacher is None or distillation == 0:
        return text
    taught = F.cross_entropy(flat, teacher.flatten(0, 1), reduction="none")
    return (1 - distillation) * text + distillation * (taught * (wanted >= 0)).sum()


def cast_matrices(parameters: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """Detached parameters, the large matrices in ``dtype``: cast once a step, before any slicing."""

    def wanted(name: str, parameter: Tensor) -> torch.dtype:
        leaf = name.rsplit(".", 1)[-1]
        keep = parameter.ndim != 2 or leaf in FULL_PRECISION or leaf.startswith("conv")
        return parameter.dtype if keep else dtype

    return {name: p.detach().to(wanted(name, p)) for name, p in parameters.items()}


def matrix_type(config: TrainConfig) -> torch.dtype:
    """The type that matrix products train in; ``auto`` takes bf16 where the CPU has instructions for it."""
    if config.precision == "auto":
        fast = bool({"avx512_bf16", "amx_bf16"} & cpu_flags())
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def cpu_flags() -> frozenset[str]:
    """The CPU's feature flags, where the system tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return frozenset(lines[0].split(":", 1)[1].split()) if lines else frozenset()


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model that never changes, whose probabilities an architecture learns beside the text."""

    architecture: Architecture
    weights: Weights  # named as in its sub-model


class Trainer:
    """The state of a training: the weights, the optimiser, and how to take one step.

    Args:
        space: the space that the architectures are of.
        config: how to train.
        corpus: what to train on.
        architecture: train this one alone, as a plain model; None trains the supernet.
        start: the weights that it alone starts from, named as in its sub-model; None draws them.
        teacher: what it alone learns from beside the text, with the weight ``config.distillation``.
        rank: which of ``workers`` this process is; it takes every ``workers``-th row of a batch.
        workers: how many processes train together, connected by ``torch.distributed``.
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
            raise ValueError("a supernet starts from config.init, and its teacher is one of its members")
        self.space, self.config, self.corpus, self.architecture = space, config, corpus, architecture
        self.start = start
        self.rank, self.workers = rank, workers
        self.length = config.length or space.max_seq_len
        if self.length > space.max_seq_len:
            raise InputError(
                f"train.length: {self.length} is more than the space's context {space.max_seq_len}"
            )
        if config.batch % workers:
            raise InputError(f"train.batch: {config.batch} rows cannot be shared by {workers} workers evenly")
        require_fits(corpus, space.vocab_size, self.length)
        generator = torch.Generator().manual_seed(config.seed)
        self.module = (
            Model(architecture, space.config, generator) if architecture else Supernet(space, generator)
        )
        self.parameters = dict(self.module.named_parameters())
        self.optimiser = PrefixAdamW(self.parameters, config.weight_decay)
        # One buffer, which one call clears.
        sizes = [p.numel() for p in self.parameters.values()]
        self.gradient = torch.zeros(sum(sizes))
        pieces = torch.split(self.gradient, sizes)
        self.gradients = {
            name: piece.view_as(p) for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)
        }
        self.dtype = matrix_type(config)
        self.teacher = None
        if teacher and config.distillation:
            self.teacher = Teacher(teacher.architecture, cast_matrices(teacher.weights, self.dtype))

    def prepare(self) -> None:
        """What precedes the first step: weights from elsewhere, where some were given or named."""
        if self.start:
            self.module.load_state_dict(self.start)
        if self.config.init and isinstance(self.module, Supernet):
            rng = np.random.default_rng([self.config.seed, 4])
            windows = (
                train_windows(self.corpus.train, rng, 16, self.length)
                if self.corpus.recall < 1
                else train_batch(self.corpus, rng, 16, self.length)[0]
            )
            load_pretrained(self.module, self.config.init, torch.from_numpy(windows))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds; a parameter that was never used has no moments."""
        moments = {
            f"{name}:{key}": value
            for name, state in self.optimiser.state.items()
            for key, value in state.items()
        }
        return {"model": dict(self.parameters), "optimizer": moments}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the tensors of a checkpoint."""
        self.module.load_state_dict(checkpoint.load("model"))
        for key, value in checkpoint.load("optimizer").items():
            name, leaf = key.rsplit(":", 1)
            self.optimiser.state.setdefault(name, {})[leaf] = value

    def step(self, step: int) -> dict[str, float]:
        """Take one step; returns what the metrics say of it (losses in nats per token).

        Raises:
            InputError: a loss is not finite; it names the step and the architecture.
        """
        weights = cast_matrices(self.parameters, self.dtype)
        chosen = [self.architecture] if self.architecture else step_subnets(self.space, self.config, step)
        sandwich = self.config.rule == "sandwich" and len(chosen) > 1
        in_turn = self.config.update == "per_subnet"
        largest = genome.largest(self.space)
        taught_by = largest if self.config.teacher == "largest" else chosen[0]
        losses: list[float] = []
        parts: dict[str, tuple[int, ...]] = {}  # the prefixes that have a gradient
        teacher: Tensor | None = None  # probabilities [B, T, V]
        for i, architecture in enumerate(chosen):
            if i == 0 or in_turn:
                tokens, targets, count = self._batch(step, i)
                teacher = self._taught(self.teacher, tokens) if self.teacher else None
            table = self._sources(architecture)
            for source, shape in table.values():
                parts[source] = tuple(map(max, parts.get(source, shape), shape))
            if sandwich and self.config.distillation and teacher is None and architecture != taught_by:
                teacher = self._taught(Teacher(taught_by, leaves(weights, self._sources(taught_by))), tokens)
            slices = leaves(weights, table)
            logits = self._logits(slices, architecture, tokens)
            loss = member_loss(logits, targets, teacher, self.config.distillation) / max(1, count)
            if sandwich and architecture == taught_by:
                teacher = logits.detach().softmax(-1)  # of the same rows, where members are together
            loss.backward()  # type: ignore[no-untyped-call]
            add_gradients(slices, table, self.gradients)
            losses.append(self._summed(loss.detach(), step, architecture))
            if in_turn or i == len(chosen) - 1:
                try:
                    self._update(weights, parts, 1 if in_turn else len(chosen), step)
                except FloatingPointError:
                    raise self._refused("a gradient is not finite", step, architecture) from None
                parts.clear()
        if not sandwich:
            return {"loss_nats": sum(losses) / len(losses)}
        row = {"loss_nats": losses[0], "smallest_nats": losses[1]}
        if len(losses) > 2:
            row["sampled_nats"] = sum(losses[2:]) / len(losses[2:])
        return row

    def tokens(self, step: int) -> int:
        """How many tokens of text a step takes, over all workers."""
        alone = self.architecture is not None or self.config.update == "accumulated"
        return self.config.batch * self.length * (1 if alone else subnet_count(self.config, step))

    def _batch(self, step: int, turn: int) -> tuple[Tensor, Tensor, int]:
        """This worker's rows of a member's batch, and how many targets all workers' rows have."""
        rng = np.random.default_rng(
            [self.config.seed, step, 0, turn] if turn else [self.config.seed, step, 0]
        )
        drawn = train_batch(self.corpus, rng, self.config.batch, self.length)
        tokens, targets = (torch.from_numpy(x[self.rank :: self.workers]) for x in drawn)
        return tokens, targets, int((drawn[1] >= 0).sum())

    def _summed(self, loss: Tensor, step: int, architecture: Architecture) -> float:
        """A member's loss over all workers, refused where it is not finite."""
        if self.workers > 1:
            dist.all_reduce(loss)
        if not torch.isfinite(loss):
            raise self._refused(f"the loss became {float(loss)}", step, architecture)
        return float(loss)

    @staticmethod
    def _refused(what: str, step: int, architecture: Architecture) -> InputError:
        return InputError(
            f"training: {what} at step {step + 1} for {architecture.describe()}; "
            "the last checkpoint is kept; try a lower learning_rate, in another folder"
        )

    def _update(self, weights: Weights, parts: Mapping[str, tuple[int, ...]], count: int, step: int) -> None:
        """Take one step of the optimiser with the mean gradient of ``count`` members.

        What no member used is left alone: no decay, no momentum. Of members that share an update, that is
        what lies outside the smallest rectangle around their prefixes. Cast weights follow.
        """
        if self.workers > 1:
            self._sum_over_workers([prefix(self.gradients[name], shape) for name, shape in parts.items()])
        if count > 1:
            self.gradient.div_(count)
        self.optimiser.step(parts, self.gradients, step_rate(self.config, step), self.config.clip)
        self.gradient.zero_()
        with torch.no_grad():
            for name in parts:
                if weights[name].dtype != self.parameters[name].dtype:
                    weights[name].copy_(self.parameters[name])

    def _sum_over_workers(self, views: list[Tensor]) -> None:
        """Sum gradients over all workers, in one message."""
        message = torch.cat([view.reshape(-1) for view in views])
        dist.all_reduce(message)
        for view, piece in zip(views, torch.split(message, [view.numel() for view in views]), strict=True):
            view.copy_(piece.view_as(view))

    def _sources(self, architecture: Architecture) -> Sources:
        """For each weight of a member: the parameter it is a prefix of, and its shape."""
        if self.architecture:
            return {name: (name, tuple(p.shape)) for name, p in self.parameters.items()}
        return sources(self.space, architecture)

    @torch.no_grad()
    def _taught(self, teacher: Teacher, tokens: Tensor) -> Tensor:
        """A teacher's probabilities [B, T, V], through which no gradient flows."""
        return self._logits(teacher.weights, teacher.architecture, tokens).softmax(-1)

    def _logits(self, weights: Weights, architecture: Architecture, tokens: Tensor) -> Tensor:
        return forward(weights, architecture, self.space.config, tokens)[0].float()
