"""Evolution: NSGA-II whose children are screened by a surrogate, and HAT's single-objective search.

NSGA-II (Deb et al. 2002) keeps the best of all that was evaluated; parents meet by binary tournament, cross
and mutate. With a surrogate (:mod:`search.strategies.surrogate`) a generation is the outcome of several
that are only predicted, in the manner of NSGANetV2 (Lu et al. 2020): costs are known exactly, the qualities
are predicted from what was evaluated, and the children evaluated in the end are those that would survive.
"""

import numpy as np

from search.strategies.pareto import Array, survivors
from search.strategies.strategy import OVERSAMPLE, Strategy, Task, unseen
from search.strategies.surrogate import Surrogate
from space.genome import Genomes
from space.variation import mix, mutate, sample

IMAGINED = 4  # generations that are only predicted, before one is evaluated
CROWD = 2  # how many times the population such a generation keeps,
BORN = 4  # and is born in it
DRAWN = 64  # samples for each of the first generation, which is taken from them


class NSGA2(Strategy):
    """NSGA-II over everything that was evaluated."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.parents = np.empty((0, task.seeds.shape[1]), np.int16)  # best first
        self.values = np.empty((0, len(task.costs)))
        self.surrogate = Surrogate(task) if task.surrogate else None

    def ask(self) -> Genomes:
        """The next genomes: children that are expected to survive; first the seeds and samples far apart."""
        task, rng = self.task, self.rng()
        if not len(self.parents):
            far = far_apart(task, self.kept(sample(task.space, rng, DRAWN * task.population)))
            return self.fill(np.concatenate([task.seeds, far]), task.population, rng)
        if self.surrogate is None or not self.surrogate.ready:
            candidates = children(task, self.parents, OVERSAMPLE * task.population, rng)
        else:
            candidates = self._imagined(self.surrogate, rng)
        return self.fill(candidates, task.population, rng)

    def tell(self, genomes: Genomes, values: Array) -> None:
        """Keep the best of what was evaluated, and fit the surrogate to all of it."""
        super().tell(genomes, values)
        everyone = np.concatenate([self.parents, genomes])
        reached = np.concatenate([self.values, values])
        failed = np.where(np.isfinite(reached).all(axis=1), 0.0, np.inf)
        best = survivors(reached, failed, self.task.population)
        best = best[failed[best] == 0]
        self.parents, self.values = everyone[best], reached[best]
        if self.surrogate:
            self.surrogate.tell(genomes, values)

    def predicted(self, genomes: Genomes) -> Array | None:
        """What the surrogate expects."""
        return self.surrogate(genomes) if self.surrogate and self.surrogate.ready else None

    def _imagined(self, surrogate: Surrogate, rng: np.random.Generator) -> Genomes:
        """New genomes that survive generations of which nothing is evaluated, best first."""
        task = self.task
        crowd = self.parents
        for _ in range(IMAGINED):
            born = children(task, crowd, BORN * task.population, rng)
            everyone = np.unique(np.concatenate([crowd, born]), axis=0)
            best = survivors(
                surrogate(everyone), task.constraint_violation(everyone), CROWD * task.population
            )
            crowd = everyone[best]
        return unseen(crowd, self.seen, len(crowd))


def far_apart(task: Task, genomes: Genomes) -> Genomes:
    """As many of genomes [N, G] as the population, each as far as can be in cost from those before.

    Sums over many layers crowd around their mean: plain samples leave both ends of a front empty, and a
    surrogate knows nothing of where there was no example.
    """
    costs = [cost(genomes) for cost in task.costs if cost is not None]
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
    """Genomes [count, G] of parents that stand best first: by binary tournament, crossed and mutated."""
    picks = rng.integers(0, len(parents), (4, count))
    first, second = np.minimum(picks[0], picks[1]), np.minimum(picks[2], picks[3])
    return mutate(task.space, mix(parents[first], parents[second], rng), rng)
