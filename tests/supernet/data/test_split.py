"""The split checked by a search of the whole training text for held-out passages."""

import string
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from space.io.errors import InputError
from supernet.data import corpus, split
from supernet.data.corpus import DataConfig, load_corpus
from supernet.data.split import BLOCK_BYTES, require_apart, shared_blocks, split_documents, without_blocks

LETTERS = np.frombuffer((string.ascii_letters + string.digits + " \n").encode(), np.uint8)


def noise(seed: int, size: int) -> bytes:
    """Text in which no passage occurs twice."""
    return LETTERS[np.random.default_rng(seed).integers(len(LETTERS), size=size)].tobytes()


def leaks(train: list[bytes], held_out: list[bytes]) -> list[bytes]:
    """Passages of held-out documents that the training text contains, by search from every position.

    A passage is 255 bytes: one so long has a whole block in it, wherever the blocks lie.
    """
    text, size = b"\0".join(train), 2 * BLOCK_BYTES - 1
    found = [part for part in held_out if part in train]
    for part in held_out:
        found += [part[i : i + size] for i in range(len(part) - size + 1) if part[i : i + size] in text]
    return found


def sides(path: Path, **settings: object) -> tuple[list[bytes], list[bytes]]:
    loaded = load_corpus(DataConfig.model_validate({"path": path, "held_out": 0.4, **settings}))
    return tuple(side.tobytes()[1:-1].split(b"\0") for side in (loaded.train, loaded.held_out))


def same_text_under_two_names(folder: Path) -> None:
    for i in range(30):
        for name in (f"{i}.txt", f"copy-of-{i}.md"):
            (folder / name).write_bytes(noise(i, 700))


def one_file_and_its_pieces(folder: Path) -> None:
    for i in range(12):
        whole = noise(i, 3000)
        (folder / f"{i}.txt").write_bytes(whole)
        for start, stop in pairwise((0, 401, 1113, 1500, 2999)):
            (folder / f"{i}-{start}.txt").write_bytes(whole[start:stop])


def a_licence_in_every_file(folder: Path) -> None:
    licence = noise(99, 600)
    for i in range(30):
        (folder / f"{i}.txt").write_bytes(noise(i, 40 * (i % 5)) + licence + noise(100 + i, 900))


def copies_with_one_change(folder: Path) -> None:
    for i in range(20):
        text = noise(i, 1200)
        (folder / f"{i}.txt").write_bytes(text)
        (folder / f"{i}-changed.txt").write_bytes(text[:611] + b"#" + text[612:])


def passages_just_long_enough(folder: Path) -> None:
    for i in range(40):
        passage = noise(1000 + i // 2, 255)
        (folder / f"{i}.txt").write_bytes(noise(i, 17 * i) + passage + noise(2000 + i, 300))


def a_page_twice_in_a_long_file(folder: Path) -> None:
    page = noise(0, 5000)
    text = b"".join(noise(i, 9000 + 77 * i) + page for i in range(1, 25))
    (folder / "book.txt").write_bytes(text)


def characters_of_three_bytes(folder: Path) -> None:
    rng = np.random.default_rng(0)
    shared = "".join(chr(0x4E00 + int(c)) for c in rng.integers(9000, size=150))
    for i in range(20):
        own = "".join(chr(0x4E00 + int(c)) for c in rng.integers(9000, size=200))
        (folder / f"{i}.txt").write_text("ab"[: i % 3] + shared + own, encoding="utf-8")


PLANTED: list[Callable[[Path], None]] = [
    same_text_under_two_names, one_file_and_its_pieces, a_licence_in_every_file, copies_with_one_change,
    passages_just_long_enough, a_page_twice_in_a_long_file, characters_of_three_bytes,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED)
def test_planted_passages_do_not_leak(plant: Callable[[Path], None], tmp_path: Path) -> None:
    plant(tmp_path)
    book = tmp_path / "book.txt"
    for limit_mb in (None, 0.012, 0.013):  # near a limit too, wherever the taking of documents stops
        if limit_mb and book.exists():
            break  # its documents are larger
        train, held_out = sides(book if book.exists() else tmp_path, limit_mb=limit_mb)
        assert not leaks(train, held_out)
        require_apart(train, held_out)
        assert all(part.decode().strip() for part in held_out)


@pytest.mark.parametrize("plant", PLANTED[1:])
def test_a_split_by_hash_alone_would_leak(plant: Callable[[Path], None], tmp_path: Path) -> None:
    """The test above can fail: without the cut, loading a corpus reports the leak."""
    plant(tmp_path)
    book = tmp_path / "book.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "without_blocks", lambda texts, unwanted: list(texts))
        with pytest.raises(InputError, match="data: held-out text is in the training text too, such as '"):
            sides(book if book.exists() else tmp_path)
        patch.setattr(corpus, "require_apart", lambda train, held_out: None)
        assert leaks(*sides(book if book.exists() else tmp_path))


def test_a_split_by_name_would_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_text_under_two_names(tmp_path)
    texts = [file.read_bytes() for file in sorted(tmp_path.iterdir())]
    monkeypatch.setattr(corpus, "split_documents", lambda *_: (texts[:40], texts[40:]))
    with pytest.raises(InputError, match="held-out text is in the training text too"):
        sides(tmp_path)


def test_only_shared_blocks_are_cut(tmp_path: Path) -> None:
    a_licence_in_every_file(tmp_path)
    _, held_out = sides(tmp_path)
    texts = [file.read_bytes() for file in tmp_path.iterdir()]
    whole = [text for text in texts if any(part in text for part in held_out)]
    lost = sum(map(len, whole)) - sum(map(len, held_out))
    # Of the licence's 600 bytes, the blocks wholly inside it: three or four of 128.
    assert 3 * BLOCK_BYTES * len(whole) <= lost <= 4 * BLOCK_BYTES * len(whole)
    for text in whole:
        parts = [part for part in held_out if part in text]
        assert text.endswith(parts[-1]) or text.endswith(parts[0])


def test_disjoint_texts_are_unchanged() -> None:
    texts = [noise(i, 100 + 30 * i) for i in range(60)]
    train, held_out = split_documents(texts, 0.4, float("inf"))
    assert sorted(train + held_out) == sorted(texts)
    assert split_documents(reversed(texts), 0.4, float("inf")) == (train, held_out)
    assert shared_blocks(train, held_out) == set()


def test_shared_blocks_are_found_at_every_offset() -> None:
    text = noise(0, 4000)
    for place in [0, 1, 127, 128, 129, 500, 4000 - BLOCK_BYTES]:
        block = text[place : place + BLOCK_BYTES]
        assert shared_blocks([noise(1, 90), text], [block + noise(2, 300)]) == {block}
        assert shared_blocks([text], [block[:-1] + b"#"]) == set()
    assert shared_blocks([text[:50], text[50:100]], [text[:BLOCK_BYTES]]) == set()  # over two documents
    assert shared_blocks([], [text]) == shared_blocks([text], []) == set()
    assert shared_blocks([text[: BLOCK_BYTES - 1]], [text]) == set()


@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_shared_blocks_across_chunk_boundaries_are_found(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_CHUNK_BYTES", chunk)
    text = noise(0, 1500)
    for place in range(0, 1372, 61):
        block = text[place : place + BLOCK_BYTES]
        assert shared_blocks([text], [block]) == {block}


def test_runs_of_one_character_are_fast(tmp_path: Path) -> None:
    """Every position of the training text has the hash of the one block; it is compared once."""
    looked: list[int] = []

    class Blocks(set):
        def __contains__(self, block: object) -> bool:
            looked.append(1)
            return super().__contains__(block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "set", Blocks, raising=False)
        assert shared_blocks([b" " * 300_000], [b" " * 300]) == {b" " * BLOCK_BYTES}
    assert len(looked) < 10


def test_cut_texts_are_utf8_with_original_block_boundaries() -> None:
    text = "".join(np.random.default_rng(0).choice(list("éüx€"), 1200))  # characters lie across blocks
    data = text.encode()
    blocks = [data[i : i + BLOCK_BYTES] for i in range(0, len(data) - BLOCK_BYTES + 1, BLOCK_BYTES)]
    for unwanted in blocks:
        parts = without_blocks([data], {unwanted})
        assert not any(unwanted in part for part in parts)
        assert len(b"".join(parts)) >= len(data) - 8 * BLOCK_BYTES
        assert all(part.decode() in text for part in parts)
        for part in parts:
            kept = [part[i : i + BLOCK_BYTES] for i in range(0, len(part) - BLOCK_BYTES + 1, BLOCK_BYTES)]
            assert set(kept) <= set(blocks) - {unwanted}


def test_passage_equal_to_training_document_is_dropped() -> None:
    shared = noise(0, BLOCK_BYTES)
    texts = [shared + noise(i, 20) for i in range(40)] + [noise(i, 20) for i in range(40)]
    train, held_out = split_documents(texts, 0.5, float("inf"))
    assert not set(train) & set(held_out)
    require_apart(train, held_out)
