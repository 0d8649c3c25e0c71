"""Files with a right header and a wrong body are refused in one line, whatever the value."""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from latency.card import load_card
from latency.predictor.accuracy import read_op_latencies, read_predictor_errors
from latency.predictor.predictor import load_predictor
from search.config import load_run_config, open_run, open_supernet
from search.engine.front import Front
from search.submodel.decoder import Decoder
from search.submodel.verify import choice_of
from space import FormfitError, InputError, Space
from space.io.artefact import file_digest
from supernet.data.corpus import load_corpus
from supernet.extract import read_submodel
from supernet.training.train import load_supernet
from tests.conftest import Program, run_program

Place = tuple[str | int, ...]
WRONG: list[Any] = [None, -1, -1.5, "x", [], {}, [None], {"x": None}, True, 10**400, math.nan, math.inf]
GONE = object()


def places(value: Any, depth: int, prefix: Place = ()) -> Iterator[Place]:
    """The places of the values in a JSON value, two of each list or large object, down to a depth."""
    if prefix:
        yield prefix
    if depth == 0:
        return
    items = list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    )
    for key, item in items if len(items) < 20 else items[:2]:
        if (*prefix, key) != ("header",):
            yield from places(item, depth - 1, (*prefix, key))


def changed(value: Any, place: Place, to: Any) -> Any:
    made = copy.deepcopy(value)
    inner = made
    for key in place[:-1]:
        inner = inner[key]
    if to is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = to
    return made


def error_of(read: Callable[[], object]) -> Exception | None:
    try:
        read()
    except Exception as error:
        return error
    return None


def refused(
    path: Path, read: Callable[[], object], places_to: list[tuple[Place, Any]]
) -> list[tuple[Place, Any]]:
    """The changes of a file that reading it refuses; other errors than formfit's fail the test."""
    text = path.read_text()
    value, found = json.loads(text), []
    for place, to in places_to:
        path.write_text(json.dumps(changed(value, place, to)))
        error = error_of(read)
        if error is not None:
            if not isinstance(error, FormfitError):
                raise AssertionError(
                    f"{path.name}: {place} = {to!r}: {type(error).__name__}: {error}"
                ) from error
            assert len(str(error).splitlines()) == 1
            assert len(str(error)) < 3000
            found.append((place, to))
    path.write_text(text)
    return found


def all_changes(path: Path, depth: int) -> list[tuple[Place, Any]]:
    value = json.loads(path.read_text())
    return [(place, to) for place in places(value, depth) for to in (*WRONG, GONE)]


def predictor_of(folder: Path) -> tuple[Path, Space]:
    run = open_run(folder / "run", folder / "devices")
    return next((folder / "devices" / "desk" / "predictors").glob("*.json")), run.space


def test_no_body_of_a_predictor_is_a_traceback(run_folder: Path) -> None:
    path, space = predictor_of(run_folder)

    def read() -> None:
        predictor = load_predictor(path, space)
        read_predictor_errors(path)
        read_op_latencies(path)
        for workload in predictor.models:
            assert predictor.cost(workload, 0.9)

    refused(path, read, all_changes(path, 4)[::3])


NUMBERS: list[Place] = [
    ("workloads", "prefill@64", "run_seconds"),
    ("workloads", "prefill@64", "spread", "relative"),
    ("workloads", "prefill@64", "shared_seconds", "full"),
    ("workloads", "decode@64", "run_relative_spread"),
    ("memory", "prefill@64", "constant"),
]


def test_numbers_of_a_predictor_are_finite_and_not_negative(run_folder: Path) -> None:
    path, space = predictor_of(run_folder)
    value = json.loads(path.read_text())
    op = next(iter(value["workloads"]["prefill@64"]["op_seconds"]))
    tried = [*NUMBERS, ("workloads", "prefill@64", "op_seconds", op)]
    changes = [(place, to) for place in tried for to in (-1e-9, math.nan, math.inf, 1e9, "1", True, None)]
    # A constant of bytes may be large.
    wanted = [(p, to) for p, to in changes if not (to == 1e9 and p[0] == "memory") and (to, p[-1]) not in
              [(1e9, "relative"), (1e9, "run_relative_spread")]]  # fmt: skip
    assert refused(path, lambda: load_predictor(path, space), wanted) == wanted


def test_no_body_of_a_card_is_a_traceback(run_folder: Path, formfit: Program) -> None:
    path = run_folder / "devices" / "desk" / "device.json"
    tried = all_changes(path, 2)
    found = refused(path, lambda: load_card(run_folder / "devices", "desk"), tried)
    assert len(found) > 0.8 * len(tried)  # a noisy machine adds problems, which are free texts
    text = path.read_text()
    shutil.copytree(run_folder / "devices" / "desk", run_folder / "devices" / "good")
    for change in (
        {"measured": 3},
        {"problems": None},
        {"measured": "2026-01-01T00:00:00"},
        {"unsupported": [1]},
    ):
        path.write_text(json.dumps({**json.loads(text), **change}))
        done = formfit("--devices", run_folder / "devices", "devices")  # one bad card does not end the list
        assert done.returncode == 0
        assert "good" in done.stdout
        assert str(path) in done.stderr


def test_no_body_of_a_front_is_a_traceback(run_folder: Path) -> None:
    path = run_folder / "run" / "searches" / "desk" / "front.json"
    tried = all_changes(path, 4)[::3]
    found = refused(path, lambda: Front.read(path), tried)
    assert len(found) > 0.7 * len(tried)


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    words = ("extract", "--run", finished_run / "run", "--search", "desk", "--format", "onnx", "--out", out)
    done = run_program("--devices", finished_run / "devices", *words)
    assert done.returncode == 0, done.stderr
    return out


def test_no_body_of_a_sub_model_is_a_traceback(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    path = folder / "architecture.json"
    tried = all_changes(path, 4)[::2]
    found = refused(path, lambda: choice_of(read_submodel(folder)), tried)
    assert len(found) > 0.6 * len(tried)


def test_weights_that_are_not_finite_are_refused(run_folder: Path, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    for value in (math.nan, math.inf):
        save_file({**weights, name: torch.full_like(weights[name], value)}, folder / "model.safetensors")
        with pytest.raises(InputError, match=f"{name} has values that are not finite"):
            read_submodel(folder).model()


def rehash(step: Path) -> None:
    """Let a checkpoint's state name the hashes of its files as they are now."""
    path = step / "state.json"
    state = json.loads(path.read_text())
    state["hashes"] = {part: file_digest(step / f"{part}.safetensors") for part in ("model", "optimizer")}
    path.write_text(json.dumps(state))


def nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(iter(tensors))
    return {**tensors, name: torch.full_like(tensors[name], math.nan)}


def smaller(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(n for n, tensor in tensors.items() if tensor.dim() == 2)
    return {**tensors, name: tensors[name][:-1].contiguous()}


CHECKPOINTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "NaN": (nan, "values that are not finite"),
    "missing": (lambda tensors: dict(list(tensors.items())[1:]), "is None, expected"),
    "unknown": (lambda tensors: {**tensors, "more": torch.zeros(1)}, "more is .*, expected None"),
    "another shape": (smaller, "is .*, expected .* differ"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_with_other_tensors_is_refused(
    case: str, run_folder: Path, tmp_path: Path, formfit: Program
) -> None:
    how, expected = CHECKPOINTS[case]
    step = max((run_folder / "run" / "supernet").glob("step-*"))
    save_file(how(load_file(step / "model.safetensors")), step / "model.safetensors")
    rehash(step)
    run = open_run(run_folder / "run", run_folder / "devices")
    with pytest.raises(InputError, match=expected):
        load_supernet(run.space, open_supernet(run, None))
    words = ("extract", "--run", run.folder, "--search", "desk", "--out", tmp_path / "out")
    done = formfit("--devices", run_folder / "devices", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


HEADERS = {
    "huge shape": header('{"w":{"dtype":"F32","shape":[1000000000000,1000000],"data_offsets":[0,4]}}')
    + b"0000",
    "overlap": header(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}'
    )
    + b"0" * 6,
    "long header": (10**12).to_bytes(8, "little") + b"{}",
    "empty": b"",
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_weights_file_of_a_wrong_form_is_refused(case: str, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    (folder / "model.safetensors").write_bytes(HEADERS[case])
    with pytest.raises(InputError, match="not a whole weights file"):
        read_submodel(folder).model()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        read_submodel(folder).model()


def test_no_state_of_a_checkpoint_is_a_traceback(run_folder: Path) -> None:
    step = max((run_folder / "run" / "supernet").glob("step-*"))
    run = open_run(run_folder / "run", run_folder / "devices")
    path = step / "state.json"
    refused(path, lambda: open_supernet(run, None), all_changes(path, 2))


CONFIG = {"vocab_size": 256, "max_seq_len": 64, "head_dim": 16, "tie_embeddings": True, "qk_norm": False}
LAYER = {"mixer": "attention", "ffn": 0, "heads": 100_000, "kv_heads": 100_000}
METADATA: dict[str, list[Any]] = {
    "formfit.model_config": [
        "{",
        [],
        {},
        CONFIG | {"max_seq_len": 10**12},
        CONFIG | {"max_seq_len": -1},
        CONFIG | {"vocab_size": 999},
        CONFIG | {"head_dim": "16"},
        CONFIG | {"head_dim": 4096},
    ],
    "formfit.architecture": ["", None, {"width": 1e9}, {"width": 99_999_999, "layers": [LAYER]}],
}


def test_a_graph_with_other_metadata_is_refused(exported: Path, tmp_path: Path) -> None:
    graph = onnx.load(exported / "model.onnx")
    assert Decoder(exported / "model.onnx").model_config.vocab_size == 256
    for key, values in METADATA.items():
        for value in values:
            made = copy.deepcopy(graph)
            next(item for item in made.metadata_props if item.key == key).value = (
                value if isinstance(value, str) else json.dumps(value)
            )
            onnx.save(made, tmp_path / "model.onnx")
            with pytest.raises(InputError, match="not a model that formfit exported"):
                Decoder(tmp_path / "model.onnx")


# Paths of a run.


def test_paths_of_a_configuration_follow_its_file(
    config_file: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(config_file.parent, folder)
    shutil.copytree(text_folder, folder / "words")
    text = (folder / "run.yaml").read_text().replace(str(text_folder), "words")
    (folder / "run.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    config = load_run_config(Path("project/run.yaml"))
    assert config.train.data.path == folder / "words"
    corpus = load_corpus(config.train.data)
    monkeypatch.chdir("/")
    assert load_corpus(config.train.data).digest == corpus.digest


def test_a_moved_run_is_extracted_from_without_its_text(
    run_folder: Path, text_folder: Path, tmp_path: Path, formfit: Program
) -> None:
    moved = tmp_path / "moved [1]"
    shutil.move(run_folder / "run", moved)
    path = moved / "config.yaml"
    text = path.read_text()
    assert f"path: {text_folder}" in text
    path.write_text(text.replace(str(text_folder), "/nowhere/text"))
    words = ("extract", "--run", moved, "--search", "desk", "--format", "onnx", "--out", tmp_path / "out")
    done = formfit("--devices", run_folder / "devices", *words)
    assert done.returncode == 0, done.stderr
    assert Decoder(tmp_path / "out" / "model.onnx").model_config.vocab_size == 256
    done = formfit("--devices", run_folder / "devices", "search", "--run", moved, "--device", "desk")
    assert (done.returncode, done.stderr) == (
        2, "formfit: data.path: /nowhere/text: not found; give a UTF-8 text file or a folder of them\n"
    )  # fmt: skip


def test_a_pick_may_be_the_beginning_of_a_key(run_folder: Path, tmp_path: Path, formfit: Program) -> None:
    front = Front.read(run_folder / "run" / "searches" / "desk" / "front.json")
    key = front.members[-1].key
    least = next(n for n in range(4, 13) if sum(m.key.startswith(key[:n]) for m in front.members) == 1)
    words = ("extract", "--run", run_folder / "run", "--search", "desk", "--out", tmp_path / "out")
    done = formfit("--devices", run_folder / "devices", *words, "--pick", key[:least], "--json")
    assert json.loads(done.stdout)["key"] == key
    for pick in (key[:3], "zzzz", "", "../x"):
        with pytest.raises(InputError, match=r"not one of"):
            front.member(pick)
    same = Front.from_json({**front.to_json(), "header": {}})
    doubled = [same.members[0], *same.members]
    with pytest.raises(InputError, match="the beginning of several keys"):
        Front.from_json({**same.to_json(), "members": [m.to_json() for m in doubled]}).member(
            doubled[0].key[:6]
        )
    assert np.isfinite([m.loss_nats for m in front.members]).all()
