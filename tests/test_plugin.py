"""Plug-ins: an installed package adds a mixer, a metric, an objective, a strategy and a runtime."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from tests.contracts import tiny_value

ROOT = Path(__file__).parents[1]
SOURCES = Path(__file__).parent / "plugin"
BUILTIN_SPACE = ROOT / "configs" / "spaces" / "quickstart.yaml"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the plug-in of ``tests/plugin`` is installed in by pip."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(SOURCES, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site"]
    done = subprocess.run(
        [*map(str, command), str(folder / "source")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


def install_module(site: Path, name: str, source: str) -> None:
    """Install a plug-in of one module as pip would leave it.

    Args:
        site: the folder that packages are installed in.
        name: of the module; its entry point is called the same.
        source: of the module.
    """
    site.mkdir(exist_ok=True)
    (site / f"{name}.py").write_text(dedent(source))
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[formfit.plugins]\n{name} = {name}\n")


def formfit(site: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a new process that finds what is installed in ``site``."""
    return subprocess.run(
        [sys.executable, "-m", "formfit", *map(str, words)],
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A run's configuration that names everything the plug-in registers."""
    folder = tmp_path_factory.mktemp("config")
    space = tiny_value(
        name="shifted",
        vocab_size=256,
        width=[16, 32],
        depth=[1, 2, 3],
        mixer=["attention", "token_shift", "linear"],
        heads=[1],
        ffn=[0, 32],
        ratios=["full", 1, "linear"],
    )
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    value = {
        "space": "space.yaml",
        "device": "desk",
        "train": {
            "steps": 4, "batch": 2, "checkpoint_every": 4, "threads": 1,
            "data": {"path": str(text_folder), "held_out": 0.2},
        },
        "profile": {
            "runtime": "eager", "block_ms": 0.5, "min_rounds": 2, "max_rounds": 2,
            "error": 1.0, "optimal_models": 5, "random_models": 3, "held_out_models": 4,
            "repeated_models": 1, "rss": False, "max_noise": None, "max_error": None,
        },
        "search": {
            "strategy": "hill-climbing", "limits": ["energy@64<=95%", "params<=95%"],
            "objectives": ["worst_loss", "energy@64"], "windows": 4, "front_windows": 6, "workers": 1,
        },
        "verify": {
            "tokens": 20, "copies": 1, "rounds": 4, "block_ms": 1.0, "max_noise": None, "searches": 1
        },
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


@pytest.fixture(scope="module")
def finished(site: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run``, from training to the report, and ``devices``."""
    folder = tmp_path_factory.mktemp("finished")
    done = formfit(site, folder, "run", config, "--out", "run", "--json")
    assert done.returncode in (0, 3), done.stderr  # measured hardly at all, a limit may be missed
    assert "Traceback" not in done.stderr
    return folder


def test_space_with_a_mixer_of_a_plugin(site: Path, config: Path) -> None:
    done = formfit(site, config.parent, "space", "space.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert "token_shift" in json.loads(done.stdout)["mixers"]
    assert done.stderr == ""


def test_run_uses_everything_that_a_plugin_registers(finished: Path) -> None:
    run = finished / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["device"]["runtime"] == "eager"
    (front_file,) = (run / "searches").glob("*/front.json")
    front = json.loads(front_file.read_text())
    assert front["objectives"] == ["worst_loss", "energy@64"]
    assert front["strategy"] == "hill-climbing"
    bound = next(item["bound"] for item in front["limits"] if item["limit"] == "energy@64<=95%")
    assert front["members"]
    for member in front["members"]:
        assert member["worst_loss"] > member["loss_nats"] > 0
        assert 0 < member["predicted"]["costs"]["energy@64"] <= bound
    verified = list(summary["verified"].values())
    assert verified
    for member in verified:
        assert member["parity"]["kept"]
        statuses = {item["limit"]: item["status"] for item in member["limits"]}
        assert statuses["energy@64<=95%"] == "kept"
    page = (front_file.parent / "report.html").read_text()
    for word in ("worst loss", "energy@64", "hill-climbing", "token_shift"):
        assert word in page, word


def test_submodel_with_a_mixer_of_a_plugin_is_exported_and_verified(site: Path, finished: Path) -> None:
    architecture = {
        "width": 32,
        "layers": [
            {"mixer": "token_shift", "heads": 0, "kv_heads": 0, "window": 0, "ffn": 32},
            {"mixer": "linear", "heads": 1, "kv_heads": 1, "window": 0, "ffn": 32},
            {"mixer": "token_shift", "heads": 0, "kv_heads": 0, "window": 0, "ffn": 0},
        ],
    }
    (finished / "architecture.json").write_text(json.dumps(architecture))
    words = ("extract", "--run", "run", "--architecture", "architecture.json", "--out", "model")
    done = formfit(site, finished, *words, "--format", "onnx", "--format", "hf")
    assert done.returncode == 0, done.stderr
    assert (finished / "model" / "model.onnx").exists()
    done = formfit(site, finished, "verify", "model", "--device", "desk", "--max-noise", 900, "--json")
    assert done.returncode == 0, done.stderr
    verification = json.loads(done.stdout)
    assert verification["parity"]["kept"]
    assert verification["runtime"].startswith("eager")
    # transformers alone, without the plug-in on its path, gives the same text.
    generated = formfit(
        site, finished, "generate", "model", "--prompt", "alpha", "--tokens", 8, "--ignore-eos", "--json"
    )
    assert generated.returncode == 0, generated.stderr
    program = dedent(
        """
        import json, sys, torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("model/hf", trust_remote_code=True)
        tokens = torch.tensor([[0, *b"alpha"]])
        out = model.generate(tokens, max_new_tokens=8, do_sample=False)
        assert "formfit_example" not in sys.modules
        print(json.dumps(out[0, 6:].tolist()))
        """
    )
    environment = {**os.environ, "HF_HOME": str(finished / "hf_home")}
    alone = subprocess.run(
        [sys.executable, "-c", program], cwd=finished, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert bytes(json.loads(alone.stdout)).decode(errors="replace") == json.loads(generated.stdout)["text"]


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("search", {"strategy": "hill-climbing"}, "strategy 'hill-climbing'"),
        ("search", {"objectives": ["worst_loss", "params"]}, "objective 'worst_loss'"),
        ("search", {"limits": ["energy@64<=95%"]}, "energy@64"),
        ("profile", {"runtime": "eager"}, "profile.runtime: 'eager'"),
        ("space", {}, "'token_shift'"),
    ],
)
def test_without_the_plugin_the_missing_name_is_said_in_one_line(
    section: str, change: dict[str, object], named: str, config: Path, tmp_path: Path
) -> None:
    value = {"space": str(BUILTIN_SPACE), "train": yaml.safe_load(config.read_text())["train"]}
    if section == "space":
        value["space"] = str(config.parent / "space.yaml")
    else:
        value[section] = change
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(value))
    done = formfit(tmp_path, tmp_path, "run", "run.yaml", "--dry-run")
    assert done.returncode == 2, done.stdout
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_plugin_that_cannot_be_imported_gives_one_line(site: Path, config: Path, tmp_path: Path) -> None:
    both = tmp_path / "site"
    shutil.copytree(site, both)
    install_module(both, "another_broken_one", "import no_such_module\n")
    done = formfit(both, config.parent, "space", "space.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert "token_shift" in json.loads(done.stdout)["mixers"]
    (line,) = done.stderr.splitlines()
    assert "plug-in another_broken_one" in line
    assert "no_such_module" in line


TAKEN = {
    "mixer": (
        """
        from dataclasses import replace
        from space.mixers import MIXERS, register_mixer
        register_mixer(replace(MIXERS.get("linear"), name="retnet"))
        """,
        "mixer 'retnet' is registered already",
    ),
    "metric": (
        """
        from dataclasses import replace
        from search.problem.metric import METRICS, register_metric
        register_metric(replace(METRICS.get("params"), unit=METRICS.get("rss").unit))
        """,
        "metric 'params' is registered already",
    ),
    "objective": (
        """
        from search.problem.objective import register_objective
        register_objective("loss", lambda model, data: 0.0)
        """,
        "objective 'loss' is registered already",
    ),
    "strategy": (
        """
        from search.strategies.registry import register_strategy
        register_strategy("nsga2", lambda task: None)
        """,
        "strategy 'nsga2' is registered already",
    ),
    "runtime": (
        """
        from latency import register_runtime
        register_runtime("torch", lambda threads, precision: None)
        """,
        "runtime 'torch' is registered already",
    ),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_plugin_that_takes_a_registered_name_gives_one_line(
    kind: str, site: Path, config: Path, tmp_path: Path
) -> None:
    source, expected = TAKEN[kind]
    both = tmp_path / "site"
    shutil.copytree(site, both)
    install_module(
        both, "a_thief", source
    )  # before formfit_example in the order of the entry points, or after it
    done = formfit(both, config.parent, "space", "space.yaml", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "plug-in a_thief" in line
    assert expected in line


def test_no_plugin_is_imported_if_no_name_needs_it(config: Path, tmp_path: Path) -> None:
    """Commands on built-in names: the space, a dry run, and a problem with limits and objectives."""
    site, mark = tmp_path / "site", tmp_path / "imported"
    install_module(site, "marked", f"open({str(mark)!r}, 'w').close()\n")
    value = yaml.safe_load(config.read_text())
    value["space"] = str(BUILTIN_SPACE)
    value["profile"].pop("runtime")
    value["search"] = {
        "limits": ["prefill@256<=60%", "params<=2M"], "objectives": ["loss", "latency:prefill@256"],
        "strategy": "nsga2",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(value))
    for words in (("--help",), ("space", BUILTIN_SPACE, "--json"), ("run", "run.yaml", "--dry-run")):
        done = formfit(site, tmp_path, *words)
        assert done.returncode == 0, done.stderr
        assert not mark.exists(), words
    value["search"]["objectives"] = ["loss", "joy"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(value))
    done = formfit(site, tmp_path, "run", "run.yaml", "--dry-run")
    assert done.returncode == 2
    assert "joy" in done.stderr
    assert mark.exists()
