"""Search under limits: problems, strategies, the engine, verification, reports and the command line.

Public names are loaded on first use; :mod:`formfit` exports them too, with their types for type checkers.
"""

from importlib import import_module
from typing import Any

__all__ = [
    "Front",
    "Limit",
    "Member",
    "Metric",
    "Objective",
    "Problem",
    "SearchConfig",
    "run_search",
]

_MODULE_OF = {
    "Front": "search.engine.front",
    "Limit": "search.problem.limit",
    "Member": "search.engine.front",
    "Metric": "search.problem.metric",
    "Objective": "search.problem.objective",
    "Problem": "search.problem.problem",
    "SearchConfig": "search.engine.config",
    "run_search": "search.engine.entry",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'search' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
