"""A small Llama of bytes that is trained for seconds, as a GGUF file with a tokenizer beside it."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from search.submodel.export import export
from space import genome
from supernet.data.corpus import DataConfig, load_corpus
from supernet.extract import write_submodel
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_supernet, train
from supernet.training.trials import one_thread
from tests.contracts import tiny_space
from tests.supernet.parent.models import write_gguf

SIZES: dict[str, Any] = {
    "vocab_size": 256, "max_seq_len": 1024, "head_dim": 16, "width": [32], "depth": [3],
    "mixer": ["attention"], "heads": [4], "kv_heads": [2], "ffn": [64], "ratios": ["full"],
}  # fmt: skip


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose ids are bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as in GPT-2
    others = iter(range(256, 512))
    characters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_trained_parent(path: Path, text: Path, scratch: Path) -> None:
    """Train the parent and write its files.

    Args:
        path: the GGUF file; ``tokenizer.json`` is written beside it.
        text: the training text.
        scratch: folder of the training.
    """
    space, corpus = tiny_space(**SIZES), load_corpus(DataConfig(path=text, held_out=0.2))
    config = TrainConfig(steps=150, batch=8, length=64, rule="random", sampled=1, threads=1, precision="fp32")
    with one_thread():
        supernet = load_supernet(space, train(space, config, scratch / "training", corpus=corpus))
        submodel = write_submodel(scratch / "model", supernet, genome.largest(space), {}, {})
        export(submodel, ("hf",))
        model = AutoModelForCausalLM.from_pretrained(scratch / "model" / "hf")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(path, model)
    byte_tokenizer().save(str(path.parent / "tokenizer.json"))
