"""Every command that a page shows exists and parses, and every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from search.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [part.strip() for line in lines for part in line.split("&&")]


SHOWN = [(page.name, command) for page in PAGES for command in commands(page)]


def test_the_readme_shows_commands() -> None:
    shown = [command for name, command in SHOWN if name == "README.md"]
    assert any("formfit run configs/quickstart.yaml" in command for command in shown)
    assert any("-m pytest" in command for command in shown)


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_commands_parse(page: str, command: str) -> None:
    words = shlex.split(command)
    name = Path(words[0]).name
    if name != "formfit":
        assert name in ("python3", "pip", "python", "pre-commit", "run"), command
        return
    group = typer.main.get_command(app)
    context = group.make_context("formfit", words[1:])
    subcommand = group.commands[context._protected_args[0]]  # type: ignore[attr-defined]
    parsed = subcommand.make_context(words[1], words[2:], parent=context)
    assert parsed.params


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
