"""The strategy ``hill-climbing``: mutants of the architecture with the least sum of ranks."""

import numpy as np

from search.strategies.registry import register_strategy
from search.strategies.strategy import Strategy, Task
from space.genome import Genomes
from space.variation import mutate


class HillClimbing(Strategy):
    """Propose mutants of the best architecture so far."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.genomes = task.initial_genomes[:0]
        self.values = np.empty((0, len(task.objective_costs)))

    def ask(self) -> Genomes:
        """The seeds first, then mutants of the best."""
        rng = self.rng()
        if not len(self.genomes):
            return self.fill(self.task.initial_genomes, self.task.population, rng)
        ranks = self.values.argsort(axis=0).argsort(axis=0).sum(axis=1)
        best = self.genomes[[ranks.argmin()] * (4 * self.task.population)]
        return self.fill(mutate(self.task.space, best, rng), self.task.population, rng)

    def tell(self, genomes: Genomes, values: np.ndarray) -> None:
        """Keep the values; one that is not finite is last."""
        super().tell(genomes, values)
        self.genomes = np.concatenate([self.genomes, genomes])
        self.values = np.concatenate([self.values, values])


register_strategy("hill-climbing", HillClimbing, population=6, generations=2)
