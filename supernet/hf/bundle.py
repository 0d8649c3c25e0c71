"""One Python file from several modules: some definitions, and every one of ours that they reach.

A Hugging Face folder has to run where formfit is not installed, with the very code that everything here was
checked with. So the code is copied definition by definition, never written a second time.

A function may import inside itself, which keeps torch out of modules that only describe mixers: an import of
ours is resolved and removed, another one moves to the top of the file.
"""

import ast
import builtins
import sys
from collections.abc import Collection, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from supernet.hf.sources import ROOT, Definition, Module, Sources, free_names

ALLOWED = {*sys.stdlib_module_names, "torch", "transformers"}  # what the file may import
Place = tuple[str, str]  # a definition's module, and its name there
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
        self.definitions: dict[Place, Definition] = {}
        self.uses: dict[Place, dict[str, Place]] = {}  # by definition and by name there, those that it uses
        self.meanings: dict[str, str] = {}  # by each name of the file
        self.imports: set[str] = set()

    def module(self, name: str) -> Module:
        """A module by its name."""
        if name not in self.modules:
            self.modules[name] = Module(name, self.sources)
        return self.modules[name]

    def name(self, place: Place) -> str:
        """The name of a definition in the file: its own, and in another package than ours with its module."""
        module, name = place
        return name if self.sources.is_ours(module) else f"{module.replace('.', '_')}_{name}"

    def reach(self, root: str, names: Iterable[str]) -> None:
        """Collect definitions and everything that they use of the modules.

        Args:
            root: their module.
            names: their names.
        """
        todo = [(root, name) for name in names]
        while todo:
            place = self._home(*todo.pop())
            if place not in self.definitions:
                self._claim(self.name(place), ".".join(place))
                self.definitions[place] = self.module(place[0]).definition(place[1])
                self.uses[place] = self._used(place)
                todo += self.uses[place].values()

    def _home(self, module: str, name: str) -> Place:
        """The place of a definition that a module may only import."""
        while name not in self.module(module).nodes and name in self.module(module).names.ours:
            module, name = self.module(module).names.ours[name]
        return module, name

    def _claim(self, name: str, meaning: str) -> None:
        if self.meanings.setdefault(name, meaning) != meaning:
            raise ValueError(f"{name} is {self.meanings[name]} and {meaning}: one file cannot hold both")

    def _used(self, place: Place) -> dict[str, Place]:
        """The definitions that a definition uses, by its names for them; ``part.name`` for a member."""
        module, definition = self.module(place[0]), self.definitions[place]
        whole = module.names.whole | definition.names.whole
        found = {f"{of}.{what}": self._home(whole[of], what) for of, what, _ in definition.members(whole)}
        for used in sorted(free_names(definition.text)):
            names = next((n for n in (definition.names, module.names) if used in n), None)
            if names and used in names.ours:
                found[used] = self._home(*names.ours[used])
            elif names and used in names.others:
                self._import(".".join(place), used, names.others[used])
            elif used in module.nodes:
                found[used] = (place[0], used)
            elif hasattr(builtins, used):
                self._claim(used, f"builtins.{used}")
            elif used not in whole:
                raise ValueError(
                    f"{'.'.join(place)} uses {used}, which its module neither defines nor imports"
                )
        return found

    def _import(self, user: str, name: str, lines: set[str]) -> None:
        for line in lines:
            package = line.split()[1].split(".")[0]
            if package not in ALLOWED:
                raise ValueError(f"{user} needs {package}: the file has only torch and transformers")
        self._claim(name, " and ".join(sorted(lines)))
        self.imports |= lines

    def text(self) -> str:
        """The file: modules after those that they use, definitions in the order of their module."""
        needs: dict[str, set[str]] = {}
        for place, uses in self.uses.items():
            needs.setdefault(place[0], set()).update({module for module, _ in uses.values()} - {place[0]})
        try:
            order = [*TopologicalSorter({m: sorted(n) for m, n in needs.items()}).static_order()]
        except CycleError as error:
            raise ValueError(f"modules use each other: {', '.join(error.args[1])}") from None
        parts = [HEADER, *_import_lines(self.imports)]
        for name in order:
            module = self.modules[name]
            parts.append(f"\n\n# {self.sources.label(name)}: {module.about}")
            above = False
            for own, node in module.nodes.items():
                if (name, own) in self.definitions:
                    constant = isinstance(node, ast.Assign | ast.AnnAssign)
                    text = self._renamed((name, own))
                    parts.append(text if above and constant else f"\n\n{text}")
                    above = constant
        return "\n".join(parts) + "\n"

    def _renamed(self, place: Place) -> str:
        """A definition with the names of the file."""
        uses = {place[1]: place} | self.uses[place]
        names = {used: self.name(other) for used, other in uses.items()}
        return self.definitions[place].renamed({a: b for a, b in names.items() if a != b})


def one_file(
    root: str,
    names: Iterable[str],
    folder: Path = ROOT,
    *,
    packages: Collection[str] = (),
    replaced: Mapping[str, str] | None = None,
) -> str:
    """The text of a module that holds definitions of another, and every one of ours that they reach.

    Imports inside a function are taken out, ``part.name`` and ``import name as other`` become ``name``, and
    definitions of other packages than ours get the name of their module before their own; nothing else is
    changed. Modules come after those that they use, definitions in the order of their module.

    Args:
        root: the module that defines the names.
        names: the definitions that the file is for.
        folder: parent of our packages.
        packages: names of other installed packages whose definitions are copied too.
        replaced: by module, a text in place of its own.

    Raises:
        ValueError: two definitions have one name, a name or a source cannot be found, or a definition needs a
            package that is neither torch, transformers nor Python's own.
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
