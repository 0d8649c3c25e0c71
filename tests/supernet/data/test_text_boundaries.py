"""The tokens around a text are the same in training, generation and the exported folder."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from search.submodel.decoder import Decoder
from search.submodel.export import export
from search.submodel.generation import Sampling, StreamingTokenizer, generate
from space import Architecture, Layer
from supernet.data.corpus import DataConfig, load_corpus
from supernet.data.tokenizer import load_tokenizer
from supernet.extract import Text, write_submodel
from supernet.supernet import Supernet
from tests.contracts import scatter, tiny_space

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "naïve", "Σigma", "日本", "don't", "."]
PIECE, WORD = "<unk>", "[UNK]"  # of characters that a vocabulary lacks
SAID = ["alpha beta", " zeta  gamma", "a", "beta naïve Σigma 日本", "don't .", "</s> alpha"]


def sentences(seed: int, count: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=count))


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's: no post-processor that adds a token."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    trained(made, trainers.BpeTrainer(vocab_size=340, special_tokens=["<|endoftext|>"],
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    return made


def llama() -> tokenizers.Tokenizer:
    """Llama's: pieces with a leading mark, bytes for unknown characters, ``<s>`` before a text."""
    plain = tokenizers.Tokenizer(models.BPE())
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained(plain, trainers.BpeTrainer(vocab_size=100, limit_alphabet=30))
    value = json.loads(plain.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *value["vocab"]]
    made = tokenizers.Tokenizer(models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, [tuple(pair) for pair in value["merges"]],
        unk_token=PIECE, byte_fallback=True, fuse_unk=True,
    ))  # fmt: skip
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.normalizer = plain.normalizer
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made


def unigram() -> tokenizers.Tokenizer:
    """T5's: every text ends in ``</s>``."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trained(made, trainers.UnigramTrainer(vocab_size=60, unk_token=PIECE,
                                          special_tokens=["<unk>", "</s>"]))  # fmt: skip
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return made


def word_piece() -> tokenizers.Tokenizer:
    """BERT's: a text stands between ``[CLS]`` and ``[SEP]``."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token=WORD))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trained(made, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[CLS]", "[SEP]"]))
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return made


def trained(made: tokenizers.Tokenizer, trainer: object) -> None:
    trainer.show_progress = False  # type: ignore[attr-defined]
    made.train_from_iterator([sentences(seed, 100) for seed in range(20)], trainer)


KINDS = [byte_level, llama, unigram, word_piece]


@pytest.fixture(params=KINDS, ids=[kind.__name__ for kind in KINDS])
def tokenizer_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "given" / "tokenizer.json"
    path.parent.mkdir()
    kind: Callable[[], tokenizers.Tokenizer] = request.param
    kind().save(str(path))
    return path


def test_training_generation_and_the_exported_folder_agree(tokenizer_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_file)
    (tmp_path / "text").mkdir()
    documents = [*SAID, *(sentences(seed, 60) for seed in range(30))]
    for i, document in enumerate(documents):
        (tmp_path / "text" / f"{i}.txt").write_text(document)
    corpus = load_corpus(DataConfig(path=tmp_path / "text", held_out=0.3, tokenizer=tokenizer_file))
    stream = [*corpus.train.tolist(), *corpus.held_out.tolist()]
    space = tiny_space(vocab_size=tokenizer.vocab_size, max_seq_len=96, mixer=["attention", "linear"])
    supernet = Supernet(space)
    scatter(supernet, 0)
    layers = [
        Layer(mixer="linear", heads=2, kv_heads=1, ffn=16),
        Layer(mixer="attention", heads=2, kv_heads=1, ffn=16),
    ]
    architecture = Architecture(width=min(space.width), layers=tuple(layers))
    text = Text(data=DataConfig(tokenizer=tokenizer_file), length=96, windows=1)
    submodel = write_submodel(tmp_path / "submodel", supernet, architecture, {}, {}, text)
    export(submodel, ["onnx", "hf"], [])
    decoder = Decoder(tmp_path / "submodel" / "model.onnx", 1)
    hf = AutoTokenizer.from_pretrained(tmp_path / "submodel" / "hf", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "submodel" / "hf", trust_remote_code=True).eval()
    for said in SAID:
        mine = StreamingTokenizer(tokenizer)
        ids = mine.encode(said)
        assert hf(said).input_ids == ids
        # In training, the next separator follows.
        row = [*ids, tokenizer.separator]
        assert any(stream[i : i + len(row)] == row for i in range(len(stream)))
        new = list(generate(decoder, ids, 12, Sampling(), tokenizer.separator))
        told = "".join([*map(mine.feed, new), mine.end()])
        with torch.no_grad():
            found = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0].tolist()
        assert [token for token in found[len(ids) :] if token != tokenizer.separator] == new
        whole = hf.decode([*ids[1:], *new], skip_special_tokens=True)
        before = hf.decode(ids[1:], skip_special_tokens=True)
        assert before + told == whole
