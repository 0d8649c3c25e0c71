"""``parent`` in a configuration, and ``formfit adapt``: defaults, what a file overrides, and bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from search.config import RunConfig, load_run_config, run_config
from space import InputError, Workload, genome
from supernet.parent import read_parent
from tests.conftest import Program
from tests.supernet.parent.models import a_parent, saved, write_gguf


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama, as a folder of transformers without a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    saved(folder, "llama")
    return folder


def config_of(value: dict[str, Any], folder: Path) -> RunConfig:
    """The configuration of a file with these settings."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(value))
    return load_run_config(path)


def test_defaults(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(llama)
    limits = ["decode@64,threads=1<=70%", "prefill@32<=90%", "params<=90%", "decode@64<=2ms"]
    config = config_of({"parent": "model", "search": {"limits": limits[:3]}}, tmp_path)
    parent = read_parent(llama)
    assert genome.largest(config.space) == parent.architecture
    assert (config.space.max_seq_len, config.space.sharing) == (128, "block")
    train = config.train
    assert (train.method, train.init, train.length) == ("blockwise", tmp_path / "model", 128)
    assert train.data.tokenizer is None  # the folder has none, so bytes are the tokens
    assert config.profile.workloads == ("decode@64", "prefill@32")
    assert config.search.objectives == ("kl", "latency:decode@64")
    assert config.search.strategy == "mip-nsga2"
    assert (config.finalists.count, config.finalists.distillation, config.finalists.baselines) == (
        2,
        1.0,
        True,
    )
    bare = config_of({"parent": "model"}, tmp_path)
    assert [str(w) for w in bare.profile.parsed(bare.space)] == ["prefill@128", "decode@128"]
    int8 = config_of({"parent": "model", "search": {"limits": ["decode@64,precision=int8<=70%"]}}, tmp_path)
    assert int8.profile.precision == "int8"
    assert int8.profile.parsed(int8.space) == [Workload.parse("decode@64,precision=int8")]


def test_the_file_overrides_defaults(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    value = {
        "parent": str(llama), "context": 64,
        "train": {"steps": 7, "length": 16, "data": {"path": "text"}, "blockwise": {"tokens": 999}},
        "profile": {"workloads": ["prefill@48"]},
        "search": {"strategy": "nsga2", "objectives": ["loss", "params"], "windows": 3},
        "finalists": {"count": 0},
    }  # fmt: skip
    config = config_of(value, tmp_path)
    assert config.space.max_seq_len == 64
    train = config.train
    assert (train.steps, train.length, train.blockwise.tokens, train.data.path) == (7, 16, 999, text)
    assert train.method == "blockwise"
    assert config.profile.workloads == ("prefill@48",)
    assert (config.search.strategy, config.search.objectives) == ("nsga2", ("loss", "params"))
    assert (config.search.windows, config.search.front_windows) == (3, 16)
    assert (config.finalists.count, config.finalists.learning_rate) == (0, 1e-4)
    config.model_dump(mode="json")
    (tmp_path / "space.yaml").write_text(
        yaml.safe_dump(config.space.model_dump(mode="json") | {"name": "mine"})
    )
    with_space = config_of({"parent": str(llama), "space": "space.yaml"}, tmp_path)
    assert (with_space.space.name, with_space.train.init) == ("mine", llama)


def test_what_a_run_saves_needs_no_parent_to_be_read(llama: Path, tmp_path: Path) -> None:
    from search.config import Run, trained_config

    config = config_of({"parent": str(llama), "search": {"limits": ["decode@64<=70%"]}}, tmp_path)
    Run(tmp_path / "run", config, tmp_path / "devices").save_config()
    assert "parent" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert trained_config(tmp_path / "run") == config


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no path": ({"parent": 3}, "parent: 3 is not the path of a folder or a GGUF file"),
    "missing": (
        {"parent": "nowhere"},
        "nowhere: not found; give a folder of config.json and safetensors, or",
    ),
    "context of another kind": ({"context": "long"}, "context: 'long' is not a number of tokens from 2"),
    "context of one token": ({"context": 1}, "context: 1 is not a number of tokens from 2"),
    "context that is too long": ({"context": 999}, "context 999: the parent's context is 128"),
    "context and space": ({"context": 64, "space": {}}, "give one of context and space"),
    "section that is a list": ({"train": [1]}, "train: [1] are no settings"),
    "unknown key": ({"trian": {}}, "trian"),
    "limit that is none": ({"search": {"limits": ["soon"]}}, "soon"),
    "limits that are none": ({"search": {"limits": 3}}, "search: limits: "),
    "limit beyond the context": ({"context": 64, "search": {"limits": ["decode@100<=1ms"]}}, "decode@100"),
}


@pytest.mark.parametrize(("value", "words"), BAD.values(), ids=BAD)
def test_bad_input(value: dict[str, Any], words: str, llama: Path, tmp_path: Path, formfit: Program) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"parent": str(llama), **value}))
    done = formfit("run", path, "--out", tmp_path / "run", "--dry-run")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert words in done.stderr
    assert not (tmp_path / "run").exists()


def test_adapt_shows_what_it_would_do(llama: Path, tmp_path: Path, formfit: Program) -> None:
    out = tmp_path / "run"
    words = ("--limit", "decode@64<=70%", "--out", out, "--dry-run", "--json")
    done = formfit("adapt", llama, *words)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert (value["out"], value["device"]) == (str(out), "here")
    assert value["largest"]["key"] == read_parent(llama).architecture.key
    assert not out.exists()
    for bad, said in (("soon", "soon"), ("params<=0.001%", "params")):
        done = formfit("adapt", llama, "--limit", bad, "--out", out, "--dry-run")
        assert done.returncode in (2, 3)
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = formfit("adapt", llama)
    assert done.returncode == 2
    assert "--limit" in done.stderr


def test_gguf_is_its_own_tokenizer(tmp_path: Path) -> None:
    """Unless a tokenizer.json is beside it; one that transformers cannot convert is one line."""
    path = tmp_path / "model.gguf"
    write_gguf(path, a_parent("llama"))
    config = run_config({"parent": str(path)}, tmp_path, "test")
    assert config.train.data.tokenizer == path
    from supernet.data.corpus import load_corpus

    with pytest.raises(
        InputError, match=r"data.tokenizer: .*model.gguf: transformers cannot convert its tokenizer"
    ):
        load_corpus(config.train.data)
