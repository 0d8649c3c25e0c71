"""The modules that :mod:`supernet.hf.bundle` copies from: their definitions and their imports."""

import ast
import importlib.util
import re
import symtable
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = ("space", "supernet")  # the packages whose definitions are copied, not imported


@dataclass(frozen=True)
class Sources:
    """The texts of the modules whose definitions are copied.

    Attributes:
        folder: parent of the packages of ``OURS``.
        packages: names of other packages whose definitions are copied; they must be importable.
        replaced: by module, a text in place of its own.
    """

    folder: Path = ROOT
    packages: Collection[str] = ()
    replaced: Mapping[str, str] = field(default_factory=dict)

    def is_ours(self, module: str) -> bool:
        """True for a module of formfit."""
        return module.split(".")[0] in OURS

    def own(self, module: str) -> bool:
        """True for a module whose definitions are copied, not imported."""
        return self.is_ours(module) or module.split(".")[0] in self.packages

    def path(self, module: str) -> Path | None:
        """The file of a module; None if there is none."""
        if self.is_ours(module):
            place = self.folder / module.replace(".", "/")
            found = [p for p in (place.with_suffix(".py"), place / "__init__.py") if p.exists()]
            return found[0] if found else None
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
        return Path(spec.origin) if spec and spec.origin and spec.has_location else None

    def label(self, module: str) -> str:
        """The file of a module, from its package on."""
        path = self.path(module)
        is_package = path is not None and path.name == "__init__.py"
        return module.replace(".", "/") + ("/__init__.py" if is_package else ".py")

    def read(self, module: str) -> str:
        """The text of a module.

        Raises:
            ValueError: there is none.
        """
        if module in self.replaced:
            return self.replaced[module]
        path = self.path(module)
        if path is None:
            raise ValueError(f"{module}: its source is not found")
        return path.read_text(encoding="utf-8")


@dataclass
class Names:
    """The meanings of the names that import statements bind.

    Attributes:
        ours: of a definition of ours, its module and its name there.
        whole: of a module of ours, the module.
        others: of all else, the import statements that bind it.
    """

    ours: dict[str, tuple[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    others: dict[str, set[str]] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return name in self.ours or name in self.others

    def add(self, node: ast.Import | ast.ImportFrom, sources: Sources) -> None:
        """Take over the names of an import statement.

        Args:
            node: the statement.
            sources: tells ours from the others.
        """
        source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        if source == "__future__":
            return
        for item in node.names:
            bound = item.asname or item.name
            if not sources.own(source or item.name):
                line = ast.unparse(ast.Import([item]))
                line = f"from {source} {line}" if source else line
                self.others.setdefault(item.asname or item.name.split(".")[0], set()).add(line)
            elif source and sources.path(f"{source}.{item.name}"):
                self.whole[bound] = f"{source}.{item.name}"
            elif source:
                self.ours[bound] = (source, item.name)


@dataclass(frozen=True)
class Definition:
    """A definition without the imports inside it.

    Attributes:
        text: as it stands in its module, with the comment above it.
        node: its statement in the module.
        names: those of its imports.
    """

    text: str
    node: ast.stmt
    names: Names

    def members(self, whole: Collection[str]) -> Iterator[tuple[str, str, ast.Attribute]]:
        """Uses of a member of a module: (the module's name, the member, the expression).

        Args:
            whole: names of modules that are imported as such.
        """
        for node in ast.walk(ast.parse(self.text)):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            if node.value.id in whole:
                yield node.value.id, node.attr, node

    def renamed(self, names: Mapping[str, str]) -> str:
        """The text with other names for what it defines and uses.

        Args:
            names: new names by old ones, also of members (``part.name``).

        Raises:
            ValueError: an old name means something else in a part of the text, or stands in an f-string.
        """
        modules = {name.split(".")[0] for name in names if "." in name}
        edits: list[tuple[ast.expr, str]] = [
            (node, f"{of}.{what}") for of, what, node in self.members(modules)
        ]
        edits += [
            (n, n.id) for n in ast.walk(ast.parse(self.text)) if isinstance(n, ast.Name) and n.id in names
        ]
        hidden = bound_names(self.text) & names.keys()
        if hidden:
            raise ValueError(f"{', '.join(sorted(hidden))} has two meanings in one definition")
        lines = [line.encode() for line in self.text.split("\n")]  # columns count bytes
        for node, old in sorted(edits, key=lambda edit: -edit[0].col_offset):  # from right to left
            row, start = lines[node.lineno - 1], node.col_offset
            if not row[start:].startswith(old.encode()):
                raise ValueError(f"{old} stands where it cannot be renamed")
            lines[node.lineno - 1] = row[:start] + names[old].encode() + row[start + len(old.encode()) :]
        text = b"\n".join(lines).decode()
        if isinstance(self.node, ast.FunctionDef | ast.ClassDef) and self.node.name in names:
            pattern = rf"(?m)^(def |class ){self.node.name}\b"
            text = re.sub(pattern, rf"\g<1>{names[self.node.name]}", text, count=1)
        return text


def free_names(text: str) -> set[str]:
    """The names that a text uses and does not itself bind where it uses them."""

    def of(table: symtable.SymbolTable) -> set[str]:
        top = table.get_type() == "module"
        found = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
        return found.union(*map(of, table.get_children()))

    return of(symtable.symtable(text, "definition", "exec"))


def bound_names(text: str) -> set[str]:
    """The names that are bound inside the definitions of a text."""

    def of(table: symtable.SymbolTable) -> set[str]:
        return {s.get_name() for s in table.get_symbols() if s.is_local()}.union(
            *map(of, table.get_children())
        )

    return set().union(*map(of, symtable.symtable(text, "definition", "exec").get_children()))


class Module:
    """A module of ours: the definitions and imports at its top.

    Args:
        name: dotted.
        sources: where its text is.
    """

    def __init__(self, name: str, sources: Sources) -> None:
        text = sources.read(name)
        tree = ast.parse(text)
        self.name, self.sources, self.lines = name, sources, text.split("\n")
        self.about = (ast.get_docstring(tree) or "").split("\n")[0]
        self.names, self.nodes = Names(), dict[str, ast.stmt]()
        for node in tree.body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                self._take(node.body)
            else:
                self._take([node])

    def _take(self, nodes: Iterable[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.nodes[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if isinstance(target, ast.Name):
                    self.nodes[target.id] = node
            elif isinstance(node, ast.Import | ast.ImportFrom):
                self.names.add(node, self.sources)

    def definition(self, name: str) -> Definition:
        """A definition at the top of the module.

        Raises:
            ValueError: there is none of that name, or it imports in a way that cannot be moved.
        """
        if name not in self.nodes:
            raise ValueError(f"{self.name} does not define {name}")
        node, names = self.nodes[name], Names()
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", ())]) - 1
        while first and self.lines[first - 1].startswith("#"):
            first -= 1
        kept = set(range(first, node.end_lineno or 0))
        for statement in self._imports_inside(node):
            names.add(statement, self.sources)
            end = statement.end_lineno or statement.lineno
            kept -= {*range(statement.lineno - 1, end), *([end] if self.lines[end] == "" else [])}
        return Definition("\n".join(self.lines[i] for i in sorted(kept)), node, names)

    def _imports_inside(self, node: ast.stmt) -> Iterator[ast.Import | ast.ImportFrom]:
        """The imports of functions; those in blocks of functions cannot be moved, as they may not run."""
        direct = {id(n) for f in ast.walk(node) if isinstance(f, ast.FunctionDef) for n in f.body}
        for statement in ast.walk(node):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                if id(statement) not in direct or not self._is_movable(statement):
                    raise ValueError(f"{self.name}: {ast.unparse(statement)}: not an import to move")
                yield statement

    def _is_movable(self, statement: ast.Import | ast.ImportFrom) -> bool:
        """True for an import that is alone on its lines and binds no package of formfit."""
        after = self.lines[(statement.end_lineno or statement.lineno) - 1][statement.end_col_offset or 0 :]
        if after.strip() and not after.strip().startswith("#"):
            return False
        return isinstance(statement, ast.ImportFrom) or not any(
            self.sources.own(item.name) for item in statement.names
        )
