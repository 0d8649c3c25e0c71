"""The space of a parent: its largest architecture is the parent, and every choice of it can be built."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from search.cli.app import main
from space import InputError, Space, genome, load_space, variation
from space.blocks import forward
from space.genome import contains
from supernet.extract import extract
from supernet.parent import read_parent
from supernet.parent.space_file import space_text
from supernet.supernet import Supernet
from tests.supernet.parent.models import PARENTS, saved, tokens


def written(folder: Path, text: str) -> Space:
    path = folder / "space.yaml"
    path.write_text(text)
    return load_space(path)


@pytest.mark.parametrize("name", PARENTS)
def test_largest_is_the_parent(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "The parent!", name, max_position_embeddings=1100, num_hidden_layers=3)
    parent = read_parent(tmp_path / "The parent!")
    space = written(tmp_path, space_text(parent))
    assert space.name == "the-parent"
    assert genome.largest(space) == parent.architecture
    assert space.config == parent.model_config
    assert space.layer.window == (128, 256)
    assert space.depth == (2, 3)


def test_every_mixer_is_sampled_and_runs(tmp_path: Path) -> None:
    saved(tmp_path / "parent", "qwen2", max_position_embeddings=512, num_hidden_layers=3)
    space = written(tmp_path, space_text(read_parent(tmp_path / "parent")))
    supernet, seen = Supernet(space), set()
    for architecture in genome.decode(space, variation.sample(space, np.random.default_rng(0), 60)):
        with torch.no_grad():
            logits, _ = forward(extract(supernet, architecture), architecture, space.config, tokens(1, 8))
        assert logits.isfinite().all()
        seen |= {layer.mixer if layer.present else "removed" for layer in architecture.layers}
    assert seen == {*space.layer.mixer, "removed"}


def test_a_short_context_has_no_window(tmp_path: Path) -> None:
    saved(tmp_path / "parent", "llama")
    parent = read_parent(tmp_path / "parent")
    space = written(tmp_path, space_text(parent, 64))
    assert space.max_seq_len == 64
    assert "sliding" not in space.layer.mixer
    with pytest.raises(InputError, match="--context 129: the parent's context is 128"):
        space_text(parent, 129)


def test_any_layer_may_be_removed_and_have_any_mixer(tmp_path: Path) -> None:
    saved(tmp_path / "parent", "llama", num_hidden_layers=4)
    space = written(tmp_path, space_text(read_parent(tmp_path / "parent")))
    options, rng = genome.encoding(space).cardinalities, np.random.default_rng(1)
    rows = rng.integers(0, options, (500, len(options))).astype(np.int16)
    rows = genome.canonical(space, rows)
    present = ((rows[:, 1::3] > 0) | (rows[:, 3::3] > 0)).sum(axis=1)
    mixing = (rows[:, 1::3] > 0).any(axis=1)
    assert list(contains(space, rows)) == list((present >= 2) & mixing)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "parent", "qwen2")
    out = tmp_path / "space.yaml"

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["formfit", "space", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    given = ("--from", str(tmp_path / "parent"))
    code, text, summary = run(*given, "--context", "100")
    assert code == 0
    assert written(tmp_path, text).max_seq_len == 100
    assert "qwen2" in summary
    assert "2 layers of width 48" in summary
    code, text, _ = run(*given, "--out", str(out), "--json")
    found = json.loads(text)
    assert (code, found["family"], found["layers"], found["file"]) == (0, "qwen2", 2, str(out))
    assert genome.largest(load_space(out)) == read_parent(tmp_path / "parent").architecture
    for words in ([], [str(out), *given], [str(out), "--context", "9"]):
        code, text, line = run(*words)
        assert (code, text, line.count("\n")) == (2, "", 1)
