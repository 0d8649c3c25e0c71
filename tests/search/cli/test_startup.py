"""Commands that need no torch import none of the libraries that take long to load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from latency.card import PREDICTOR, Card
from latency.device_runner.fingerprint import Fingerprint
from latency.predictor.accuracy import Accuracy, HeldOutErrors, PredictorErrors

ROOT = Path(__file__).parents[3]
SPACE = ROOT / "configs" / "spaces" / "small.yaml"
CONFIG = ROOT / "configs" / "quickstart.yaml"
HEAVY = {
    "onnx",
    "onnxruntime",
    "optuna",
    "pandas",
    "plotly",
    "pyarrow",
    "ray",
    "safetensors",
    "scipy",
    "sklearn",
    "torch",
    "transformers",
}

# All commands run in one process, the lightest first; each is followed by the modules imported so far.
SCRIPT = """
import contextlib, io, json, sys

import formfit

answers = []
for words in json.load(sys.stdin):
    sys.argv = ["formfit", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            formfit.main()
        except SystemExit as ended:
            code = ended.code
    modules = sorted({name.partition(".")[0] for name in sys.modules})
    answers.append([code, out.getvalue(), err.getvalue(), modules])
print(json.dumps(answers))
"""


def run(folder: Path, commands: list[list[str]]) -> list[tuple[int, str, str, set[str]]]:
    """Exit code, stdout, stderr and imported modules after each of the commands."""
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env=environment,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=True,
    )
    return [(code, out, err, set(modules)) for code, out, err, modules in json.loads(done.stdout)]


def test_help_and_version_import_no_library_but_typer(tmp_path: Path) -> None:
    commands = ["run", "space", "train", "profile", "search", "extract", "export", "verify", "generate"]
    commands += ["finetune", "audit", "report", "devices"]
    asked = [["--version"], ["--help"], *([command, "--help"] for command in commands)]
    for words, (code, out, err, modules) in zip(asked, run(tmp_path, asked), strict=True):
        assert (code, err) == (0, ""), words
        assert out.startswith("formfit " if words == ["--version"] else "Usage: formfit"), words
        assert not modules & (HEAVY | {"numpy", "rich", "yaml"}), words
        if len(words) == 1:  # typer itself validates the arguments of commands with pydantic
            assert "pydantic" not in modules, words


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """A folder with a run that was not trained, and with configurations that have a mistake."""
    text = CONFIG.read_text().replace("spaces/", f"{ROOT}/configs/spaces/")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    (tmp_path / "typo.yaml").write_text(f"{text}\ntrian: {{}}\n")
    (tmp_path / "limit.yaml").write_text(text.replace("prefill@256<=60%", "decode<=2ms"))
    (tmp_path / "nothing.zip").write_text("")
    return tmp_path


SEARCH = ["search", "--run", "run", "--device", "here"]
PROFILE = ["profile", "--space", str(SPACE), "--device", "here"]
BAD = {
    "missing configuration": (["run", "none.yaml"], "none.yaml: not found"),
    "unknown key": (["run", "typo.yaml"], "trian: unknown key (did you mean train?)"),
    "malformed limit in a configuration": (["train", "limit.yaml", "--out", "x"], "limit 'decode<=2ms'"),
    "missing run": (["audit", "--run", "none"], "none: not a run's folder"),
    "report of a missing run": (["report", "none"], "none: not a run's folder"),
    "missing space": (["space", "none.yaml"], "none.yaml: not found"),
    "missing sub-model": (["export", "none", "--format", "onnx"], "none/architecture.json: not found"),
    "verify of a missing sub-model": (
        ["verify", "none", "--device", "here"],
        "none/architecture.json: not found",
    ),
    "generate from a missing sub-model": (
        ["generate", "none", "--prompt", "a"],
        "none/model.onnx: not found",
    ),
    "unknown format": (["export", "none", "--format", "pb"], "--format pb: not one of onnx, hf"),
    "malformed limit": ([*SEARCH, "--limit", "decode<=2ms"], "limit 'decode<=2ms'"),
    "limit given twice": ([*SEARCH, "--limit", "params<=1M", "--limit", "params<=2M"], "both limit params"),
    "unknown objective": ([*SEARCH, "--objective", "lossy"], "objective 'lossy': not one of"),
    "unknown strategy": ([*SEARCH, "--strategy", "annealing"], "strategy 'annealing': not one of"),
    "unknown baseline": ([*SEARCH, "--baseline", "best"], "--baseline"),
    "name that is no folder's": ([*SEARCH, "--name", "a/b"], "name 'a/b'"),
    "unknown device": (SEARCH, "device here: no card in devices"),
    "malformed pick": (
        ["extract", "--run", "run", "--out", "x", "--pick", "decode<=1ms"],
        "limit 'decode<=1ms'",
    ),
    "malformed workload": ([*PROFILE, "--workload", "decode"], "workload 'decode'"),
    "unknown runtime": ([*PROFILE, "--runtime", "tflite"], "tflite"),
    "malformed budget": ([*PROFILE, "--budget", "ten"], "budget 'ten'"),
    "missing kit result": ([*PROFILE, "--kit-result", "none.json"], "none.json: not found"),
    "unknown option": (["run", "--fast"], "No such option"),
}


def test_bad_input_is_refused_before_heavy_imports(answered: Path) -> None:
    answers = run(answered, [words for words, _ in BAD.values()])
    for (name, (_, expected)), (code, out, err, modules) in zip(BAD.items(), answers, strict=True):
        assert (code, out, err.count("\n")) == (2, "", 1), f"{name}: {err}"
        assert expected in err, f"{name}: {err}"
        assert not modules & HEAVY, f"{name}: {modules & HEAVY}"


def test_space_devices_and_dry_run_need_no_heavy_imports(answered: Path) -> None:
    card = Card(answered / "devices" / "laptop", Fingerprint.local("onnxruntime", "0.1"))
    card.save()
    accuracy = Accuracy(
        models=9,
        mape_percent=2.5,
        standard_error_percent=0.5,
        worst_percent=9.0,
        within_5_percent=0.9,
        within_10_percent=1.0,
        spearman=None,
        span=3.0,
    )
    test = HeldOutErrors(held_out=accuracy, flops_and_params=accuracy, repeatability_mape_percent=None)
    errors = PredictorErrors(leave_one_out_mape_percent=2.0, test=test)
    ops = {"ffn-w96-f128": 1e-5, "gated_deltanet-w192-h6-k3": 2.5e-5}
    model = {
        "errors": errors.to_json(),
        "op_seconds": ops,
        "op_relative_spreads": {"ffn-w96-f128": 0.0123},
        "run_seconds": 1e-6,
        "shared_seconds": {"full": 0.0, "linear": 0.0, "local": 0.0},
        "cache_seconds_per_mib": {},
        "spread": {"seconds": 0.0, "relative": 0.02},
        "run_relative_spread": 0.02,
    }
    path = card.predictor_path("small", "onnxruntime", 1, "fp32")
    body = {"workloads": {"decode@256": model}, "space": "small", "residuals": [0.1], "memory": {}}
    PREDICTOR.write(path, {}, {**body, "ops": {"models": {}, "kinds": {}, "source": None}})
    asked = [["devices"], ["devices", "laptop"], ["space", str(SPACE)], ["run", str(CONFIG), "--dry-run"]]
    for words, (code, out, err, modules) in zip(asked, run(answered, asked), strict=True):
        assert (code, "measured with onnxruntime 0.1" in err) == (0, words[0] == "devices"), words
        assert max(map(len, out.splitlines())) <= 80, words
        assert not modules & HEAVY, f"{words}: {modules & HEAVY}"
