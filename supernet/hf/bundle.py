"""One Python file from several modules: some definitions, and every one of ours that they reach.

A Hugging Face folder has to run where formfit is not installed, with the very code that everything here was
checked with. So the code is copied definition by definition, never written a second time.

A function may import inside itself, which keeps torch out of modules that only describe mixers: an import of
ours is resolved and removed, another one moves to the top of the file.
"""

import ast
import builtins
import re
import symtable
import sys
from collections.abc import Collection, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from supernet.hf.sources import ROOT, Definition, Module, Sources

ALLOWED = {*sys.stdlib_module_names, "torch", "transformers"}  # what the file may import
HEADER = '''"""A language model that formfit found, as transformers runs it: all of its code in one file.

formfit generated this from its sources, each definition as it stands there. It needs torch and
transformers; on a GPU, half precision uses flash-linear-attention where that is installed.

SPDX-License-Identifier: Apache-2.0
"""
'''


class Bundle:
    """The definitions that are reached from some, with their names in the file.

    Args:
        sources: the modules.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.modules: dict[str, Module] = {}
        self.definitions: dict[tuple[str, str], Definition] = {}
        self.shown: dict[tuple[str, str], str] = {}  # each definition's name in the file
        self.meanings: dict[str, str] = {}  # by each name of the file
        self.imports: set[str] = set()
        self.needs: dict[str, set[str]] = {}  # by module, those whose definitions it uses

    def module(self, name: str) -> Module:
        """A module by its name."""
        if name not in self.modules:
            self.modules[name] = Module(name, self.sources)
        return self.modules[name]

    def reach(self, root: str, names: Iterable[str]) -> None:
        """Collect definitions and everything of ours that they use.

        Args:
            root: their module.
            names: their names.
        """
        todo = [(root, name, name) for name in names]
        while todo:
            place, name, alias = todo.pop()
            place, name = self._home(place, name)
            self._claim(alias, f"{place}.{name}")
            if self.shown.setdefault((place, name), alias) != alias:
                raise ValueError(f"{place}.{name} is used as {self.shown[place, name]} and as {alias}")
            if (place, name) not in self.definitions:
                self.definitions[place, name] = self.module(place).definition(name)
                todo += self._used(place, name)

    def _home(self, place: str, name: str) -> tuple[str, str]:
        """The module that defines a name, where another one only imports it."""
        while name not in self.module(place).nodes and name in self.module(place).names.ours:
            place, name = self.module(place).names.ours[name]
        return place, name

    def _claim(self, name: str, meaning: str) -> None:
        if self.meanings.setdefault(name, meaning) != meaning:
            raise ValueError(f"{name} is {self.meanings[name]} and {meaning}: one file cannot hold both")

    def _used(self, place: str, name: str) -> list[tuple[str, str, str]]:
        """What a definition uses of ours: module, name there, name in the file."""
        module, definition = self.module(place), self.definitions[place, name]
        whole = module.names.whole | definition.names.whole
        found = [(whole[of], what, f"{of}_{what}") for of, what, *_ in definition.members(whole)]
        for used in sorted(_free_names(symtable.symtable(definition.text, place, "exec"))):
            for names in (definition.names, module.names):
                if used in names.ours:
                    found.append((*names.ours[used], used))
                    break
                if used in names.others:
                    self._import(f"{place}.{name}", used, names.others[used])
                    break
            else:
                if used in module.nodes:
                    found.append((place, used, used))
                elif hasattr(builtins, used):
                    self._claim(used, f"builtins.{used}")
                elif used not in whole:
                    raise ValueError(
                        f"{place}.{name} uses {used}, which its module neither defines nor imports"
                    )
        homes = {self._home(other, what)[0] for other, what, _ in found}
        self.needs.setdefault(place, set()).update(homes - {place})
        return found

    def _import(self, user: str, name: str, lines: set[str]) -> None:
        for line in lines:
            package = line.split()[1].split(".")[0]
            if package not in ALLOWED:
                raise ValueError(
                    f"{user} needs {package}: the file has only torch and transformers"
                )
        self._claim(name, " and ".join(sorted(lines)))
        self.imports |= lines

    def text(self) -> str:
        """The file: modules after those that they use, definitions in the order of their module."""
        parts = [HEADER, *_import_lines(self.imports)]
        try:
            order = [*TopologicalSorter({p: sorted(n) for p, n in self.needs.items()}).static_order()]
        except CycleError as error:
            raise ValueError(f"modules use each other: {', '.join(error.args[1])}") from None
        for place in order:
            module = self.modules[place]
            parts.append(f"\n\n# {self.sources.label(place)}: {module.about}")
            above = False
            for name, node in module.nodes.items():
                if (place, name) in self.shown:
                    constant = isinstance(node, ast.Assign | ast.AnnAssign)
                    text = self._renamed(place, name)
                    parts.append(text if above and constant else f"\n\n{text}")
                    above = constant
        return "\n".join(parts) + "\n"

    def _renamed(self, place: str, name: str) -> str:
        """A definition under its name in the file, with the names there of what it takes from modules."""
        definition, alias = self.definitions[place, name], self.shown[place, name]
        lines = definition.text.split("\n")
        whole = self.modules[place].names.whole | definition.names.whole
        for of, what, line, column in definition.members(whole):
            row = lines[line - 1].encode()  # columns count bytes; one character for another moves none
            there = row[column:].decode().replace(f"{of}.{what}", f"{of}_{what}", 1)
            lines[line - 1] = row[:column].decode() + there
        return re.sub(rf"(?m)^(def |class |){name}\b", rf"\g<1>{alias}", "\n".join(lines), count=1)


def one_file(
    root: str,
    names: Iterable[str],
    folder: Path = ROOT,
    *,
    packages: Collection[str] = (),
    replaced: Mapping[str, str] | None = None,
) -> str:
    """The text of a module that holds definitions of another, and every one of ours that they reach.

    ``part.name``, of a module imported as such, becomes ``part_name``; imports inside a function are taken
    out; nothing else is changed. Modules come after those that they use, definitions in the order of their
    module.

    Args:
        root: the module that defines the names.
        names: the definitions that the file is for.
        folder: parent of our packages.
        packages: names of other installed packages whose definitions are copied too.
        replaced: by module, a text in place of its own.

    Raises:
        ValueError: two definitions have one name, one has two, a name or a source cannot be found, or a
            definition needs a package that is neither torch, transformers nor Python's own.
    """
    bundle = Bundle(Sources(folder, packages, replaced or {}))
    bundle.reach(root, names)
    return bundle.text()


def _import_lines(imports: Collection[str]) -> list[str]:
    lines = sorted(line for line in imports if line.startswith("import "))
    sources = sorted({line.split(" import ")[0] for line in imports if line not in lines})
    for source in sources:
        items = sorted(line.split(" import ")[1] for line in imports if line.startswith(f"{source} import "))
        lines.append(f"{source} import {', '.join(items)}")
    return lines


def _free_names(table: symtable.SymbolTable) -> set[str]:
    """The names that a text uses and does not itself bind where it uses them."""
    top = table.get_type() == "module"
    found = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return found.union(*(_free_names(child) for child in table.get_children()))
