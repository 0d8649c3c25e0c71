"""Training the supernet: sandwich steps with in-place distillation (Yu and Huang 2019).

A step trains the maximal-size member with cross-entropy and the smallest plus a few sampled
members against its detached logits as well. Every second step the maximal-size member is
``largest()``; on the others its mixers are drawn by a cycle over all (ratio, linear kind)
pairs, so that linear mixers train at full size as often as each other.

Everything random in step n is drawn from a generator seeded with (seed, n), so that a run
that was killed and resumed takes the very same steps as one that was not.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from space import Architecture, InputError, Space, genome
from space.blocks import forward
from space.files import canonical_json, digest, write_text
from supernet.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from supernet.corpus import Corpus, DataConfig, load_corpus, require_length, train_batch
from supernet.supernet import Supernet

Weights = Mapping[str, Tensor]
FULL_PRECISION = ("beta", "decay")  # what makes the recurrence's gates stays fp32


class TrainConfig(BaseModel):
    """How the supernet is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataConfig = DataConfig()
    steps: Annotated[int, Field(gt=0)] = 2000
    batch: Annotated[int, Field(gt=0)] = 8
    length: Annotated[int, Field(gt=1)] | None = None  # None: the space's context
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.02  # share of steps in which the rate rises
    largest_only: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of steps before the sandwich starts
    sampled: Annotated[int, Field(ge=0)] = 2
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.5  # weight of the teacher against the text
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    threads: Annotated[int, Field(gt=0)] | None = None  # None: all cores
    checkpoint_every: Annotated[int, Field(gt=0)] = 100
    seed: Annotated[int, Field(ge=0)] = 0


def training_inputs(space: Space, config: TrainConfig, corpus: Corpus) -> dict[str, str]:
    """The hashes that identify a training: another value is another supernet."""
    settings = config.model_dump(mode="json", exclude={"data", "checkpoint_every"})
    return {"space": space.hash, "corpus": corpus.digest, "training": digest(canonical_json(settings))}


def members(space: Space, config: TrainConfig, step: int) -> list[Architecture]:
    """The architectures of a step: the maximal-size one first, then the smallest and the sampled."""
    rng = np.random.default_rng([config.seed, step, 1])
    largest = genome.largest(space)
    if step < config.largest_only * config.steps:
        return [largest]
    first = largest if step % 2 == 0 else _maximal(space, config, step // 2, rng)
    sampled = genome.decode(space, genome.sample(space, rng, config.sampled))
    return [first, genome.smallest(space), *sampled]


def _maximal(space: Space, config: TrainConfig, turn: int, rng: np.random.Generator) -> Architecture:
    """A member of maximal sizes whose ratio and linear mixer come from a shuffled cycle."""
    depth = max(d for d, _ in space.patterns)
    ratios = [r for d, r in space.patterns if d == depth]
    linear = [i for i, (m, _) in enumerate(space.mixer_options) if i and space.mixer_class(m) == "linear"]
    pairs = [(r, m) for r in ratios for m in linear or [0] if r != "full" or not linear]
    if not pairs:
        return genome.largest(space)
    cycle = np.random.default_rng([config.seed, turn // len(pairs), 2]).permutation(len(pairs))
    ratio, option = pairs[cycle[turn % len(pairs)]]
    lay = genome.layout(space)
    genomes = genome.encode(space, [genome.largest(space)])
    full = rng.permutation(space.slots) < space.full_count(ratio, space.slots)
    full |= lay.forced
    genomes[0, 1::3] = np.where(full, genomes[0, 1::3], option)
    return genome.decode(space, genome.repair(space, genomes, rng))[0]


def step_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step: a linear rise, then a cosine down to a twentieth."""
    rise = max(1, round(config.warmup * config.steps))
    if step < rise:
        return config.learning_rate * (step + 1) / rise
    done = (step - rise) / max(1, config.steps - rise)
    return config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def member_loss(logits: Tensor, targets: Tensor, teacher: Tensor | None, distillation: float) -> Tensor:
    """Cross-entropy with the text, mixed with that to the teacher's detached probabilities."""
    flat = logits.float().flatten(0, 1)
    text = F.cross_entropy(flat, targets.flatten())
    if teacher is None or distillation == 0:
        return text
    return (1 - distillation) * text + distillation * F.cross_entropy(flat, teacher)


def cast_matrices(parameters: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """Detached parameters, the large matrices in ``dtype``: cast once a step, before any slicing."""

    def wanted(name: str, parameter: Tensor) -> torch.dtype:
        leaf = name.rsplit(".", 1)[-1]
        keep = parameter.ndim != 2 or leaf in FULL_PRECISION or leaf.startswith("conv_")
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


class Trainer:
    """The state of a training run: the supernet, the optimiser, and how to take one step."""

    def __init__(self, space: Space, config: TrainConfig, corpus: Corpus) -> None:
        self.space, self.config, self.corpus = space, config, corpus
        self.length = config.length or space.context
        if self.length > space.context:
            raise InputError(f"train.length: {self.length} is more than the space's context {space.context}")
        require_length(corpus, self.length)
        self.supernet = Supernet(space, torch.Generator().manual_seed(config.seed))
        self.parameters = dict(self.supernet.named_parameters())
        matrices: dict[str, Any] = {"params": [p for p in self.parameters.values() if p.ndim == 2]}
        others: dict[str, Any] = {"params": [p for p in self.parameters.values() if p.ndim != 2]}
        self.optimiser = torch.optim.AdamW(
            [matrices, {**others, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.dtype = matrix_type(config)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds."""
        moments = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                moments[f"{name}:{key}"] = value
        return {"model": self.parameters, "optimizer": moments}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the tensors of a checkpoint."""
        self.supernet.load_state_dict(checkpoint.load("model"))
        for key, value in checkpoint.load("optimizer").items():
            name, leaf = key.rsplit(":", 1)
            self.optimiser.state[self.parameters[name]][leaf] = value

    def step(self, step: int) -> float:
        """Take one step; returns the maximal-size member's loss in nats per token."""
        rng = np.random.default_rng([self.config.seed, step, 0])
        batch = torch.from_numpy(train_batch(self.corpus.train, rng, self.config.batch, self.length))
        tokens, targets = batch[:, :-1], batch[:, 1:]
        for group in self.optimiser.param_groups:
            group["lr"] = step_rate(self.config, step)
        self.optimiser.zero_grad(set_to_none=False)
        weights = cast_matrices(self.parameters, self.dtype)
        chosen = members(self.space, self.config, step)
        teacher: Tensor | None = None
        losses = []
        for architecture in chosen:
            taught = teacher

            def loss_of(
                leaves: Weights, architecture: Architecture = architecture, taught: Tensor | None = taught
            ) -> Tensor:
                nonlocal teacher
                logits, _ = forward(leaves, architecture, self.space.frame, tokens)
                if taught is None:
                    teacher = logits.detach().float().flatten(0, 1).softmax(-1)
                return member_loss(logits, targets, taught, self.config.distillation)

            loss = self.supernet.accumulate(architecture, weights, loss_of)
            if not torch.isfinite(loss):
                raise InputError(
                    f"training: the loss became {float(loss)} at step {step} for {architecture.describe()}; "
                    "the last checkpoint is kept; try a lower train.learning_rate"
                )
            losses.append(loss)
        for parameter in self.parameters.values():
            parameter.grad.div_(len(chosen))  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        self.optimiser.step()
        return float(losses[0])


def train(
    space: Space,
    config: TrainConfig,
    root: Path,
    report: Callable[[Mapping[str, Any]], None] | None = None,
    corpus: Corpus | None = None,
) -> Checkpoint:
    """Train to the last step, from the newest whole checkpoint if there is one.

    Args:
        space: the space whose supernet is trained.
        config: how.
        root: the folder for checkpoints and ``metrics.jsonl``.
        report: called with each row of the metrics.
        corpus: the data, where it is loaded already.

    Raises:
        InputError: bad data, a checkpoint of other inputs, or a loss that is not finite.
    """
    corpus = corpus or load_corpus(config.data)
    inputs = training_inputs(space, config, corpus)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.use_deterministic_algorithms(True)
    found = latest_checkpoint(root, inputs)
    if found and found.step == config.steps:
        return found
    trainer = Trainer(space, config, corpus)
    start = 0
    if found:
        trainer.restore(found)
        start = found.step
    log = root / "metrics.jsonl"
    keep_metrics(log, start)
    began, since = time.monotonic(), start
    for step in range(start, config.steps):
        loss = trainer.step(step)
        done = step + 1
        if done % 20 == 0 or done == config.steps:
            now = time.monotonic()
            rate = (done - since) * config.batch * trainer.length / (now - began)
            row = {"step": done, "steps": config.steps, "loss_nats": loss, "rate": step_rate(config, step),
                   "tokens_per_second": round(rate, 1)}  # fmt: skip
            began, since = now, done
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if report:
                report(row)
        if done % config.checkpoint_every == 0 or done == config.steps:
            save_checkpoint(root, done, trainer.tensors(), inputs)
    last = latest_checkpoint(root, inputs)
    if last is None:
        raise RuntimeError(f"{root}: the checkpoint just written cannot be read back")
    return last


def keep_metrics(log: Path, step: int) -> None:
    """Cut the metrics back to the step that training goes on from."""
    if not log.exists():
        return
    rows: list[str] = []
    for line in log.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= step:
            rows.append(line + "\n")
    write_text(log, "".join(rows))


def load_supernet(space: Space, checkpoint: Checkpoint) -> Supernet:
    """The supernet of a checkpoint, without gradients."""
    supernet = Supernet(space)
    supernet.load_state_dict(checkpoint.load("model"))
    return supernet.requires_grad_(False).eval()
