"""Kits: packing, running in a Python with nothing but the zip, reading the result, invalid results."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latency import ProfileConfig, load_card, load_predictor
from latency.device_runner.plan import checksum
from latency.kit.pack import pack
from latency.kit.unpack import unpack
from latency.kit.writer import DEVICE_MODULES
from space import InputError, Space, Workload, genome, variation
from tests.contracts import tiny_space

QUICK = ProfileConfig(
    workloads=("prefill@16", "decode@16"),
    block_ms=0.2,
    min_rounds=2,
    max_rounds=2,
    max_noise=None,
    max_error=None,
    optimal_models=4,
    random_models=2,
    held_out_models=3,
    repeated_models=1,
    group=12,
)


def space() -> Space:
    return tiny_space(
        mixer=["attention", "short_conv", "linear"], width=[16, 32], heads=[1], depth=[1, 2, 3], ffn=[0, 32]
    )


def run_kit(kit: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a kit as a user does on the device; -I keeps this repository off the path."""
    command = [sys.executable, "-I", str(kit), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with kit.zip, result.json and devices/far."""
    folder = tmp_path_factory.mktemp("kit")
    pack(space(), folder / "devices" / "far", QUICK, folder / "kit.zip")
    done = run_kit(folder / "kit.zip", folder / "result.json")
    assert done.returncode == 0, done.stderr
    return folder


def test_device_runner_needs_only_python_3_8_numpy_and_onnxruntime() -> None:
    own = {part.__name__ for part in DEVICE_MODULES}
    for part in DEVICE_MODULES:
        tree = ast.parse(Path(str(part.__file__)).read_text(), feature_version=(3, 8))
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        names |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        assert {n for n in names if n.split(".")[0] in ("latency", "space", "search", "supernet")} <= own
        outside = {n.split(".")[0] for n in names} - sys.stdlib_module_names
        assert outside <= {"latency", "numpy", "onnxruntime", "space"}


def test_kit_is_small_and_its_result_makes_a_card(measured: Path) -> None:
    assert (measured / "kit.zip").stat().st_size < 20 * 2**20
    with zipfile.ZipFile(measured / "kit.zip") as kit:
        assert all(not name.startswith(("/", "..")) for name in kit.namelist())
    unpack(space(), measured / "devices" / "far", measured / "result.json")
    card = load_card(measured / "devices", "far")
    assert card.unsupported == {}
    predictor = load_predictor(card.predictor_path("tiny", "onnxruntime", 1, "fp32"), space(), "x")
    rows = variation.sample(space(), np.random.default_rng(0), 50)
    for workload in QUICK.parsed(space()):
        assert (predictor.predict(rows, workload) > 0).all()
        assert predictor.models[workload].errors.test.held_out.models == 3
    again = run_kit(measured / "kit.zip", measured / "result.json")
    assert again.returncode == 0
    assert "complete already" in again.stderr


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
@pytest.mark.parametrize("precision", ["int8", "int8-dynamic"])
def test_kit_of_another_precision_draws_integer_weights(precision: str, tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"precision": precision, "workloads": ("decode@16",)})
    folder = tmp_path / "devices" / "far"
    pack(space(), folder, config, tmp_path / "kit.zip")
    with zipfile.ZipFile(tmp_path / "kit.zip") as kit:
        plan = json.loads(kit.read("kit.json"))
    kinds = {
        weight["dtype"] for group in plan["groups"] for item in group["items"] for weight in item["weights"]
    }
    assert kinds == {"float32", "uint8"} | ({"int8"} if precision == "int8-dynamic" else set())
    done = run_kit(tmp_path / "kit.zip", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    predictor = unpack(space(), folder, tmp_path / "result.json")
    assert [str(w) for w in predictor.models] == [f"decode@16,precision={precision}"]
    assert load_card(tmp_path / "devices", "far").predictor_path("tiny", "onnxruntime", 1, precision).exists()


def test_interrupted_kit_resumes(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    process = subprocess.Popen(
        [sys.executable, "-I", str(measured / "kit.zip"), "--out", str(out)], stderr=subprocess.DEVNULL
    )
    while not out.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    first = json.loads(out.read_text())
    assert not first["complete"]
    with pytest.raises(InputError, match="run the kit to its end"):
        unpack(space(), measured / "devices" / "far", out)
    done = run_kit(measured / "kit.zip", out)
    assert done.returncode == 0, done.stderr
    whole = json.loads(out.read_text())
    assert whole["complete"]
    assert whole["groups"][: len(first["groups"])] == first["groups"]


def packed_for(measured: Path, folder: Path) -> Path:
    """The folder of a future card, with the manifest of the same kit."""
    folder.mkdir(parents=True)
    return Path(shutil.copy(measured / "devices" / "far" / "kit.json", folder)).parent


def test_unsupported_mixer_is_left_out(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = run_kit(measured / "kit.zip", out, "--refuse", "linear")
    assert done.returncode == 0, done.stderr
    assert "UNSUPPORTED linear" in done.stderr
    predictor = unpack(space(), packed_for(measured, tmp_path / "devices" / "old"), out)
    assert set(load_card(tmp_path / "devices", "old").unsupported) == {"linear"}
    rows = variation.sample(space(), np.random.default_rng(0), 200)
    has = np.array([any(x.mixer == "linear" for x in a.layers) for a in genome.decode(space(), rows)])
    assert has.any()
    assert (~has).any()
    for workload in QUICK.parsed(space()):
        seconds = predictor.predict(rows, workload)
        assert np.isinf(seconds[has]).all()
        assert np.isfinite(seconds[~has]).all()


def with_checksum(value: dict[str, Any]) -> str:
    return json.dumps({**value, "checksum": checksum(value)})


def first_timing(value: dict[str, Any]) -> dict[str, Any]:
    return next(iter(next(g for g in value["groups"] if g["timings"])["timings"].values()))


def faster(value: dict[str, Any]) -> None:
    """Divide all times by a million, consistently."""
    for group in value["groups"]:
        for timing in group["timings"].values():
            for series in ("raw", "values"):
                timing[series] = [t * 1e-6 for t in timing[series]]


def slower(value: dict[str, Any], factor: float) -> None:
    """Multiply all times but the anchors', consistently."""
    for group in value["groups"]:
        for timing in group["timings"].values():
            for series in ("raw", "values"):
                timing[series] = [t * factor for t in timing[series]]


def all_rounds(value: dict[str, Any], kept: slice, times: int = 1) -> None:
    """Keep some rounds of every timing, as often as given."""
    for group in value["groups"]:
        for timing in group["timings"].values():
            for series in ("raw", "values", "anchors"):
                timing[series] = timing[series][kept] * times


INVALID_RESULTS: dict[str, tuple[Callable[[str], str], str]] = {
    "truncated": (lambda text: text[: len(text) // 2], "not a result"),
    "edited": (lambda text: text.replace('"threads": 1', '"threads": 2'), "changed since it was measured"),
    "another kit": (
        lambda text: change(text, lambda v: v.update(kit="0" * 64)),
        "the result of kit 000000000000",
    ),
    "NaN": (lambda text: change(text, lambda v: first_timing(v)["raw"].__setitem__(0, float("nan"))), "NaN"),
    "negative": (
        lambda text: change(text, lambda v: first_timing(v)["raw"].__setitem__(0, -1.0)),
        "not positive",
    ),
    "other values": (
        lambda text: change(text, lambda v: first_timing(v)["values"].__setitem__(0, 9.0)),
        "do not follow from its raw times",
    ),
    "impossibly fast": (lambda text: change(text, faster), "is impossible"),
    "a huge time": (
        lambda text: change(text, lambda v: first_timing(v)["raw"].__setitem__(0, 10**400)),
        "too large",
    ),
    "endless": (lambda text: text.replace('"steal_ms": 0.0', '"steal_ms": 1e999', 1), "not a result|changed"),
    "no width": (
        lambda text: change(text, lambda v: first_timing(v).update(wanted_half_width=None)),
        "wanted_half_width is None",
    ),
    "words for switches": (
        lambda text: change(text, lambda v: first_timing(v).update(involuntary_switches="x")),
        "involuntary_switches is 'x'",
    ),
    "no groups": (lambda text: change(text, lambda v: v.update(groups=[])), "groups: List should have"),
    "no fingerprint": (lambda text: change(text, lambda v: v.update(fingerprint={})), "fingerprint.machine"),
    "no anchor": (
        lambda text: change(text, lambda v: v["groups"][0].update(anchor_reference=0.0)),
        "anchor_reference: Input should be greater than 0",
    ),
    "tiny anchor": (
        lambda text: change(text, lambda v: v["groups"][0].update(anchor_reference=1e-320)),
        "reference product in .* impossible",
    ),
    "a mixer less": (
        lambda text: change(
            text, lambda v: v["groups"][0]["timings"].pop(next(iter(v["groups"][0]["timings"])))
        ),
        "lacks .* that its kit measures",
    ),
    "no reference": (
        lambda text: change(text, lambda v: v["groups"][0]["timings"].popitem()),
        "lacks reference.*, the reference work of a group",
    ),
    "what was not asked": (
        lambda text: change(text, lambda v: v["groups"][0]["timings"].update(x=first_timing(v))),
        "x: its kit does not measure that",
    ),
    "other threads": (lambda text: change(text, lambda v: v.update(threads=2)), "on 2 threads, its kit on 1"),
    "a group more": (
        lambda text: change(text, lambda v: v["groups"].append(v["groups"][-1])),
        r"has \d+ groups, its kit \d+",
    ),
    "fewer rounds": (
        lambda text: change(text, lambda v: all_rounds(v, slice(0, 1))),
        "1 rounds, its kit takes 2",
    ),
    "more rounds": (
        lambda text: change(text, lambda v: all_rounds(v, slice(0, 2), 50)),
        "100 rounds, its kit takes 2 to 2",
    ),
    "beyond any ceiling": (lambda text: change(text, lambda v: slower(v, 1e9)), "is impossible, above 600 s"),
    "unknown mixers": (
        lambda text: change(text, lambda v: v.update(unsupported={f"m{i}": "" for i in range(99)})),
        "mixer 'm0' is not one of its kit",
    ),
    "many mixers": (
        lambda text: change(text, lambda v: v.update(unsupported={f"m{i}": "" for i in range(100_000)})),
        "unsupported: Dictionary should have at most 100 items",
    ),
    "a long reason": (
        lambda text: change(text, lambda v: v.update(unsupported={"linear": "x" * 100_000})),
        "at most 2000 characters",
    ),
    "parity of nothing": (
        lambda text: change(text, lambda v: v.update(parity={"onnx": 0.0})),
        "lacks what its kit measures",
    ),
    "more keys": (lambda text: change(text, lambda v: v.update(path="/etc/passwd")), "path"),
    "another schema": (lambda text: change(text, lambda v: v.update(schema=7)), "schema version 7"),
    "a list": (lambda _: "[]", "not a result"),
    "deep": (lambda _: "[" * 200000, "not a result"),
    "garbage": (lambda _: "\x00garbage" * 1000, "not a result"),
}


def change(text: str, how: Callable[[dict[str, Any]], object]) -> str:
    value = json.loads(text)
    how(value)
    return with_checksum(value)


@pytest.mark.parametrize("case", INVALID_RESULTS)
def test_invalid_result_is_refused_in_one_line(case: str, measured: Path, tmp_path: Path) -> None:
    how, expected = INVALID_RESULTS[case]
    path = tmp_path / "result.json"
    path.write_text(how((measured / "result.json").read_text()))
    packed_for(measured, tmp_path / "devices" / "far")
    with pytest.raises(InputError, match=expected) as caught:
        unpack(space(), tmp_path / "devices" / "far", path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "devices" / "far" / "device.json").exists()


def test_oversized_result_is_not_read(measured: Path, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    packed_for(measured, tmp_path / "devices" / "far")
    with pytest.raises(InputError, match="larger than 67,108,864 bytes"):
        unpack(space(), tmp_path / "devices" / "far", path)


def test_a_device_or_pipe_is_no_result(measured: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    packed_for(measured, tmp_path / "devices" / "far")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            unpack(space(), tmp_path / "devices" / "far", path)


@pytest.mark.parametrize("opened", ["folder", "program"])
def test_a_kit_that_was_unzipped_runs(opened: str, measured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kit [/v1]"
    with zipfile.ZipFile(measured / "kit.zip") as kit:
        kit.extractall(folder)
    out = tmp_path / "made" / "on demand" / "result.json"
    # -I would leave the folder of a program off the path.
    program = ["-I", str(folder)] if opened == "folder" else [str(folder / "__main__.py")]
    command = [sys.executable, *program, "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert unpack(space(), packed_for(measured, tmp_path / "devices" / "far"), out).models


def test_a_kit_tries_its_output_first(measured: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (Path("/proc/none/result.json"), tmp_path / "file" / "result.json", tmp_path):
        done = run_kit(measured / "kit.zip", out)
        assert done.returncode == 2
        assert "group" not in done.stderr  # nothing was measured
        assert "Traceback" not in done.stderr
    done = run_kit(tmp_path / "none.zip", tmp_path / "result.json")
    assert done.returncode != 0


def test_packing_twice_gives_the_same_kit(tmp_path: Path) -> None:
    first = pack(space(), tmp_path / "a", QUICK, tmp_path / "a.zip")
    second = pack(space(), tmp_path / "b", QUICK, tmp_path / "b.zip")
    assert first.kit == second.kit
    assert Workload.parse("prefill@16") in QUICK.parsed(space())


def test_card_is_extended_but_not_by_another_device(measured: Path, tmp_path: Path) -> None:
    """The same kit again keeps the card's units; the result of another device is refused."""
    folder = packed_for(measured, tmp_path / "devices" / "far")
    unpack(space(), folder, measured / "result.json")
    first = load_card(tmp_path / "devices", "far")
    twice = run_kit(measured / "kit.zip", tmp_path / "again.json")
    assert twice.returncode == 0, twice.stderr
    unpack(space(), folder, tmp_path / "again.json")
    again = load_card(tmp_path / "devices", "far")
    assert again.references == first.references
    assert len(again.table("models")) == len(first.table("models"))
    other = change((measured / "result.json").read_text(), lambda v: v["fingerprint"].update(cpu="Other"))
    (tmp_path / "other.json").write_text(other)
    with pytest.raises(InputError, match="measured on another device"):
        unpack(space(), folder, tmp_path / "other.json")


def test_space_without_plain_models_is_packed(tmp_path: Path) -> None:
    linear = tiny_space(mixer=["linear", "retnet"], ratios=["linear"], ffn=[16, 32], depth=[1, 2, 3])
    assert pack(linear, tmp_path / "far", QUICK, tmp_path / "kit.zip").models == 4 + 2 + 3 + 1


def test_space_of_too_few_architectures_is_refused(tmp_path: Path) -> None:
    few = tiny_space(mixer=["attention"], ratios=["full"], width=[16], heads=[1], ffn=[16], depth=[1, 2])
    with pytest.raises(InputError, match="at least 3 of each are needed"):
        pack(few, tmp_path / "far", QUICK, tmp_path / "kit.zip")
