"""The search loop: from a problem and an evaluator to a front of architectures.

This process runs the strategy. The genomes of generation g are a function of the seed, g and the evaluations
before it, so a search that was interrupted continues as if it had not been. On one CPU model and torch
version it gives the same ``front.json``, byte for byte, with any number of workers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search.engine.config import SearchConfig
from search.engine.evaluations import EVALUATIONS, Record, genomes_of
from search.engine.evaluator import EvaluateMany, Failed, Machine, Outcome, make_quality, quality_value
from search.engine.front import Front
from search.engine.make_front import make_front
from search.engine.optuna_study import open_projection
from search.problem.feasibility import check_feasible
from search.problem.limit import ROUNDING_TOLERANCE
from search.problem.milp import feasible
from search.problem.problem import Problem
from search.problem.solution_pool import pool_within
from search.strategies.pareto import best_evaluated, non_dominated
from search.strategies.registry import make_strategy
from search.strategies.strategy import ScoreAgreement, Strategy, Task
from space import InfeasibleError, InputError, genome
from space.genome import Genomes
from space.io.artefact import canonical_json, digest
from space.io.parquet import read_table
from supernet.evaluate import Quality
from supernet.training.checkpoint import sole_writer

# The number of best evaluations that are evaluated again, by stage: 64 on the middle
# number of windows, then 32 of these on the final one. The front is the non-dominated part of the last.
REEVALUATED = {"middle": 64, "front": 32}
Report = Callable[[int, int, str], None]  # evaluations done, evaluations in all, a text
Outcomes = dict[tuple[str, str], Outcome]  # by the stage and the architecture's key


class Search:
    """One search of a problem, kept in a folder.

    Args:
        problem: what is searched.
        config: the strategy, its size and its seed.
        folder: the search's.
        inputs: sha256 of what evaluations depend on, by name; a folder made from others is refused.
        outcomes: that need not be evaluated again; new ones are added.
        earlier_searches: folders of finished searches of the same supernet, whose evaluations this one starts
            from. They are not in ``inputs``: they are the earlier rounds of a measured search, on whose
            measurements the predictors depend, which are in ``inputs``.
        known_probes: qualities of the strategy's probes that need not be evaluated, by key.
        reevaluated: the number of best evaluations that are evaluated again, by stage.
        warn: called once with a line if a part of the record was evaluated on another CPU or torch version.
    """

    def __init__(
        self,
        problem: Problem,
        config: SearchConfig,
        folder: Path,
        inputs: Mapping[str, str],
        outcomes: Outcomes | None = None,
        earlier_searches: Sequence[Path] = (),
        reevaluated: Mapping[str, int] = REEVALUATED,
        warn: Callable[[str], None] = lambda _text: None,
        known_probes: Mapping[str, Quality] = MappingProxyType({}),
    ) -> None:
        self.problem, self.config, self.folder = problem, config, folder
        self.inputs = {**inputs, "search": search_digest(problem, config)}
        self.record = Record(folder, self.inputs)
        self.constraints = problem.constraints()
        self.objective_costs = {o.text: problem.objective_cost(o) for o in problem.objectives}
        self.outcomes = {} if outcomes is None else outcomes
        self.outcomes |= {("probes", key): quality for key, quality in known_probes.items()}
        self.earlier_searches, self.reevaluated = tuple(earlier_searches), dict(reevaluated)
        self.warn, self.warned = warn, False
        self.failed: list[pd.DataFrame] = []  # re-evaluations that failed
        self.agreement: dict[str, ScoreAgreement] = {}  # of the strategy's scores, by quality
        # Per device, the latency of its first profiled workload; used only to see whether the device can run
        # a genome.
        self.latencies = [p.cost(next(iter(p.models))) for p in problem.predictors.values()]
        self.population, self.generations = config.size

    def constraint_violation(self, genomes: Genomes) -> NDArray[np.float64]:
        """The sum [N] of the relative excess over each limit; inf where a device cannot run a genome.

        Args:
            genomes: [N, G].
        """
        total = np.zeros(len(genomes))
        for item in self.constraints:
            total += np.maximum(0.0, item.cost(genomes) / item.bound - 1 - ROUNDING_TOLERANCE)
        for latency in self.latencies:
            total[~np.isfinite(latency(genomes))] = np.inf
        return total

    def check(self) -> None:
        """Refuse limits that no architecture keeps.

        Raises:
            InfeasibleError: names them, with the least possible value and the architecture that has it.
        """
        check_feasible(self.problem.space, self.constraints, self.latencies)

    def run(self, evaluate_many: EvaluateMany, report: Report | None = None) -> Front:
        """Search to the last generation, from the record if there is one, and write ``front.json``.

        Args:
            evaluate_many: gives the qualities of architectures.
            report: called after every evaluation.

        Raises:
            InfeasibleError: the limits cannot be met.
            InputError: the record belongs to a search with other inputs, or every evaluation failed.
        """
        self.check()
        with sole_writer(self.folder):
            table = self._evolve(evaluate_many, report)
            members = self._members(table, evaluate_many, report)
            failed = pd.concat([table[table["failed"] != ""], *self.failed]).drop_duplicates("key")
            front = make_front(self.problem, self.config, members, table, failed, self.inputs, self.agreement)
            front.write(self.folder / "front.json")
        return front

    def evolve(self, evaluate_many: EvaluateMany, report: Report | None = None) -> pd.DataFrame:
        """All evaluations on the windows of the search, a row each, in order.

        Args:
            evaluate_many: gives the qualities of architectures.
            report: called after every evaluation.
        """
        with sole_writer(self.folder):
            return self._evolve(evaluate_many, report)

    def _evolve(self, evaluate_many: EvaluateMany, report: Report | None) -> pd.DataFrame:
        problem = self.problem
        recorded = [self._recorded(f"{generation:04d}") for generation in range(self.generations)]
        path = self.folder / "study.log"  # opened only after the record is known to be of this search
        projection = open_projection(path, self.folder.name, problem.names, problem.space.hash)
        strategy = make_strategy(self.config.strategy, self._task())
        earlier = self._earlier_evaluations()
        self._probe(strategy, evaluate_many, report)
        if strategy.accepts_foreign_evaluations:
            for evaluations in earlier:
                strategy.tell(genomes_of(evaluations), self._objectives(evaluations))
        parts: list[pd.DataFrame] = []
        for generation, part in enumerate(recorded):
            if part is None:
                part = self._generation(generation, strategy, evaluate_many, report)
                self.record.write(f"{generation:04d}", part)
            self._remember(part, "search")
            if not len(part):  # no further architecture keeps the limits
                break
            strategy.tell(genomes_of(part), self._objectives(part))
            projection.add(problem.space, part, problem.names, sum(map(len, parts)))
            parts.append(part)
        names = self.problem.names
        self.agreement = {names[i]: one for i, one in strategy.score_agreement().items()}
        return pd.concat([*earlier, *parts], ignore_index=True).drop_duplicates("key", ignore_index=True)

    def _probe(self, strategy: Strategy, evaluate_many: EvaluateMany, report: Report | None) -> None:
        """Evaluate the strategy's probes, round by round, from the record if they are there."""
        for turn in count():
            part = self._recorded(f"probes-{turn:04d}")
            if part is None:
                genomes = strategy.probes()
                if not len(genomes):
                    return
                part = self._evaluate(genomes, evaluate_many, "probes", -1, report)
                self.record.write(f"probes-{turn:04d}", part)
            self._remember(part, "probes")
            strategy.tell_probes(genomes_of(part), self._objectives(part))

    def _generation(
        self, generation: int, strategy: Strategy, evaluate_many: EvaluateMany, report: Report | None
    ) -> pd.DataFrame:
        """The evaluations of a strategy's proposals, with its predictions."""
        genomes = strategy.ask()
        part = self._evaluate(genomes, evaluate_many, "search", generation, report)
        predicted = strategy.predicted(genomes)
        for i, objective in enumerate(self.problem.objectives):
            if objective.is_quality:
                part[f"predicted_{objective.text}"] = np.nan if predicted is None else predicted[:, i]
        return part

    @property
    def complete(self) -> bool:
        """True if the record has the last generation, or one after which no architecture was left."""
        parts = sorted(self.record.folder.glob("part-[0-9]*.parquet"))
        if not parts:
            return False
        last = self.record.read(parts[-1].stem.partition("-")[2])
        return len(parts) == self.generations or (last is not None and last.empty)

    def _earlier_evaluations(self) -> list[pd.DataFrame]:
        """Evaluations of earlier searches that keep these limits, with costs by today's predictors."""
        found = []
        for folder in self.earlier_searches:
            for path in sorted((folder / "evaluations").glob("part-probes-*.parquet")):
                self._remember(read_table(path, EVALUATIONS)[0], "probes")
            for path in sorted((folder / "evaluations").glob("part-[0-9]*.parquet")):
                part = read_table(path, EVALUATIONS)[0]
                self._remember(part, "search")
                self._compare_machine(part)
                if not len(part):
                    continue
                genomes = genomes_of(part)
                for name, cost in self.objective_costs.items():
                    if cost is not None:
                        part[name] = cost(genomes)
                found.append(part[self.constraint_violation(genomes) <= 0])
        return [part for part in found if len(part)]

    def _task(self) -> Task:
        """The problem as a strategy sees it; one initial genome keeps the limits if any architecture does."""
        space = self.problem.space
        initial = [genome.smallest(space), genome.largest(space)]
        costs, bounds = [b.cost for b in self.constraints], [b.bound for b in self.constraints]
        if costs or self.latencies:
            within = [*bounds, *[math.inf] * len(self.latencies)]
            witness = feasible(space, [*costs, *self.latencies], within)
            if witness is None:
                raise InfeasibleError(
                    f"space {space.name}: no architecture runs on the device within the limits"
                )
            initial.append(witness)
        return Task(
            space=space,
            objective_costs=tuple(self.objective_costs.values()),
            constraint_violation=self.constraint_violation,
            initial_genomes=genome.encode(space, initial),
            population=self.population,
            seed=self.config.seed,
            surrogate=self.config.surrogate,
            best_architectures=pool_within(
                self.constraints, self.latencies, list(self.objective_costs.values())
            ),
        )

    def _objectives(self, table: pd.DataFrame) -> NDArray[np.float64]:
        """The objectives [N, M]; not finite where an evaluation failed."""
        return table[list(self.problem.names)].to_numpy(float)

    def _evaluate(
        self,
        genomes: Genomes,
        evaluate_many: EvaluateMany,
        stage: str,
        generation: int,
        report: Report | None,
    ) -> pd.DataFrame:
        """The evaluations of genomes [N, G] on the windows of a stage, a row each.

        The stage ``probes`` has the windows of the search, and no generation.
        """
        architectures = genome.decode(self.problem.space, genomes)
        keys = [a.key for a in architectures]
        evaluated_before, total = max(generation, 0) * self.population, self.generations * self.population
        windows = "search" if stage == "probes" else stage
        if stage == "search":
            title = f"generation {generation + 1} of {self.generations}"
        elif stage != "probes":
            number = self.config.windows_by_stage()[stage]
            title = f"re-evaluation of the {len(genomes)} best on {number} windows"
        new = [a for a, key in zip(architectures, keys, strict=True) if (stage, key) not in self.outcomes]
        for done, (one, outcome) in enumerate(zip(new, evaluate_many(new, windows), strict=True), start=1):
            self.outcomes[stage, one.key] = outcome
            if report and stage == "probes":
                report(0, total, f"change {done} of {len(new)} in the largest architecture")
            elif report:
                report(min(evaluated_before + done, total), total, title)
        columns: dict[str, Any] = {
            "generation": generation,
            "key": keys,
            "architecture": [a.text for a in architectures],
            "genome": list(genomes),
            **self._outcome_columns([self.outcomes[stage, key] for key in keys]),
            **asdict(Machine.here()),
        }
        columns |= {name: cost(genomes) for name, cost in self.objective_costs.items() if cost is not None}
        return pd.DataFrame(columns)

    def _outcome_columns(self, outcomes: Sequence[Outcome]) -> dict[str, list[float] | list[str]]:
        """The qualities of outcomes and the reasons of failures, by column."""
        columns: dict[str, list[float] | list[str]] = {
            name: [math.nan if isinstance(o, Failed) else quality_value(o, name) for o in outcomes]
            for name in self.problem.qualities
        }
        columns["failed"] = [o.reason if isinstance(o, Failed) else "" for o in outcomes]
        return columns

    def _remember(self, part: pd.DataFrame, stage: str) -> None:
        """Take over the outcomes of a part of the record."""
        for row in part[["key", "failed", *self.problem.qualities]].to_dict("records"):
            values = {name: row[name] for name in self.problem.qualities}
            self.outcomes[stage, row["key"]] = (
                Failed(row["failed"]) if row["failed"] else make_quality(values)
            )

    def _recorded(self, name: str) -> pd.DataFrame | None:
        """A part of the record; None if it was not evaluated."""
        part = self.record.read(name)
        if part is not None:
            self._compare_machine(part)
        return part

    def _compare_machine(self, part: pd.DataFrame) -> None:
        """Warn, once, of a part of the record that another machine evaluated."""
        here = Machine.here()
        for cpu, torch in part[["cpu", "torch"]].drop_duplicates().itertuples(index=False):
            if not self.warned and Machine(cpu, torch) != here:
                self.warned = True
                self.warn(
                    f"{self.folder}: recorded on {cpu} with torch {torch}, continued on {here.cpu} with "
                    f"torch {here.torch}: an uninterrupted search may give another front"
                )

    def _members(
        self, table: pd.DataFrame, evaluate_many: EvaluateMany, report: Report | None
    ) -> pd.DataFrame:
        """The non-dominated part, sorted by the objectives, of the best after their re-evaluations."""
        last = self.generations - 1
        for stage, number in self.reevaluated.items():
            part = self._recorded(stage)
            if part is None:
                part = self._evaluate(self._candidates(table, number), evaluate_many, stage, last, report)
                if not np.isfinite(self._objectives(part)).all(axis=1).any():
                    reason = part["failed"].iloc[0]
                    raise InputError(f"search: every re-evaluation failed: {reason}")
                self.record.write(stage, part)
            table = part
            self.failed += [part[part["failed"] != ""]]
        self._candidates(table, 1)  # refuses a table without any
        finite = table.iloc[np.flatnonzero(np.isfinite(self._objectives(table)).all(axis=1))]
        kept = np.flatnonzero(non_dominated(self._objectives(finite)))
        return finite.iloc[kept].sort_values([*self.problem.names, "key"], ignore_index=True)

    def _candidates(self, table: pd.DataFrame, count: int) -> Genomes:
        """The genomes [at most count, G] of the best evaluations.

        Raises:
            InputError: every evaluation failed.
        """
        best = best_evaluated(self._objectives(table), count)
        if not len(best):
            raise InputError(f"search: every evaluation failed; the first with {table['failed'].iloc[0]}")
        return genomes_of(table.iloc[best])


def search_digest(problem: Problem, config: SearchConfig) -> str:
    """The hash of what determines a search's result, beside its space, supernet and predictors.

    Args:
        problem: its objectives and devices count.
        config: all settings count except ``workers``, ``ray_address`` and ``baseline``.
    """
    settings = config.model_dump(mode="json", exclude={"workers", "ray_address", "baseline"})
    settings["population"], settings["generations"] = config.size
    return digest(canonical_json([settings, list(problem.names), list(problem.predictors)]))
