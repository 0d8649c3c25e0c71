"""Four packages, arrows one way only, small doors."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "space": {"space"},
    "supernet": {"space", "supernet"},
    "latency": {"space", "latency"},
    "search": {"space", "supernet", "latency", "search"},
}
MODULES = sorted(path.relative_to(ROOT) for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported(source: str, package: str) -> set[str]:
    """The top-level names that a module of a package imports, wherever in it and in whatever form."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else str(node.module).split(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names.add(str(node.args[0].value).split(".")[0])
    return names


def test_imports_are_found_in_every_form() -> None:
    source = """
import a.b as c, d
from e.f import g
from . import h
def inside():
    if TYPE_CHECKING:
        from i import j
    importlib.import_module("k.l")
    return __import__("m"), open("n")
"""
    assert imported(source, "space") == {"a", "d", "e", "space", "i", "k", "m"}


def test_every_package_has_modules() -> None:
    assert {path.parts[0] for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    package = path.parts[0]
    ours = imported((ROOT / path).read_text(encoding="utf-8"), package) & {*MAY_IMPORT, "tests", "benchmarks"}
    assert ours <= MAY_IMPORT[package]


@pytest.mark.parametrize(
    "module", ["space", "space.genome", "space.ops", "space.cost", "space.shapes", "space.onnx.model"]
)
def test_space_is_described_without_torch(module: str) -> None:
    script = f"import sys, {module}\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_the_door_of_space() -> None:
    assert importlib.import_module("space").__all__ == [
        "Architecture",
        "ModelConfig",
        "FormfitError",
        "InfeasibleError",
        "InputError",
        "Layer",
        "LimitMissedError",
        "Space",
        "Workload",
        "load_space",
    ]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_doors_are_small_and_open(package: str) -> None:
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names)) <= 8
    for name in names:
        assert hasattr(module, name), f"{package}.{name}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
