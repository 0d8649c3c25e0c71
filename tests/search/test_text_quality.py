"""Text quality of a run: bits per byte, and None where they are unknown."""

import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from search import pipeline
from search.config import Run, RunConfig
from space import InputError
from supernet.data.corpus import load_corpus
from tests.conftest import Quiet
from tests.contracts import tiny_value


def make_run(folder: Path, vocab_size: int, **data: object) -> Run:
    value = {
        "space": tiny_value(vocab_size=vocab_size, max_seq_len=32),
        "train": {"steps": 2, "batch": 2, "threads": 1, "data": data},
        "search": {"front_windows": 4},
    }
    return Run(folder, RunConfig.model_validate(value), folder / "devices")


def quality(run: Run) -> dict[str, Any]:
    corpus = load_corpus(run.config.train.data)
    checkpoint = pipeline.trained(run, Quiet(), corpus)
    return dict(vars(pipeline.text_quality(run, checkpoint, corpus, 2.0)))


def letters(folder: Path) -> Path:
    """A tokenizer of bytes and a few pairs of letters: 300 tokens."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = [(a, b) for a in "abcdegh" for b in "aehlmnt"][:44]
    vocab_size = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    made = tokenizers.Tokenizer(models.BPE(vocab_size, pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_word_pieces_have_bits_per_byte_but_no_baselines(text_folder: Path, tmp_path: Path) -> None:
    data = {"path": text_folder, "held_out": 0.2, "tokenizer": letters(tmp_path), "recall": 0.5}
    found = quality(make_run(tmp_path / "run", 300, **data))
    assert found["gzip_bits_per_byte"] is found["order2_bits_per_byte"] is None
    assert found["held_out_bytes"] > 4 * 32  # a token stands for more than a byte
    expected = 2.0 / math.log(2) * 4 * 32 / found["held_out_bytes"]
    assert found["chosen_bits_per_byte"] == pytest.approx(expected)
    assert 0 < found["largest_bits_per_byte"] < 16
    assert 0 <= found["largest_mqar_accuracy"] <= 1
    with pytest.raises(InputError, match="the tokenizer has 300 tokens, the space's vocabulary is 256"):
        quality(make_run(tmp_path / "other", 256, **data))


def test_mqar_alone_has_no_text(tmp_path: Path) -> None:
    found = quality(make_run(tmp_path / "run", 256, recall=1.0))
    assert found["source"] == "MQAR sequences"
    assert found["recall_share"] == 1
    assert found["largest_recall_loss_nats"] > 0
    assert {value for name, value in found.items() if "byte" in name} == {None}


def test_bytes_have_all_but_mqar(text_folder: Path, tmp_path: Path) -> None:
    found = quality(make_run(tmp_path / "run", 256, path=text_folder, held_out=0.2))
    assert found["largest_mqar_accuracy"] is None
    assert found["held_out_bytes"] == 4 * 32
    assert found["chosen_bits_per_byte"] == pytest.approx(2.0 / math.log(2))
    assert all(found[f"{name}_bits_per_byte"] > 0 for name in ("largest", "gzip", "order2"))


def test_too_little_held_out_text_is_refused_before_training(text_folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 256, path=text_folder, held_out=0.2)
    settings = run.config.search.model_copy(update={"front_windows": 5000})
    long = Run(run.folder, run.config.model_copy(update={"search": settings}), run.devices)
    with pytest.raises(InputError, match="5000 windows of 33 need"):
        quality(long)
    assert not (tmp_path / "run" / "supernet").exists()
