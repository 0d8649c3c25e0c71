"""Evaluation of a supernet's sub-networks, in this process or by Ray actors that hold the supernet."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from numpy.typing import NDArray

from search.engine.evaluator import EvaluateMany
from search.engine.workers import pool
from search.problem.objective import QUALITIES
from space import Architecture, InputError, Space
from space.genome import largest
from supernet.evaluate import EvaluationSet, Parent, Quality, QualityFunction, evaluate, run_parent
from supernet.supernet import Supernet


def _functions(objectives: Sequence[str]) -> dict[str, QualityFunction]:
    """The functions of objectives, without those that need a parent.

    Raises:
        InputError: an objective is not registered here, or has no function.
    """
    functions = {}
    for name in objectives:
        objective = QUALITIES.get(name)
        if objective.evaluate is not None:
            functions[name] = objective.evaluate
        elif not objective.needs_parent:
            raise InputError(f"objective {name}: it has no function that evaluates a supernet's members")
    return functions


class SupernetEvaluator:
    """Evaluates sub-networks of a supernet that is rebuilt from arrays.

    Args:
        space: the space's JSON object.
        weights: the supernet's, by name.
        sets: held-out sequences by the name of the stage.
        objectives: registered qualities to evaluate beside the losses.

    Raises:
        InputError: an objective is not registered here, or has no function.
    """

    def __init__(
        self,
        space: dict[str, Any],
        weights: Mapping[str, NDArray[Any]],
        sets: Mapping[str, EvaluationSet],
        objectives: Sequence[str] = (),
    ) -> None:
        self.extra = _functions(objectives)
        self.needs_parent = any(QUALITIES.get(name).needs_parent for name in objectives)
        self.parents: dict[str, Parent] = {}  # of the stage that was evaluated last
        torch.use_deterministic_algorithms(True)
        with warnings.catch_warnings():
            # The workers of a machine read the same arrays in Ray's object store; nothing writes to them.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            values = {name: torch.from_numpy(value) for name, value in weights.items()}
        supernet = Supernet(Space.model_validate(space), values=values)
        self.supernet, self.sets = supernet.requires_grad_(False).eval(), dict(sets)

    def __call__(self, architecture: Architecture, stage: str) -> Quality:
        """The quality of an architecture on the windows of a stage, computed by one thread."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            weights = self.supernet.weights(architecture)
            config, windows = self.supernet.space.config, self.sets[stage]
            parent = self._parent(stage) if self.needs_parent else None
            return evaluate(weights, architecture, config, windows, extra=self.extra, parent=parent)
        finally:
            torch.set_num_threads(threads)

    def _parent(self, stage: str) -> Parent:
        """The largest architecture on the windows of a stage: one more evaluation by every worker."""
        if stage not in self.parents:
            top = largest(self.supernet.space)
            weights, config = self.supernet.weights(top), self.supernet.space.config
            self.parents = {stage: run_parent(weights, top, config, self.sets[stage])}
        return self.parents[stage]


def evaluator(
    supernet: Supernet,
    sets: Mapping[str, EvaluationSet],
    workers: int,
    address: str | None = None,
    warn: Callable[[str], None] = lambda _text: None,
    objectives: Sequence[str] = (),
) -> AbstractContextManager[EvaluateMany]:
    """The :func:`search.engine.workers.pool` that evaluates a supernet's sub-networks.

    Args:
        supernet: with its weights.
        sets: held-out sequences by the name of the stage.
        workers: Ray actors of one CPU each; 0: this process evaluates.
        address: of a running Ray cluster; None starts one on this machine for as long.
        warn: called for every worker whose CPU or torch differs from this process's.
        objectives: registered qualities to evaluate beside the losses.

    Raises:
        InputError: an objective is not registered, or has no function.
    """
    _functions(objectives)  # refused here rather than in every worker
    weights = {name: value.numpy() for name, value in supernet.state_dict().items()}
    space = supernet.space.model_dump(mode="json")
    arguments = (space, weights, dict(sets), tuple(objectives))
    return pool(SupernetEvaluator, arguments, workers, address, warn, ("loss", *objectives))
