"""Optuna's samplers as strategies: its NSGA-II, and its tree-structured Parzen estimator.

A sampler draws one parameter per gene, and its draws are repaired into the space. An architecture that was
evaluated before is told its values again without an evaluation; one that breaks a limit is told as failed.
A sampler keeps a random state of its own. A new strategy that is told a record therefore asks the sampler for
every generation again, and refuses the record if the proposals differ.
"""

import warnings

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import Trial, TrialState

from search.strategies.pareto import Array
from search.strategies.strategy import Strategy, Task
from space import InputError
from space.genome import Genomes, encoding
from space.variation import repair

MAX_DRAWS = 8  # for each architecture that is wanted


class OptunaStrategy(Strategy):
    """A strategy that takes its proposals from a sampler of Optuna.

    Args:
        task: the problem.
        sampler: Optuna's.
    """

    accepts_foreign_evaluations = False

    def __init__(self, task: Task, sampler: BaseSampler) -> None:
        super().__init__(task)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(sampler=sampler, directions=["minimize"] * len(task.objective_costs))
        sizes = encoding(task.space).cardinalities
        mixers = set(range(1, len(sizes), 3))
        self.genes: dict[str, BaseDistribution] = {
            f"gene{i:03d}": CategoricalDistribution(range(n)) if i in mixers else IntDistribution(0, n - 1)
            for i, n in enumerate(sizes.tolist())
        }
        self.values_by_genome: dict[bytes, list[float]] = {}
        self.asked: tuple[Genomes, list[Trial]] | None = None

    def ask(self) -> Genomes:
        """The next genomes; at first the initial genomes."""
        self.asked = self._propose()
        return self.asked[0]

    def _propose(self) -> tuple[Genomes, list[Trial]]:
        """The next genomes and their trials."""
        task, rng = self.task, self.rng()
        wanted: list[NDArray[np.int16]] = []
        trials: list[Trial] = []
        if self.generation == 0:
            self._enqueue(self.kept(task.initial_genomes))
        for _ in range(MAX_DRAWS * task.population):
            if len(wanted) == task.population:
                break
            trial = self.study.ask(self.genes)
            row = repair(task.space, np.array([list(trial.params.values())]), rng)
            key = row.tobytes()
            if key in self.values_by_genome:
                self.study.tell(trial, self.values_by_genome[key])
            elif task.constraint_violation(row)[0] > 0 or any(key == other.tobytes() for other in wanted):
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                wanted.append(row[0])
                trials.append(trial)
        found = np.array(wanted, np.int16).reshape(len(wanted), len(self.genes))
        genomes = self.fill(found, task.population, rng)
        self._enqueue(genomes[len(found) :])
        trials += [self.study.ask(self.genes) for _ in genomes[len(found) :]]
        return genomes, trials

    def tell(self, genomes: Genomes, values: Array) -> None:
        """Take the evaluations of a generation; one that was not asked for here is asked for first.

        Args:
            genomes: [N, G].
            values: objectives [N, M], minimised; not finite where an evaluation failed.

        Raises:
            InputError: the sampler proposes others.
        """
        proposed, trials = self.asked or self._propose()
        if not np.array_equal(proposed, genomes):
            raise InputError(
                f"generation {self.generation}: not what Optuna {optuna.__version__} proposes; "
                "the search was begun with another version, and cannot go on with this one"
            )
        for row, trial, objectives in zip(genomes, trials, values, strict=True):
            if np.isfinite(objectives).all():
                self.values_by_genome[row.tobytes()] = objectives.tolist()
                self.study.tell(trial, objectives.tolist())
            else:
                self.study.tell(trial, state=TrialState.FAIL)
        self.asked = None
        super().tell(genomes, values)

    def _enqueue(self, genomes: Genomes) -> None:
        for row in genomes.tolist():
            self.study.enqueue_trial(dict(zip(self.genes, row, strict=True)))


def nsga2(task: Task) -> OptunaStrategy:
    """Optuna's NSGA-II.

    Args:
        task: the problem.
    """
    return OptunaStrategy(task, NSGAIISampler(population_size=task.population, seed=task.seed))


def tpe(task: Task) -> OptunaStrategy:
    """Optuna's tree-structured Parzen estimator; running trials get the constant liar.

    Args:
        task: the problem.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return OptunaStrategy(task, TPESampler(seed=task.seed, constant_liar=True))
