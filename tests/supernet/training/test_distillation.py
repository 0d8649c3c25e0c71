"""Distillation from inherited weights with a fixed teacher, in resumable steps."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from space import Architecture, InputError, Space, genome, variation
from space.blocks import Model
from space.io.artefact import file_digest
from supernet.data.corpus import Corpus, DataConfig, load_corpus
from supernet.evaluate import evaluate, evaluation_set
from supernet.extract import extract
from supernet.supernet import Supernet
from supernet.training.distillation import distil, largest_teacher, load_subnet, weights_digest
from supernet.training.recipe import TrainConfig, step_rate
from supernet.training.train import load_stand_alone, load_supernet, train
from supernet.training.trainer import Teacher, Trainer
from tests.contracts import scatter
from tests.supernet.training.test_train import small_space


@dataclass(frozen=True)
class Start:
    """A trained supernet, a student and a teacher."""

    space: Space
    supernet: Supernet
    corpus: Corpus
    student: Architecture
    teacher: Teacher

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return extract(self.supernet, self.student)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Start:
    space = small_space()
    corpus = load_corpus(DataConfig(path=text_folder, held_out=0.2))
    root = tmp_path_factory.mktemp("supernet")
    checkpoint = train(space, TrainConfig(steps=40, threads=1, learning_rate=5e-3), root, None, corpus)
    supernet = load_supernet(space, checkpoint)
    student = next(
        a
        for a in genome.decode(space, variation.sample(space, np.random.default_rng(0), 50))
        if len({layer.mixer for layer in a.layers} - {"none"}) == 2 and a.width == 16
    )
    return Start(space, supernet, corpus, student, largest_teacher(supernet))


def settings(**changes: object) -> TrainConfig:
    fields = {"steps": 40, "batch": 4, "threads": 1, "distillation": 0.5, "precision": "fp32"}
    return TrainConfig.model_validate(fields | changes)


def losses(start: Start, weights: dict[str, torch.Tensor]) -> float:
    data = evaluation_set(start.corpus, 16, 32)
    return evaluate(weights, start.student, start.space.config, data).loss_nats


def test_student_starts_as_supernet_subnetwork(start: Start) -> None:
    data = evaluation_set(start.corpus, 16, 32)
    rng = np.random.default_rng(1)
    for architecture in genome.decode(start.space, variation.sample(start.space, rng, 6)):
        given = extract(start.supernet, architecture)
        trainer = Trainer(start.space, settings(), start.corpus, architecture, start=given)
        trainer.prepare()
        inside = evaluate(start.supernet.weights(architecture), architecture, start.space.config, data)
        assert evaluate(trainer.parameters, architecture, start.space.config, data) == inside
        trainer.step(0)
        inherited = extract(start.supernet, architecture)
        assert weights_digest(given) == weights_digest(inherited)  # copied, not trained
        assert weights_digest(trainer.parameters) != weights_digest(given)


def test_distillation_lowers_loss_and_follows_teacher(start: Start, tmp_path: Path) -> None:
    """The loss is below the inherited one; more weight of the teacher brings the student nearer to it."""
    inputs = torch.from_numpy(evaluation_set(start.corpus, 16, 32).tokens)
    teacher = start.teacher
    wanted = start.supernet(inputs, teacher.architecture)[0].softmax(-1)
    apart = []
    for share in (0.0, 1.0):
        found = distil(
            start.space, settings(distillation=share, learning_rate=2e-3), tmp_path / str(share),
            start.student, start.weights, teacher, start.corpus,
        )  # fmt: skip
        assert losses(start, found.load("model")) < losses(start, start.weights) - 0.1
        with torch.no_grad():
            log_probs = load_stand_alone(start.space, found, start.student)(inputs)[0].log_softmax(-1)
        apart.append(float((wanted * (wanted.log() - log_probs)).sum(-1).mean()))
    assert apart[1] < apart[0] - 0.01


def test_step_gradient_equals_autograd_and_teacher_is_unchanged(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the mixed loss, written out, with a teacher whose weights require gradients."""
    weights = {name: t.clone().requires_grad_() for name, t in start.teacher.weights.items()}
    teacher = Teacher(start.teacher.architecture, weights)
    config = settings(distillation=0.3)
    trainer = Trainer(start.space, config, start.corpus, start.student, start=start.weights, teacher=teacher)
    trainer.prepare()
    monkeypatch.setattr(trainer, "_update", lambda *_: None)  # keep the gradients
    trainer.step(7)
    assert all(t.grad is None for t in weights.values())
    assert weights_digest(weights) == weights_digest(start.teacher.weights)

    model = Model(start.student, start.space.config)
    model_teacher = Model(teacher.architecture, start.space.config)
    model.load_state_dict(start.weights)
    model_teacher.load_state_dict(start.teacher.weights)
    batch = trainer._batch(7, 0)
    tokens, targets = batch.tokens, batch.targets
    logs = model(tokens)[0].log_softmax(-1)
    text = -logs.gather(-1, targets[..., None]).mean()
    likeness = -(model_teacher(tokens)[0].softmax(-1).detach() * logs).sum(-1).mean()
    (0.7 * text + 0.3 * likeness).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(trainer.gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_zero_weight_drops_teacher(start: Start) -> None:
    arguments = (start.space, settings(distillation=0.0), start.corpus, start.student)
    rows = [
        Trainer(*arguments, start=start.weights, teacher=teacher).step(0) for teacher in (None, start.teacher)
    ]
    assert rows[0] == rows[1]


def test_stopped_training_equals_uninterrupted(start: Start, tmp_path: Path) -> None:
    """Weights and learning rates do not depend on where a call stops."""
    arguments = (start.student, start.weights, start.teacher, start.corpus)
    config = settings(checkpoint_every=15, precision="auto")
    straight = distil(start.space, config, tmp_path / "a", *arguments)
    for until in (10, 25, 25):
        found = distil(start.space, config, tmp_path / "b", *arguments, until=until)
        assert found.step == until
    found = distil(start.space, config, tmp_path / "b", *arguments, until=99)
    assert found.step == straight.step == 40
    for part in ("model", "optimizer"):
        file = f"{part}.safetensors"
        assert file_digest(straight.folder / file) == file_digest(found.folder / file)
    for root, steps in ((tmp_path / "a", [20, 40]), (tmp_path / "b", [10, 20, 25, 40])):
        rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == steps
        assert [row["rate"] for row in rows] == [step_rate(config, step - 1) for step in steps]
    with pytest.raises(InputError, match=r"trained to step 40, past step 25; remove the folder"):
        distil(start.space, config, tmp_path / "b", *arguments, until=25)


def test_checkpoint_of_other_inputs_is_error(start: Start, tmp_path: Path) -> None:
    config, weights, teacher = settings(steps=2), start.weights, start.teacher
    distil(start.space, config, tmp_path, start.student, weights, teacher, start.corpus)
    moved = {name: t + 1e-3 for name, t in weights.items()}
    other = Teacher(teacher.architecture, {name: t + 1e-3 for name, t in teacher.weights.items()})
    largest = teacher.architecture
    cases = {
        "start": (config, start.student, moved, teacher),
        "teacher": (config, start.student, weights, other),
        "training": (settings(steps=3), start.student, weights, teacher),
        "architecture": (config, largest, extract(start.supernet, largest), teacher),
    }
    for name, (changed, architecture, given, other_teacher) in cases.items():
        with pytest.raises(InputError, match=f"made for {name} "):
            distil(start.space, changed, tmp_path, architecture, given, other_teacher, start.corpus)
    with pytest.raises(InputError, match=r"workers: 2, but distillation runs in one process"):
        distil(start.space, settings(workers=2), tmp_path, start.student, weights, teacher, start.corpus)
    with pytest.raises(ValueError, match="start and teacher are for a plain model"):
        Trainer(start.space, config, start.corpus, teacher=teacher)


def test_non_finite_loss_error_names_step(start: Start, tmp_path: Path) -> None:
    weights = start.weights
    weights["norm"] = weights["norm"] * float("nan")
    with pytest.raises(InputError, match=r"the loss became nan at step 1 for width 16") as caught:
        distil(start.space, settings(), tmp_path, start.student, weights, start.teacher, start.corpus)
    assert "\n" not in str(caught.value)


def test_load_subnet_is_inverse_of_extract(start: Start) -> None:
    """Every weight is copied, and no other weight changes."""
    supernet = Supernet(start.space)
    scatter(supernet)
    before = {name: p.detach().clone() for name, p in supernet.named_parameters()}
    model = Model(start.student, start.space.config)
    scatter(model, seed=1)
    tensors = dict(model.named_parameters())
    inside = extract(supernet, start.student)
    load_subnet(supernet, start.student, tensors)
    found = extract(supernet, start.student)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    load_subnet(supernet, start.student, inside)
    assert all(torch.equal(p, before[name]) for name, p in supernet.named_parameters())
    with pytest.raises(ValueError, match="not the weights of architecture"):
        load_subnet(supernet, genome.largest(start.space), tensors)
