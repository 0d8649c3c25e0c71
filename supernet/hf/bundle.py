"""One Python file from several modules: some definitions, and every one of ours that they reach.

What a Hugging Face folder ships has to run where formfit is not installed, and to be the very code that
everything here was checked with. So it is copied definition by definition, never written a second time.
"""

import ast
import builtins
import re
import symtable
from collections.abc import Iterable
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path

HOUSE = Path(__file__).parents[2]
OURS = ("space", "supernet")  # the packages whose definitions are copied, not imported
HEADER = '''"""A language model that formfit found, as transformers runs it: all of its code in one file.

formfit generated this from its sources, each definition as it stands there. It needs torch and
transformers; on a GPU, half precision uses flash-linear-attention where that is installed.

SPDX-License-Identifier: Apache-2.0
"""
'''


@dataclass
class Module:
    """A module of ours: its text, and what the names at its top stand for."""

    lines: list[str]
    about: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    ours: dict[str, tuple[str, str]] = field(default_factory=dict)  # imported: a module and a name in it
    whole: dict[str, str] = field(default_factory=dict)  # modules imported as such
    others: dict[str, set[str]] = field(default_factory=dict)  # the imports that bind a name

    def text(self, name: str) -> str:
        """A definition as it stands, with the comment above it."""
        node = self.definitions[name]
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", ())]) - 1
        while first and self.lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first : node.end_lineno])


def one_file(root: str, names: Iterable[str], folder: Path = HOUSE) -> str:
    """The text of a module that holds definitions of another, and every one of ours that they reach.

    ``cuda.takes``, of a module imported as such, becomes ``cuda_takes``; nothing else is changed. Modules
    come after those that they import, definitions in the order of their module.

    Args:
        root: the module that defines the names.
        names: what the file is for.
        folder: where our packages stand.

    Raises:
        ValueError: two things have one name, one thing has two, or a name cannot be found.
    """
    modules: dict[str, Module] = {}
    meant: dict[str, str] = {}  # by each name of the file
    shown: dict[tuple[str, str], str] = {}  # each definition's name in the file
    imports: set[str] = set()

    def claim(name: str, meaning: str) -> None:
        if meant.setdefault(name, meaning) != meaning:
            raise ValueError(f"{name} is {meant[name]} and {meaning}: one file cannot hold both")

    todo = [(root, name, name) for name in names]
    while todo:
        place, name, alias = todo.pop()
        claim(alias, f"{place}.{name}")
        if shown.setdefault((place, name), alias) != alias:
            raise ValueError(f"{place}.{name} is used as {shown[place, name]} and as {alias}")
        module = modules.get(place) or modules.setdefault(place, _read(folder, place))
        if name not in module.definitions:
            raise ValueError(f"{place} does not define {name}")
        text = module.text(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                raise ValueError(f"{place}.{name}: {ast.unparse(node)}: only the top of a module may import")
        wanted = [(module.whole[of], what, f"{of}_{what}") for of, what, *_ in _members(text, module)]
        for used in sorted(_free_names(symtable.symtable(text, place, "exec"))):
            if used in module.definitions:
                wanted.append((place, used, used))
            elif used in module.ours:
                wanted.append((*module.ours[used], used))
            elif used in module.others:
                claim(used, " and ".join(sorted(module.others[used])))
                imports |= module.others[used]
            elif hasattr(builtins, used):
                claim(used, f"builtins.{used}")
            elif used not in module.whole:
                raise ValueError(f"{place}.{name} uses {used}, which its module neither defines nor imports")
        todo += [item for item in wanted if shown.get(item[:2]) != item[2]]

    lines = sorted(line for line in imports if line.startswith("import "))
    sources = sorted({line.split(" import ")[0] for line in imports.difference(lines)})
    for source in sources:
        items = sorted(line.split(" import ")[1] for line in imports if line.startswith(f"{source} import "))
        lines.append(f"{source} import {', '.join(items)}")
    parts = [HEADER, *lines]
    needs = {
        place: [*(p for p, _ in module.ours.values() if p in modules),
                *(p for p in module.whole.values() if p in modules)]
        for place, module in modules.items()
    }  # fmt: skip
    for place in TopologicalSorter(needs).static_order():
        parts.append(f"\n\n# {place.replace('.', '/')}.py: {modules[place].about}")
        above = False
        for name, node in modules[place].definitions.items():
            if (place, name) in shown:
                constant = isinstance(node, ast.Assign | ast.AnnAssign)
                text = _renamed(modules[place], name, shown[place, name])
                parts.append(text if above and constant else f"\n\n{text}")
                above = constant
    return "\n".join(parts) + "\n"


def _read(folder: Path, name: str) -> Module:
    """A module's top level; what else than these statements defines cannot be reached."""
    text = (folder / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    module = Module(text.split("\n"), (ast.get_docstring(tree) or "").split("\n")[0])
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            module.definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                module.definitions[target.id] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for item in node.names:
                bound = item.asname or item.name
                if (source or item.name).split(".")[0] not in OURS:
                    line = ast.unparse(ast.Import([item]))
                    line = f"from {source} {line}" if source else line
                    module.others.setdefault(item.asname or item.name.split(".")[0], set()).add(line)
                elif source and (folder / source.replace(".", "/")).is_dir():
                    module.whole[bound] = f"{source}.{item.name}"
                elif source:
                    module.ours[bound] = (source, item.name)
    return module


def _free_names(table: symtable.SymbolTable) -> set[str]:
    """The names that a text uses and does not itself bind where it uses them."""
    top = table.get_type() == "module"
    found = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return found.union(*(_free_names(child) for child in table.get_children()))


def _members(text: str, module: Module) -> list[tuple[str, str, int, int]]:
    """Where a text takes what from a module of ours imported as such: (module, name, line, column)."""
    return [
        (node.value.id, node.attr, node.lineno, node.col_offset)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in module.whole
    ]


def _renamed(module: Module, name: str, alias: str) -> str:
    """A definition under its name in the file, with the names there of what it takes from modules."""
    lines = module.text(name).split("\n")
    for of, what, line, column in _members("\n".join(lines), module):
        row = lines[line - 1].encode()  # columns count bytes; one character for another moves none
        there = row[column:].decode().replace(f"{of}.{what}", f"{of}_{what}", 1)
        lines[line - 1] = row[:column].decode() + there
    return re.sub(rf"(?m)^(def |class |){name}\b", rf"\g<1>{alias}", "\n".join(lines), count=1)
