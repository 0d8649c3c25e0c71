"""The public Python API of formfit, the console script and ``python -m formfit``.

    import formfit

    space = formfit.load_space("configs/spaces/small.yaml")

Importing this module loads nothing else: a name of ``__all__`` is loaded when it is first used. The packages
``space``, ``latency``, ``supernet`` and ``search`` are formfit's own even where the working directory or
``PYTHONPATH`` has a module of the same name. docs/api.md describes all names, with examples.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latency.card import Card, load_card
    from latency.config import ProfileConfig
    from latency.predictor.predictor import Predictor, load_predictor
    from latency.profiling import profile
    from latency.runtimes.registry import register_runtime
    from search.engine.config import SearchConfig
    from search.engine.entry import run_search
    from search.engine.front import Front, Member
    from search.problem.limit import Limit
    from search.problem.metric import Metric, register_metric
    from search.problem.objective import Objective, register_objective
    from search.problem.problem import Problem
    from search.strategies.registry import register_strategy
    from search.submodel.verify import verify
    from space.architecture import Architecture, Layer, ModelConfig
    from space.io.errors import FormfitError, InfeasibleError, InputError, LimitMissedError, ParityError
    from space.mixers import register_mixer
    from space.space import Space, load_space
    from space.workload import Workload
    from supernet.extract import SubModel
    from supernet.supernet import Supernet
    from supernet.training.recipe import TrainConfig
    from supernet.training.train import train

__all__ = [
    "Architecture",
    "Card",
    "FormfitError",
    "Front",
    "InfeasibleError",
    "InputError",
    "Layer",
    "Limit",
    "LimitMissedError",
    "Member",
    "Metric",
    "ModelConfig",
    "Objective",
    "ParityError",
    "Predictor",
    "Problem",
    "ProfileConfig",
    "SearchConfig",
    "Space",
    "SubModel",
    "Supernet",
    "TrainConfig",
    "Workload",
    "load_card",
    "load_predictor",
    "load_space",
    "profile",
    "register_metric",
    "register_mixer",
    "register_objective",
    "register_runtime",
    "register_strategy",
    "run_search",
    "train",
    "verify",
]

_MODULE_OF = {
    "Architecture": "space.architecture",
    "Card": "latency.card",
    "FormfitError": "space.io.errors",
    "Front": "search.engine.front",
    "InfeasibleError": "space.io.errors",
    "InputError": "space.io.errors",
    "Layer": "space.architecture",
    "Limit": "search.problem.limit",
    "LimitMissedError": "space.io.errors",
    "Member": "search.engine.front",
    "Metric": "search.problem.metric",
    "ModelConfig": "space.architecture",
    "Objective": "search.problem.objective",
    "ParityError": "space.io.errors",
    "Predictor": "latency.predictor.predictor",
    "Problem": "search.problem.problem",
    "ProfileConfig": "latency.config",
    "SearchConfig": "search.engine.config",
    "Space": "space.space",
    "SubModel": "supernet.extract",
    "Supernet": "supernet.supernet",
    "TrainConfig": "supernet.training.recipe",
    "Workload": "space.workload",
    "load_card": "latency.card",
    "load_predictor": "latency.predictor.predictor",
    "load_space": "space.space",
    "profile": "latency.profiling",
    "register_metric": "search.problem.metric",
    "register_mixer": "space.mixers",
    "register_objective": "search.problem.objective",
    "register_runtime": "latency.runtimes.registry",
    "register_strategy": "search.strategies.registry",
    "run_search": "search.engine.entry",
    "train": "supernet.training.train",
    "verify": "search.submodel.verify",
}
PACKAGES = ("space", "latency", "supernet", "search")
_ROOT = Path(__file__).resolve().parent


def _is_ours(spec: ModuleSpec | None) -> bool:
    """Whether a package's ``__init__.py`` stands in a folder beside this file."""
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent.parent == _ROOT


def _put_packages_first() -> None:
    """Put this module's folder first on ``sys.path`` where another one would give a package of ours."""
    for name in PACKAGES:
        spec = PathFinder.find_spec(name)
        if spec and not _is_ours(spec):
            sys.path.insert(0, str(_ROOT))
            return


def _foreign_module() -> str | None:
    """A line that names a foreign module which was imported under the name of a package of ours."""
    for name in PACKAGES:
        module: ModuleType | None = sys.modules.get(name)
        if module and not _is_ours(module.__spec__):
            where = getattr(module, "__file__", None) or "no file"
            return f"module {name!r} was imported from {where} and hides formfit's package; rename that file"
    return None


def import_packages() -> None:
    """Import formfit's four packages; Ray calls it in a worker before the working directory is on its path.

    Raises:
        ImportError: a foreign module of one of their names was imported already.
    """
    line = _foreign_module()
    if line:
        raise ImportError(line)
    for name in PACKAGES:
        import_module(name)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("formfit")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'formfit' has no attribute {name!r}")
    line = _foreign_module()
    if line:
        raise ImportError(line)
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def main() -> None:
    """Run the command line; exits with its exit code."""
    line = _foreign_module()
    if line:
        sys.stderr.write(f"formfit: {line}\n")
        sys.exit(2)
    try:
        import_module("search.cli").main()
    except KeyboardInterrupt:  # while modules are imported
        sys.stderr.write("formfit: stopped\n")
        sys.exit(130)


_put_packages_first()
if __name__ == "__main__":
    main()
