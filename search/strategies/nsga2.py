"""NSGA-II whose children are screened by a surrogate.

NSGA-II (Deb et al. 2002) keeps the best evaluations as parents; binary tournaments choose which of them cross
and mutate. With a surrogate (:mod:`search.strategies.surrogate`), several surrogate generations precede each
evaluated one, as in NSGANetV2 (Lu et al. 2020): costs are known exactly, qualities are predicted, and the
children that would survive are evaluated.
"""

import numpy as np

from search.strategies.pareto import Array, best_evaluated, survivors
from search.strategies.strategy import OVERSAMPLE, Strategy, Task, unseen
from search.strategies.surrogate import Surrogate
from space.genome import Genomes
from space.variation import mix, mutate, sample

SURROGATE_GENERATIONS = 4  # predicted generations before one is evaluated
SURROGATE_POPULATION = 2  # genomes that a predicted generation keeps, as a multiple of the population
SURROGATE_OFFSPRING = 4  # children of a predicted generation, as a multiple of the population
INITIAL_POOL = 64  # samples from which the first generation is selected, as a multiple of the population


class NSGA2(Strategy):
    """NSGA-II over all evaluations.

    Args:
        task: the problem; its ``surrogate`` decides if children are screened.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.parents = np.empty((0, task.initial_genomes.shape[1]), np.int16)  # best first
        self.values = np.empty((0, len(task.objective_costs)))
        self.surrogate = Surrogate(task) if task.surrogate else None

    def ask(self) -> Genomes:
        """The next genomes: children that are expected to survive.

        At first they are the initial genomes and samples that lie far apart in cost.
        """
        task, rng = self.task, self.rng()
        if not len(self.parents):
            pool = self.kept(sample(task.space, rng, INITIAL_POOL * task.population))
            spread = spread_over_costs(task, pool)
            return self.fill(np.concatenate([task.initial_genomes, spread]), task.population, rng)
        if self.surrogate is None or not self.surrogate.ready:
            candidates = children(task, self.parents, OVERSAMPLE * task.population, rng)
        else:
            candidates = self._surrogate_evolution(self.surrogate, rng)
        return self.fill(candidates, task.population, rng)

    def tell(self, genomes: Genomes, values: Array) -> None:
        """Take the evaluations of a generation; the best of all are the next parents.

        Args:
            genomes: [N, G].
            values: objectives [N, M], minimised; not finite where an evaluation failed.
        """
        super().tell(genomes, values)
        rivals = np.concatenate([self.parents, genomes])
        objectives = np.concatenate([self.values, values])
        best = best_evaluated(objectives, self.task.population)
        self.parents, self.values = rivals[best], objectives[best]
        if self.surrogate:
            self.surrogate.tell(genomes, values)

    def predicted(self, genomes: Genomes) -> Array | None:
        """Objectives [N, M] that the surrogate predicts; None without one, or before enough evaluations.

        Args:
            genomes: [N, G].
        """
        return self.surrogate(genomes) if self.surrogate and self.surrogate.ready else None

    def _surrogate_evolution(self, surrogate: Surrogate, rng: np.random.Generator) -> Genomes:
        """New genomes that survive the surrogate generations, best first."""
        task = self.task
        current = self.parents
        for _ in range(SURROGATE_GENERATIONS):
            offspring = children(task, current, SURROGATE_OFFSPRING * task.population, rng)
            rivals = np.unique(np.concatenate([current, offspring]), axis=0)
            violation, kept = task.constraint_violation(rivals), SURROGATE_POPULATION * task.population
            current = rivals[survivors(surrogate(rivals), violation, kept)]
        return unseen(current, self.seen, len(current))


def spread_over_costs(task: Task, genomes: Genomes) -> Genomes:
    """A population of genomes, each as far as possible in cost from those before it.

    Costs are sums over many layers and concentrate around their mean: plain samples leave both ends of a
    front empty, and the surrogate without examples there.

    Args:
        task: its costs are the axes, scaled to the range of the genomes.
        genomes: to choose from [N, G].
    """
    costs = [cost(genomes) for cost in task.objective_costs if cost is not None]
    if not costs or not len(genomes):
        return genomes
    values = np.stack(costs, axis=1)
    extent = np.ptp(values, axis=0)
    values /= np.where(extent > 0, extent, 1.0)
    order = [int(values[:, 0].argmax())]
    nearest = np.full(len(values), np.inf)
    for _ in range(min(task.population, len(values)) - 1):
        nearest = np.minimum(nearest, ((values - values[order[-1]]) ** 2).sum(axis=1))
        order.append(int(nearest.argmax()))
    return genomes[order]


def children(task: Task, parents: Genomes, count: int, rng: np.random.Generator) -> Genomes:
    """Genomes [count, G] by binary tournament, crossover and mutation.

    Args:
        task: its space is searched.
        parents: [N, G], the best first.
        count: the number of children.
        rng: draws tournaments, crossovers and mutations.
    """
    picks = rng.integers(0, len(parents), (4, count))
    first, second = np.minimum(picks[0], picks[1]), np.minimum(picks[2], picks[3])
    return mutate(task.space, mix(parents[first], parents[second], rng), rng)
