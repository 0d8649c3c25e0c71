"""Successive halving: inherited weights, halving, resuming, and failures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from search.engine.config import FinalistsConfig, rungs
from search.select import successive_halving as finalists
from search.select.finalist import Finalist
from search.select.successive_halving import (
    distil_baselines,
    distil_finalists,
    inherited,
    write_finalist,
)
from space import Architecture, InputError, genome, variation
from space.io.artefact import canonical_json, digest, file_digest
from supernet.data.corpus import DataConfig, load_corpus
from supernet.evaluate import EvaluationSet, evaluate, evaluation_set, run_parent
from supernet.extract import Text, extract
from supernet.training.distillation import distil, largest_teacher
from supernet.training.recipe import TrainConfig
from supernet.training.train import Trained, load_supernet, train
from tests.conftest import Quiet
from tests.contracts import tiny_space
from tests.supernet.training.test_train import small_space

ROOT = Path(__file__).parents[3]
CONFIG = FinalistsConfig(count=4, steps=8, learning_rate=5e-3)


class WarningsKept(Quiet):
    """A reporter that also keeps warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def trained_in(root: Path, text: Path) -> Trained:
    """A small trained supernet."""
    space, corpus = small_space(), load_corpus(DataConfig(path=text, held_out=0.2))
    config = TrainConfig(steps=30, batch=4, threads=1, learning_rate=5e-3)
    text = Text(data=config.data, length=32, windows=8)
    return Trained(space, train(space, config, root, None, corpus), corpus, text)


def evaluation_of(trained: Trained) -> EvaluationSet:
    """Held-out sequences with random recallable targets, since the text has none."""
    data = evaluation_set(trained.corpus, 12, trained.length)
    return replace(data, recallable=np.random.default_rng(0).random(data.tokens.shape) < 0.1)


def members_of(trained: Trained) -> list[Architecture]:
    drawn = variation.sample(trained.space, np.random.default_rng(5), 40)
    return list(dict.fromkeys(genome.decode(trained.space, drawn)))[:5]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Trained:
    return trained_in(tmp_path_factory.mktemp("trained") / "supernet", text_folder)


@pytest.fixture(scope="module")
def data(trained: Trained) -> EvaluationSet:
    return evaluation_of(trained)


@pytest.fixture(scope="module")
def members(trained: Trained) -> list[Architecture]:
    return members_of(trained)


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory,
    trained: Trained,
    members: list[Architecture],
    data: EvaluationSet,
) -> tuple[Path, list[Finalist]]:
    """Four finalists, uninterrupted, in this process."""
    folder = tmp_path_factory.mktemp("outcome")
    return folder, distil_finalists(trained, members, data, CONFIG, "loss", folder, Quiet(), 0)


def result(folder: Path, architecture: Architecture, rung: int) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(
        (folder / architecture.key / f"rung-{rung}" / "result.json").read_text()
    )
    return value


def digests(folder: Path) -> dict[str, str]:
    """The hashes of all weights and results, by where they are."""
    wanted = ("model.safetensors", "result.json", "finalists.json")
    return {str(p.relative_to(folder)): file_digest(p) for p in sorted(folder.rglob("*")) if p.name in wanted}


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (2, [2]), (3, [3, 2]), (4, [4, 2]), (5, [5, 3, 2]), (8, [8, 4, 2])]
)
def test_every_rung_has_half_of_the_one_before_and_twice_its_steps(count: int, sizes: list[int]) -> None:
    assert rungs(count, 100) == [(size, 100 * 2**i) for i, size in enumerate(sizes)]
    training = FinalistsConfig(count=count).training(count, 32)
    assert training.steps == 100 * 2 ** (len(sizes) - 1)
    assert (training.threads, training.workers, training.length) == (1, 0, 32)


def test_before_is_what_the_sub_networks_reach(
    trained: Trained, members: list[Architecture], data: EvaluationSet, outcome: tuple[Path, list[Finalist]]
) -> None:
    supernet = load_supernet(trained.space, trained.checkpoint)
    found = {a: evaluate(supernet.weights(a), a, trained.space.config, data).to_json() for a in members[:4]}
    assert {f.architecture: f.before for f in outcome[1]} == {
        a: {name: value[name] for name in ("loss_nats", "recall_loss_nats")} for a, value in found.items()
    }
    order = sorted(found, key=lambda a: found[a]["loss_nats"] or 0.0)
    assert [order[f.rank_before - 1] for f in outcome[1]] == [f.architecture for f in outcome[1]]


def test_divergence_from_the_largest_ranks(
    trained: Trained, members: list[Architecture], data: EvaluationSet, tmp_path: Path
) -> None:
    largest = genome.largest(trained.space)
    found = distil_finalists(trained, [*members[:2], largest], data, CONFIG, "kl", tmp_path, Quiet(), 0)
    before = {f.architecture: f.before["kl"] for f in found}
    assert before.pop(largest) == 0
    assert all(value is not None and value > 0 for value in before.values())
    assert next(f for f in found if f.architecture == largest).rank_before == 1
    supernet = load_supernet(trained.space, trained.checkpoint)
    parent = run_parent(supernet.weights(largest), largest, trained.space.config, data)
    for one in found:
        weights = load_file(one.folder / "model.safetensors") if one.folder else {}
        again = evaluate(weights, one.architecture, trained.space.config, data, parent=parent)
        assert one.after
        assert one.after["kl"] == again.extra["kl"]
    last = [f for f in found if f.rung == 2]
    assert [f.after and f.after["kl"] for f in last] == sorted(f.after["kl"] for f in last if f.after)


def test_baselines_are_trained_as_the_best_finalist(
    trained: Trained,
    members: list[Architecture],
    data: EvaluationSet,
    outcome: tuple[Path, list[Finalist]],
    tmp_path: Path,
) -> None:
    """The same weights, bit for bit, where a baseline is a finalist; and a second call reads the file."""
    best = outcome[1][0]
    beside = {"one": members[4], "same": best.architecture}

    def call(folder: Path, **changes: Any) -> dict[str, Finalist]:
        return distil_baselines(trained, beside, 4, data, CONFIG, "loss", folder, Quiet(), 0, **changes)

    found = call(tmp_path)
    assert found["same"].after == best.after
    assert best.folder
    assert found["same"].folder
    names = ("model.safetensors",)
    assert [file_digest(found["same"].folder / n) for n in names] == [
        file_digest(best.folder / n) for n in names
    ]
    assert found["one"].steps == best.steps
    assert list(found) == sorted(found, key=lambda name: (found[name].after or {})["loss_nats"] or 0.0)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert call(tmp_path) == found
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == stamps
    with pytest.raises(InputError, match=r"baselines.json: made for training "):
        call(tmp_path, seed=1)


@pytest.mark.parametrize("quality", ["loss", "recall_loss"])
def test_better_half_continues(
    quality: str,
    trained: Trained,
    members: list[Architecture],
    data: EvaluationSet,
    outcome: tuple[Path, list[Finalist]],
    tmp_path: Path,
) -> None:
    """Recomputed from the files of the rungs; recorded losses are those of the weights."""
    folder, found = outcome
    if quality == "recall_loss":
        folder = tmp_path
        found = distil_finalists(trained, members, data, CONFIG, quality, folder, Quiet(), 0)

    def loss(architecture: Architecture, rung: int) -> float:
        return float(result(folder, architecture, rung)["losses"][f"{quality}_nats"])

    first = sorted(members[:4], key=lambda a: loss(a, 1))
    last = sorted(first[:2], key=lambda a: loss(a, 2))
    assert [f.architecture for f in found] == [*last, *first[2:]]
    assert [f.rank_after for f in found] == [1, 2, 3, 4]
    assert [f.rung for f in found] == [2, 2, 1, 1]
    assert [f.steps for f in found] == [16, 16, 8, 8]
    assert not any((folder / a.key / "rung-2").exists() for a in first[2:])
    for finalist in found:
        assert finalist.folder == folder / finalist.architecture.key / f"rung-{finalist.rung}"
        assert finalist.failed is None
        weights = load_file(finalist.folder / "model.safetensors")
        reached = evaluate(weights, finalist.architecture, trained.space.config, data)
        assert finalist.after == {
            "loss_nats": reached.loss_nats, "recall_loss_nats": reached.recall_loss_nats
        }  # fmt: skip
        assert reached.loss_nats < (finalist.before["loss_nats"] or 0.0) - 0.02
        assert result(folder, finalist.architecture, finalist.rung)["losses"] == finalist.after
    assert not list(folder.glob("*/step-*"))
    assert (folder / "finalists.json").exists()


def test_rungs_do_not_change_the_training(
    trained: Trained, outcome: tuple[Path, list[Finalist]], tmp_path: Path
) -> None:
    """The best finalist's weights equal those of a training without rungs."""
    best = outcome[1][0]
    supernet = load_supernet(trained.space, trained.checkpoint)
    straight = distil(
        trained.space, CONFIG.training(4, trained.length), tmp_path, best.architecture,
        extract(supernet, best.architecture), largest_teacher(supernet), trained.corpus,
    )  # fmt: skip
    assert best.folder is not None
    assert file_digest(best.folder / "model.safetensors") == straight.digest


def test_finished_results_are_reused_and_lost_ones_recomputed(
    trained: Trained,
    members: list[Architecture],
    data: EvaluationSet,
    outcome: tuple[Path, list[Finalist]],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(outcome[0], tmp_path / "copy"))
    moved = [replace(f, folder=folder / str(f.folder)[len(str(outcome[0])) + 1 :]) for f in outcome[1]]
    reporter = Quiet()

    def again() -> list[Finalist]:
        return distil_finalists(trained, members, data, CONFIG, "loss", folder, reporter, 0)

    assert again() == moved
    assert (reporter.stages, reporter.skips) == ([], ["finalists"])
    (folder / "finalists.json").unlink()
    assert again() == moved  # from the results
    assert reporter.stages == []
    (folder / "finalists.json").unlink()
    weights = folder / moved[0].architecture.key / "rung-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (folder / moved[3].architecture.key / "rung-1" / "result.json").write_text("{")
    assert again() == moved
    assert reporter.stages == ["finalists: 4 to step 8", "finalists: 2 to step 16"]
    assert digests(folder) == digests(outcome[0])


def test_other_inputs_are_refused(
    trained: Trained,
    members: list[Architecture],
    data: EvaluationSet,
    outcome: tuple[Path, list[Finalist]],
    tmp_path: Path,
) -> None:
    """Before any training, with the final file or only with rung results."""
    folder = Path(shutil.copytree(outcome[0], tmp_path / "copy"))
    elsewhere = replace(trained.checkpoint, digest="0" * 64)
    cases: dict[str, Callable[[], Any]] = {
        "training": lambda: call(seed=1),
        "supernet": lambda: call(trained=replace(trained, checkpoint=elsewhere)),
        "evaluation": lambda: call(data=replace(data, recallable=~data.recallable)),
        "corpus": lambda: call(trained=replace(trained, corpus=replace(trained.corpus, digest="0" * 64))),
        "finalists": lambda: call(architectures=members[1:]),
    }

    def call(**changes: Any) -> list[Finalist]:
        arguments = {"trained": trained, "architectures": members, "data": data, "config": CONFIG} | changes
        return distil_finalists(**arguments, quality="loss", folder=folder, reporter=Quiet(), workers=0)

    for name, attempt in cases.items():
        with pytest.raises(InputError, match=f"finalists.json: made for {name} "):
            attempt()
    (folder / "finalists.json").unlink()
    for name in list(cases)[:-1]:
        with pytest.raises(InputError, match=f"result.json: made for {name} "):
            cases[name]()
    assert call()[0].architecture == outcome[1][0].architecture


def breaking(monkeypatch: pytest.MonkeyPatch, broken: Sequence[Architecture]) -> list[Architecture]:
    """Make the training of some architectures refuse; returns those whose training was tried."""
    tried: list[Architecture] = []

    def distil_or_not(*arguments: Any, **named: Any) -> Any:
        tried.append(arguments[3])
        if arguments[3] in broken:
            raise InputError("training: the loss became nan at step 3")
        return distil(*arguments, **named)

    monkeypatch.setattr(finalists, "distil", distil_or_not)
    return tried


def test_failed_finalist_is_reported_and_others_continue(
    trained: Trained,
    members: list[Architecture],
    data: EvaluationSet,
    outcome: tuple[Path, list[Finalist]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best = outcome[1][0].architecture
    tried = breaking(monkeypatch, [best])
    reporter = WarningsKept()
    found = distil_finalists(trained, members, data, CONFIG, "loss", tmp_path, reporter, 0)
    # The third of the undisturbed takes the place.
    assert {f.architecture for f in found[:2]} == {f.architecture for f in outcome[1][1:3]}
    assert [f.rung for f in found] == [2, 2, 1, 0]
    assert found[3].architecture == best
    assert (found[3].after, found[3].steps, found[3].folder) == (None, 0, None)
    assert found[3].failed == "training: the loss became nan at step 3"
    assert reporter.warnings == [f"finalist {best.key}: {found[3].failed}"]
    assert len(tried) == 6
    with pytest.raises(InputError, match=f"finalist {best.key} has no weights"):
        write_finalist(tmp_path / "model", trained, found[3], {}, {})
    # It stays failed, so that who goes on does not change.
    (tmp_path / "finalists.json").unlink()
    assert distil_finalists(trained, members, data, CONFIG, "loss", tmp_path, reporter, 0) == found
    assert len(tried) == 6


def test_finalist_that_fails_later_keeps_its_rung(
    trained: Trained,
    members: list[Architecture],
    data: EvaluationSet,
    outcome: tuple[Path, list[Finalist]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best = outcome[1][0].architecture
    folder = Path(shutil.copytree(outcome[0], tmp_path / "copy"))
    (folder / "finalists.json").unlink()
    shutil.rmtree(folder / best.key / "rung-2")
    breaking(monkeypatch, [best])
    found = distil_finalists(trained, members, data, CONFIG, "loss", folder, WarningsKept(), 0)
    assert [f.rung for f in found] == [2, 1, 1, 1]
    (kept,) = [f for f in found if f.architecture == best]
    assert kept.failed
    assert (kept.rung, kept.steps, kept.folder) == (1, 8, folder / best.key / "rung-1")
    assert kept.after == result(folder, best, 1)["losses"]


def test_error_if_all_finalists_fail(
    trained: Trained, members: list[Architecture], data: EvaluationSet, tmp_path: Path
) -> None:
    """A real failure: at such a learning rate, no weight stays finite."""
    wild = CONFIG.model_copy(update={"learning_rate": 1e30, "count": 2})
    reporter = WarningsKept()
    with pytest.raises(
        InputError, match=r"all 2 failed; \w+: .*(nan|inf|finite).*; remove .* to try again"
    ) as f:
        distil_finalists(trained, members, data, wild, "loss", tmp_path, reporter, 0)
    assert "\n" not in str(f.value)
    assert len(reporter.warnings) == 2
    assert not (tmp_path / "finalists.json").exists()


def test_tuned_weights_are_written_as_a_submodel(
    trained: Trained, data: EvaluationSet, outcome: tuple[Path, list[Finalist]], tmp_path: Path
) -> None:
    best = outcome[1][0]
    assert best.folder is not None
    submodel = write_finalist(tmp_path / "model", trained, best, {"front": "1" * 64}, {"limits": []})
    weights = dict(submodel.model().named_parameters())
    assert best.after is not None
    assert (
        evaluate(weights, submodel.architecture, submodel.model_config, data).loss_nats
        == best.after["loss_nats"]
    )
    assert submodel.architecture == best.architecture
    header = json.loads((tmp_path / "model" / "architecture.json").read_text())["header"]
    path = best.folder / "model.safetensors"
    chosen = digest(canonical_json({"limits": []}))
    assert header["inputs"] == {"front": "1" * 64, "finalist": file_digest(path), "chosen": chosen}
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    again = write_finalist(tmp_path / "model", trained, best, {"front": "1" * 64}, {"limits": []})
    assert (again.folder / "model.safetensors").stat().st_mtime_ns == before
    assert best.architecture.key in (tmp_path / "model" / "README.md").read_text()
    shutil.copytree(best.folder, tmp_path / "torn")
    torn = tmp_path / "torn" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    other = next(f for f in outcome[1] if f.architecture != best.architecture)
    for folder, architecture in ((tmp_path / "torn", best.architecture), (best.folder, other.architecture)):
        wrong = replace(best, folder=folder, architecture=architecture)
        with pytest.raises(InputError, match="not the finalist's weights"):
            write_finalist(tmp_path / "again", trained, wrong, {}, {})
    assert not (tmp_path / "again").exists()


def test_invalid_requests_are_refused(
    trained: Trained, members: list[Architecture], data: EvaluationSet, tmp_path: Path
) -> None:
    assert FinalistsConfig().count == 0
    assert distil_finalists(trained, members, data, FinalistsConfig(), "loss", tmp_path, Quiet(), 0) == []
    with pytest.raises(ValidationError, match="extra_forbidden"):
        FinalistsConfig.model_validate({"rate": 1.0})
    foreign = genome.largest(tiny_space(vocab_size=256, max_seq_len=32, width=[48]))
    with pytest.raises(InputError, match="is not of space tiny"):
        distil_finalists(trained, [foreign], data, CONFIG, "loss", tmp_path, Quiet(), 0)
    nothing = replace(data, recallable=np.zeros_like(data.recallable))
    for quality, some in (("latency", data), ("recall_loss", nothing)):
        with pytest.raises(InputError, match=rf"{quality} of \w+ is None .*loss and recall_loss"):
            inherited(trained, members, some, quality)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # Ray starts slowly where the cores are busy
@pytest.mark.timeout(600)
def test_finalist_that_crashes_repeatedly_fails_in_ray_tune(
    trained: Trained, members: list[Architecture], data: EvaluationSet, tmp_path: Path
) -> None:
    """The failure is not caused by input; the other finalist is the same as without Ray."""
    good, broken = members[:2]
    folder, alone = tmp_path / "finalists", tmp_path / "alone"
    (folder / broken.key).mkdir(parents=True)
    (folder / broken.key / "tensorboard").write_text("in the way of a folder")
    reporter = WarningsKept()
    two = CONFIG.model_copy(update={"count": 2})
    found = distil_finalists(trained, members, data, two, "loss", folder, reporter, 2)
    assert [(f.architecture, f.rung, f.steps) for f in found] == [(good, 1, 8), (broken, 0, 0)]
    assert found[1].failed is not None
    assert found[1].failed.startswith("NotADirectoryError: ")
    assert "\n" not in found[1].failed
    assert reporter.warnings == [f"finalist {broken.key}: {found[1].failed}"]
    assert not (folder / "tune").exists()
    distil_finalists(trained, members, data, two, "loss", alone, Quiet(), 0)
    file = f"{good.key}/rung-1/model.safetensors"
    assert file_digest(folder / file) == file_digest(alone / file)


@pytest.mark.timeout(600)
def test_resume_after_sigkill_selects_the_same_finalist(
    trained: Trained,
    members: list[Architecture],
    data: EvaluationSet,
    outcome: tuple[Path, list[Finalist]],
    text_folder: Path,
    tmp_path: Path,
) -> None:
    """A real SIGKILL under Ray Tune, in the first or second rung; resumed without Ray."""
    script = tmp_path / "go.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.search.select.test_successive_halving import *\n"
        "trained = trained_in(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "data, members = evaluation_of(trained), members_of(trained)\n"
        "distil_finalists(trained, members, data, CONFIG, 'loss', Path(sys.argv[3]), Quiet(), 1)\n"
    )
    folder = tmp_path / "finalists"
    arguments = [str(trained.checkpoint.folder.parent), str(text_folder), str(folder)]
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    moment = ["*/rung-1/result.json", "*/step-000016"][np.random.default_rng().integers(2)]
    try:
        deadline = time.monotonic() + 240
        while not list(folder.glob(moment)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    kept = {path: path.stat().st_ino for path in folder.glob("*/rung-1/result.json")}
    found = distil_finalists(trained, members, data, CONFIG, "loss", folder, Quiet(), 0)
    assert [f.architecture for f in found] == [f.architecture for f in outcome[1]]
    assert digests(folder) == digests(outcome[0])
    assert all(path.stat().st_ino == inode for path, inode in kept.items())
