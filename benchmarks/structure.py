"""Measure the structure of the code: dependencies, size, complexity, types, docstrings, string keys.

    python benchmarks/structure.py --label after

A tree is only read, never imported, so that ``--root`` can name any other checkout. Outcomes stand by label
("before", "after") in one file. ``DEFINITIONS`` says what each number counts, and ``GOALS`` what is wanted.
"""

import argparse
import ast
import io
import json
import platform
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "structure.json"
LABELS = ("before", "after")
DOORS = ("formfit.py", "formfit/__init__.py")
PACKAGES = ("space", "supernet", "latency", "search")
LONG_FILE, COMPLEX = 350, 15
OPENINGS = ("What", "Whether", "How", "Those", "Where", "All that", "Of")
DEFINITIONS = {
    "file_edges": "pairs of files of search/ of which one imports the other, anywhere in the file",
    "file_levels": "files on the longest chain of such imports; a cycle counts with all its files",
    "package_edges": "the same between nodes: a directory directly in search/, or a single module there",
    "package_levels": "nodes on the longest chain of such imports",
    "cycles": "groups of files, or of nodes, that import each other",
    "long_files": f"files of more than {LONG_FILE} lines, blank lines and docstrings included",
    "complex_functions": f"functions and methods of cyclomatic complexity over {COMPLEX}: 1, and 1 for each "
    "if, elif, for, while, except, case, assert, ternary, and/or, comprehension and its if; nested functions "
    "count in the function around them too",
    "any_per_1000": "uses of the name Any, without imports, per 1000 lines that are not blank or comments",
    "args_percent": "public functions, methods and classes that take arguments and whose docstring has a "
    "section Args (of classes: Args or Attributes); annotated fields are the arguments of a class with no "
    "__init__; protocols and nested functions are left out",
    "api_args_percent": "the same of the functions and classes that formfit.py exports; null without one",
    "api_method_args_percent": "the same of the public methods of those classes",
    "api_other": "what formfit.py exports that is no function or class found in the tree",
    "string_keys": 'x["key"] that is read, and x.get("key"), in search/',
    "string_keys_text": 'text of the form ["lower_case"] in search/: reads, writes and lists of one name',
    "opened_badly": f"docstrings that open with {', '.join(OPENINGS)}",
    "docstring_percent": "modules, and public classes, functions and methods, that have a docstring",
    "lines": "lines of the four packages",
    "comment_percent": "lines that are, or end in, a comment",
}
GOALS = {
    "package_edges": ("<=", 25),
    "package_levels": ("<=", 6),
    "api_args_percent": (">=", 100),
    "opened_badly": ("<=", 0),
}
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
Edges = set[tuple[str, str]]
LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.comprehension)
BRANCHES = (*LOOPS, ast.If, ast.IfExp, ast.ExceptHandler, ast.match_case, ast.Assert)


def module_name(path: str) -> str:
    """The dotted name of a file: ``search/pipeline.py`` is search.run, ``search/__init__.py`` is search."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imported(module: str, is_package: bool, tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Every import of a module, wherever it stands: the module, the name taken from it, the name given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", alias.asname or "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((source, alias.name, alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.Call):
            by_name = ast.unparse(node.func).endswith(("import_module", "__import__"))
            yield from (
                (str(arg.value), "", "") for arg in node.args[:by_name] if isinstance(arg, ast.Constant)
            )


def depth(edges: Edges) -> tuple[int, list[list[str]]]:
    """The nodes on the longest chain, and the groups of nodes that reach each other."""
    after: dict[str, set[str]] = {}
    for tail, head in edges:
        after.setdefault(tail, set()).add(head)
        after.setdefault(head, set())

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = after[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    reach = {node: reached(node) for node in after}
    group = {a: frozenset({a} | {b for b in reach[a] if a in reach[b]}) for a in after}

    @cache
    def chain(members: frozenset[str]) -> int:
        below = {group[head] for tail in members for head in after[tail]} - {members}
        return len(members) + max(map(chain, below), default=0)

    cycles = sorted(sorted(members) for members in set(group.values()) if len(members) > 1)
    return max(map(chain, group.values()), default=0), cycles


def complexity(function: Function) -> int:
    """1, and 1 for each branch."""
    nodes = list(ast.walk(function))
    branches = sum(isinstance(node, BRANCHES) for node in nodes)
    conditions = sum(len(node.ifs) for node in nodes if isinstance(node, ast.comprehension))
    return 1 + branches + conditions + sum(len(n.values) - 1 for n in nodes if isinstance(n, ast.BoolOp))


def public(body: list[ast.stmt], inside: str = "") -> dict[str, Definition]:
    """The public functions, classes and methods of a module by their names; nested functions are not."""
    found: dict[str, Definition] = {}
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            found[f"{inside}{node.name}"] = node
            if isinstance(node, ast.ClassDef):
                found |= public(node.body, f"{inside}{node.name}.")
    return found


def takes_arguments(node: Definition) -> bool:
    """A function by its parameters besides self and cls; a class by its __init__, else by its fields."""
    if isinstance(node, ast.ClassDef):
        made = [n for n in node.body if isinstance(n, Function) and n.name == "__init__"]
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.dump(n)]
        protocol = any("Protocol" in ast.dump(base) for base in node.bases)
        return any(map(takes_arguments, made)) if made else bool(fields) and not protocol
    a = node.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg]
    return any(name not in ("self", "cls") for name in names)


def described(node: Definition) -> bool:
    """True where the docstring has the section."""
    sections = "Args|Attributes" if isinstance(node, ast.ClassDef) else "Args"
    return re.search(rf"^\s*({sections}):\s*$", ast.get_docstring(node) or "", re.MULTILINE) is not None


def percent(found: list[bool]) -> float | None:
    return round(100 * sum(found) / len(found), 1) if found else None


def api(trees: Mapping[str, ast.Module]) -> dict[str, Definition | None]:
    """The exports of formfit.py (__all__, else its imports) with their definitions, or None without one."""
    paths = {module_name(path): path for path in trees}

    def defined(module: str, name: str, tried: frozenset[tuple[str, str]]) -> Definition | None:
        if module not in paths or (module, name) in tried:
            return None
        tree = trees[paths[module]]
        if name in (here := public(tree.body)):
            return here[name]
        sources = imported(module, paths[module].endswith("__init__.py"), tree)
        homes = (
            defined(source, taken, tried | {(module, name)})
            for source, taken, given in sources
            if given == name
        )
        return next((home for home in homes if home), None)

    door = next((trees[path] for path in DOORS if path in trees), ast.Module([], []))
    assigned = [node for node in door.body if isinstance(node, ast.Assign)]
    lists = [node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__"]
    names = [str(name) for value in lists for name in ast.literal_eval(value)]
    names = names or [given for _, taken, given in imported("formfit", False, door) if taken]
    return {name: defined("formfit", name, frozenset()) for name in names}


def dependencies(search: Mapping[str, ast.Module]) -> dict[str, Any]:
    """The imports inside search/, between files and between sub-packages."""
    named = {module_name(path): path for path in search}
    files: Edges = set()
    for path, tree in search.items():
        for source, name, _ in imported(module_name(path), path.endswith("__init__.py"), tree):
            head = named.get(f"{source}.{name}") or named.get(source)
            files |= {(path, head)} if head and head != path else set()
    nodes = {(a.split("/")[1], b.split("/")[1]) for a, b in files}
    nodes = {(a, b) for a, b in nodes if a != b}
    (file_levels, file_cycles), (node_levels, node_cycles) = depth(files), depth(nodes)
    return {
        "file_edges": len(files),
        "file_levels": file_levels,
        "package_edges": len(nodes),
        "package_levels": node_levels,
        "cycles": {"files": file_cycles, "packages": node_cycles},
    }


def code(trees: Mapping[str, ast.Module], texts: Mapping[str, str]) -> dict[str, Any]:
    """Lines, comments, complexity and the name Any."""
    lines = {path: texts[path].splitlines() for path in trees}
    total = sum(map(len, lines.values()))
    full = sum(bool(line.strip()) and not line.strip().startswith("#") for p in lines for line in lines[p])
    tokens = (t for p in trees for t in tokenize.generate_tokens(io.StringIO(texts[p]).readline))
    comments = sum(token.type == tokenize.COMMENT for token in tokens)
    walked = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    functions = [(complexity(n), f"{path}: {n.name}") for path, n in walked if isinstance(n, Function)]
    anys = sum(isinstance(node, ast.Name) and node.id == "Any" for _, node in walked)
    return {
        "long_files": [f"{path} {len(text)}" for path, text in lines.items() if len(text) > LONG_FILE],
        "complex_functions": [f"{name} {n}" for n, name in sorted(functions, reverse=True) if n > COMPLEX],
        "any_per_1000": round(1000 * anys / full, 1),
        "lines": total,
        "comment_percent": round(100 * comments / total, 1),
    }


def string_keys(search: Mapping[str, ast.Module], texts: Mapping[str, str]) -> dict[str, Any]:
    """Reads by a string that stands in the code."""
    keys: list[ast.expr] = []
    for node in (node for tree in search.values() for node in ast.walk(tree)):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            keys.append(node.slice)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            keys += node.args[:1]
    return {
        "string_keys": sum(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in keys),
        "string_keys_text": sum(len(re.findall(r'\["[a-z_]+"\]', texts[path])) for path in search),
    }


def docstrings(trees: Mapping[str, ast.Module], exported: Mapping[str, Definition | None]) -> dict[str, Any]:
    """Shares of docstrings and of their sections, and how they open."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, kinds)]
    opened = re.compile(rf"({'|'.join(OPENINGS)})\b")
    shown = [node for tree in trees.values() for node in public(tree.body).values()]
    door = [node for node in exported.values() if node]
    methods = [n for node in door if isinstance(node, ast.ClassDef) for n in public(node.body).values()]

    def with_section(of: list[Definition]) -> float | None:
        return percent([described(node) for node in of if takes_arguments(node)])

    return {
        "args_percent": with_section(shown),
        "api_args_percent": with_section(door),
        "api_method_args_percent": with_section(methods),
        "api_other": [name for name, node in exported.items() if node is None],
        "opened_badly": sum(bool(opened.match(ast.get_docstring(node) or "")) for node in nodes),
        "docstring_percent": percent([bool(ast.get_docstring(node)) for node in (*trees.values(), *shown)]),
    }


def measured(root: Path) -> dict[str, Any]:
    """All numbers of a tree, and the lists behind them."""
    paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    if not paths:
        raise ValueError(f"{root}: has no Python file in {', '.join(PACKAGES)}")
    doors = [path for path in map(root.joinpath, DOORS) if path.is_file()]
    texts = {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in (*paths, *doors)}
    parsed = {path: ast.parse(text, path) for path, text in texts.items()}
    trees = {path: tree for path, tree in parsed.items() if path not in DOORS}
    search = {path: tree for path, tree in trees.items() if path.startswith("search/")}
    found = (
        dependencies(search)
        | code(trees, texts)
        | string_keys(search, texts)
        | docstrings(trees, api(parsed))
    )
    return {name: found[name] for name in DEFINITIONS}


def commit(root: Path) -> str | None:
    """The commit of a checkout, with "and changes" where the packages differ from it; None outside git."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--", *PACKAGES, *DOORS)
    return f"{git('rev-parse', 'HEAD')}{' and changes' if changed else ''}" if changed is not None else None


def shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{len(groups)} of {name}" for name, groups in value.items())
    return "n/a" if value is None else str(len(value) if isinstance(value, list) else value)


def run(arguments: argparse.Namespace) -> int:
    numbers = measured(arguments.root)
    counted = {name: numbers[name] for name in GOALS if numbers[name] is not None}
    goals = {
        f"{name} {value} {GOALS[name][0]} {GOALS[name][1]}": (
            value <= GOALS[name][1] if GOALS[name][0] == "<=" else value >= GOALS[name][1]
        )
        for name, value in counted.items()
    }
    outcome = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {"machine": platform.machine(), "python": platform.python_version()},
        "commit": commit(arguments.root),
        "goals": goals,
        **numbers,
    }
    before = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    if not isinstance(before, dict):
        raise ValueError(f"{arguments.out}: holds no outcomes of this benchmark")
    value = {**before, "benchmark": "structure", "definitions": DEFINITIONS, arguments.label: outcome}
    arguments.out.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    if arguments.json:
        sys.stdout.write(json.dumps(outcome, indent=1) + "\n")
    else:
        labels = [label for label, of in value.items() if isinstance(of, dict) and "goals" in of]
        sys.stdout.write("".join(f"{word:>28}" for word in ("", *labels)) + "\n")
        for name in DEFINITIONS:
            cells = [shown(value[label].get(name)) for label in labels]
            sys.stdout.write("".join(f"{word:>28}" for word in (name, *cells)) + "\n")
        for name in ("long_files", "complex_functions"):
            sys.stdout.write("\n".join([f"{name}:", *(f"  {line}" for line in numbers[name])]) + "\n")
        for goal, reached in goals.items():
            sys.stdout.write(f"{'reached' if reached else 'MISSED '}  {goal}\n")
        sys.stdout.write(f"written to {arguments.out}\n")
    return 0 if all(goals.values()) else 3


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the structure of the code.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to measure")
    parser.add_argument("--label", choices=LABELS, default="after", help="what the file calls these numbers")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--out", type=Path, default=OUT, help="the file that the outcome is written to")
    try:
        return run(parser.parse_args())
    except (OSError, ValueError, SyntaxError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
