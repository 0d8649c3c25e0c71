"""All stages at smoke size: every shipped configuration, resuming, and bad input in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from search import config as run_config
from tests.conftest import Program, short_smoke
from tests.test_plugin import install_module

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in ROOT.glob("configs/*.yaml") if "parent:" not in path.read_text())
SPACES = sorted(ROOT.glob("configs/spaces/*.yaml"))


def new_process(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the program in a new process."""
    command = [sys.executable, "-c", "from search.cli import main; main()", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.timeout(600)  # minutes where the cores are busy
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configuration_runs_and_reruns_without_work(
    config: Path, tmp_path: Path, formfit: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's configuration in a new process, the others here with fewer training steps.

    An installed plug-in is not imported, because all names are built-in.
    """
    site, mark = tmp_path / "site", tmp_path / "imported"
    install_module(site, "marked", f"open({str(mark)!r}, 'w').close()")
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    words = ("--devices", tmp_path / "devices", "run", config, "--smoke", "--out", tmp_path / "run", "--json")
    as_a_user = config.stem == "quickstart"
    if not as_a_user:
        monkeypatch.setattr(run_config, "smoke", short_smoke)
    first = new_process(*words) if as_a_user else formfit(*words)
    assert first.returncode in (0, 3), (
        first.stderr
    )  # a smoke run's limits may be missed: it measures hardly at all
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    if first.returncode == 0:
        assert json.loads(first.stdout) == summary
    check_summary(summary)
    for member in summary["verified"].values():
        folder = tmp_path / "run" / "submodels" / member["key"]
        assert {p.name for p in folder.iterdir()} >= {
            "model.onnx",
            "model.safetensors",
            "verify.json",
            "README.md",
        }
    page = next((tmp_path / "run" / "searches").glob("*/report.html")).read_text()
    assert "<script src" not in page
    assert "Plotly.newPlot" in page
    assert not mark.exists()
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    second = formfit(*words)
    assert second.returncode == first.returncode
    stages = [line for line in second.stderr.splitlines() if not line.startswith("formfit: ")]
    assert {line.partition(":")[0] for line in stages} == {"train", "profile", "search"}
    assert all("done already" in line for line in stages)
    if first.returncode == 3:
        assert second.stderr.splitlines()[-1] == first.stderr.splitlines()[-1]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == files


def check_summary(summary: dict[str, object]) -> None:
    """The keys that docs/files.md documents."""
    chosen = summary["chosen"]
    assert isinstance(chosen, dict)
    assert summary["front"]
    for timing in chosen["latency"].values():
        assert timing["predicted_latency_ms"] > 0
        assert timing["measured_latency_ms"] > 0
    assert {w.split("@")[0] for w in chosen["latency"]} == {"prefill", "decode"}
    assert chosen["parity"]["kept"]
    assert max(chosen["parity"]["errors"].values()) <= 1e-5
    assert {item["status"] for item in chosen["limits"]} <= {"kept", "missed"}
    text = summary["text"]
    assert isinstance(text, dict)
    assert {"largest_bits_per_byte", "gzip_bits_per_byte", "order2_bits_per_byte"} <= set(text)


@pytest.mark.parametrize("space", SPACES, ids=lambda path: path.stem)
def test_shipped_space_is_described(space: Path, formfit: Program) -> None:
    done = formfit("space", space, "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["architectures"] >= 10**8
    assert len(value["mixers"]) >= 4
    assert value["smallest"]["params"] < value["largest"]["params"]


def test_extract_verify_report_and_devices_from_a_finished_search(
    run_folder: Path, tmp_path: Path, formfit: Program
) -> None:
    devices, run = run_folder / "devices", run_folder / "run"
    out = tmp_path / "model"
    source = ("--devices", devices, "extract", "--run", run)
    done = formfit(
        *source, "--search", "desk", "--pick", "fastest", "--format", "onnx", "--out", out, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"][-1] == "model.onnx"
    checked = formfit("--devices", devices, "verify", out, "--device", "desk", "--max-noise", "900", "--json")
    assert checked.returncode in (0, 3), checked.stderr
    assert json.loads(checked.stdout)["parity"]["kept"]
    file = out / "architecture.json"
    by_file = formfit(*source, "--architecture", file, "--out", tmp_path / "same", "--json")
    assert json.loads(by_file.stdout)["key"] == json.loads(done.stdout)["key"]
    listed = json.loads(formfit("--devices", devices, "devices", "desk", "--json").stdout)
    assert listed["devices"][0]["this_machine"]
    assert listed["devices"][0]["warning"] is None
    assert 0 <= listed["devices"][0]["age_days"] < 1
    assert "held_out" in next(iter(listed["devices"][0]["predictors"].values()))["decode@64"]


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> Path:
    value = yaml.safe_load(path.read_text())
    change(value)
    path.write_text(yaml.safe_dump(value))
    return path


BAD_CONFIGS: dict[str, tuple[Callable[[dict[str, object]], object], str]] = {
    "misspelt key": (lambda v: v["train"].update(stepz=3), "train.stepz: unknown key (did you mean steps?)"),
    "unknown key": (lambda v: v.update(colour="red"), "colour: unknown key"),
    "wrong type": (lambda v: v["train"].update(steps="many"), "train.steps"),
    "missing space": (lambda v: v.update(space="nowhere.yaml"), "nowhere.yaml: not found"),
    "missing corpus": (lambda v: v["train"]["data"].update(path="no/text"), "no/text"),
    "malformed limit": (lambda v: v["search"].update(limits=["prefill<=5"]), "prefill"),
    "limit in a wrong unit": (lambda v: v["search"].update(limits=["prefill@64<=5MiB"]), "MiB"),
    "unknown objective": (lambda v: v["search"].update(objectives=["joy"]), "joy"),
    "workload too long": (lambda v: v["profile"].update(workloads=["prefill@999"]), "prefill@999"),
    "unmeasured workload": (lambda v: v["search"].update(limits=["decode@32<=1ms"]), "decode@32"),
    "two errors": (lambda v: (v["train"].update(steps=0), v.update(x=1)), "train.steps"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configuration_gets_one_line(
    name: str, config_file: Path, run_folder: Path, tmp_path: Path, formfit: Program
) -> None:
    folder = tmp_path / "config"
    shutil.copytree(config_file.parent, folder)
    change, expected = BAD_CONFIGS[name]
    path = edit(folder / config_file.name, change)
    done = formfit("--devices", run_folder / "devices", "run", path, "--out", run_folder / "run")
    assert done.returncode == 2, (done.returncode, done.stderr)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("formfit: ")
    assert expected in last
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_infeasible_counted_limit_is_refused_before_training(
    config_file: Path, tmp_path: Path, formfit: Program
) -> None:
    """A limit on parameters needs no device, so that no minute is spent on training."""
    folder = tmp_path / "config"
    shutil.copytree(config_file.parent, folder)
    path = edit(folder / config_file.name, lambda v: v["search"].update(limits=["desk:params<=1"]))
    done = formfit("--devices", tmp_path / "devices", "run", path, "--out", tmp_path / "run")
    assert done.returncode == 3, done.stderr
    assert "params<=1 cannot be met: the least is" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_empty_corpus_is_refused(tmp_path: Path, config_file: Path, formfit: Program) -> None:
    folder = tmp_path / "config"
    shutil.copytree(config_file.parent, folder)
    (tmp_path / "empty").mkdir()
    path = edit(folder / config_file.name, lambda v: v["train"]["data"].update(path=str(tmp_path / "empty")))
    done = formfit("run", path, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "empty" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("search", "--run", "RUN", "--device", "moon"), "formfit profile --space SPACE --device moon"),
        (("search", "--run", "nowhere", "--device", "desk"), "formfit train CONFIG --out nowhere"),
        (("search", "--run", "RUN", "--device", "desk", "--limit", "speed<=3"), "speed"),
        (("extract", "--run", "RUN", "--search", "none", "--out", "x"), "formfit search"),
        (("extract", "--run", "RUN", "--search", "desk", "--pick", "odd", "--out", "x"), "odd"),
        (("extract", "--run", "RUN", "--out", "x"), "--search NAME, --architecture FILE and --pick"),
        (("extract", "--run", "RUN", "--search", "desk", "--format", "pdf", "--out", "x"), "pdf"),
        (("verify", "nowhere", "--device", "desk"), "formfit extract"),
        (("devices", "moon"), "formfit profile --space SPACE --device moon"),
        (("space", "nowhere.yaml"), "nowhere.yaml: not found"),
        (("run", "nowhere.yaml"), "nowhere.yaml: not found"),
        (("fly",), "fly"),
        (("train", "x.yaml"), "--out"),
    ],
)
def test_bad_command_gets_one_line(
    words: tuple[str, ...],
    expected: str,
    finished_run: Path,
    tmp_path: Path,
    formfit: Program,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [str(finished_run / "run") if w == "RUN" else w for w in words]
    monkeypatch.chdir(tmp_path)
    done = formfit("--devices", finished_run / "devices", *given)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert expected in done.stderr


def test_files_of_another_space_or_schema_are_refused(run_folder: Path, formfit: Program) -> None:
    """A checkpoint of another space and a card of another schema version; both sides are named."""
    config = run_folder / "run" / "config.yaml"
    kept = config.read_text()
    edit(config, lambda v: v["space"].update(width=[16, 32, 48]))
    done = formfit(
        "--devices", run_folder / "devices", "search", "--run", run_folder / "run", "--device", "desk"
    )
    assert done.returncode == 2
    assert "made for space" in done.stderr
    config.write_text(kept)
    card = run_folder / "devices" / "desk" / "device.json"
    card.write_text(re.sub(r'"schema": \d+', '"schema": 99', card.read_text(), count=1))
    done = formfit("--devices", run_folder / "devices", "devices", "desk")
    assert done.returncode == 2
    assert "schema version 99" in done.stderr


def test_devices_warns_of_outdated_cards(run_folder: Path, formfit: Program) -> None:
    card = run_folder / "devices" / "desk" / "device.json"
    text = card.read_text()
    version = json.loads(text)["fingerprint"]["runtime_version"]
    card.write_text(text.replace(f'"{version}"', '"1.0.0"'))
    done = formfit("--devices", run_folder / "devices", "devices")
    assert done.returncode == 0
    assert f"measured with onnxruntime 1.0.0, here is {version}" in done.stderr
    assert f"formfit profile --space SPACE --device desk-{version}" in done.stderr
    value = json.loads(text)
    value["fingerprint"]["cpu"] = "Other"
    card.write_text(json.dumps(value))
    done = formfit("--devices", run_folder / "devices", "devices", "desk")
    assert "not this machine: cpu: card Other" in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['formfit', '--help']\nfrom search.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'ray', 'onnxruntime', 'optuna', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in [
        "run",
        "space",
        "train",
        "profile",
        "search",
        "audit",
        "extract",
        "verify",
        "devices",
        "report",
    ]:
        assert command in done.stdout


@pytest.mark.parametrize("runtime", ["torch", pytest.param("torch-cuda", marks=pytest.mark.gpu)])
def test_all_stages_with_a_torch_card(
    config_file: Path, tmp_path: Path, formfit: Program, runtime: str
) -> None:
    """Profiled, searched and verified on the card's runtime."""
    folder = tmp_path / "config"
    shutil.copytree(config_file.parent, folder)
    path = edit(folder / config_file.name, lambda v: v["profile"].update(runtime=runtime, error=1.0))
    words = ("--devices", tmp_path / "devices", "run", path, "--out", tmp_path / "run", "--json")
    done = formfit(*words)
    assert done.returncode in (0, 3), done.stderr  # measured hardly at all, a limit may be missed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["device"]["runtime"] == runtime
    for member in summary["verified"].values():
        assert member["parity"]["kept"]
        assert all(timing["measured_latency_ms"] > 0 for timing in member["latency"].values())
        assert ("cuda_decode" in member["parity"]["errors"]) == (runtime == "torch-cuda")
    verified = next((tmp_path / "run" / "submodels").glob("*/verify.json"))
    assert json.loads(verified.read_text())["runtime"].startswith(runtime)
    again = formfit(
        "--devices", tmp_path / "devices", "verify", verified.parent, "--device", "desk", "--max-noise", 900
    )
    assert again.returncode in (0, 3), again.stderr
    listed = formfit("--devices", tmp_path / "devices", "devices", "desk", "--json")
    assert json.loads(listed.stdout)["devices"][0]["this_machine"]
