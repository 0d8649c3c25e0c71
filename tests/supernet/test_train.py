"""Training: it learns, draws its members fairly, and a kill leaves no trace."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from space import InputError, Space, genome
from space.files import file_digest
from supernet.checkpoint import latest_checkpoint
from supernet.corpus import DataConfig, load_corpus
from supernet.train import (
    TrainConfig,
    Trainer,
    _maximal,
    load_supernet,
    members,
    step_rate,
    train,
    training_inputs,
)
from tests.contracts import tiny_space


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with some regularity, large enough to be split."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    for i in range(40):
        chosen = " ".join(words[j] for j in rng.integers(0, 5, 400))
        (folder / f"{i}.txt").write_text(chosen)
    return folder


def small_space() -> Space:
    return tiny_space(
        vocabulary=256,
        context=32,
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


def test_it_learns(text: Path, tmp_path: Path) -> None:
    rows: list[float] = []
    settings = config(text, steps=120, checkpoint_every=120, learning_rate=1e-2)
    train(small_space(), settings, tmp_path, lambda row: rows.append(row["loss_nats"]))
    assert rows[-1] < 0.6 * np.log(256)
    assert rows[-1] < rows[0] - 0.5


def test_a_killed_run_ends_with_the_same_weights(text: Path, tmp_path: Path) -> None:
    """A real SIGKILL, at whatever moment it falls, then the same call again."""
    script = tmp_path / "go.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.supernet.test_train import small_space, config\n"
        "from supernet.train import train\n"
        "train(small_space(), config(Path(sys.argv[1]), steps=60, checkpoint_every=7), Path(sys.argv[2]))\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}

    def call(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, str(script), str(text), str(folder)], env=environment, cwd=root
        )

    undisturbed, killed = tmp_path / "a", tmp_path / "b"
    assert call(undisturbed).wait(120) == 0
    process = call(killed)
    moment = 7 * int(np.random.default_rng().integers(1, 6))  # another one each time
    deadline = time.monotonic() + 60
    while not (killed / f"step-{moment:06d}" / "state.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not (killed / "step-000060").exists()
    assert call(killed).wait(120) == 0
    for name in ("model", "optimizer"):
        file = f"step-000060/{name}.safetensors"
        assert file_digest(undisturbed / file) == file_digest(killed / file)
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_half_a_checkpoint_does_not_exist(text: Path, tmp_path: Path) -> None:
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
                continue  # only the last line's end is gone: still whole JSON
            assert found is not None
            assert found.step == 20, (name, cut)
        path.write_bytes(data)
    again = latest_checkpoint(tmp_path, inputs)
    assert again == whole
    assert load_supernet(space, whole).count() > 0


def test_a_checkpoint_of_another_space_is_refused_by_both_names(text: Path, tmp_path: Path) -> None:
    settings = config(text, steps=2, checkpoint_every=2)
    train(small_space(), settings, tmp_path)
    other = tiny_space(vocabulary=256, context=32)
    with pytest.raises(InputError, match=other.hash[:12]) as caught:
        train(other, settings, tmp_path)
    assert small_space().hash[:12] in str(caught.value)


def test_not_finite_loss_stops_and_says_where(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(text, steps=6, checkpoint_every=2, clip=1e-3)
    space = small_space()
    original = Trainer.step

    def poisoned(self: Trainer, step: int) -> float:
        if step == 4:
            with torch.no_grad():
                self.parameters["embedding"].fill_(float("nan"))
        return original(self, step)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(InputError, match=r"step 4 .*width"):
        train(space, settings, tmp_path)
    found = latest_checkpoint(tmp_path, training_inputs(space, settings, load_corpus(settings.data)))
    assert found is not None
    assert found.step == 4


def test_members_of_a_step() -> None:
    space = small_space()
    settings = TrainConfig(steps=100, largest_only=0.1, sampled=2)
    assert members(space, settings, 5) == [genome.largest(space)]
    chosen = members(space, settings, 50)
    assert chosen[0] == genome.largest(space)
    assert chosen[1] == genome.smallest(space)
    assert len(chosen) == 4
    assert members(space, settings, 51) == members(space, settings, 51)
    assert members(space, settings, 51) != members(space, settings, 53)


def test_the_maximal_member_draws_every_mixer_evenly() -> None:
    space = small_space()
    settings = TrainConfig(steps=1000)
    drawn: Counter[str] = Counter()
    pairs = 2 * 3  # ratios 1 and linear, three linear mixers
    for turn in range(4 * pairs):
        architecture = _maximal(space, settings, turn, np.random.default_rng(turn))
        assert genome.contains(space, genome.encode(space, [architecture])).all()
        top = genome.largest(space)
        assert (architecture.width, architecture.depth) == (top.width, top.depth)
        assert all(
            a.heads == b.heads and a.ffn == b.ffn
            for a, b in zip(architecture.layers, top.layers, strict=True)
        )
        drawn.update({layer.mixer for layer in architecture.layers} - {"attention"})
    assert set(drawn.values()) == {4 * 2}


def test_the_rate_rises_then_falls() -> None:
    settings = TrainConfig(steps=100, warmup=0.1, learning_rate=1.0)
    rates = [step_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] < 0.06
