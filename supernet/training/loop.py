"""The training loop: steps, metrics and checkpoints."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tensorboardX import SummaryWriter

from space.io.artefact import write_text
from supernet.training.checkpoint import latest_checkpoint, save_checkpoint
from supernet.training.recipe import step_rate
from supernet.training.trainer import LOG_EVERY, Trainer


def take_steps(
    trainer: Trainer,
    root: Path,
    inputs: Mapping[str, str],
    report: Callable[[Mapping[str, Any]], None] | None = None,
    until: int | None = None,
) -> None:
    """Take the steps that are left; the first worker writes checkpoints and metrics.

    With ``until`` it stops after that step, with a checkpoint from which another call goes on as if it had
    not: what a step does depends on ``config.steps`` and never on where a call stops.
    """
    config, writes = trainer.config, trainer.rank == 0
    last = min(until or config.steps, config.steps)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.use_deterministic_algorithms(True)
    found = latest_checkpoint(root, inputs)
    start = found.step if found else 0
    if found:
        trainer.restore(found)
    else:
        trainer.prepare()
    log = root / "metrics.jsonl"
    scalars = None
    if writes:
        log.parent.mkdir(parents=True, exist_ok=True)
        keep_metrics(log, start)
        scalars = SummaryWriter(str(root / "tensorboard"), purge_step=start + 1)
    began, since = time.monotonic(), start
    recent: dict[str, list[float]] = {}  # since the last row
    for step in range(start, last):
        for name, loss in trainer.step(step).items():
            recent.setdefault(name, []).append(loss)
        done = step + 1
        if writes and scalars and (done % LOG_EVERY == 0 or done == last):
            now = time.monotonic()
            row = {
                "step": done,
                "steps": config.steps,
                **{name: sum(losses) / len(losses) for name, losses in recent.items()},
                "rate": step_rate(config, step),
                "tokens": sum(trainer.tokens(step) for step in range(done)),
                "tokens_per_second": round(sum(map(trainer.tokens, range(since, done))) / (now - began), 1),
            }
            began, since = now, done
            recent.clear()
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            for name in row.keys() - {"step", "steps"}:
                scalars.add_scalar(name, row[name], done)
            if report:
                report(row)
        if writes and (done % config.checkpoint_every == 0 or done == last):
            save_checkpoint(root, done, trainer.tensors(), inputs)
    if scalars:
        scalars.close()


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
