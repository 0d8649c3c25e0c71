"""Data-parallel training equals training in one process on the whole batch.

The arithmetic is tested with two bare processes, which start faster than Ray's.
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from space import InputError
from supernet.data.corpus import Corpus, DataConfig, load_corpus
from supernet.training import checkpoint
from supernet.training.checkpoint import Checkpoint, latest_checkpoint, sole_writer
from supernet.training.parallel import train_parallel
from supernet.training.recipe import TrainConfig
from supernet.training.train import train, training_inputs
from supernet.training.trainer import Trainer
from tests.numerics import assert_close
from tests.supernet.training.test_train import config as base
from tests.supernet.training.test_train import small_space

REPOSITORY = Path(__file__).parents[3]
# Rounding only, but AdamW divides by the size of a gradient that may itself be rounding error.
TOLERANCE = 1e-3


def settings(text: Path, **changes: Any) -> TrainConfig:
    """Rows with few targets, so that the workers' shares of the loss differ."""
    fields = {"steps": 40, "checkpoint_every": 20, "precision": "fp32"}
    return base(text, **(fields | {"data": DataConfig(path=text, held_out=0.2, recall=0.25)} | changes))


def assert_same(actual: Checkpoint, expected: Checkpoint) -> None:
    """Compare all tensors of two checkpoints, up to rounding."""
    for part in ("model", "optimizer"):
        ours, theirs = actual.load(part), expected.load(part)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert_close(name, ours[name], tensor, TOLERANCE)


def losses(root: Path) -> list[float]:
    return [json.loads(line)["loss_nats"] for line in (root / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training in one process, with checkpoints of steps 20 and 40."""
    root = tmp_path_factory.mktemp("one")
    train(small_space(), settings(text_folder), root)
    return root


def one_of_two(rank: int, config: str, folder: Path, begun: Checkpoint, steps: range) -> None:
    """A worker without Ray; writes its losses, tensors, and the error of a diverging learning rate."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    chosen = TrainConfig.model_validate_json(config)
    corpus = load_corpus(chosen.data)
    trainer = Trainer(small_space(), chosen, corpus, rank=rank, workers=2)
    trainer.restore(begun)
    rows = [trainer.step(step) for step in steps]
    for part, tensors in trainer.tensors().items():
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, folder / f"{part}-{rank}")
    wild = chosen.model_copy(update={"learning_rate": 1e30})
    trainer = Trainer(small_space(), wild, corpus, rank=rank, workers=2)
    with pytest.raises(InputError) as caught:
        list(map(trainer.step, steps))
    (folder / f"{rank}.json").write_text(json.dumps([rows, str(caught.value)]))
    dist.destroy_process_group()


def run_two(config: TrainConfig, folder: Path, begun: Checkpoint, steps: range) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = config.model_dump_json(), folder, begun, steps
    both = [context.Process(target=one_of_two, args=(rank, *arguments)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0


def test_two_processes_share_every_batch(one_process: Path, text_folder: Path, tmp_path: Path) -> None:
    """Losses of each step from one process's checkpoint; both workers hold equal bits and stop alike."""
    config = settings(text_folder)
    begun = Checkpoint(one_process / "step-000020", 20, "")
    single = Trainer(small_space(), config, load_corpus(config.data))
    single.restore(begun)
    expected = [single.step(step) for step in range(20, 40)]
    run_two(config, tmp_path, begun, range(20, 40))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    rows, refused = found[0]
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert re.match(r"training: (the loss became nan|a gradient is not finite) at step \d+ for", refused)
    for part, tensors in single.tensors().items():
        first, second = (load_file(tmp_path / f"{part}-{rank}") for rank in range(2))
        assert first.keys() == second.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(first[name], second[name]), name
            assert_close(name, first[name], tensor, TOLERANCE)
    # The case of a parameter without a gradient occurred: not every one was used in every step.
    assert len({float(x) for name, x in single.tensors()["optimizer"].items() if name.endswith(":step")}) > 1


def test_ray_train_equals_one_process(
    one_process: Path,
    text_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two workers from scratch; then the second half again in one process, from their checkpoint."""
    monkeypatch.chdir(text_folder.parent)
    config = settings(Path(text_folder.name), workers=2)
    reported: list[Any] = []
    both = train(small_space(), config, tmp_path, reported.append)
    assert not ray.is_initialized()
    assert capfd.readouterr().out == ""
    names = [".lock", "metrics.jsonl", "step-000020", "step-000040", "tensorboard"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [row["step"] for row in reported] == [20, 40]
    assert [row["loss_nats"] for row in reported] == losses(tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(one_process), rel=1e-5)
    inputs = training_inputs(small_space(), config, load_corpus(config.data))
    expected = latest_checkpoint(one_process, inputs)
    assert expected is not None
    assert_same(both, expected)
    shutil.rmtree(tmp_path / "step-000040")
    assert_same(train(small_space(), settings(text_folder), tmp_path), expected)
    assert losses(tmp_path) == pytest.approx(losses(one_process), rel=1e-5)


def test_second_writer_of_folder_is_error(
    one_process: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "LOCK_TIMEOUT_S", 0.2)
    with sole_writer(tmp_path), pytest.raises(InputError, match=f"{tmp_path}: another process writes here"):
        train(small_space(), settings(text_folder, steps=1), tmp_path)
    train(small_space(), settings(text_folder, steps=1), tmp_path)


def workers_of(mark: str) -> list[int]:
    """Ray's training processes with a mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and b"RayTrainWorker" in (folder / "cmdline").read_bytes()
                and mark.encode() in (folder / "environ").read_bytes()
            ):
                found.append(int(folder.name))
        except OSError:
            continue  # ended meanwhile
    return found


def start(root: Path, config: TrainConfig) -> subprocess.Popen[bytes]:
    """Train in a subprocess whose descendants have the folder in their environment."""
    code = (
        "import sys; from pathlib import Path\n"
        "from supernet.training.recipe import TrainConfig\n"
        "from supernet.training.train import train\n"
        "from tests.supernet.test_parallel import small_space\n"
        "train(small_space(), TrainConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, config.model_dump_json(), str(root)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "MARK": str(root)},
        cwd=REPOSITORY,
    )


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 150
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_worker_is_replaced(text_folder: Path, tmp_path: Path) -> None:
    config = settings(text_folder, steps=200, workers=2)
    process = start(tmp_path / "two", config)
    wait_for(tmp_path / "two/step-000060/state.json", process)
    before = workers_of(str(tmp_path))
    assert len(before) == 2
    os.kill(before[1], signal.SIGKILL)
    assert process.wait(200) == 0
    assert not workers_of(str(tmp_path))
    steps = [json.loads(line)["step"] for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(20, 201, 20))
    inputs = training_inputs(small_space(), config, load_corpus(config.data))
    ended = latest_checkpoint(tmp_path / "two", inputs)
    assert ended is not None
    assert ended.step == 200
    train(small_space(), settings(text_folder, steps=200), tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.slow
def test_resumes_after_all_processes_were_killed(text_folder: Path, tmp_path: Path) -> None:
    """The next call starts at once, while workers of the killed training may still run."""
    process = start(tmp_path / "two", settings(text_folder, steps=200, workers=2))
    wait_for(tmp_path / "two/step-000060/state.json", process)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    again = train(small_space(), settings(text_folder, steps=200), tmp_path / "two")
    assert not workers_of(str(tmp_path))
    assert again.step == 200
    train(small_space(), settings(text_folder, steps=200), tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.slow
def test_interrupt_ends_all_processes(text_folder: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "two", settings(text_folder, steps=2000, workers=2))
    wait_for(tmp_path / "two/step-000020/state.json", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert not workers_of(str(tmp_path))
    assert not (tmp_path / "two/ray").exists()


@pytest.mark.slow
def test_worker_error_reaches_caller(text_folder: Path, tmp_path: Path) -> None:
    """Also: a running Ray is used, stays open, and must have enough CPUs."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(InputError, match=r"(became nan|is not finite) at step \d+ for width") as caught:
            train(small_space(), settings(text_folder, learning_rate=1e30, workers=2), tmp_path)
        assert "\n" not in str(caught.value)
        assert ray.is_initialized()
        config = settings(text_folder, batch=6, workers=3)
        corpus: Corpus = load_corpus(config.data)
        with pytest.raises(InputError, match="3 workers need a CPU each, Ray has 2"):
            train_parallel(small_space(), config, corpus, tmp_path, {})
    finally:
        ray.shutdown()
