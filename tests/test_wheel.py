"""The wheel holds all packages, and works outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("space", "latency", "supernet", "search")
FILES = ("pyproject.toml", "README.md", "LICENSE", "formfit.py")

# Imports every module named on stdin, none of them through an editable install.
IMPORT_ALL = """
import importlib, sys

sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
for name in sys.stdin.read().split():
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.argv[1]), (name, module.__file__)
print("imported")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    (path,) = (folder / "dist").glob("formfit-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed in, beside nothing else."""
    target = tmp_path_factory.mktemp("installed") / "site"
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return target


def run(installed: Path, *command: object, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command outside the checkout, the installed wheel first on the path."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        list(map(str, command)), cwd=installed.parent, env=environment, input=text,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for pattern in ("*.py", "py.typed")
        for path in (ROOT / package).rglob(pattern)
    }
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted([*sources, "formfit.py"])
    assert {f"{package}/py.typed" for package in PACKAGES} <= sources


def test_every_module_of_the_wheel_is_imported_outside_the_checkout(wheel: Path, installed: Path) -> None:
    paths = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    modules = [path.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in paths]
    done = run(installed, sys.executable, "-P", "-c", IMPORT_ALL, installed, text="\n".join(modules))
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.parametrize(
    "program", [(sys.executable, "-m", "formfit"), ("bin/formfit",)], ids=["module", "script"]
)
def test_command_line_works_outside_the_checkout(installed: Path, program: tuple[str, ...]) -> None:
    command = [installed / word if word.startswith("bin/") else word for word in program]
    config = ROOT / "configs" / "spaces" / "quickstart.yaml"
    assert run(installed, *command, "--version").stdout.startswith("formfit ")
    done = run(installed, *command, "space", config, "--json")
    assert '"architectures"' in done.stdout, done.stderr
