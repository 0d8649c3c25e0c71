"""Claim: a kit in a bare Python environment gives the same device card as direct profiling, within noise.

Packs a kit for configs/spaces/quickstart.yaml, runs it in a new virtual environment that has only numpy and
onnxruntime, unpacks it, and profiles the same machine directly, twice. The cards' predictions for random
architectures are compared. The noise is the difference between the two direct profiles.
"""

import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import outcome

from latency import Predictor, ProfileConfig, load_card
from latency.kit.pack import pack
from latency.kit.unpack import unpack
from latency.profiling import profile
from space import Space, Workload, load_space, variation

SPACE = Path(__file__).parents[1] / "configs" / "spaces" / "quickstart.yaml"
QUICK = {
    "block_ms": 1.0, "min_rounds": 3, "max_rounds": 3, "held_out_models": 5,
    "repeated_models": 2, "error": 0.5, "max_noise": None,
}  # fmt: skip


FEWER = {"held_out_models": 12, "repeated_models": 4}  # every profile is measured three times


def bare(folder: Path) -> Path:
    """Create an environment with only numpy and onnxruntime; return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    wanted = [f"numpy=={np.__version__}", f"onnxruntime=={ort.__version__}"]
    subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True)
    names = {item["name"].lower() for item in json.loads(listed.stdout)}
    if names & {"torch", "formfit", "onnx", "scipy", "pandas"}:
        raise RuntimeError(f"not bare: {sorted(names)}")
    return python


def difference(one: Predictor, other: Predictor, genomes: Any, workload: Workload) -> dict[str, float]:
    """Return the median ratio of two predictors minus 1, and the mean deviation from 1, in percent."""
    ratio = one.predict(genomes, workload) / other.predict(genomes, workload)
    return {
        "scale_percent": 100 * float(np.median(ratio) - 1),
        "mean_percent": 100 * float(np.abs(ratio - 1).mean()),
    }


def direct(space: Space, folder: Path, name: str, config: ProfileConfig) -> tuple[Predictor, float]:
    began = time.monotonic()
    return profile(space, folder, name, config), (time.monotonic() - began) / 60


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    space = load_space(SPACE)
    config = ProfileConfig(**(QUICK if arguments.quick else {**FEWER, "max_noise": 0.1}))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        packed = pack(space, folder / "kit", config, folder / "kit.zip")
        python = bare(folder / "environment")
        here, minutes = direct(space, folder, "here", config)
        began = time.monotonic()
        command = [python, "-I", folder / "kit.zip", "--out", folder / "result.json"]
        subprocess.run(command, check=True, cwd=folder)
        kit_minutes = (time.monotonic() - began) / 60
        far = unpack(space, folder / "kit", folder / "result.json")
        again, _ = direct(space, folder, "again", config)
        problems = {name: load_card(folder, name).problems for name in ("here", "kit", "again")}
    genomes = variation.sample(space, np.random.default_rng(1), 1000)
    table, checks = {}, {f"kit of {packed.bytes / 2**20:.1f} MiB < 20": packed.bytes < 20 * 2**20}
    for w in here.models:
        of_kit, of_noise = (difference(p, here, genomes, w) for p in (far, again))
        table[str(w)] = {
            "kit_against_direct": of_kit,
            "direct_against_direct": of_noise,
            "held_out_mape_percent": {
                name: p.models[w].errors.test.held_out.mape_percent
                for name, p in (("direct", here), ("kit", far), ("direct again", again))
            },
            "repeatability_mape_percent": here.models[w].errors.test.repeatability_mape_percent,
        }
        bound = max(2 * of_noise["mean_percent"], 3.0)
        text = f"{w}: kit and direct profile differ by {of_kit['mean_percent']:.1f}%, two direct ones by "
        text += f"{of_noise['mean_percent']:.1f}%; at most twice that, or 3%"
        checks[text] = of_kit["mean_percent"] <= bound
    body = {
        "kit": vars(packed),
        "kit_minutes": round(kit_minutes, 1),
        "direct_minutes": round(minutes, 1),
        "workloads": table,
        "problems": problems,
    }
    return outcome.write("kit", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
