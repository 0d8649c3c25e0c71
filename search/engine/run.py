"""A search's folder: its front, made where it is not there, and the members that are taken from it."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from latency import Predictor
from search.config import SearchConfig, make_problem
from search.engine.evaluator import Evaluator, evaluator
from search.engine.front import FRONT, Front
from search.engine.search import Known, Search
from search.problem.problem import Problem
from space import InputError
from space.io.artefact import canonical_json, digest
from space.io.progress import Reporter
from supernet.evaluate import evaluation_set
from supernet.training.train import Trained, load_supernet


def search_supernet(
    folder: Path,
    trained: Trained,
    predictors: Mapping[str, Predictor],
    config: SearchConfig,
    reporter: Reporter,
    known: Known | None = None,
    units: Mapping[str, Predictor] | None = None,
    before: Sequence[Path] = (),
) -> Front:
    """Search a supernet, or read the front that is there already.

    Args:
        folder: the search's.
        trained: what is searched.
        predictors: by device; the first is meant where none is named.
        config: how.
        reporter: told how far it is.
        known: outcomes that need not be found again; those found are added.
        units: predictors whose predictions percentages are of, where they are others.
        before: folders of finished searches of the same supernet whose evaluations this one starts from.

    Raises:
        InfeasibleError: the limits cannot be met.
        InputError: an objective or a limit is not understood, or the folder is another search's.
    """
    problem = make_problem(trained.space, predictors, config, units)
    inputs = {
        "space": trained.space.hash,
        "supernet": trained.checkpoint.digest,
        "predictors": predictors_digest(predictors),
        **({"units": predictors_digest(units)} if units and units != predictors else {}),
    }
    path = folder / "front.json"
    search = Search(problem, config, folder, inputs, known, before)
    rival = _rival(search) if config.baseline == "random" else None
    done = FRONT.made_from(path, search.inputs)
    if done and (rival is None or rival.complete):
        reporter.skipped("search")
        return Front.read(path)
    search.check()
    with reporter.stage("search") as stage:
        stage(0.0, "starting the evaluators")
        with search_evaluator(problem, config, trained, reporter) as evaluate_all:
            if not done:
                search.run(evaluate_all, lambda done, total, text: stage(done / total, text))
            if rival:
                rival.evolve(
                    evaluate_all, lambda done, total, text: stage(done / total, f"random search, {text}")
                )
    return Front.read(path)


def search_front(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """:func:`search_supernet` as the JSON object with its header; to be removed."""
    search_supernet(*args, **kwargs)
    return FRONT.read(args[0] / "front.json")


def predictors_digest(predictors: Mapping[str, Predictor]) -> str:
    """The hash of what predictors say."""
    return digest(canonical_json({device: p.identity() for device, p in predictors.items()}))


def _rival(search: Search) -> Search:
    """Random search for the same, at as many evaluations; what the other evaluates is known to it."""
    population, generations = search.config.size
    generations = 1 + round((generations - 1) * search.config.strategy_entry.offspring)
    update = {"strategy": "random", "population": population, "generations": generations}
    config = search.config.model_copy(update=update)
    inputs = {name: value for name, value in search.inputs.items() if name != "search"}
    return Search(search.problem, config, search.folder / "random", inputs, search.known)


def search_evaluator(
    problem: Problem, config: SearchConfig, trained: Trained, reporter: Reporter
) -> AbstractContextManager[Evaluator]:
    """What evaluates the architectures of a search.

    Raises:
        InputError: an objective asks for what the evaluation windows do not have.
    """
    sets = {
        name: evaluation_set(trained.corpus, windows, trained.length)
        for name, windows in config.windows_of().items()
    }
    if "recall_loss" in problem.names and not sets["search"].recall_share:
        raise InputError("objective recall_loss: no byte of the evaluation windows can be recalled")
    supernet = load_supernet(trained.space, trained.checkpoint)
    return evaluator(supernet, sets, config.workers, config.ray_address, reporter.warn)
