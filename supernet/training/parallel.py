"""Data-parallel training: several processes share every batch, through Ray Train.

Each worker builds the same :class:`~supernet.training.trainer.Trainer`, takes its rows of every batch and
sums gradients with the others before every update; nothing else differs from training in one process, and
the checkpoints are the same files. A worker that dies is replaced: all go on from the last whole
checkpoint. The folder of the training must be one that every worker sees.

``fit`` runs in a Ray task of its own, because Ray Train takes over the interrupt signal of the
process that calls it; killing that task ends the whole training, wherever Ray came from.
"""

import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from space import Architecture, InputError, Space
from supernet.data.corpus import Corpus
from supernet.training.checkpoint import latest_checkpoint, sole_writer
from supernet.training.loop import keep_metrics, take_steps
from supernet.training.recipe import TrainConfig
from supernet.training.trainer import Trainer

RETRIES = 2  # how often a training goes on after losing a worker
ANSWER = 5.0  # seconds that a Ray cluster has to answer
POLL = 0.25  # seconds between two looks at the metrics, or at the workers


def train_parallel(
    space: Space,
    config: TrainConfig,
    corpus: Corpus,
    root: Path,
    inputs: Mapping[str, str],
    report: Callable[[Mapping[str, Any]], None] | None = None,
    architecture: Architecture | None = None,
) -> None:
    """Take the steps that are left in ``config.workers`` processes of one torch thread each.

    Args:
        space: the space that the architectures are of.
        config: how to train; ``threads`` is that of each worker, 1 where it is not given.
        corpus: what to train on; the workers of a machine share one copy.
        root: the folder for checkpoints and metrics, seen by every worker.
        inputs: the hashes that checkpoints carry.
        report: called in this process with each row of the metrics.
        architecture: train this one alone; None trains the supernet.

    Raises:
        InputError: what a worker refused, or a running Ray with fewer CPUs than workers.
    """
    root = root.resolve()
    log = root / "metrics.jsonl"
    with sole_writer(root):
        found = latest_checkpoint(root, inputs)
        seen = found.step if found else 0
        keep_metrics(log, seen)  # rows past the checkpoint will be written again
    with ray_session(max(os.cpu_count() or 1, config.workers)):
        import ray

        cpus = int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
        if cpus < config.workers:
            raise InputError(f"train.workers: {config.workers} workers need a CPU each, Ray has {cpus} here")
        job = {
            "space": space.model_dump(mode="json"),
            "config": config.model_dump(mode="json"),
            "corpus": ray.put(corpus),
            "root": str(root),
            "inputs": dict(inputs),
            "architecture": architecture and architecture.to_json(),
            "folder": str(Path.cwd()),
        }
        # A process used once: Ray Train leaves its signal handler behind.
        fitted = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(_fit).remote(job)
        try:
            while True:
                ready, _ = ray.wait([fitted], timeout=POLL)
                for row in _rows(log):
                    if report and row["step"] > seen:
                        report(row)
                    seen = max(seen, row["step"])
                if ready:
                    break
            refused = ray.get(fitted)
        finally:
            ray.cancel(fitted, force=True)  # its workers go with it
            shutil.rmtree(_storage(root), ignore_errors=True)
    if refused:
        raise InputError(refused)


@contextmanager
def ray_session(cpus: int, address: str | None = None) -> Iterator[None]:
    """A quiet Ray: the cluster at an address, or one of this machine with so many CPUs.

    One that this process is connected to already is used, and left.

    Raises:
        InputError: no cluster answers at the address.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_worker_niceness", "0")  # a worker is no less than a process without Ray
    import ray

    if ray.is_initialized():
        yield
        return
    if address:
        _require_answer(address)
    try:
        ray.init(
            address=address or "local",
            num_cpus=None if address else cpus,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray's own classes have no common base but this one
        if not address:
            raise
        raise InputError(f"Ray address {address}: {' '.join(str(error).split())}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Refuse an address at which nothing listens; Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not colon or not port.isdigit():
        raise InputError(f"Ray address {address!r}: expected HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"Ray address {address}: nothing answers ({error}); `ray start --head` starts a cluster"
        ) from None


def _storage(root: Path) -> Path:
    """Where Ray Train keeps its own notes while it runs."""
    return root / "ray"


def _rows(log: Path) -> list[dict[str, Any]]:
    """The whole lines of the metrics."""
    try:
        lines = log.read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def _fit(job: Mapping[str, Any]) -> str | None:
    """Run the workers to the end; returns what one of them refused."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process less; checkpoints are enough
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(POLL)  # else it ends up to 2 s late
    from ray.train import RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig  # what ray.train has at run time; its types say another

    for left in reversed(range(RETRIES + 1)):
        trainer = TorchTrainer(
            _work,
            train_loop_config=dict(job),
            scaling_config=ScalingConfig(num_workers=job["config"]["workers"]),
            run_config=RunConfig(
                name="train",
                storage_path=str(_storage(Path(job["root"]))),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=RETRIES),
            ),
        )
        try:
            trainer.fit()
            break
        except WorkerGroupError as error:
            for failure in error.worker_failures.values():
                if isinstance(failure, InputError):
                    return str(failure)
            if not left:
                raise
    return None


def _work(job: Mapping[str, Any]) -> None:
    """What each worker does."""
    import ray

    os.chdir(job["folder"])  # relative paths mean what they mean to the caller
    rank, workers = dist.get_rank(), dist.get_world_size()
    space, config = Space.model_validate(job["space"]), TrainConfig.model_validate(job["config"])
    architecture = Architecture.from_json(job["architecture"]) if job["architecture"] else None
    root = Path(job["root"])
    torch.set_num_threads(config.threads or 1)
    with sole_writer(root) if rank == 0 else nullcontext():
        dist.barrier()  # none looks for a checkpoint while an older training might write one
        trainer = Trainer(space, config, ray.get(job["corpus"]), architecture, rank=rank, workers=workers)
        take_steps(trainer, root, job["inputs"])
