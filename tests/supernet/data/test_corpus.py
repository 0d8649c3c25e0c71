"""Reading, splitting and sampling text; errors are one line."""

import math
import sysconfig
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from pydantic import ValidationError

from space.io.errors import InputError
from supernet.data import documents as data_documents
from supernet.data.corpus import (
    Corpus,
    DataConfig,
    held_out_windows,
    load_corpus,
    require_fits,
    train_batch,
    train_windows,
)
from supernet.data.documents import PIECE_BYTES, files_below, pieces


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


def test_sides_hold_every_document_once(library: Path) -> None:
    corpus = load_corpus(DataConfig(path=library, held_out=0.2))
    train, held_out = documents(corpus.train), documents(corpus.held_out)
    assert sorted(train + held_out) == sorted(file.read_bytes() for file in library.rglob("*.txt"))
    assert (corpus.documents, corpus.source) == (len(train + held_out), str(library))


def test_duplicates_and_file_names_do_not_change_corpus(library: Path) -> None:
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


def test_limit_shortens_both_sides(library: Path) -> None:
    whole = load_corpus(DataConfig(path=library, held_out=0.2))
    part = load_corpus(DataConfig(path=library, held_out=0.2, limit_mb=0.005))
    train, held_out = documents(part.train), documents(part.held_out)
    assert 5000 <= sum(map(len, train + held_out)) < 5100
    assert train == documents(whole.train)[: len(train)]
    assert 0.1 < len(held_out) / part.documents < 0.3


def test_non_text_files_and_zero_bytes_are_skipped(library: Path) -> None:
    before = load_corpus(DataConfig(path=library))
    unwanted = dict.fromkeys([".git/config", ".hidden", "__pycache__/a.py", "site-packages/a.py"], b"no")
    for name, content in {**unwanted, "empty": b"", "blank": b" \n\0", "latin": b"caf\xe9"}.items():
        (library / name).parent.mkdir(exist_ok=True)
        (library / name).write_bytes(content)
    (library / "dangling").symlink_to(library / "nowhere")
    file = library / "part0" / "0.txt"
    file.write_bytes(b"\0" + file.read_bytes().replace(b"d", b"d\0\0"))
    assert load_corpus(DataConfig(path=library)).digest == before.digest


@pytest.mark.parametrize("line", ["a line, {}\n", "no line ends {} é"])
def test_single_file_is_cut_into_documents(tmp_path: Path, line: str) -> None:
    text = "".join(line.format(index) for index in range(60_000))
    (tmp_path / "book.txt").write_text(text)
    corpus = load_corpus(DataConfig(path=tmp_path / "book.txt", held_out=0.2))
    parts = documents(corpus.train) + documents(corpus.held_out)
    assert len(parts) == corpus.documents > 40
    assert all(len(part) <= PIECE_BYTES for part in parts)
    assert set(parts) == set(pieces(text.encode()))
    assert b"".join(pieces(text.encode())) == text.encode()
    assert "\n" not in line or all(part.endswith(b"\n") for part in parts)


def test_text_without_line_ends_is_cut_between_characters() -> None:
    text = "é€😀x" * 20_000
    parts = list(pieces(text.encode()))
    assert "".join(part.decode() for part in parts) == text
    assert all(PIECE_BYTES - 4 < len(part) <= PIECE_BYTES for part in parts[:-1])


def test_default_corpus_is_standard_library() -> None:
    corpus = load_corpus(DataConfig(limit_mb=3))
    texts = set(documents(corpus.train) + documents(corpus.held_out))
    assert 2.9e6 <= len(corpus.train) + len(corpus.held_out) < 4.5e6
    assert len(texts) == corpus.documents
    assert "standard library of Python 3" in corpus.source
    files = set(files_below(Path(sysconfig.get_paths()["stdlib"])))
    assert not any("site-packages" in file.parts for file in files)
    whole = {file.read_bytes().replace(b"\0", b"") for file in files if file.suffix == ".py"}
    assert set(documents(corpus.train)) <= whole
    assert all(any(text in file for file in whole) for text in documents(corpus.held_out))


def test_errors_name_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(data_documents, "read_file", Mock(side_effect=refusal))
    with pytest.raises(InputError, match=r"data.path: a.txt: Permission denied"):
        load_corpus(DataConfig(path=tmp_path))


def test_each_side_gets_a_document_whatever_the_share(library: Path) -> None:
    few, most = (load_corpus(DataConfig(path=library, held_out=share)) for share in (1e-9, 1 - 1e-9))
    assert (few.held_out == 0).sum() == 2  # separators of one document
    assert (most.train == 0).sum() == 2
    for found in (few, most):
        assert len(found.train) > 2
        assert len(found.held_out) > 2


def test_single_file_in_folder_gets_hint(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("".join(f"line {i} of a long text\n" for i in range(3000)))
    with pytest.raises(InputError, match="or name the file itself, which is then cut into documents"):
        load_corpus(DataConfig(path=tmp_path, held_out=0.3))
    assert load_corpus(DataConfig(path=tmp_path / "all.txt", held_out=0.3)).documents > 1


def made(**changes: object) -> Corpus:
    fields: dict[str, object] = {
        "train": np.arange(200, dtype=np.uint8),
        "held_out": np.arange(65, dtype=np.uint8),
        "digest": "",
        "documents": 2,
        "source": "a book",
    }
    return Corpus(**(fields | changes))


def test_corpus_that_does_not_fit_space_is_error() -> None:
    require_fits(made(), 256, 64)
    require_fits(made(), 300, 64)  # a larger vocabulary than bytes need
    with pytest.raises(InputError, match=r"data: a book: the held-out side has 65 bytes, .* needs 66; give"):
        require_fits(made(), 256, 65)
    with pytest.raises(InputError, match=r"the training side has 60 bytes, a length of 64 needs 65"):
        require_fits(made(train=np.zeros(60, np.uint8)), 256, 64)
    with pytest.raises(InputError, match=r"a book: bytes are the tokens, .* is 255; give vocab_size 256"):
        require_fits(made(), 255, 64)
    words = {"train": np.arange(90, dtype=np.uint16), "held_out": np.arange(70, dtype=np.uint16)}
    require_fits(made(**words, vocab_size=90), 90, 64)
    require_fits(made(**words, vocab_size=90), 91, 64)  # some models have more embeddings than tokens
    with pytest.raises(InputError, match="has 90 tokens, the space's vocabulary is 89; it has to be"):
        require_fits(made(**words, vocab_size=90), 89, 64)
    for side in ("train", "held_out"):
        name = {"train": "training", "held_out": "held-out"}[side]
        spoilt = words | {side: np.append(words[side], np.uint16(90))}
        with pytest.raises(InputError, match=f"token 90 on the {name} side; a vocabulary of 90 has 0 to 89"):
            require_fits(made(**spoilt, vocab_size=90), 90, 64)
    with pytest.raises(InputError, match=r"data\.pairs: 17 key-value pairs; a length of 64 holds at most 16"):
        require_fits(made(recall=0.5, pairs=17), 256, 64)
    mqar_only = load_corpus(DataConfig(recall=1.0))
    require_fits(mqar_only, 256, 64)
    with pytest.raises(InputError, match=r"data\.pairs: 1 key-value pairs; a length of 3 holds at most 0"):
        require_fits(mqar_only, 256, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"held_out": 0},
        {"held_out": 1},
        {"limit_mb": math.inf},
        {"paths": "x"},
        {"recall": 1.1},
        {"recall": -0.1},
        {"pairs": 4},
        {"recall": 0.5, "pairs": 0},
        {"recall": 1, "path": "x"},
    ],
)
def test_invalid_config_is_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DataConfig.model_validate(wrong)


def test_train_windows_cover_text() -> None:
    tokens = np.arange(40, dtype=np.uint8)
    windows = train_windows(tokens, np.random.default_rng(0), 5000, 7)
    np.testing.assert_array_equal(windows, windows[:, :1] + np.arange(8))
    assert set(windows[:, 0].tolist()) == set(range(33))
    assert train_windows(tokens, np.random.default_rng(0), 1, 39).tolist() == [list(range(40))]
    with pytest.raises(InputError, match="40 tokens to train on, a window needs 41"):
        train_windows(tokens, np.random.default_rng(0), 2, 40)


def test_text_batch_targets_are_next_tokens() -> None:
    corpus = made(train=np.arange(100, 140, dtype=np.uint8), held_out=np.arange(100, dtype=np.uint8))
    drawn = [train_batch(corpus, np.random.default_rng(step), 6, 7) for step in range(50)]
    for tokens, targets in drawn:
        assert tokens.shape == targets.shape == (6, 7)
        assert tokens.dtype == targets.dtype == np.int64
        np.testing.assert_array_equal(targets, tokens + 1)
    # No token of the held-out side is ever seen.
    assert {int(t) for pair in drawn for side in pair for t in np.unique(side)} == set(range(100, 140))


@pytest.mark.parametrize(("recall", "batch"), [(0.5, 8), (0.3, 8), (0.02, 8), (0.9, 3), (1.0, 5)])
def test_mixture_has_expected_share_of_mqar_rows(recall: float, batch: int) -> None:
    corpus = replace(made(train=np.full(400, 7, np.uint8)), recall=recall, pairs=2)
    counts = []
    for step in range(400):
        tokens, targets = train_batch(corpus, np.random.default_rng([step]), batch, 16)
        again = train_batch(corpus, np.random.default_rng([step]), batch, 16)
        np.testing.assert_array_equal((tokens, targets), again)
        asked = (targets != -100).sum(axis=1)
        rows = asked == 2
        assert set(asked.tolist()) <= {2, 16}
        assert (tokens[~rows] == 7).all()
        assert (targets[~rows] == 7).all()
        assert math.floor(recall * batch) <= rows.sum() <= math.ceil(recall * batch)
        counts.append(int(rows.sum()))
    part = recall * batch % 1
    spread = math.sqrt(part * (1 - part) / 400)
    assert abs(np.mean(counts) - recall * batch) <= 4.5 * spread + 1e-12


def test_digest_depends_on_everything_in_a_batch(library: Path) -> None:
    settings: list[dict[str, object]] = [{}, {"recall": 0.1}, {"recall": 0.2}, {"recall": 0.2, "pairs": 3}]
    configs = [DataConfig.model_validate({"path": library, **given}) for given in settings]
    digests = {load_corpus(config).digest for config in [*configs, DataConfig(recall=1.0)]}
    assert len(digests) == 5


@pytest.mark.parametrize(("size", "count", "length"), [(250, 7, 20), (147, 7, 20), (21, 1, 20), (200, 3, 1)])
def test_held_out_windows_are_evenly_spaced_and_disjoint(size: int, count: int, length: int) -> None:
    tokens = np.arange(size, dtype=np.uint8)
    windows = held_out_windows(tokens, count, length)
    np.testing.assert_array_equal(windows, windows[:, :1] + np.arange(length + 1))
    assert np.diff(windows[:, 0]).tolist() == [size // count] * (count - 1)
    assert np.unique(windows).size == windows.size


def test_held_out_windows_are_fixed() -> None:
    tokens = np.arange(100, dtype=np.uint8)
    assert held_out_windows(tokens, 3, 4)[:, 0].tolist() == [0, 33, 66]
    with pytest.raises(InputError, match="100 tokens held out, 3 windows of 34 need 102; use fewer"):
        held_out_windows(tokens, 3, 33)
