"""The evolutionary search of HAT: one objective, the best fifth of the population as parents."""

import numpy as np

from search.strategies.pareto import Array
from search.strategies.strategy import OVERSAMPLE, Strategy, Task, unseen
from space.genome import Genomes
from space.variation import crossover, mutate


class Hat(Strategy):
    """The evolutionary search of HAT (Wang et al. 2020).

    A population of 125 has 25 parents, 50 mutants (each gene mutates with probability 0.3) and 50 crossovers;
    parents are not evaluated again.

    Args:
        task: a problem with one objective.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.parents = np.empty((0, task.initial_genomes.shape[1]), np.int16)
        self.values = np.empty((0, len(task.objective_costs)))

    def ask(self) -> Genomes:
        """The next genomes: mutants and crossovers; at first the initial genomes and samples."""
        task, rng = self.task, self.rng()
        if not len(self.parents):
            return self.fill(task.initial_genomes, task.population, rng)
        half = 2 * task.population // 5
        draws = rng.integers(0, len(self.parents), (3, OVERSAMPLE * half))
        mutants = mutate(task.space, self.parents[draws[0]], rng, 0.3)
        crossed = crossover(task.space, self.parents[draws[1]], self.parents[draws[2]], rng)
        first = unseen(self.kept(mutants), self.seen, half)
        return self.fill(np.concatenate([first, crossed, mutants]), 2 * half, rng)

    def tell(self, genomes: Genomes, values: Array) -> None:
        """Take the evaluations of a generation; the best of all are the next parents.

        Args:
            genomes: [N, G].
            values: the objective [N, 1], minimised; not finite where an evaluation failed.
        """
        super().tell(genomes, values)
        rivals = np.concatenate([self.parents, genomes])
        objectives = np.concatenate([self.values, values])
        kept = np.isfinite(objectives[:, 0])
        order = np.argsort(objectives[kept, 0], kind="stable")
        best = np.flatnonzero(kept)[order][: self.task.population // 5]
        self.parents, self.values = rivals[best], objectives[best]
