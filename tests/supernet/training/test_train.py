"""Training: it lowers the loss, resumes exactly, and reports errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from space import Architecture, InputError, Space, genome
from space.io.artefact import file_digest
from supernet.data.corpus import DataConfig, load_corpus
from supernet.training.checkpoint import latest_checkpoint, save_checkpoint
from supernet.training.loop import keep_metrics
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_stand_alone, load_supernet, train, training_inputs
from supernet.training.trainer import Trainer, Weights, distillation_loss
from tests.contracts import tiny_space


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A regular text, large enough to be split."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    for i in range(40):
        chosen = " ".join(words[j] for j in rng.integers(0, 5, 400))
        (folder / f"{i}.txt").write_text(chosen)
    return folder


def small_space() -> Space:
    return tiny_space(
        vocab_size=256,
        max_seq_len=32,
        mixer=["attention", "gated_deltanet", "sliding", "linear"],
        window=[8],
        depth=[1, 2],
        ratios=["full", 1, "linear"],
    )


def config(text: Path, **changes: object) -> TrainConfig:
    fields = {
        "steps": 30,
        "batch": 4,
        "checkpoint_every": 10,
        "threads": 1,
        "data": DataConfig(path=text, held_out=0.2),
    }
    return TrainConfig.model_validate(fields | changes)


def test_training_lowers_loss(text: Path, tmp_path: Path) -> None:
    rows: list[float] = []
    settings = config(text, steps=120, checkpoint_every=120, learning_rate=3e-3)
    train(small_space(), settings, tmp_path, lambda row: rows.append(row["loss_nats"]))
    assert rows[-1] < 0.2 * np.log(256)
    assert rows[-1] < rows[0] - 0.5


def test_killed_and_resumed_training_equals_uninterrupted(text: Path, tmp_path: Path) -> None:
    """SIGKILL at a random moment, then the same call again."""
    script = tmp_path / "go.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.supernet.training.test_train import small_space, config\n"
        "from supernet.training.train import train\n"
        "train(small_space(), config(Path(sys.argv[1]), steps=60, checkpoint_every=7), Path(sys.argv[2]))\n"
    )
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root}

    def call(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, str(script), str(text), str(folder)], env=environment, cwd=root
        )

    undisturbed, killed = tmp_path / "a", tmp_path / "b"
    process = call(killed)
    moment = 7 * int(np.random.default_rng().integers(1, 6))  # a different one in each run
    deadline = time.monotonic() + 60
    while not (killed / f"step-{moment:06d}" / "state.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not (killed / "step-000060").exists()
    resumed = call(killed)
    train(small_space(), config(text, steps=60, checkpoint_every=7), undisturbed)  # meanwhile, here
    assert resumed.wait(120) == 0
    for name in ("model", "optimizer"):
        file = f"step-000060/{name}.safetensors"
        assert file_digest(undisturbed / file) == file_digest(killed / file)
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_incomplete_checkpoint_is_ignored(text: Path, tmp_path: Path) -> None:
    space, settings = small_space(), config(text)
    inputs = training_inputs(space, settings, load_corpus(settings.data))
    train(space, settings, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000020", "step-000030"]
    whole = latest_checkpoint(tmp_path, inputs)
    assert whole is not None
    assert whole.step == 30
    for name in ("state.json", "model.safetensors", "optimizer.safetensors"):
        path = tmp_path / "step-000030" / name
        data = path.read_bytes()
        for cut in (0, 1, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:cut])
            found = latest_checkpoint(tmp_path, inputs)
            if name == "state.json" and cut == len(data) - 1:
                continue  # only the final line end is cut: still complete JSON
            assert found is not None
            assert found.step == 20, (name, cut)
        path.write_bytes(data)
    again = latest_checkpoint(tmp_path, inputs)
    assert again == whole
    load_supernet(space, whole)


def test_latest_checkpoint_has_highest_step(tmp_path: Path) -> None:
    for step in (999_900, 1_000_000, 1_000_100):
        save_checkpoint(tmp_path, step, {"model": {}, "optimizer": {}}, {})
    (tmp_path / "step-by-hand").mkdir()
    found = latest_checkpoint(tmp_path, {})
    assert found is not None
    assert found.step == 1_000_100
    assert sorted(p.name for p in tmp_path.glob("step-*0")) == ["step-1000000", "step-1000100"]


def test_non_finite_gradient_stops_before_update(text: Path) -> None:
    """A finite loss with a gradient that is not finite: sqrt at 0."""
    settings = config(text, rule="random", sampled=1)
    trainer = Trainer(small_space(), settings, load_corpus(settings.data))
    logits = trainer._logits

    def broken(weights: Weights, architecture: Architecture, tokens: Tensor) -> Tensor:
        return logits(weights, architecture, tokens) + 0 * weights["norm"].sub(1).square().sum().sqrt()

    trainer._logits = broken  # type: ignore[method-assign]
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    with pytest.raises(InputError, match=r"a gradient is not finite at step 1 for width"):
        trainer.step(0)
    for name, parameter in trainer.parameters.items():
        assert torch.equal(parameter, before[name]), name


def test_checkpoint_of_other_space_error_names_both(text: Path, tmp_path: Path) -> None:
    settings = config(text, steps=2, checkpoint_every=2)
    train(small_space(), settings, tmp_path)
    other = tiny_space(vocab_size=256, max_seq_len=32)
    with pytest.raises(InputError, match=other.hash[:12]) as caught:
        train(other, settings, tmp_path)
    assert small_space().hash[:12] in str(caught.value)


def test_non_finite_loss_error_names_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(text, steps=6, checkpoint_every=2, clip=1e-3)
    space = small_space()
    original = Trainer.step

    def poisoned(self: Trainer, step: int) -> dict[str, float]:
        if step == 4:
            with torch.no_grad():
                self.parameters["embedding"].fill_(float("nan"))
        return original(self, step)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(InputError, match=r"step 5 .*width"):
        train(space, settings, tmp_path)
    found = latest_checkpoint(tmp_path, training_inputs(space, settings, load_corpus(settings.data)))
    assert found is not None
    assert found.step == 4


def test_stand_alone_training_matches_supernet_training(text: Path, tmp_path: Path) -> None:
    """Equal batches and schedule, own weights, the same kind of checkpoint."""
    space, settings = small_space(), config(text, steps=60, checkpoint_every=20, learning_rate=5e-3)
    architecture = genome.largest(space)
    rows: list[float] = []
    found = train(
        space, settings, tmp_path / "a", lambda row: rows.append(row["loss_nats"]), architecture=architecture
    )
    assert rows[-1] < rows[0] - 0.3
    model = load_stand_alone(space, found, architecture)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: tuple(t.shape) for n, t in found.load("model").items()
    }
    with pytest.raises(InputError, match="architecture"):
        train(space, settings, tmp_path / "a", architecture=genome.smallest(space))


def test_unused_weights_are_unchanged(text: Path) -> None:
    """Without gradient, momentum and decay, the weights keep every bit."""
    space, settings = small_space(), config(text, largest_warmup=0.5)
    trainer = Trainer(space, settings, load_corpus(settings.data))
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    for step in range(3):  # the largest only
        trainer.step(step)
    for name, parameter in trainer.parameters.items():
        private = any(f".{mixer}." in name for mixer in ("linear", "gated_deltanet", "sliding"))
        assert torch.equal(parameter, before[name]) == private, name
        assert (name not in trainer.optimiser.state) == private, name


def test_training_options_run(text: Path) -> None:
    space = small_space()
    for changes in (
        {"rule": "random", "sampled": 1},
        {"update": "accumulated"},
        {"update": "accumulated", "teacher": "largest"},
        {"teacher": "largest"},
        {"distillation": 0.0},
        {"progressive_shrinking": 0.9, "depth_warmup": 0.0},
        {"precision": "bf16"},
    ):
        settings = config(text).model_copy(update=changes)
        trainer = Trainer(space, settings, load_corpus(settings.data))
        for step in range(2):
            assert np.isfinite(trainer.step(step)["loss_nats"])


def test_distillation_loss_equals_reference() -> None:
    """Cross-entropies written out; targets of -100 are ignored."""
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(size=(2, 3, 5)), rng.dirichlet(np.ones(5), (2, 3))
    targets = np.array([[1, -100, 4], [0, 2, -100]])
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    text = soft = 0.0
    for i, j in zip(*np.nonzero(targets >= 0), strict=True):
        text -= logs[i, j, targets[i, j]]
        soft -= (teacher[i, j] * logs[i, j]).sum()
    found = [
        float(distillation_loss(torch.from_numpy(logits), torch.from_numpy(targets), t, share))
        for t, share in ((None, 0.5), (torch.from_numpy(teacher), 0.0), (torch.from_numpy(teacher), 0.3))
    ]
    assert found == pytest.approx([text, text, 0.7 * text + 0.3 * soft], rel=1e-5)


def test_metrics_and_tensorboard_are_written(text: Path, tmp_path: Path) -> None:
    settings = config(text, steps=40)
    train(small_space(), settings, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40]
    warmup_steps = round(settings.largest_warmup * 40)
    assert (
        rows[-1]["tokens"]
        == (warmup_steps + (40 - warmup_steps) * (2 + settings.sampled)) * settings.batch * 32
    )
    assert all(row["tokens_per_second"] > 0 and row["smallest_nats"] > 0 for row in rows)
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(name.encode() in content for name in ("loss_nats", "sampled_nats", "tokens_per_second"))


def test_lines_of_the_metrics_that_are_no_rows_are_removed(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    rows = [{"step": 20, "loss_nats": 1.0}, {"step": 40, "loss_nats": 0.9}, {"step": 60, "loss_nats": 0.8}]
    lines = [json.dumps(row) for row in rows]
    log.write_text("\n".join([lines[0], "7", "[]", "{}", '{"step": "x"}', lines[1], lines[2], '{"ste']))
    keep_metrics(log, 40)
    assert [json.loads(line) for line in log.read_text().splitlines()] == rows[:2]
