"""The training loop: steps, metrics and checkpoints."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tensorboardX import SummaryWriter

from space.cpus import available_cpus
from space.io.artefact import write_text
from space.io.machine import check_threads
from supernet.training.checkpoint import latest_checkpoint, save_checkpoint
from supernet.training.recipe import step_rate
from supernet.training.trainer import Trainer

LOG_EVERY = 20  # steps between two rows of the metrics

Report = Callable[[Mapping[str, Any]], None]
"""Called with each row of the metrics; see ``metrics.jsonl`` in docs/files.md."""


def take_steps(
    trainer: Trainer,
    root: Path,
    inputs: Mapping[str, str],
    report: Report | None = None,
    until: int | None = None,
) -> None:
    """Train from the newest checkpoint on; the worker of rank 0 writes checkpoints and metrics.

    A step depends on ``config.steps`` only, never on ``until``: stopping and resuming changes no result.

    Args:
        trainer: the training's state; restored from the newest checkpoint, if there is one.
        root: the folder for checkpoints, ``metrics.jsonl`` and ``tensorboard/``.
        inputs: sha256 of everything the training depends on, by name; checkpoints carry them.
        report: called with each row of the metrics.
        until: the step to stop after, with a checkpoint; None is ``config.steps``.
    """
    config = trainer.config
    last = min(until or config.steps, config.steps)
    check_threads("threads", config.threads or 1)
    torch.set_num_threads(config.threads or min(torch.get_num_threads(), available_cpus()))
    torch.use_deterministic_algorithms(True)
    checkpoint = latest_checkpoint(root, inputs)
    start = checkpoint.step if checkpoint else 0
    if checkpoint:
        trainer.restore(checkpoint)
    else:
        trainer.prepare()
    metrics = _Metrics(trainer, root, start, report) if trainer.rank == 0 else None
    for step in range(start, last):
        losses = trainer.step(step)
        done = step + 1
        if metrics:
            metrics.add(losses)
            if done % LOG_EVERY == 0 or done == last:
                metrics.write(step)
            if done % config.checkpoint_every == 0 or done == last:
                save_checkpoint(root, done, trainer.tensors(), inputs)
    if metrics:
        metrics.close()


class _Metrics:
    """Writes rows of metrics to ``metrics.jsonl`` and TensorBoard: means since the row before."""

    def __init__(self, trainer: Trainer, root: Path, start: int, report: Report | None) -> None:
        self.trainer, self.report = trainer, report
        self.log = root / "metrics.jsonl"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        keep_metrics(self.log, start)
        self.scalars = SummaryWriter(str(root / "tensorboard"), purge_step=start + 1)
        self.row_began_s, self.row_start = time.monotonic(), start
        self.losses: dict[str, list[float]] = {}  # since the last row

    def add(self, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            self.losses.setdefault(name, []).append(loss)

    def write(self, step: int) -> None:
        """Write the row of a step that was taken."""
        now, done, tokens = time.monotonic(), step + 1, self.trainer.tokens
        row_tokens = sum(map(tokens, range(self.row_start, done)))
        row = {
            "step": done,
            "steps": self.trainer.config.steps,
            **{name: sum(losses) / len(losses) for name, losses in self.losses.items()},
            "rate": step_rate(self.trainer.config, step),
            "tokens": sum(tokens(step) for step in range(done)),
            "tokens_per_second": round(row_tokens / (now - self.row_began_s), 1),
        }
        self.row_began_s, self.row_start = now, done
        self.losses.clear()
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name in row.keys() - {"step", "steps"}:
            self.scalars.add_scalar(name, row[name], done)
        if self.report:
            self.report(row)

    def close(self) -> None:
        self.scalars.close()


def row_share(row: Mapping[str, Any]) -> float:
    """Share of the training that is done.

    Args:
        row: of the metrics.
    """
    return float(row["step"] / row["steps"])


def keep_metrics(log: Path, step: int) -> None:
    """Remove the rows of the metrics after the step that training resumes from.

    Args:
        log: path of ``metrics.jsonl``; it may be missing.
        step: the last step to keep.
    """
    if not log.exists():
        return
    rows: list[str] = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            continue
        if row["step"] <= step:
            rows.append(line + "\n")
    write_text(log, "".join(rows))
