"""YAML of any kind: read in bounded time and memory, refused in one short line."""

import os
from pathlib import Path

import pytest
import yaml

from space import InputError, load_space
from space.io import config
from space.io.config import MAX_YAML_BYTES, load_yaml
from tests.contracts import tiny_value


def given(folder: Path, text: str) -> Path:
    path = folder / "given.yaml"
    path.write_text(text)
    return path


def bomb(first: str, step: str) -> str:
    """Nine aliases of nine aliases of ..., nine deep."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {step % ', '.join([f'*a{i - 1}'] * 9)}" for i in range(1, 10)]
    return "\n".join(lines)


BOMBS = {
    "lists": bomb("[1, 2, 3]", "[%s]"),
    "merged keys": bomb("{x: 1}", "{<<: [%s]}"),
    "inside itself": "a: &a [*a]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_aliases_are_bounded(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"aliases expanded|inside that value") as refused:
        load_yaml(given(tmp_path, BOMBS[name]))
    assert len(str(refused.value)) < 400


def test_values_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "MAX_YAML_NODES", 500)
    load_yaml(given(tmp_path, f"[{'1,' * 499}]"))
    with pytest.raises(InputError, match="more than 500 values"):
        load_yaml(given(tmp_path, f"[{'1,' * 500}]"))


def test_aliases_and_merge_keys_of_honest_files_work(tmp_path: Path) -> None:
    text = "base: &base {steps: 3, batch: 4}\nother:\n  <<: *base\n  batch: 8\nagain: [*base, *base]\n"
    base = {"steps": 3, "batch": 4}
    assert load_yaml(given(tmp_path, text)) == {
        "base": base,
        "other": {"steps": 3, "batch": 8},
        "again": [base, base],
    }
    with pytest.raises(InputError, match="'batch' is given twice"):
        load_yaml(given(tmp_path, "base: &base {a: 1}\nother:\n  <<: *base\n  batch: 8\n  batch: 9\n"))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\n", encoding="utf-8-sig")
    assert load_yaml(tmp_path / "a.yaml") == {"a": 1}


def test_only_files_of_a_sensible_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_YAML_BYTES + 1))
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "large.yaml", tmp_path):
        with pytest.raises(InputError, match=f"{path}: cannot be read"):
            load_yaml(path)


def test_many_errors_are_cut_short(tmp_path: Path) -> None:
    space = {**tiny_value(), "width": [-1] * 1000, "x" * 10_000: {"y": ["z"] * 1000}}
    with pytest.raises(InputError, match=r"and [0-9,]+ more") as refused:
        load_space(given(tmp_path, yaml.safe_dump(space)))
    assert len(str(refused.value)) < 3000
    space = {**tiny_value(), "depth": {"deep" * 1000: ["long" * 1000] * 99}}
    with pytest.raises(InputError) as refused:
        load_space(given(tmp_path, yaml.safe_dump(space)))
    assert len(str(refused.value)) < 1000
