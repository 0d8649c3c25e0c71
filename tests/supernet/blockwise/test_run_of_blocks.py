"""A run with blockwise training: the stages after it read its checkpoint as any other."""

from pathlib import Path

import numpy as np

from search import pipeline
from search.audit.audit import AuditConfig
from search.config import Run, RunConfig, open_run, open_trained
from search.engine.supernet_evaluator import SupernetEvaluator
from search.submodel.export import export
from search.submodel.parity import parity
from space import genome, variation
from supernet.data.corpus import load_corpus
from supernet.evaluate import evaluate, evaluation_set
from supernet.extract import write_submodel
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_supernet
from tests.conftest import Quiet
from tests.supernet.blockwise.conftest import block_space, settings


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
