"""The modules that :mod:`supernet.hf.bundle` copies from: their definitions and their imports."""

import ast
import importlib.util
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

    def own(self, module: str) -> bool:
        """Whether definitions of a module are copied, not imported."""
        package = module.split(".")[0]
        return package in OURS or package in self.packages

    def path(self, module: str) -> Path | None:
        """The file of a module; None if there is none."""
        if module.split(".")[0] in OURS:
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

    def members(self, whole: Mapping[str, str]) -> Iterator[tuple[str, str, int, int]]:
        """Uses of a member of a module: (module's name, member, line, column).

        Args:
            whole: by name, the modules of ours that are imported as such.
        """
        for node in ast.walk(ast.parse(self.text)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in whole
            ):
                yield node.value.id, node.attr, node.lineno, node.col_offset


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
        direct = {id(n) for f in ast.walk(node) if isinstance(f, ast.FunctionDef) for n in f.body}
        for statement in ast.walk(node):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                if id(statement) not in direct or not self._is_movable(statement):
                    raise ValueError(f"{self.name}.{name}: {ast.unparse(statement)}: not an import to move")
                names.add(statement, self.sources)
                end = statement.end_lineno or statement.lineno
                kept -= {*range(statement.lineno - 1, end), *([end] if self.lines[end] == "" else [])}
        return Definition("\n".join(self.lines[i] for i in sorted(kept)), node, names)

    def _is_movable(self, statement: ast.Import | ast.ImportFrom) -> bool:
        """Whether an import is alone on its lines, and binds no package of ours."""
        after = self.lines[(statement.end_lineno or statement.lineno) - 1][statement.end_col_offset or 0 :]
        if after.strip() and not after.strip().startswith("#"):
            return False
        return isinstance(statement, ast.ImportFrom) or not any(
            self.sources.own(item.name) for item in statement.names
        )
