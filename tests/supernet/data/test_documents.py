"""Files of a folder: what is read, and what is left out with a line that says so."""

import gzip
import os
from pathlib import Path

import pytest

from space import InputError
from supernet.data.corpus import DataConfig, load_corpus
from supernet.data.documents import Skipped, read_documents
from tests.conftest import Program

TEXT = "naïve words, 日本\n"


def read(path: Path) -> tuple[set[bytes], str | None]:
    skipped = Skipped()
    return {text for text in read_documents(path, skipped) if text}, skipped.describe()


def test_text_in_other_forms_is_read(tmp_path: Path) -> None:
    forms = ("utf-8", "utf-8-sig", "utf-16", "utf-32")
    for name in forms:
        (tmp_path / f"{name}.txt").write_bytes(f"{name} {TEXT}".encode(name))
    (tmp_path / "be.txt").write_bytes(b"\xfe\xff" + f"be {TEXT}".encode("utf-16-be"))
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(f"gz {TEXT}".encode("utf-16")))
    found, line = read(tmp_path)
    assert found == {f"{name} {TEXT}".encode() for name in (*forms, "be", "gz")}
    assert line is None


def test_linked_files_and_folders_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("a")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "b.txt").write_text("b")
    (inside / "linked").symlink_to(tmp_path / "other", target_is_directory=True)
    (inside / "again").symlink_to(inside, target_is_directory=True)  # a cycle
    skipped = Skipped()
    assert sorted(read_documents(inside, skipped)) == [b"a", b"b"]
    assert skipped.files == 2


def test_what_is_left_out_is_counted_with_reason_and_first_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i} with some words of its own", encoding="utf-8")
    for i in range(3):
        (tmp_path / f"latin{i}.txt").write_bytes(f"caf\xe9 {i}".encode("cp1252"))
    (tmp_path / "torn.gz").write_bytes(gzip.compress(os.urandom(999))[:500])
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    _, line = read(tmp_path)
    assert line is not None
    assert line.startswith("6 of 46 files left out: ")
    assert "3 not UTF-8, nor UTF-16 with a byte order mark (first: " in line
    assert f"1 not a whole .gz of at most 1 GiB (first: {tmp_path / 'torn.gz'})" in line
    assert "2 neither a file nor a folder (first: " in line
    load_corpus(DataConfig(path=tmp_path, held_out=0.3))
    assert f"data.path: {tmp_path}: {line}" in caplog.text


def test_a_device_is_no_text() -> None:
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(InputError, match=f"data.path: {path}: not a regular file"):
            load_corpus(DataConfig(path=Path(path)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_prompt_file_has_no_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    from search.submodel.loading import prompt_text

    (tmp_path / "prompt.txt").write_text(TEXT, encoding=encoding)
    assert prompt_text(None, tmp_path / "prompt.txt") == TEXT


def test_a_prompt_file_is_a_file(tmp_path: Path, formfit: Program) -> None:
    from search.submodel.loading import prompt_text

    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(InputError, match=r"--prompt-file .*: cannot be read as UTF-8 text"):
            prompt_text(None, path)
