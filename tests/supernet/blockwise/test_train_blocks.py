"""Blockwise training from a trained parent: files, scores, resuming, workers and refusals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from space import Architecture, InputError, Layer, Space, genome
from space.blocks import forward
from space.io.parquet import read_table
from supernet.blockwise.capture import capture_windows
from supernet.blockwise.parent import open_parent
from supernet.blockwise.train import SCORES, make_plan, require_room, train_blocks
from supernet.data.corpus import Corpus
from supernet.evaluate import evaluation_set
from supernet.extract import read_submodel
from supernet.training.checkpoint import Checkpoint
from supernet.training.parallel import ray_session
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_supernet
from tests.supernet.blockwise.conftest import block_space, settings

REPOSITORY = Path(__file__).parents[3]
SPACE = block_space()


def quiet(share: float, text: str) -> None:
    assert 0 <= share <= 1, text


@pytest.fixture(scope="module")
def config(text_folder: Path, parent_folder: Path) -> TrainConfig:
    return settings(text_folder, parent_folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, config: TrainConfig) -> tuple[Path, Checkpoint]:
    root = tmp_path_factory.mktemp("blockwise")
    return root, train_blocks(SPACE, config, root, quiet)


def block_files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "blocks").glob("*-*")) if path.is_file()}


def composite(space: Space, slot: int, part: str, layer: Layer) -> Architecture:
    """The parent's architecture with one block replaced."""
    layers = list(genome.largest(space).layers)
    own = layers[slot]
    mixer = own if part == "ffn" else layer
    layers[slot] = Layer(
        mixer=mixer.mixer, heads=mixer.heads, kv_heads=mixer.kv_heads, window=mixer.window,
        ffn=layer.ffn if part == "ffn" else own.ffn,
    )  # fmt: skip
    return Architecture(32, tuple(layers))


def test_largest_is_the_parent(trained: tuple[Path, Checkpoint], parent_folder: Path) -> None:
    supernet, parent = load_supernet(SPACE, trained[1]), read_submodel(parent_folder).model()
    tokens = torch.arange(64)[None]
    assert torch.equal(supernet(tokens, genome.largest(SPACE))[0], parent(tokens)[0])


def test_errors_of_the_library(trained: tuple[Path, Checkpoint]) -> None:
    table = pd.read_parquet(trained[0] / "library.parquet").set_index(["slot", "candidate"])
    assert len(table) == 2 * 5
    for slot in range(2):
        for own in ("attention-h4-k2", "ffn-64"):
            assert table.error[slot, own] == 0 == table.steps[slot, own]
        for other in ("gated_deltanet-h4-k2", "short_conv", "ffn-32"):
            assert 0 < table.error[slot, other] < table.start_error[slot, other] < 1
    assert not list((trained[0] / "blocks").glob("capture-*"))


def test_scores_equal_forward_passes_of_composites(
    trained: tuple[Path, Checkpoint], corpus: Corpus, config: TrainConfig
) -> None:
    supernet = load_supernet(SPACE, trained[1])
    data = evaluation_set(corpus, config.blockwise.score_windows, 64)
    tokens, targets = torch.from_numpy(data.tokens), torch.from_numpy(data.targets).flatten()

    def logs(architecture: Architecture) -> torch.Tensor:
        weights = supernet.weights(architecture)
        found = forward(weights, architecture, SPACE.config, tokens)[0].double()
        return found.flatten(0, 1).log_softmax(-1)

    parent = logs(genome.largest(SPACE))
    scores = pd.read_parquet(trained[0] / "scores.parquet")
    choices = {
        "attention-h4-k2": ("mixer", Layer(mixer="attention", heads=4, kv_heads=2)),
        "gated_deltanet-h4-k2": ("mixer", Layer(mixer="gated_deltanet", heads=4, kv_heads=2)),
        "short_conv": ("mixer", Layer(mixer="short_conv")),
        "ffn-32": ("ffn", Layer(ffn=32)),
        "ffn-64": ("ffn", Layer(ffn=64)),
    }
    assert len(scores) == 2 * len(choices)
    for row in scores.itertuples():
        child = logs(composite(SPACE, row.slot, *choices[row.candidate]))
        kl = float((parent.exp() * (parent - child)).sum(-1).mean())
        losses = F.nll_loss(child, targets, reduction="none")
        recalled = losses[torch.from_numpy(data.recallable).flatten()]
        assert row.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert row.loss_nats == pytest.approx(float(losses.mean()), rel=1e-5)
        assert row.recall_loss_nats == pytest.approx(float(recalled.mean()), rel=1e-5)
        if row.candidate in ("attention-h4-k2", "ffn-64"):
            assert row.kl == 0  # the parent itself
        else:
            assert row.kl > 0


def test_leaving_blocks_out_is_scored_where_the_space_may(config: TrainConfig, tmp_path: Path) -> None:
    space = block_space(mixer=["attention", "none"], ratios=["full"], ffn=[0, 64])
    train_blocks(space, config, tmp_path, quiet)
    table, _ = read_table(tmp_path / "scores.parquet", SCORES)
    for slot in range(2):
        rows = table[table.slot == slot].set_index("candidate")
        assert set(rows.index) == {"attention-h4-k2", "ffn-64", "none", "ffn-0"}
        assert rows.kl["none"] > 0 < rows.kl["ffn-0"]


def test_sigkill_and_resume_give_the_same_files(
    trained: tuple[Path, Checkpoint],
    text_folder: Path,
    parent_folder: Path,
    config: TrainConfig,
    tmp_path: Path,
) -> None:
    """A real SIGKILL when some blocks are there."""
    script = tmp_path / "go.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.supernet.blockwise.test_train_blocks import *\n"
        "text, parent, out = map(Path, sys.argv[1:])\n"
        "train_blocks(SPACE, settings(text, parent), out, quiet)\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(script), str(text_folder), str(parent_folder), str(out)],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list((out / "blocks").glob("000-*.safetensors"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL)  # it may have come to its end first
    files = sorted((out / "blocks").glob("000-*.safetensors"))
    times = {path: path.stat().st_mtime_ns for path in files}
    damaged = files[0]
    damaged.write_bytes(damaged.read_bytes()[:100])  # what a power failure may leave
    checkpoint = train_blocks(SPACE, config, out, quiet)
    assert block_files(out) == block_files(trained[0])
    assert checkpoint.digest == trained[1].digest
    assert all(path.stat().st_mtime_ns == times[path] for path in files if path != damaged)


def test_workers_give_the_same_files(
    trained: tuple[Path, Checkpoint], config: TrainConfig, tmp_path: Path
) -> None:
    with ray_session(2):  # one for both
        for workers in (1, 2):
            out = tmp_path / str(workers)
            train_blocks(SPACE, config.model_copy(update={"workers": workers}), out, quiet)
            assert block_files(out) == block_files(trained[0])
            assert (out / "scores.parquet").read_bytes() == (trained[0] / "scores.parquet").read_bytes()


def test_few_layers_at_a_time_give_the_same_blocks(
    trained: tuple[Path, Checkpoint], config: TrainConfig, corpus: Corpus, tmp_path: Path
) -> None:
    from supernet.blockwise import train

    parent = open_parent(Path(str(config.init)), SPACE)
    windows, held_out = capture_windows(corpus, config.blockwise.tokens, 64)
    plan = make_plan(SPACE, config, tmp_path / "blocks", parent, windows, held_out)
    train.write_parent(plan.parent, parent.weights, parent.digest)
    train.Stages(plan, windows, config, quiet).fit([0, 1], 1)
    assert len(list(plan.capture.iterdir())) == 1
    expected = {name: data for name, data in block_files(trained[0]).items() if name.endswith("safetensors")}
    assert block_files(tmp_path) == expected


def test_added_choices_are_fitted_alone(
    trained: tuple[Path, Checkpoint], config: TrainConfig, tmp_path: Path
) -> None:
    small = block_space(mixer=["attention"], ratios=["full"])
    train_blocks(small, config, tmp_path / "small", quiet)
    ours = {n: d for n, d in block_files(tmp_path / "small").items() if n.endswith("safetensors")}
    assert ours.items() <= block_files(trained[0]).items()
    assert len(ours) == 2 * 3


def test_bf16_activations_change_errors_little(
    trained: tuple[Path, Checkpoint], text_folder: Path, parent_folder: Path, tmp_path: Path
) -> None:
    fp32 = settings(text_folder, parent_folder, blockwise={"storage": "fp32", "score_windows": 0})
    train_blocks(SPACE, fp32, tmp_path, quiet)
    exact = pd.read_parquet(tmp_path / "library.parquet")
    rounded = pd.read_parquet(trained[0] / "library.parquet")
    assert np.allclose(rounded.error, exact.error, rtol=0.05, atol=1e-4)
    assert not (tmp_path / "scores.parquet").exists()


def test_too_little_disk_or_memory_is_refused_before_the_work(
    config: TrainConfig, corpus: Corpus, tmp_path: Path
) -> None:
    parent = open_parent(Path(str(config.init)), SPACE)
    plan = make_plan(SPACE, config, tmp_path / "blocks", parent, np.zeros((1, 32), np.int64), 1)
    petabytes = np.broadcast_to(np.int64(0), (10**12, 1024))  # no disk has room for so many windows
    with pytest.raises(InputError, match=r"blocks: blockwise training needs [0-9.]+ GB of disk .* free"):
        require_room(plan, parent, petabytes, config, 2)
    with pytest.raises(InputError, match=r"needs [0-9.]+ GB of memory for 1 layers at a time"):
        require_room(plan, parent, np.broadcast_to(np.int64(0), (10**7, 64)), config, 0)
    assert require_room(plan, parent, np.zeros((4, 32), np.int64), config, 2) == SPACE.slots


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blockwise": {"tokens": 10**7}}, "blockwise.tokens: .* windows of 64 tokens need .* text has"),
        ({"blockwise": {"tokens": 80}}, "train.blockwise.tokens: 80 are fewer than two windows of 64"),
        ({"length": 65}, "train.length: 65 is more than the space's max_seq_len 64"),
        ({"blockwise": {"score_windows": 10**6}}, "tokens held out, 1000000 windows of 65 need"),
    ],
)  # fmt: skip
def test_texts_that_do_not_fit_are_refused(
    text_folder: Path, parent_folder: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train_blocks(SPACE, settings(text_folder, parent_folder, **changes), tmp_path, quiet)


def test_text_shorter_than_a_window_is_refused(parent_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} words")
    config = settings(tmp_path / "text", parent_folder)
    with pytest.raises(InputError, match=r"side has \d+ bytes, a length of 64 needs 65"):
        train_blocks(SPACE, config, tmp_path / "out", quiet)


def test_progress_rises_and_says_what_is_left(config: TrainConfig, tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    few = config.model_copy(update={"steps": 4})
    train_blocks(SPACE, few, tmp_path, lambda share, text: told.append((share, text)))
    shares, texts = [share for share, _ in told], [text for _, text in told]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert texts[0] == "the parent reads the text, layer 0 of 2"
    assert any(text.startswith("1 of 2 layers fitted, about ") for text in texts)
    assert texts[-1].startswith("2 of 2 layers scored, about 0 s left")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharing": "qkvo"}, "blockwise needs a parent .* sharing: block; space tiny has sharing: qkvo"),
        ({"width": [48]}, r"train.init: .* does not fit space tiny: it has width 32 \(space: 48\)"),
        ({"depth": [3]}, r"does not fit space tiny: it has layers 2 \(space: 3\)"),
        ({"qk_norm": True}, r"it has qk_norm False \(space: True\)"),
        ({"ffn": [64, 128]}, "layer.ffn: 128 is more than the parent's 64"),
        ({"heads": [8]}, "layer.heads: 8 is more than the parent's 4"),
    ],
)  # fmt: skip
def test_spaces_that_do_not_fit_are_refused(
    config: TrainConfig, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train_blocks(block_space(**changes), config, tmp_path, quiet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": None}, "method: blockwise needs a parent; name its folder with init"),
        ({"distillation": 0.5}, "distillation: method blockwise does not use it; leave it out"),
        ({"method": "joint"}, "blockwise: method joint has no such settings"),
        ({"data": {"recall": 1.0}}, "method: blockwise needs text"),
    ],
)
def test_contradictory_settings_are_refused(
    text_folder: Path, parent_folder: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(text_folder, parent_folder, **changes)
