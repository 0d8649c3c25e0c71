"""Settings of profiling, and the imports that they need."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from latency import ProfileConfig

HEAVY = ("numpy", "onnx", "onnxruntime", "torch", "pandas", "scipy", "sklearn")


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("ProfileConfig", ()), ("register_runtime", ()), ("load_card", ()), ("Runtime", ("numpy",))],
)
def test_public_name_loads_no_heavy_library(name: str, allowed: tuple[str, ...]) -> None:
    script = f"import sys\nfrom latency import {name}\nprint(*(m for m in {HEAVY} if m in sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= set(allowed)


def test_unknown_runtime_is_refused_with_the_registered_names() -> None:
    with pytest.raises(ValidationError, match="'tvm' is not one of onnxruntime, torch, torch-compiled"):
        ProfileConfig(runtime="tvm")
