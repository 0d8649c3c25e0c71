"""HAT's evolution: one objective, the best quarter as parents."""

import numpy as np

from search.strategies.pareto import Array
from search.strategies.strategy import OVERSAMPLE, Strategy, Task, unseen
from space.genome import Genomes
from space.variation import crossover, mutate


class Hat(Strategy):
    """The evolution of HAT (Wang et al. 2020): one objective, the best quarter as parents.

    A population of 125 has 25 parents, 50 mutants with 0.3 as the probability of a gene, and 50
    crossed; parents are not evaluated again.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.parents = np.empty((0, task.seeds.shape[1]), np.int16)
        self.values = np.empty((0, len(task.costs)))

    def ask(self) -> Genomes:
        """The next genomes: mutants and crossed; first the seeds and samples."""
        task, rng = self.task, self.rng()
        if not len(self.parents):
            return self.fill(task.seeds, task.population, rng)
        each = 2 * task.population // 5
        draws = rng.integers(0, len(self.parents), (3, OVERSAMPLE * each))
        mutants = mutate(task.space, self.parents[draws[0]], rng, 0.3)
        crossed = crossover(task.space, self.parents[draws[1]], self.parents[draws[2]], rng)
        first = unseen(self.kept(mutants), self.seen, each)
        return self.fill(np.concatenate([first, crossed, mutants]), 2 * each, rng)

    def tell(self, genomes: Genomes, values: Array) -> None:
        """Keep the parents."""
        super().tell(genomes, values)
        everyone = np.concatenate([self.parents, genomes])
        reached = np.concatenate([self.values, values])
        kept = np.isfinite(reached[:, 0])
        best = np.flatnonzero(kept)[np.argsort(reached[kept, 0], kind="stable")][: self.task.population // 5]
        self.parents, self.values = everyone[best], reached[best]
