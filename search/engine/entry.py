"""Searches in a folder: run to the end, or read if they are there.

:func:`run_search` takes the caller's own evaluator; :func:`search_supernet` evaluates a trained supernet.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from search.engine.block_scores import read_block_scores, score_file
from search.engine.config import SearchConfig, make_problem, require_objectives
from search.engine.evaluator import EvaluateArchitecture, EvaluateMany, FunctionEvaluator
from search.engine.front import FRONT, Front
from search.engine.search import Outcomes, Report, Search
from search.engine.supernet_evaluator import evaluator
from search.engine.workers import pool
from search.problem.problem import Problem
from space import InputError
from space.io.artefact import canonical_json, digest
from space.io.config import parse
from space.io.progress import Reporter
from supernet.evaluate import evaluation_set
from supernet.training.train import Trained, load_supernet

if TYPE_CHECKING:
    from latency import Predictor


def run_search(
    problem: Problem,
    evaluate: EvaluateArchitecture,
    folder: Path | str,
    strategy: str = "nsga2",
    population: int | None = None,
    generations: int | None = None,
    seed: int = 0,
    *,
    surrogate: bool = True,
    workers: int = 0,
    inputs: Mapping[str, str] | None = None,
    report: Report | None = None,
) -> Front:
    """Search with an evaluator of one's own; a search that was interrupted continues in its folder.

    Example::

        space = load_space("configs/spaces/small.yaml")
        problem = Problem(space, objectives=["loss", "params"], limits=["params<=60%"])
        front = run_search(problem, lambda a: 3 - 0.1 * a.depth - a.width / 1000, "out")
        print(front.member("knee").architecture.describe())

    Args:
        problem: the space, objectives and limits.
        evaluate: ``evaluate(architecture)`` gives a value of the first objective that is a quality, or values
            by the names of qualities; lower is better. Where it raises, the architecture counts as failed.
        folder: keeps evaluations and ``front.json``; a search of something else is refused.
        strategy: the name of a registered strategy.
        population: architectures of a generation; None: the strategy's own number.
        generations: None: the strategy's own number.
        seed: of the search.
        surrogate: candidates are screened by predicted quality, where the strategy does that.
        workers: Ray actors of one CPU each that call ``evaluate``, which is pickled; 0: this process does.
        inputs: what ``evaluate`` depends on, by name, such as a checkpoint's sha256; a folder that was made
            from others is refused.
        report: ``report(done, total, text)`` is called after every evaluation.

    Returns:
        The front: the evaluated architectures that no other one dominates.

    Raises:
        InfeasibleError: no architecture keeps the limits.
        InputError: no objective is a quality, the strategy is unknown, every evaluation failed, or the folder
            belongs to another search.
    """
    settings = {
        "limits": [limit.text for limit in problem.limits],
        "objectives": problem.names,
        "strategy": strategy,
        "surrogate": surrogate,
        "population": population,
        "generations": generations,
        "confidence": problem.confidence,
        "seed": seed,
    }
    config = parse(SearchConfig, settings, "search")
    require_objectives(config, problem.objectives)
    qualities = [objective.text for objective in problem.objectives if objective.is_quality]
    search = Search(problem, config, Path(folder), _inputs(problem, inputs or {}), reevaluated={})
    path = search.folder / "front.json"
    if FRONT.made_from(path, search.inputs):
        return Front.read(path)
    search.check()
    with pool(FunctionEvaluator, (evaluate, qualities), workers, required=qualities) as evaluate_many:
        return search.run(evaluate_many, report)


def search_supernet(
    folder: Path,
    trained: Trained,
    predictors: "Mapping[str, Predictor]",
    config: SearchConfig,
    reporter: Reporter,
    outcomes: Outcomes | None = None,
    reference_predictors: "Mapping[str, Predictor] | None" = None,
    earlier_searches: Sequence[Path] = (),
) -> Front:
    """Search a supernet, or read the front that is there already.

    Args:
        folder: the search's.
        trained: the supernet and its text.
        predictors: by device; the first is meant where a limit or objective names none.
        config: of the search.
        reporter: shows progress.
        outcomes: that need not be evaluated again; new ones are added.
        reference_predictors: by device; a limit in percent is a share of their prediction for the largest
            architecture; None: ``predictors``.
        earlier_searches: folders of finished searches of the same supernet, see
            :class:`search.engine.search.Search`.

    Raises:
        InfeasibleError: the limits cannot be met.
        InputError: an objective or a limit is not understood, or the folder belongs to another search.
    """
    problem = make_problem(trained.space, predictors, config, reference_predictors)
    evaluated, known = {"supernet": trained.checkpoint.digest}, {}
    scored = score_file(trained.checkpoint.folder.parent, problem, config)
    if scored is not None:
        known = read_block_scores(scored, trained.space)
        evaluated["scores"] = digest(scored.read_bytes())
    inputs = _inputs(problem, evaluated)
    path = folder / "front.json"
    search = Search(
        problem, config, folder, inputs, outcomes, earlier_searches, warn=reporter.warn, known_probes=known
    )
    baseline = _baseline(search) if config.baseline == "random" else None
    done = FRONT.made_from(path, search.inputs)
    if done and (baseline is None or baseline.complete):
        reporter.skipped("search")
        return Front.read(path)
    search.check()
    with reporter.stage("search") as stage:
        stage(0.0, "starting the evaluators")
        with search_evaluator(problem, config, trained, reporter) as evaluate_many:
            if not done:
                search.run(evaluate_many, lambda done, total, text: stage(done / total, text))
            if baseline:
                baseline.evolve(
                    evaluate_many, lambda done, total, text: stage(done / total, f"random search, {text}")
                )
    return Front.read(path)


def _inputs(problem: Problem, evaluated: Mapping[str, str]) -> dict[str, str]:
    """The hashes of a search's space, of what is evaluated, and of its predictors, by name."""
    inputs = {"space": problem.space.hash, **evaluated}
    if problem.predictors:
        inputs["predictors"] = predictors_digest(problem.predictors)
    if problem.reference_predictors != problem.predictors:
        inputs["units"] = predictors_digest(problem.reference_predictors)  # the key that finished files have
    return inputs


def predictors_digest(predictors: "Mapping[str, Predictor]") -> str:
    """The hash of the predictions of some devices.

    Args:
        predictors: by device.
    """
    return digest(canonical_json({device: p.identity() for device, p in predictors.items()}))


def _baseline(search: Search) -> Search:
    """Random search with about as many evaluations as ``search``, whose outcomes it reuses."""
    population, generations = search.config.size
    generations = 1 + round((generations - 1) * search.config.strategy_entry.relative_offspring)
    update = {"strategy": "random", "population": population, "generations": generations}
    config = search.config.model_copy(update=update)
    inputs = {name: value for name, value in search.inputs.items() if name != "search"}
    return Search(search.problem, config, search.folder / "random", inputs, search.outcomes, warn=search.warn)


def search_evaluator(
    problem: Problem, config: SearchConfig, trained: Trained, reporter: Reporter
) -> AbstractContextManager[EvaluateMany]:
    """The evaluator of a supernet's search.

    Args:
        problem: its objectives decide what is evaluated.
        config: the windows and workers.
        trained: the supernet and its text.
        reporter: shows warnings.

    Raises:
        InputError: an objective cannot be evaluated on these windows, or has no function.
    """
    sets = {
        name: evaluation_set(trained.corpus, windows, trained.length)
        for name, windows in config.windows_by_stage().items()
    }
    if "recall_loss" in problem.names and not sets["search"].recall_share:
        raise InputError("objective recall_loss: no byte of the evaluation windows can be recalled")
    supernet = load_supernet(trained.space, trained.checkpoint)
    return evaluator(
        supernet, sets, config.workers, config.ray_address, reporter.warn, problem.registered_qualities
    )
