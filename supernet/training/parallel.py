"""Data-parallel training through Ray Train: several processes share every batch.

Each worker builds the same :class:`~supernet.training.trainer.Trainer`, takes its rows of every batch and
sums gradients with the others before every update. Checkpoints are those of a training in one process. A
worker that dies is replaced, and all resume from the newest complete checkpoint. Every worker must see the
training's folder.

``fit`` runs in a Ray task of its own, because Ray Train installs an interrupt handler in the process that
calls it. Killing that task ends the whole training, whoever started Ray.
"""

import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from space import Architecture, InputError, Space
from space.cpus import available_cpus
from space.io.machine import session_folder
from supernet.data.corpus import Corpus
from supernet.training.checkpoint import latest_checkpoint, sole_writer
from supernet.training.loop import Report, keep_metrics, take_steps
from supernet.training.recipe import TrainConfig
from supernet.training.trainer import Trainer
from supernet.training.worker_imports import worker_environment

if TYPE_CHECKING:
    import ray

MAX_RETRIES = 2  # after losing a worker
CONNECT_TIMEOUT_S = 5.0  # of a Ray cluster
POLL_INTERVAL_S = 0.25  # of the metrics and of the workers' health


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything that a worker needs; sent through Ray."""

    space: Space
    config: TrainConfig
    corpus: "ray.ObjectRef[Corpus]"
    root: Path
    inputs: dict[str, str]
    architecture: Architecture | None
    working_directory: Path


def train_parallel(
    space: Space,
    config: TrainConfig,
    corpus: Corpus,
    root: Path,
    inputs: Mapping[str, str],
    report: Report | None = None,
    architecture: Architecture | None = None,
) -> None:
    """Train from the newest checkpoint to the last step, in ``config.workers`` processes.

    Args:
        space: the space.
        config: the training settings; ``threads`` is per worker, by default 1.
        corpus: the training text; the workers of a machine share one copy.
        root: the folder for checkpoints and metrics, visible to every worker.
        inputs: sha256 of everything the training depends on, by name.
        report: called in this process with each row of the metrics.
        architecture: train a plain model of this architecture; None trains the supernet.

    Raises:
        InputError: a worker raised one, or a running Ray has fewer CPUs than workers.
    """
    root = root.resolve()
    log = root / "metrics.jsonl"
    with sole_writer(root):
        checkpoint = latest_checkpoint(root, inputs)
        seen = checkpoint.step if checkpoint else 0
        keep_metrics(log, seen)  # rows past the checkpoint will be written again
    with ray_session(max(available_cpus(), config.workers)):
        import ray

        cpus = int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
        if cpus < config.workers:
            raise InputError(f"train.workers: {config.workers} workers need a CPU each, Ray has {cpus}")
        job = _Job(
            space=space,
            config=config,
            corpus=ray.put(corpus),
            root=root,
            inputs=dict(inputs),
            architecture=architecture,
            working_directory=Path.cwd(),
        )
        # The task's process is used once, because Ray Train leaves its signal handler behind.
        task = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(_fit).remote(job)
        try:
            while True:
                ready, _ = ray.wait([task], timeout=POLL_INTERVAL_S)
                for row in _rows(log):
                    if report and row["step"] > seen:
                        report(row)
                    seen = max(seen, row["step"])
                if ready:
                    break
            error = ray.get(task)
        finally:
            ray.cancel(task, force=True)  # ends its workers too
            shutil.rmtree(_storage(root), ignore_errors=True)
    if error:
        raise InputError(error)


@contextmanager
def ray_session(cpus: int, address: str | None = None) -> Iterator[None]:
    """Connect to Ray without its output: to a cluster, or to one started on this machine.

    If this process is connected already, that connection is used and stays open.

    Args:
        cpus: CPUs of a cluster that is started.
        address: address of a running cluster; None starts one.

    Raises:
        InputError: no cluster answers at the address, or none can be started.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # which would upload the working directory
    os.environ.setdefault("RAY_worker_niceness", "0")  # the priority of processes without Ray
    import ray

    if ray.is_initialized():
        yield
        return
    if address:
        _require_answer(address)
    folder = None if address else str(session_folder() / "ray")
    try:
        ray.init(
            address=address or "local",
            num_cpus=None if address else cpus,
            include_dashboard=None if address else False,
            _temp_dir=folder,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=worker_environment(),
        )
    except Exception as error:  # Ray's errors have no more specific common base
        where = f"Ray address {address}" if address else f"Ray cannot start in {folder}"
        raise InputError(f"{where}: {' '.join(str(error).split())}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Check that something listens at an address; Ray itself would wait for minutes.

    Raises:
        InputError: the address is malformed, or nothing answers.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not colon or not port.isdigit():
        raise InputError(f"Ray address {address!r}: expected HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"Ray address {address}: nothing answers ({error}); `ray start --head` starts a cluster"
        ) from None


def _storage(root: Path) -> Path:
    """Ray Train's own folder while it runs."""
    return root / "ray"


def _rows(log: Path) -> list[dict[str, Any]]:
    """The rows of the metrics; an incomplete last line is ignored."""
    try:
        lines = log.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def _fit(job: _Job) -> str | None:
    """Run the workers to the end; the message of a worker's :class:`InputError`, if any."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # saves a process; checkpoints suffice
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(
        POLL_INTERVAL_S
    )  # by default a training ends up to 2 s late
    from ray.train import RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import (
        FailureConfig,  # the class at run time; ray.train's annotations name another
    )

    for left in reversed(range(MAX_RETRIES + 1)):
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(num_workers=job.config.workers),
            run_config=RunConfig(
                name="train",
                storage_path=str(_storage(job.root)),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=MAX_RETRIES),
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


def _work(train_loop_config: Mapping[str, _Job]) -> None:
    """Run one worker."""
    import ray

    job = train_loop_config["job"]
    os.chdir(job.working_directory)  # relative paths resolve as in the caller
    rank, workers = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(job.config.threads or 1)
    with sole_writer(job.root) if rank == 0 else nullcontext():
        dist.barrier()  # no worker reads checkpoints before the lock is held
        corpus = ray.get(job.corpus)
        trainer = Trainer(job.space, job.config, corpus, job.architecture, rank=rank, workers=workers)
        take_steps(trainer, job.root, job.inputs)
