"""A run with blockwise training: the stages after it read its checkpoint as any other."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from search import pipeline
from search.audit.audit import AuditConfig
from search.config import Run, RunConfig, open_run, open_trained
from search.engine.supernet_evaluator import SupernetEvaluator
from search.submodel.export import export
from search.submodel.parity import parity
from space import genome, variation
from space.blocks import forward
from supernet.blockwise.train import train_blocks
from supernet.data.corpus import load_corpus
from supernet.evaluate import evaluate, evaluation_set
from supernet.extract import write_submodel
from supernet.parent import read_parent
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_supernet
from tests.conftest import Quiet
from tests.contracts import tiny_space
from tests.supernet.blockwise.conftest import block_space, settings
from tests.supernet.parent.models import saved


def test_run_with_blockwise_training(text_folder: Path, parent_folder: Path, tmp_path: Path) -> None:
    config = settings(text_folder, parent_folder, steps=8)
    search = {"windows": 2, "front_windows": 4}
    run = Run(
        tmp_path / "run",
        RunConfig.model_validate({"space": block_space(), "train": config, "search": search}),
        tmp_path / "devices",
    )
    corpus, quiet = load_corpus(config.data), Quiet()
    checkpoint = pipeline.trained(run, quiet, corpus)
    assert (quiet.stages, quiet.skips) == (["train"], [])
    assert pipeline.trained(run, quiet, corpus) == checkpoint
    assert (quiet.stages, quiet.skips) == (["train"], ["train"])
    trained = open_trained(open_run(run.folder, run.devices))
    assert trained.checkpoint == checkpoint

    supernet, space = load_supernet(trained.space, checkpoint), trained.space
    member = genome.decode(space, variation.sample(space, np.random.default_rng(4), 1))[0]
    data = evaluation_set(corpus, 2, 64)
    weights = {name: p.numpy() for name, p in supernet.named_parameters()}
    evaluator = SupernetEvaluator(space.model_dump(mode="json"), weights, {"search": data})
    submodel = write_submodel(tmp_path / "model", supernet, member, {}, {}, trained.text)
    plain = dict(submodel.model().named_parameters())
    assert evaluator(member, "search") == evaluate(plain, member, space.config, data)

    export(submodel, ["onnx"])
    found = parity(submodel, tokens=24)
    assert found.kept, found


def test_audit_trains_by_the_settings_of_joint_training(text_folder: Path, parent_folder: Path) -> None:
    config = settings(text_folder, parent_folder)
    found, joint = AuditConfig().training(config), TrainConfig()
    assert (found.method, found.init, found.length) == ("joint", None, config.length)
    assert (found.learning_rate, found.batch) == (joint.learning_rate, joint.batch)
    assert found.data == config.data


@pytest.mark.parametrize("name", ["llama3", "heads of 8", "qwen2", "qwen3"])
def test_parents_of_every_family(name: str, text_folder: Path, tmp_path: Path) -> None:
    """Frequencies, biases, norms of queries and keys, and heads of other sizes than the width's."""
    saved(tmp_path / "parent", name, vocab_size=256)
    parent = read_parent(tmp_path / "parent")
    layer = parent.architecture.layers[0]
    fields = {**parent.model_config.to_json(), "max_seq_len": 64}
    space = tiny_space(
        **fields, sharing="block", width=[48], depth=[2], mixer=["attention", "gated_deltanet"],
        heads=[layer.heads], kv_heads=[layer.kv_heads, layer.heads], ffn=[16, layer.ffn],
        ratios=["full", "linear"],
    )  # fmt: skip
    config = settings(text_folder, tmp_path / "parent", steps=8, blockwise={"tokens": 1024})
    checkpoint = train_blocks(space, config, tmp_path / "out", lambda share, text: None)
    supernet, own = load_supernet(space, checkpoint), parent.architecture
    tokens = torch.arange(64)[None]
    expected = forward(parent.weights, own, parent.model_config, tokens)[0]
    assert torch.equal(supernet(tokens, own)[0], expected)
    table = pd.read_parquet(tmp_path / "out" / "library.parquet").set_index(["slot", "candidate"])
    for slot in range(2):
        for kv_heads in (layer.kv_heads, layer.heads):
            assert 0 < table.error[slot, f"gated_deltanet-h{layer.heads}-k{kv_heads}"] < 1
        # Repeated keys and values compute the same.
        assert table.start_error[slot, f"attention-h{layer.heads}-k{layer.heads}"] < 1e-6
