"""A small run that several tests start from: trained, profiled and searched once a session."""

import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import yaml

from search.cli.app import main
from search.config import RunConfig, smoke
from tests.contracts import tiny_value

Program = Callable[..., subprocess.CompletedProcess[str]]


# Files that take longest. They start first, so that all workers of pytest-xdist end at about the same time.
LONGEST = (
    "test_tutorials.py",
    "test_pipeline.py",
    "test_search.py",
    "test_plugin.py",
    "test_parallel.py",
    "test_audit.py",
    "test_feasibility.py",
    "test_kit.py",
    "test_profiling.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first."""
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


class Quiet:
    """A reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.skips: list[str] = []

    @contextmanager
    def stage(self, title: str) -> Iterator[object]:
        self.stages.append(title)
        yield lambda share, text: None

    def skipped(self, title: str) -> None:
        self.skips.append(title)

    def warn(self, text: str) -> None:
        raise AssertionError(text)


def short_smoke(config: RunConfig) -> RunConfig:
    """The configuration of a smoke run, with a third of its training steps."""
    small = smoke(config)
    return small.model_copy(
        update={"train": small.train.model_copy(update={"steps": 4, "checkpoint_every": 2})}
    )


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with some regularity, in enough files to be split."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(words[j] for j in rng.integers(0, len(words), 300)))
    return folder


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A run's configuration on a small space: seconds for each stage."""
    folder = tmp_path_factory.mktemp("config")
    space = tiny_value(
        name="small",
        vocab_size=256,
        width=[16, 32],
        depth=[1, 2, 3],
        mixer=["attention", "sliding", "linear", "gated_deltanet", "none"],
        window=[16],
        heads=[1, 2],
        ffn=[0, 32, 64],
        ratios=["full", 1, "linear"],
    )
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    value = {
        "space": "space.yaml",
        "device": "desk",
        "train": {
            "steps": 20, "batch": 4, "checkpoint_every": 10, "threads": 1,
            "data": {"path": str(text_folder), "held_out": 0.2},
        },
        "profile": {
            "block_ms": 0.5, "min_rounds": 2, "max_rounds": 2, "optimal_models": 6,
            "random_models": 4, "held_out_models": 5, "repeated_models": 2, "rss_models": 1,
            "max_noise": None, "max_error": None,
        },
        "search": {
            "limits": ["prefill@64<=90%", "params<=95%"], "generations": 4, "population": 8, "windows": 8,
            "front_windows": 12, "workers": 0,
        },
        "verify": {
            "tokens": 20, "copies": 1, "rounds": 4, "block_ms": 1.0, "max_noise": None, "searches": 2
        },
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    """A folder with ``run`` (trained and searched) and ``devices``."""
    from search import pipeline
    from search.config import Run, load_run_config
    from search.engine.entry import search_supernet
    from supernet.data.corpus import load_corpus

    folder = tmp_path_factory.mktemp("finished")
    run = Run(folder / "run", load_run_config(config_file), folder / "devices")
    run.save_config()
    corpus = load_corpus(run.config.train.data)
    checkpoint = pipeline.trained(run, Quiet(), corpus)
    predictor = pipeline.profiled(run, Quiet())
    front = search_supernet(
        run.folder / "searches" / "desk", run.trained(checkpoint, corpus), {"desk": predictor},
        run.config.search, Quiet(),
    )  # fmt: skip
    assert json.loads(json.dumps(front.to_json())) == front.to_json()
    return folder


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def run_program(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command within this process, which has imported torch already.

    Args:
        words: the arguments of ``formfit``.
    """
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["formfit", *map(str, words)])
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(words, int(str(ended.value.code)), out.getvalue(), err.getvalue())


@pytest.fixture
def formfit() -> Program:
    """The command line within this process."""
    return run_program
