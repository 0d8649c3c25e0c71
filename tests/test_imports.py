"""Four packages and their sub-packages: which imports which, what they export, what needs no torch."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "space": {"space"},
    "supernet": {"space", "supernet"},
    "latency": {"space", "latency"},
    "search": {"space", "supernet", "latency", "search"},
}
# Modules that count as nodes of their own: mixers write graphs, and the graph of a model is made of mixers.
OWN_NODES = {"space/onnx/block.py": "onnx.block", "space/onnx/graph.py": "onnx.graph"}
# By package and node (a sub-package, or a module beside them), the nodes that its files import anywhere, for
# type checkers too. The public names of a package's own __init__ are left out.
EDGES: dict[str, dict[str, str]] = {
    "space": {
        "io": "",
        "layer": "io",
        "precision": "",
        "attention": "layer",
        "onnx.graph": "layer",
        "registry": "io",
        "workload": "io precision",
        "onnx.block": "layer onnx.graph",
        "mixers": "attention io layer onnx.block onnx.graph registry workload",
        "architecture": "io layer mixers",
        "shapes": "architecture mixers",
        "space": "architecture io layer mixers",
        "blocks": "architecture attention mixers shapes",
        "genome": "architecture io space",
        "onnx": "architecture io mixers onnx.block onnx.graph precision shapes",
        "ops": "architecture genome space",
        "variation": "genome space",
        "cost": "architecture mixers ops precision shapes space workload",
        "testing": "architecture blocks cost layer mixers onnx ops shapes workload",
    },
    "supernet": {
        "data": "",
        "supernet": "",
        "evaluate": "data",
        "extract": "data supernet",
        "hf": "data parent supernet",
        "parent": "",
        "training": "data extract hf parent supernet",
        "blockwise": "data evaluate extract parent supernet training",
    },
    "latency": {
        "device_runner": "",
        "card": "device_runner",
        "predictor": "card device_runner",
        "runtimes": "card device_runner",
        "config": "device_runner predictor runtimes",
        "records": "card device_runner predictor runtimes",
        "testing": "device_runner runtimes",
        "profiling": "card config device_runner predictor records runtimes",
        "kit": "card config device_runner predictor profiling records runtimes",
    },
    "search": {
        "problem": "",
        "strategies": "",
        "engine": "problem strategies",
        "testing": "problem strategies",
        "config": "engine",
        "report": "engine problem strategies",
        "submodel": "engine",
        "audit": "config engine report",
        "select": "config engine problem submodel",
        "pipeline": "audit config report select",
        "cli": "config engine pipeline select submodel",
    },
}
MAX_SEARCH_EDGES, MAX_SEARCH_LEVELS = 25, 6
NO_TORCH = [
    "formfit",
    "latency",
    "search",
    "search.cli",
    "search.config",
    "search.problem.problem",
    "search.strategies.registry",
    "search.submodel.loading",
    "space",
    "space.cost",
    "space.genome",
    "space.onnx.model",
    "space.ops",
    "space.shapes",
    "supernet",
    "supernet.training.recipe",
]
PUBLIC = {
    "space": [
        "Architecture",
        "FormfitError",
        "InfeasibleError",
        "InputError",
        "Layer",
        "LimitMissedError",
        "ModelConfig",
        "Space",
        "Workload",
        "load_space",
    ],
    "supernet": [
        "Quality",
        "SubModel",
        "Supernet",
        "TrainConfig",
        "load_supernet",
        "read_submodel",
        "train",
        "write_submodel",
    ],
    "latency": [
        "Card",
        "OnnxRuntime",
        "Predictor",
        "ProfileConfig",
        "Runtime",
        "load_card",
        "load_predictor",
        "profile",
        "register_runtime",
    ],
    "search": [
        "Front",
        "Limit",
        "Member",
        "Metric",
        "Objective",
        "Problem",
        "SearchConfig",
        "run_search",
    ],
}
MODULES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


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
    assert {path.parts[0] for path in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_packages_import_one_way(path: Path) -> None:
    package = path.parts[0]
    ours = imported((ROOT / path).read_text(encoding="utf-8"), package)
    assert ours & {*PACKAGES, "formfit", "tests", "benchmarks"} <= PACKAGES[package]


@cache
def structure() -> ModuleType:
    """The script that counts dependencies, benchmarks/structure.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("structure")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def parsed(package: str) -> dict[str, ast.Module]:
    """The files of a package."""
    files = (ROOT / path for path in MODULES if path.parts[0] == package)
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def node_of(path: str) -> str:
    """The node of a file: its sub-package, or the module in the package's own folder."""
    return OWN_NODES.get(path) or path.split("/")[1].removesuffix(".py")


def node_edges(package: str) -> dict[str, set[str]]:
    """The nodes that each node of a package imports."""
    trees = parsed(package)
    paths = {structure().module_name(path): path for path in trees}
    edges: dict[str, set[str]] = {node_of(path): set() for path in trees}
    for path, tree in trees.items():
        module = structure().module_name(path)
        for source, name, _ in structure().imported(module, path.endswith("__init__.py"), tree):
            target = paths.get(f"{source}.{name}") or paths.get(source)
            if target and node_of(target) != "__init__":
                edges[node_of(path)] |= {node_of(target)} - {node_of(path)}
    del edges["__init__"]
    return edges


@pytest.mark.parametrize("package", PACKAGES)
def test_sub_packages_import_as_the_table_says(package: str) -> None:
    found = {node: " ".join(sorted(targets)) for node, targets in node_edges(package).items()}
    assert found == EDGES[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_cycles(package: str) -> None:
    assert structure().dependencies(parsed(package))["cycles"]["files"] == []
    edges = {(node, target) for node, targets in node_edges(package).items() for target in targets}
    assert structure().depth(edges)[1] == []


def test_search_has_few_dependencies() -> None:
    found = structure().dependencies(parsed("search"))
    assert found["package_edges"] <= MAX_SEARCH_EDGES
    assert found["package_levels"] <= MAX_SEARCH_LEVELS


@pytest.mark.parametrize("module", NO_TORCH)
def test_modules_are_imported_without_torch(module: str) -> None:
    script = f"import sys, {module}\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_pinned(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == PUBLIC[package]
    assert len(module.__all__) == len(set(module.__all__)) <= 10
    for name in module.__all__:
        assert hasattr(module, name), f"{package}.{name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_benchmarks_import_what_exists() -> None:
    missing = []
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                not isinstance(node, ast.ImportFrom)
                or not node.module
                or node.module.split(".")[0] not in PACKAGES
            ):
                continue
            try:
                module = importlib.import_module(node.module)
            except ModuleNotFoundError:
                missing.append(f"{path.name}: {node.module}")
                continue
            for item in node.names:
                if not hasattr(module, item.name):
                    try:
                        importlib.import_module(f"{node.module}.{item.name}")
                    except ModuleNotFoundError:
                        missing.append(f"{path.name}: {node.module}.{item.name}")
    assert not missing
