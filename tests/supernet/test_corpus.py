import math
import sysconfig
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from pydantic import ValidationError

from space.errors import InputError
from supernet import corpus as module
from supernet.corpus import Corpus, DataConfig, held_out_windows, load_corpus, recall_mask, train_batch


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for index in range(200):
        file = tmp_path / "library" / f"part{index % 2}" / f"{index}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"document {index}: " + "words é " * (index % 9 + 1), encoding="utf-8")
    return tmp_path / "library"


def documents(tokens: np.ndarray) -> list[bytes]:
    content = tokens.tobytes()
    assert content[:1] == content[-1:] == b"\0"
    return content[1:-1].split(b"\0")


def recall_by_hand(windows: np.ndarray, sample: np.ndarray, order: int) -> np.ndarray:
    mask = np.zeros(windows.shape, bool)
    for row, text in zip(mask, windows.astype(np.uint8), strict=True):
        for end in range(order, len(text) + 1):
            gram = text[end - order : end].tobytes()
            row[end - 1] = gram in text[: end - 1].tobytes() and gram not in sample.tobytes()
    return mask[:, 1:]


def test_sides_hold_every_document_once(library: Path) -> None:
    corpus = load_corpus(DataConfig(path=library, held_out=0.2))
    train, held_out = documents(corpus.train), documents(corpus.held_out)
    assert sorted(train + held_out) == sorted(file.read_bytes() for file in library.rglob("*.txt"))
    assert (corpus.documents, corpus.source) == (len(train + held_out), str(library))


def test_duplicates_and_names_change_nothing(library: Path) -> None:
    before = load_corpus(DataConfig(path=library))
    for index, file in enumerate(sorted(library.rglob("*.txt"))):
        (library / f"copy{index}").write_bytes(file.read_bytes())
        file.rename(file.with_name(f"{999 - index}.md"))
    after = load_corpus(DataConfig(path=library))
    assert (after.digest, after.documents) == (before.digest, before.documents)
    assert documents(after.train) == documents(before.train)
    (library / "new").write_text("one more")
    more = load_corpus(DataConfig(path=library, held_out=0.3))
    assert more.digest != before.digest
    assert set(documents(more.held_out)) > set(documents(before.held_out))


def test_a_limit_takes_from_both_sides(library: Path) -> None:
    whole = load_corpus(DataConfig(path=library, held_out=0.2))
    part = load_corpus(DataConfig(path=library, held_out=0.2, limit_mb=0.005))
    train, held_out = documents(part.train), documents(part.held_out)
    assert 5000 <= sum(map(len, train + held_out)) < 5100
    assert train == documents(whole.train)[: len(train)]
    assert 0.1 < len(held_out) / part.documents < 0.3


def test_other_files_and_zero_bytes_are_left_out(library: Path) -> None:
    before = load_corpus(DataConfig(path=library))
    unwanted = dict.fromkeys([".git/config", ".hidden", "__pycache__/a.py", "site-packages/a.py"], b"no")
    for name, content in {**unwanted, "empty": b"", "blank": b" \n\0", "latin": b"caf\xe9"}.items():
        (library / name).parent.mkdir(exist_ok=True)
        (library / name).write_bytes(content)
    (library / "dangling").symlink_to(library / "nowhere")
    file = library / "part0" / "0.txt"
    file.write_bytes(b"\0" + file.read_bytes().replace(b"d", b"d\0\0"))
    assert load_corpus(DataConfig(path=library)).digest == before.digest


@pytest.mark.parametrize("line", ["a line, {}\n", "no line ends {} "])
def test_one_file_is_cut_into_documents(tmp_path: Path, line: str) -> None:
    text = "".join(line.format(index) for index in range(60_000))
    (tmp_path / "book.txt").write_text(text)
    corpus = load_corpus(DataConfig(path=tmp_path / "book.txt", held_out=0.2))
    pieces = documents(corpus.train) + documents(corpus.held_out)
    assert len(pieces) == corpus.documents > 40
    assert all(len(piece) <= module.PIECE_BYTES for piece in pieces)
    assert set(pieces) == set(module._pieces(text.encode()))
    assert b"".join(module._pieces(text.encode())) == text.encode()
    assert "\n" not in line or all(piece.endswith(b"\n") for piece in pieces)


def test_the_standard_library_is_the_default() -> None:
    corpus = load_corpus(DataConfig(limit_mb=3))
    texts = set(documents(corpus.train) + documents(corpus.held_out))
    assert 3e6 <= len(corpus.train) + len(corpus.held_out) < 4.5e6
    assert len(texts) == corpus.documents
    assert "standard library of Python 3" in corpus.source
    files = set(module._files(Path(sysconfig.get_paths()["stdlib"])))
    assert not any("site-packages" in file.parts for file in files)
    assert texts <= {file.read_bytes().replace(b"\0", b"") for file in files if file.suffix == ".py"}


def test_refused_paths_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "blank").write_text(" \n")
    wrong = {"missing": "not found", "folder": "no UTF-8 text", "binary": "no UTF-8", "blank": "no UTF-8"}
    for name, reason in wrong.items():
        with pytest.raises(InputError) as refused:
            load_corpus(DataConfig(path=tmp_path / name))
        assert str(refused.value).startswith(f"data.path: {tmp_path / name}: {reason}")
        assert str(refused.value).endswith("; give a UTF-8 text file or a folder of them")
    refusal = PermissionError(13, "Permission denied", "a.txt")
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=refusal))
    with pytest.raises(InputError, match=r"data.path: a.txt: Permission denied"):
        load_corpus(DataConfig(path=tmp_path))


def test_an_empty_or_short_side_is_refused(library: Path) -> None:
    for held_out in (1e-9, 1 - 1e-9):
        with pytest.raises(InputError, match="each side needs one; give more text"):
            load_corpus(DataConfig(path=library, held_out=held_out))
    tokens = np.zeros(65, np.uint8)
    corpus = Corpus(train=np.tile(tokens, 9), held_out=tokens, digest="", documents=2, source="a book")
    module.require_length(corpus, 64)
    with pytest.raises(InputError, match=r"data: a book: the held-out side has 65 bytes, .* needs 66; give"):
        module.require_length(corpus, 65)


@pytest.mark.parametrize("wrong", [{"held_out": 0}, {"held_out": 1}, {"limit_mb": math.inf}, {"paths": "x"}])
def test_the_config_is_strict(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DataConfig.model_validate(wrong)


def test_train_batches_are_windows_from_everywhere() -> None:
    tokens = np.arange(40, dtype=np.uint8)
    batch = train_batch(tokens, np.random.default_rng(0), 5000, 7)
    np.testing.assert_array_equal(batch, batch[:, :1] + np.arange(8))
    assert set(batch[:, 0].tolist()) == set(range(33))
    assert train_batch(tokens, np.random.default_rng(0), 1, 39).tolist() == [list(range(40))]
    with pytest.raises(InputError, match="40 bytes to train on, a window needs 41"):
        train_batch(tokens, np.random.default_rng(0), 2, 40)


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize(("size", "count", "length"), [(250, 7, 20), (147, 7, 20), (21, 1, 20), (200, 3, 1)])
def test_held_out_windows_are_spread_and_apart(size: int, count: int, length: int, seed: int) -> None:
    tokens = np.arange(size, dtype=np.uint8)
    windows = held_out_windows(tokens, count, length, seed)
    np.testing.assert_array_equal(windows, windows[:, :1] + np.arange(length + 1))
    assert np.diff(windows[:, 0]).tolist() == [size // count] * (count - 1)
    assert np.unique(windows).size == windows.size


def test_held_out_windows_do_not_change() -> None:
    tokens = np.arange(100, dtype=np.uint8)
    assert held_out_windows(tokens, 3, 4)[:, 0].tolist() == [0, 33, 66]
    assert held_out_windows(tokens, 3, 4, seed=1)[:, 0].tolist() == [2, 35, 68]
    with pytest.raises(InputError, match="100 bytes held out, 3 windows of 34 need 102; ask for fewer"):
        held_out_windows(tokens, 3, 33)


def test_recall_on_a_sentence() -> None:
    text = b"the zebra42 sat; the zebra42 ran; def main(): def main():"
    windows = np.frombuffer(text, np.uint8)[None].astype(np.int64)
    mask = recall_mask(windows, np.frombuffer(b"  def main(): pass", np.uint8))
    # " the zeb" is new, "the zebr" was seen before, "def main" is known from training.
    second = text.rindex(b"the zebra42 ")
    assert set(np.flatnonzero(mask[0]) + 1) == set(range(second + 7, second + 12))


@pytest.mark.parametrize("order", range(1, 9))
@pytest.mark.parametrize(("low", "high"), [(0, 2), (253, 256), (0, 256)])
def test_recall_is_exact(order: int, low: int, high: int) -> None:
    rng = np.random.default_rng(order)
    windows = rng.integers(low, high, (12, 90))
    windows[3:6, 50:80], windows[6], windows[7] = windows[3:6, 10:40], 0, 255
    sample = np.concatenate([rng.integers(low, high, 2 ** min(order, 6)), windows[4, 15:30]]).astype(np.uint8)
    expected = recall_by_hand(windows, sample, order)
    assert expected.any()
    np.testing.assert_array_equal(recall_mask(windows, sample, order), expected)


def test_recall_looks_in_one_window_and_one_sample() -> None:
    half = np.random.default_rng(0).integers(0, 256, 30)
    both, empty = np.tile(half, (1, 2)), np.zeros(0, np.uint8)
    sample = np.concatenate([np.zeros(100), half]).astype(np.uint8)
    assert recall_mask(both, empty).sum() == 30 - 7
    assert not recall_mask(both.reshape(2, 30), empty).any()
    assert not recall_mask(both, sample).any()
    assert recall_mask(both, sample, sample_bytes=100).sum() == 30 - 7
    assert recall_mask(np.zeros((2, 5), np.int64), np.zeros(0, np.uint8)).shape == (2, 4)
    with pytest.raises(ValueError, match="order 9"):
        recall_mask(np.zeros((1, 20), np.int64), np.zeros(9, np.uint8), order=9)
    with pytest.raises(ValueError, match="tokens up to 256"):
        recall_mask(np.full((1, 20), 256), np.zeros(9, np.uint8))
