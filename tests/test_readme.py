"""The documentation: commands parse, links resolve, tables and figures match benchmarks/results."""

import importlib
import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

from search.cli.app import app
from space.io.artefact import digest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    """Commands in the shell blocks of a page."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [part.strip() for line in lines for part in line.split("&&")]


SHOWN = [(page.name, command) for page in PAGES for command in commands(page)]


def test_readme_has_run_and_test_commands() -> None:
    shown = [command for name, command in SHOWN if name == "README.md"]
    assert any("formfit run configs/quickstart.yaml" in command for command in shown)
    assert any("-m pytest" in command for command in shown)


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_command_parses(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    name = Path(words[0]).name
    if name != "formfit":
        assert name in ("python3", "pip", "python", "pre-commit", "run", "unzip"), command
        return
    group = typer.main.get_command(app)
    context = group.make_context("formfit", words[1:])
    subcommand = group.commands[context._protected_args[0]]  # type: ignore[attr-defined]
    parsed = subcommand.make_context(words[1], words[2:], parent=context)
    assert parsed.params


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("readme")


def outcome(name: str) -> dict[str, object]:
    """A result file of a benchmark."""
    return dict(json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()))


def test_tables_equal_results(tables: ModuleType) -> None:
    for page in tables.PAGES:
        text = page.read_text()
        assert "<!-- from results" in text
        assert tables.written(text, outcome) == text, f"{page.name}: run python benchmarks/readme.py"


def test_tables_mark_missed_goals(tables: ModuleType) -> None:
    def missed(name: str) -> dict[str, object]:
        found = outcome(name)
        goals = found["goals"]
        assert isinstance(goals, dict)
        return {**found, "goals": dict.fromkeys(goals, False)}

    page = tables.PAGES[0].read_text()
    rows = [line for line in tables.written(page, missed).splitlines() if "`python benchmarks/" in line]
    assert sum("**missed:**" in row for row in rows) == len(tables.CLAIMS)


def test_extensions_of_contributing_can_be_registered() -> None:
    blocks = re.findall(
        r"^ *```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 5  # mixer, runtime, strategy, metric, objective
    program = (
        "\n".join(textwrap.dedent(block) for block in blocks)
        + """
from formfit import Limit, Objective
from latency.runtimes.registry import open_runtime
from search.strategies.registry import STRATEGIES
from space.mixers import MIXERS
assert MIXERS.get("shift").mixer_class == "local"
assert open_runtime("my-runtime", 1, "int8").fingerprint().runtime == "my-runtime"
assert STRATEGIES.get("hill-climbing").max_objectives == 1
assert Limit.parse("flops@64<=5M").bound == 5e6
assert Objective.parse("worst_loss").is_quality
"""
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SCRIPTS = [
    (page.name, command)
    for page in PAGES
    for command in re.findall(r"python benchmarks/[a-z_]+\.py[^`\n]*", page.read_text())
]


@pytest.mark.parametrize(("page", "command"), sorted(set(SCRIPTS)))
def test_benchmark_command_has_its_options(page: str, command: str) -> None:
    words = shlex.split(command)
    source = (ROOT / words[1]).read_text() + (ROOT / "benchmarks" / "outcome.py").read_text()
    for word in words[2:]:
        if word.startswith("--"):
            assert f'"{word}"' in source, f"{page}: {command}"


DRAWINGS = ("flow", "supernet")  # without data


@pytest.mark.parametrize("figure", sorted((ROOT / "docs" / "figures").glob("*.svg")), ids=lambda p: p.stem)
def test_figure_is_drawn_from_current_results(figure: Path) -> None:
    drawn = re.search(r"<dc:description>([a-z_]+)\.json ([0-9a-f]+)</dc:description>", figure.read_text())
    if figure.stem not in DRAWINGS:
        assert drawn, f"{figure.name}: does not name its result file"
        text = (ROOT / "benchmarks" / "results" / f"{drawn[1]}.json").read_text()
        assert digest(text) == drawn[2], f"{figure.name}: run python benchmarks/figures.py"
