"""Verification by a kit: packed here, run by an isolated Python, judged here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from latency.device_runner.plan import checksum
from search.submodel.kit import CASES
from tests.conftest import Program, run_program


@pytest.fixture(scope="module")
def measured(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sub-model that was exported and packed, and what its kit measured."""
    folder = tmp_path_factory.mktemp("measured")
    source = ("--devices", finished_run / "devices")
    run, out = finished_run / "run", folder / "model"
    run_program(*source, "extract", "--run", run, "--search", "desk", "--format", "onnx", "--out", out)
    kit = folder / "kit.zip"
    done = run_program(*source, "verify", out, "--device", "desk", "--make-kit", kit, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["timings"] == 6
    command = [sys.executable, "-I", str(kit), "--out", str(folder / "result.json")]
    timed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert timed.returncode == 0, timed.stderr
    return folder


@pytest.fixture
def packed(measured: Path, tmp_path: Path) -> Path:
    """A copy of the measured folder that a test may change."""
    return Path(shutil.copytree(measured, tmp_path / "packed"))


def test_kit_result_is_judged(packed: Path, run_folder: Path, formfit: Program) -> None:
    out, result = packed / "model", packed / "result.json"
    words = ("--devices", run_folder / "devices", "verify", out, "--device", "desk", "--kit-result")
    done = formfit(*words, result, "--json")
    assert done.returncode in (0, 3), done.stderr
    value = json.loads(done.stdout)
    assert value["parity"]["kept"]
    assert {f"device_{name}" for name in CASES} < set(value["parity"]["errors"])
    assert 0 < max(json.loads(result.read_text())["parity"].values()) < 1e-5
    here = json.loads(formfit(*words[:-1], "--max-noise", "900", "--json").stdout)
    for workload, row in value["latency"].items():
        assert 0.2 < row["measured_latency_ms"] / here["latency"][workload]["measured_latency_ms"] < 5
    assert {item["status"] for item in value["limits"]} <= {"kept", "missed"}


def test_kit_result_of_another_model_is_refused(packed: Path, run_folder: Path, formfit: Program) -> None:
    model = packed / "model" / "model.onnx"
    model.write_bytes(model.read_bytes() + b" ")
    words = ("verify", packed / "model", "--device", "desk", "--kit-result", packed / "result.json")
    done = formfit("--devices", run_folder / "devices", *words)
    assert done.returncode == 2
    assert "not the graphs that were packed" in done.stderr


TAMPERED = {
    "truncated": (lambda text: text[:-9], "not a result"),
    "another device": (
        lambda text: sealed(text, lambda v: v["fingerprint"].update(cpu="Other")),
        "measured on another device",
    ),
    "less": (
        lambda text: sealed(
            text, lambda v: v["groups"][0]["timings"].pop(next(iter(v["groups"][0]["timings"])))
        ),
        "lacks what its kit",
    ),
    "no parity": (lambda text: sealed(text, lambda v: v["parity"].clear()), "lacks what its kit"),
    "another kit": (lambda text: sealed(text, lambda v: v.update(kit="1" * 64)), "the result of kit 1111"),
}


def sealed(text: str, change: object) -> str:
    value = json.loads(text)
    change(value)  # type: ignore[operator]
    return json.dumps({**value, "checksum": checksum(value)})


def test_tampered_results_are_refused_in_one_line(packed: Path, run_folder: Path, formfit: Program) -> None:
    tampered = packed / "tampered.json"
    for how, expected in TAMPERED.values():
        tampered.write_text(how((packed / "result.json").read_text()))
        done = formfit(
            "--devices",
            run_folder / "devices",
            "verify",
            packed / "model",
            "--device",
            "desk",
            "--kit-result",
            tampered,
        )
        assert done.returncode == 2, done.stderr
        assert expected in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not (packed / "model" / "verify.json").exists()
