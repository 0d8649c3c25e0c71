"""The Python API: docs/api.md and the README's example run, and every public name is documented."""

import ast
import enum
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest

import formfit

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api.md"
README = ROOT / "README.md"
ERRORS = {name for name in formfit.__all__ if name.endswith("Error")}


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, in a folder."""
    script = folder / "example.py"
    script.write_text(code)
    return subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, check=False)


def test_blocks_of_the_api_page_run_in_order(tmp_path: Path) -> None:
    done = run(tmp_path, "\n".join(blocks(API)))
    assert done.returncode == 0, done.stderr
    assert "ms for a token" in done.stdout


def test_readme_example_searches_in_ten_lines(tmp_path: Path) -> None:
    (code,) = blocks(README)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = run(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["best", "knee", "fastest"]


def signature(name: str) -> str:
    """A public name with its parameters; those with a default end in ``=``."""
    value = getattr(formfit, name)
    if name in ERRORS:
        return name
    if inspect.isclass(value) and issubclass(value, pydantic.BaseModel):
        return f"{name}(**settings)"
    words, starred = [], False
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        words.append(parameter.name + ("" if parameter.default is parameter.empty else "="))
    return f"{name}({', '.join(words)})"


@pytest.mark.parametrize("name", formfit.__all__)
def test_api_page_has_the_signature_of_every_name(name: str) -> None:
    assert f"\n- `{signature(name)}`" in API.read_text(), f"docs/api.md should list `{signature(name)}`"
    assert name in "".join(blocks(API)) or name in ERRORS | {"Metric", "Layer"}


def methods(value: type) -> list[tuple[str, Any]]:
    """The public methods that a class of ours defines itself."""
    found = []
    for name, member in vars(value).items():
        plain = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        if inspect.isfunction(plain) and not name.startswith("_"):
            found.append((name, plain))
    return found


def documented(value: Any, text: str | None) -> str:
    """Reason why a callable's docstring does not suffice; empty if it does."""
    if not text:
        return "no docstring"
    if inspect.isclass(value) and issubclass(value, Exception | enum.Enum):
        return ""
    names = [
        name for name in inspect.signature(value).parameters if name not in ("self", "cls", "args", "kwargs")
    ]
    if inspect.isclass(value) and issubclass(value, pydantic.BaseModel):
        names = list(value.model_fields)
    if not names:
        return ""
    if not re.search(r"^\s*(Args|Attributes):$", text, re.MULTILINE):
        return "no section Args or Attributes"
    missing = [name for name in names if not re.search(rf"^\s+\**{name}\b.*:", text, re.MULTILINE)]
    return f"no {', '.join(missing)}" if missing else ""


@pytest.mark.parametrize("name", formfit.__all__)
def test_public_names_are_documented(name: str) -> None:
    value = getattr(formfit, name)
    text = inspect.getdoc(value) or ""
    if inspect.isclass(value) and value.__init__ is not object.__init__:
        text += "\n" + (inspect.getdoc(value.__init__) or "")
    assert documented(value, text) == ""


@pytest.mark.parametrize("name", [n for n in formfit.__all__ if n not in ERRORS and n[0].isupper()])
def test_public_methods_have_docstrings(name: str) -> None:
    assert [method for method, plain in methods(getattr(formfit, name)) if not inspect.getdoc(plain)] == []


def test_import_of_formfit_loads_nothing() -> None:
    code = "import sys, formfit; print({m.partition('.')[0] for m in sys.modules} & set(formfit.PACKAGES))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_type_checkers_see_every_name() -> None:
    tree = ast.parse((ROOT / "formfit.py").read_text())
    (guarded,) = [
        node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: str(node.module) for node in imports for alias in node.names}
    assert homes == formfit._MODULE_OF
    assert sorted(homes) == formfit.__all__
    assert "main" not in formfit.__all__
    for name, module in homes.items():
        assert getattr(formfit, name) is getattr(importlib.import_module(module), name)
    assert set(formfit.__all__) <= set(dir(formfit))
    with pytest.raises(AttributeError, match="module 'formfit' has no attribute 'nothing'"):
        formfit.nothing  # noqa: B018
