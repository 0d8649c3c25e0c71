"""Subword tokens of small tokenizers: ids, bytes of tokens, errors."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from space.io.errors import InputError
from supernet.data.corpus import DataConfig, load_corpus, require_fits
from supernet.data.recall import PIECE_ORDER, recall_mask
from supernet.data.tokenizer import load_tokenizer
from supernet.evaluate import evaluation_set

TEXTS = [f"Document {i}: naïve  words,\n\tand 😀 {'again ' * (i % 5)}{i * i}.\n" for i in range(120)]


def byte_level(size: int = 400, specials: tuple[str, ...] = ("<unk>", "</s>")) -> tokenizers.Tokenizer:
    """A byte-level BPE, as most models have; it splits characters and decodes to every text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def word_level(*words: str) -> tokenizers.Tokenizer:
    """Lower-cased words between whitespace; decoding does not give the text back."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def saved(folder: Path, made: tokenizers.Tokenizer) -> Path:
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "texts"


def test_both_sides_decode_to_their_documents(texts: Path, tmp_path: Path) -> None:
    made = byte_level()
    config = DataConfig(path=texts, held_out=0.3, tokenizer=saved(tmp_path, made))
    found, plain = load_corpus(config), load_corpus(DataConfig(path=texts, held_out=0.3))
    assert found.vocab_size == made.get_vocab_size() == 400
    assert found.train.dtype == found.held_out.dtype == np.uint16
    assert not found.is_bytes
    assert found.documents == plain.documents == 120
    require_fits(found, 400, 64)
    end = made.token_to_id("</s>")
    for ids, text in ((found.train, plain.train), (found.held_out, plain.held_out)):
        assert ids[0] == ids[-1] == end
        parts = np.split(ids, np.flatnonzero(ids == end))[1:-1]
        decoded = [made.decode(part[1:].tolist()).encode() for part in parts]
        assert decoded == text.tobytes()[1:-1].split(b"\0")
    assert found.digest != plain.digest
    other = tmp_path / "other"
    other.mkdir()
    config = config.model_copy(update={"tokenizer": saved(other, byte_level(390))})
    assert load_corpus(config).digest not in (found.digest, plain.digest)


def test_bits_per_byte_use_bytes_of_text(texts: Path, tmp_path: Path) -> None:
    """Compared with a reader that decodes every prefix of a document."""
    made = byte_level(280)  # few merges: characters of four bytes stay split over tokens
    found = load_corpus(DataConfig(path=texts, held_out=0.3, tokenizer=saved(tmp_path, made)))
    sizes, end = found.held_out_bytes, made.token_to_id("</s>")
    assert sizes is not None
    assert len(sizes) == len(found.held_out)
    place, split_characters = 1, 0
    while place < len(found.held_out):
        ids = found.held_out[place:].tolist()
        ids = ids[: ids.index(end)]
        before = 0
        for i in range(len(ids)):
            so_far = made.decode(ids[: i + 1])
            split_characters += so_far.endswith("\ufffd")
            if not so_far.endswith("\ufffd"):  # no character is split here: what is before is whole
                assert sizes[place : place + i + 1].sum() == len(so_far.encode())
                before = len(so_far.encode())
        assert before == sizes[place : place + len(ids)].sum()
        assert sizes[place + len(ids)] == 1
        place += len(ids) + 1
    assert split_characters > 20
    data = evaluation_set(found, 8, 32)
    windows = data.windows
    stride = len(found.held_out) // 8
    np.testing.assert_array_equal(windows, [found.held_out[i * stride : i * stride + 33] for i in range(8)])
    assert data.text_bytes == sum(int(sizes[i * stride + 1 : i * stride + 33].sum()) for i in range(8))
    nats = 2.5
    assert data.bits_per_byte(nats) == pytest.approx(nats * 8 * 32 / np.log(2) / data.text_bytes)


def test_subword_recall_mask_uses_rare_bigrams(texts: Path, tmp_path: Path) -> None:
    found = load_corpus(DataConfig(path=texts, held_out=0.3, tokenizer=saved(tmp_path, byte_level())))
    for known in (found.train, found.train[:1]):
        data = evaluation_set(replace(found, train=known), 4, 100)
        expected = recall_mask(data.windows, known, PIECE_ORDER, rare_per_million=1)
        np.testing.assert_array_equal(data.recallable, expected)
    assert data.recallable.any()


def test_lossy_tokenizer_has_no_bits_per_byte(texts: Path, tmp_path: Path) -> None:
    words = sorted({word for text in TEXTS for word in text.lower().split()})
    made = word_level(*words)
    found = load_corpus(DataConfig(path=texts, held_out=0.3, tokenizer=saved(tmp_path, made)))
    assert found.held_out_bytes is None
    assert found.vocab_size == len(words) + 1
    assert evaluation_set(found, 4, 8).bits_per_byte(1.0) is None


def test_padding_truncation_and_special_tokens_are_ignored(texts: Path, tmp_path: Path) -> None:
    """Padding, truncation and a template apply to prompts; a separator's name in a text is plain text."""
    (texts / "spelt.txt").write_text("a </s> b")
    plain = byte_level()
    config = DataConfig(path=texts, held_out=0.3, tokenizer=saved(tmp_path, plain))
    before = load_corpus(config)
    plain.enable_truncation(3)
    plain.enable_padding(length=50)
    plain.post_processor = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 1)])
    saved(tmp_path, plain)
    after = load_corpus(config)
    np.testing.assert_array_equal(after.train, before.train)
    np.testing.assert_array_equal(after.held_out, before.held_out)
    ends = (after.train == 1).sum() + (after.held_out == 1).sum()
    assert ends == after.documents + 2


@pytest.mark.parametrize(
    ("specials", "separator"),
    [(("<unk>", "</s>"), 1), (("[SEP]", "x", "<|endoftext|>"), 2), (("<pad>", "<s>"), 0)],
)
def test_separator_of_special_tokens(specials: tuple[str, ...], separator: int, tmp_path: Path) -> None:
    assert load_tokenizer(saved(tmp_path, byte_level(300, specials))).separator == separator


def test_vocab_size_of_ids_with_gaps(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "again": 70_000}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    loaded = load_tokenizer(saved(tmp_path, made))
    assert loaded.vocab_size == 70_001
    ids = loaded.encode([b"again and again"])
    assert ids.dtype == np.uint32
    assert ids.tolist() == [0, 70_000, 0, 70_000, 0]


def broken(change: str) -> bytes:
    value: dict[str, Any] = json.loads(byte_level(300).to_str())
    if change == "no model":
        del value["model"]
    elif change == "unknown model":
        value["model"]["type"] = "Oracle"
    elif change == "merges of nothing":
        value["model"]["merges"] = [["no", "such"]]
    elif change == "no vocabulary":
        value["model"] |= {"vocab": {}, "merges": []}
        value["added_tokens"] = []
    elif change == "negative id":
        value["model"]["vocab"]["a"] = -1
    return json.dumps(value).encode()


BROKEN = ("no model", "unknown model", "merges of nothing", "no vocabulary", "negative id")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1, 2]", b"null", b"\xff\xfe", b'{"version": "1.0"', *map(broken, BROKEN)]
)
def test_invalid_file_is_one_line_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        load_corpus(DataConfig(tokenizer=path))
    assert str(refused.value).startswith(f"data.tokenizer: {path}: ")
    assert "okenizer" in str(refused.value).removeprefix(f"data.tokenizer: {path}: ")
    assert "\n" not in str(refused.value)


def test_missing_file_is_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json: not found; give a Hugging Face tokenizer\.json"):
        load_corpus(DataConfig(tokenizer=tmp_path / "nowhere.json"))
    with pytest.raises(InputError, match="Is a directory; give a Hugging Face"):
        load_corpus(DataConfig(tokenizer=tmp_path))


def test_missing_package_error_names_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, byte_level(300))
    original = importlib.import_module

    def absent(name: str, package: str | None = None) -> object:
        if name == "tokenizers":
            raise ModuleNotFoundError(name)
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(InputError, match=r"needs the package tokenizers; `pip install 'formfit\[hf\]'`"):
        load_tokenizer(path)
    load_corpus(DataConfig(recall=1.0))  # bytes need no package


def test_a_tokenizer_that_knows_too_little_of_a_text_is_refused(texts: Path, tmp_path: Path) -> None:
    config = DataConfig(path=texts, held_out=0.3, tokenizer=saved(tmp_path, word_level("again", "words")))
    with pytest.raises(InputError, match=r"knows no token for \d+.\d% of the characters, at most 20%"):
        load_corpus(config)


def test_unknown_characters_are_those_in_unknown_tokens_or_in_none(tmp_path: Path) -> None:
    known = load_tokenizer(saved(tmp_path, word_level("again", "words")))
    assert known.unknown_share([b"again  words\n abc", b"Again ab"]) == 5 / 20
    assert known.unknown_share([b" \n"]) == 0
    letters = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))  # drops what it does not know
    assert load_tokenizer(saved(tmp_path, letters)).unknown_share([b"abcab d"]) == 2 / 6
    assert load_tokenizer(saved(tmp_path, byte_level())).unknown_share([t.encode() for t in TEXTS]) == 0


def test_lost_text_and_a_missing_decoder_and_separator_are_told(
    texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = sorted({word for text in TEXTS for word in text.lower().split()} - {"words,"})
    (texts / "more.txt").write_text("again " * 2000)
    load_corpus(DataConfig(path=texts, held_out=0.5, tokenizer=saved(tmp_path, word_level(*words))))
    assert "has no decoder" in caplog.text
    assert "token 0 ('[UNK]') separates documents" in caplog.text
    assert "% of the characters; they are lost" in caplog.text
    caplog.clear()
    made = byte_level()
    load_corpus(DataConfig(path=texts, held_out=0.3, tokenizer=saved(tmp_path, made)))
    assert caplog.text == ""
