"""Fine-tuning: the new text is learned, interruptions change nothing, and bad input is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from search.config import Run, RunConfig, open_run, open_supernet, open_trained
from search.select.picks import select_member
from search.submodel import finetune as module
from search.submodel.finetune import FinetuneConfig
from space import InputError, genome, variation
from space.io.artefact import file_digest
from space.io.progress import Reporter
from supernet.data.corpus import DataConfig, load_corpus
from supernet.evaluate import evaluate, evaluation_set
from supernet.extract import SubModel, read_submodel, write_submodel
from supernet.training.distillation import largest_teacher, weights_digest
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_supernet, train
from tests.conftest import Quiet
from tests.contracts import tiny_space
from tests.supernet.data.test_tokenizer import byte_level, saved

ROOT = Path(__file__).parents[3]
CONFIG = FinetuneConfig(steps=60, batch=4, learning_rate=5e-3, threads=1)


def tune(
    submodel: SubModel, run: Run, data: DataConfig, out: Path, config: FinetuneConfig, reporter: Reporter
) -> SubModel:
    """Fine-tune with a run's supernet as the teacher."""
    return module.finetune(submodel, open_trained(run), run.folder, data, out, config, reporter)


class StoppedError(Exception):
    """Stands for a process that ends at once."""


class Stopping(Quiet):
    """A reporter that stops at a share of the training."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    @contextmanager
    def stage(self, title: str) -> Iterator[object]:
        def stage(share: float, text: str) -> None:
            if share >= self.share:
                raise StoppedError

        yield stage


@pytest.fixture(scope="module")
def run(finished_run: Path) -> Run:
    """A finished run, which no test here writes to."""
    return open_run(finished_run / "run", finished_run / "devices")


@pytest.fixture(scope="module")
def new_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with other words than the run's."""
    folder = tmp_path_factory.mktemp("new")
    rng = np.random.default_rng(1)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for i in range(30):
        (folder / f"{i}.txt").write_text(" ".join(words[j] for j in rng.integers(0, len(words), 250)))
    return folder


@pytest.fixture(scope="module")
def data(new_text: Path) -> DataConfig:
    return DataConfig(path=new_text, held_out=0.2)


@pytest.fixture(scope="module")
def submodel(run: Run, tmp_path_factory: pytest.TempPathFactory) -> SubModel:
    """A front's member, extracted from the run's supernet."""
    checkpoint = open_supernet(run, load_corpus(run.config.train.data))
    selection = select_member(run, "desk", "knee")
    folder = tmp_path_factory.mktemp("submodel") / "start"
    supernet = load_supernet(run.space, checkpoint)
    return write_submodel(folder, supernet, selection.architecture, {}, selection.chosen, run.text)


@pytest.fixture(scope="module")
def tuned(
    run: Run, submodel: SubModel, data: DataConfig, tmp_path_factory: pytest.TempPathFactory
) -> SubModel:
    """The sub-model after an uninterrupted fine-tuning."""
    return tune(submodel, run, data, tmp_path_factory.mktemp("tuned") / "out", CONFIG, Quiet())


def stop(*_: object, **__: object) -> None:
    raise StoppedError


def recorded(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "finetune.json").read_text())
    return value


def contents(folder: Path) -> dict[str, str]:
    """Hashes by path of all files but the metrics, which contain speeds."""
    files = (p for p in folder.rglob("*") if p.is_file() and "training" not in p.relative_to(folder).parts)
    return {str(p.relative_to(folder)): file_digest(p) for p in files}


def test_new_text_is_learned(run: Run, submodel: SubModel, tuned: SubModel, data: DataConfig) -> None:
    """The recorded losses are those of the weights in both folders."""
    value = recorded(tuned.folder)
    assert value["after"]["loss_nats"] < value["before"]["loss_nats"] - 0.3
    corpus = load_corpus(data)
    evaluation = evaluation_set(corpus, run.text.windows, run.text.length)
    for one, name in ((submodel, "before"), (tuned, "after")):
        weights = dict(one.model().named_parameters())
        reached = evaluate(weights, one.architecture, one.model_config, evaluation)
        assert value[name] == {
            "loss_nats": pytest.approx(reached.loss_nats, rel=1e-6),
            "recall_loss_nats": None,  # nothing can be recalled here
            "bits_per_byte": pytest.approx(reached.loss_nats / np.log(2), rel=1e-6),
        }
    assert value["text"] == run.text.model_copy(update={"data": data}).model_dump(mode="json")
    assert value["teacher"] == {"run": str(run.folder), "key": genome.largest(run.space).key}
    assert (value["key"], value["steps"]) == (submodel.architecture.key, 60)
    assert value["model"] == file_digest(tuned.folder / "model.safetensors")


def test_tuned_folder_is_a_submodel_of_the_new_text(
    run: Run, submodel: SubModel, tuned: SubModel, data: DataConfig
) -> None:
    assert read_submodel(tuned.folder) == tuned
    assert (tuned.architecture, tuned.model_config) == (submodel.architecture, submodel.model_config)
    assert tuned.text is not None
    assert tuned.text.data == data
    assert submodel.chosen["loss_nats"] > 0
    assert tuned.chosen == {k: v for k, v in submodel.chosen.items() if k != "loss_nats"}
    inputs = json.loads((tuned.folder / "architecture.json").read_text())["header"]["inputs"]
    checkpoint = open_supernet(run, load_corpus(run.config.train.data))
    teacher = largest_teacher(load_supernet(run.space, checkpoint))
    assert inputs["supernet"] == checkpoint.digest
    assert inputs["start"] == weights_digest(submodel.model().state_dict())
    assert inputs["teacher"] == f"{teacher.architecture.key}-{weights_digest(teacher.weights)}"
    assert inputs == recorded(tuned.folder)["header"]["inputs"]
    rows = [
        json.loads(line) for line in (tuned.folder / "training" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert not list(tuned.folder.rglob("step-*"))


def test_finished_result_is_reused_and_damaged_weights_are_rebuilt(
    run: Run, submodel: SubModel, tuned: SubModel, data: DataConfig, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(tuned.folder, tmp_path / "copy"))
    (out / "training" / "step-000060").mkdir()  # killed before it was removed
    reporter = Quiet()
    before = contents(out)
    assert tune(submodel, run, data, out, CONFIG, reporter) == replace(tuned, folder=out)
    assert (reporter.stages, reporter.skips) == ([], ["finetune"])
    assert contents(out) == before
    assert not list(out.rglob("step-*"))
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    tune(submodel, run, data, out, CONFIG, reporter)
    assert (reporter.stages, reporter.skips) == (["finetune"], ["finetune"])
    assert contents(out) == before


@pytest.mark.parametrize("moment", ["before a checkpoint", "after one", "before the sub-model", "after it"])
def test_resumed_fine_tuning_equals_uninterrupted(
    moment: str,
    run: Run,
    submodel: SubModel,
    tuned: SubModel,
    data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At any moment of the interruption, the final files are equal bit for bit."""
    reporter = Stopping({"before a checkpoint": 0.3, "after one": 1.0}.get(moment, 2.0))
    with monkeypatch.context() as patch:
        if moment == "before the sub-model":
            patch.setattr(module, "write_submodel", stop)
        if moment == "after it":
            patch.setattr(module, "file_digest", stop)
        with pytest.raises(StoppedError):
            tune(submodel, run, data, tmp_path, CONFIG, reporter)
    kept = {"before a checkpoint": [], "after one": ["step-000050"]}.get(
        moment, ["step-000050", "step-000060"]
    )
    assert sorted(p.name for p in (tmp_path / "training").glob("step-*")) == kept
    assert (tmp_path / "architecture.json").exists() == (moment == "after it")
    assert recorded(tmp_path)["after"] is None
    found = tune(submodel, run, data, tmp_path, CONFIG, Quiet())
    assert found == replace(tuned, folder=tmp_path)
    assert contents(tmp_path) == contents(tuned.folder)
    assert not list(tmp_path.rglob("step-*"))


def test_resume_after_sigkill_equals_uninterrupted(
    run: Run, submodel: SubModel, tuned: SubModel, data: DataConfig, tmp_path: Path
) -> None:
    """A real SIGKILL after the first checkpoint."""
    script = tmp_path / "go.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.search.submodel.test_finetune import *\n"
        "folder, devices, start, text, out = map(Path, sys.argv[1:])\n"
        "data = DataConfig(path=text, held_out=0.2)\n"
        "tune(read_submodel(start), open_run(folder, devices), data, out, CONFIG, Quiet())\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(script), str(run.folder), str(run.devices), str(submodel.folder),
         str(data.path), str(out)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / "training" / "step-000050").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL)  # it may have come to its end first
    assert tune(submodel, run, data, out, CONFIG, Quiet()) == replace(tuned, folder=out)
    assert contents(out) == contents(tuned.folder)


def test_settings_and_teacher_reach_the_training(
    run: Run, submodel: SubModel, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is the run's largest sub-network."""
    asked: list[tuple[Any, ...]] = []

    def distil(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise StoppedError

    monkeypatch.setattr(module, "distil", distil)
    settings = {"steps": 7, "batch": 3, "learning_rate": 2e-3, "distillation": 0.25, "threads": 1, "seed": 4}
    with pytest.raises(StoppedError):
        tune(submodel, run, data, tmp_path, FinetuneConfig(**settings, length=24), Quiet())
    space, config, root, architecture, start, teacher, corpus = asked[0]
    assert (space, root, architecture) == (run.space, tmp_path / "training", submodel.architecture)
    assert isinstance(config, TrainConfig)
    assert {name: getattr(config, name) for name in settings} == settings
    assert (config.length, config.workers, config.init) == (24, 0, None)
    assert teacher.architecture == genome.largest(run.space)
    assert weights_digest(start) == weights_digest(submodel.model().state_dict())
    assert corpus.digest == load_corpus(data).digest
    assert recorded(tmp_path)["text"]["length"] == 24


def refused(match: str, *arguments: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        tune(*arguments)
    assert "\n" not in str(caught.value)


def test_output_folder_in_use_is_refused(
    run: Run, submodel: SubModel, tuned: SubModel, data: DataConfig, tmp_path: Path
) -> None:
    own = submodel.folder / ".." / submodel.folder.name
    refused("the folder of the sub-model itself", submodel, run, data, own, CONFIG, Quiet())
    (tmp_path / "notes.txt").write_text("mine")
    refused("not empty, and no fine-tuning", submodel, run, data, tmp_path, CONFIG, Quiet())
    refused("not a folder", submodel, run, data, tmp_path / "notes.txt", CONFIG, Quiet())
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    before = contents(tuned.folder)
    other = data.model_copy(update={"held_out": 0.3})
    moved = CONFIG.model_copy(update={"steps": 61})
    match = r"made for corpus \w{12}, but the corpus given"
    refused(match, submodel, run, other, tuned.folder, CONFIG, Quiet())
    refused(r"made for training \w{12}, but", submodel, run, data, tuned.folder, moved, Quiet())
    again = replace(submodel, folder=Path(shutil.copytree(submodel.folder, tmp_path / "moved")))
    tensors = load_file(again.folder / "model.safetensors")
    save_file({name: t + 1e-3 for name, t in tensors.items()}, again.folder / "model.safetensors")
    refused(r"made for start \w{12}, but", again, run, data, tuned.folder, CONFIG, Quiet())
    assert contents(tuned.folder) == before


def test_submodel_of_another_space_is_refused(
    run: Run, submodel: SubModel, data: DataConfig, tmp_path: Path
) -> None:
    longer = replace(submodel, model_config=replace(submodel.model_config, max_seq_len=128, vocab_size=512))
    match = (
        "the sub-model has vocab_size 512, max_seq_len 128, "
        "the teacher .*run has vocab_size 256, max_seq_len 64"
    )
    refused(match, longer, run, data, tmp_path, CONFIG, Quiet())
    first = replace(submodel.architecture.layers[0], ffn=96)
    layers = (first, *submodel.architecture.layers[1:])
    wider = replace(submodel, architecture=replace(submodel.architecture, layers=layers))
    refused(r"is not of space small: layers\[0\].ffn: 96", wider, run, data, tmp_path, CONFIG, Quiet())
    drawn = genome.decode(run.space, variation.sample(run.space, np.random.default_rng(0), 200))
    swap = {"linear": "attention", "attention": "linear"}
    swapped = [
        replace(a, layers=tuple(replace(one, mixer=swap.get(one.mixer, one.mixer)) for one in a.layers))
        for a in drawn
    ]
    outside = swapped[genome.contains(run.space, genome.encode(run.space, swapped)).argmin()]
    excluded = replace(submodel, architecture=outside)
    why = "teacher .*: it has .* full and .* linear layers; ratios .* allow"
    refused(why, excluded, run, data, tmp_path, CONFIG, Quiet())
    assert list(tmp_path.iterdir()) == []


def test_unusable_text_is_refused(run: Run, submodel: SubModel, data: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"no. {i}")
    short = DataConfig(path=tmp_path / "text", held_out=0.1)
    match = r"the held-out side has \d+ bytes, a length of 64 needs 65"
    refused(match, submodel, run, short, out, CONFIG, Quiet())
    nowhere = DataConfig(path=tmp_path / "nowhere")
    refused("nowhere: not found", submodel, run, nowhere, out, CONFIG, Quiet())
    longer = CONFIG.model_copy(update={"length": 65})
    refused("length: 65 is more than the context 64", submodel, run, data, out, longer, Quiet())
    assert not out.exists()


def test_short_text_is_evaluated_on_fewer_sequences(
    run: Run, submodel: SubModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "distil", stop)
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"chapter {i} of a short story")
    data = DataConfig(path=tmp_path / "text", held_out=0.2)
    with pytest.raises(StoppedError):
        tune(submodel, run, data, tmp_path / "out", CONFIG, Quiet())
    windows = recorded(tmp_path / "out")["text"]["windows"]
    assert windows == len(load_corpus(data).held_out) // 65
    assert 0 < windows < run.text.windows


def test_different_tokenizers_are_refused(
    run: Run, submodel: SubModel, new_text: Path, data: DataConfig, tmp_path: Path
) -> None:
    """Either side may have one; the run's tokenizer reads the new text and is copied to the sub-model."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    file, other = saved(tmp_path / "a", byte_level(300)), saved(tmp_path / "b", byte_level(310))
    space = tiny_space(vocab_size=300, width=[16])
    text = run.config.train.data.model_copy(update={"tokenizer": file})
    config = RunConfig(space=space, train=TrainConfig(steps=2, batch=2, threads=1, data=text))
    pieces = Run(tmp_path / "run", config, run.devices)
    pieces.save_config()
    checkpoint = train(space, config.train, pieces.folder / "supernet")
    supernet = load_supernet(space, checkpoint)
    start = write_submodel(tmp_path / "start", supernet, genome.smallest(space), {}, {}, pieces.text)

    out = tmp_path / "out"
    named, wrong = (data.model_copy(update={"tokenizer": path}) for path in (file, other))
    digests = {path: f"tokenizer {file_digest(path)[:12]}" for path in (file, other)}
    match = f"data.tokenizer {file} has {digests[file]}, the teacher {run.folder} has bytes as tokens"
    refused(match, submodel, run, named, out, CONFIG, Quiet())
    match = f"data.tokenizer {other} has {digests[other]}, the teacher {pieces.folder} has {digests[file]}"
    refused(match, start, pieces, wrong, out, CONFIG, Quiet())
    foreign = replace(start, tokenizer_digest=file_digest(other))
    match = f"the sub-model {start.folder} has {digests[other]}, the teacher .* has {digests[file]}"
    refused(match, foreign, pieces, data, out, CONFIG, Quiet())
    assert not out.exists()

    quick = CONFIG.model_copy(update={"steps": 2})
    found = tune(start, pieces, data, out, quick, Quiet())
    assert found.text is not None
    assert found.text.data == named
    assert file_digest(out / "tokenizer.json") == file_digest(file)
    unknown = replace(start, text=None, tokenizer_digest=None)
    assert tune(unknown, pieces, named, out, quick, Quiet()) == found


def test_invalid_settings_are_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"rate": 1e-3}, {"teacher": None}, {"steps": 0}, {"batch": 0}, {"learning_rate": float("inf")},
        {"distillation": 1.5}, {"length": 1}, {"threads": 0}, {"seed": -1},
    ]  # fmt: skip
    for settings in wrong:
        with pytest.raises(ValidationError, match=next(iter(settings))):
            FinetuneConfig.model_validate(settings)


def test_non_finite_loss_is_refused(run: Run, submodel: SubModel, data: DataConfig, tmp_path: Path) -> None:
    wild = CONFIG.model_copy(update={"learning_rate": 1e30})
    refused("training: .* at step", submodel, run, data, tmp_path / "out", wild, Quiet())
    broken = replace(submodel, folder=Path(shutil.copytree(submodel.folder, tmp_path / "broken")))
    path = broken.folder / "model.safetensors"
    save_file({name: t * float("nan") for name, t in load_file(path).items()}, path)
    refused("values that are not finite", broken, run, data, tmp_path / "never", CONFIG, Quiet())
    assert not (tmp_path / "never").exists()
