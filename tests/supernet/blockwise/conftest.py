"""A parent that is trained once a session: two layers of attention, as an extracted sub-model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from space import Space, genome
from supernet.data.corpus import Corpus, DataConfig, load_corpus
from supernet.extract import write_submodel
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_supernet, train
from supernet.training.trials import one_thread
from tests.contracts import tiny_space

PARENT: dict[str, Any] = {
    "vocab_size": 256, "head_dim": 16, "width": [32], "depth": [2], "mixer": ["attention"],
    "heads": [4], "kv_heads": [2], "ffn": [64], "ratios": ["full"],
}  # fmt: skip


def block_space(**changes: Any) -> Space:
    """A space of private blocks around the parent."""
    choices: dict[str, Any] = {"sharing": "block", "mixer": ["attention", "gated_deltanet", "short_conv"]}
    return tiny_space(**{**PARENT, **choices, "ffn": [32, 64], "ratios": ["full", 1, "linear"], **changes})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other take longer than these models."""
    with one_thread():
        yield


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words, and in every document a code of its own again and again, which can be recalled."""
    folder = tmp_path_factory.mktemp("codes")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    for i in range(60):
        code = "".join(rng.choice(list("bcdfghjklmnp"), 10))
        drawn = [code if rng.random() < 0.2 else words[rng.integers(6)] for _ in range(300)]
        (folder / f"{i}.txt").write_text(" ".join(drawn))
    return folder


@pytest.fixture(scope="session")
def corpus(text_folder: Path) -> Corpus:
    return load_corpus(DataConfig(path=text_folder, held_out=0.2))


@pytest.fixture(scope="session")
def parent_folder(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    """The parent's folder."""
    folder = tmp_path_factory.mktemp("parent")
    space = tiny_space(**PARENT)
    config = TrainConfig(steps=250, batch=8, length=64, rule="random", sampled=1, threads=1, precision="fp32")
    checkpoint = train(space, config, folder / "training", corpus=corpus)
    write_submodel(folder / "model", load_supernet(space, checkpoint), genome.largest(space), {}, {})
    return folder / "model"


def settings(text_folder: Path, parent_folder: Path, **changes: Any) -> TrainConfig:
    """Settings of a blockwise training of seconds."""
    blockwise = {"tokens": 8192, "score_windows": 4, **changes.pop("blockwise", {})}
    value = {
        "method": "blockwise", "init": str(parent_folder), "steps": 48, "batch": 4, "length": 64,
        "precision": "fp32", "threads": 1, "data": {"path": str(text_folder), "held_out": 0.2},
        "blockwise": blockwise,
    }  # fmt: skip
    return TrainConfig.model_validate({**value, **changes})
