"""What proposes architectures, by ask and tell.

``ask`` gives the next generation: members of the space that keep the limits, none of them given before;
fewer than wanted, or none, where the space has no more. ``tell`` says what those reached.
Between two strategies with the same task that were told the same there is no difference: what they draw comes
from the seed and the number of generations told. So a search that was killed goes on after telling a new
strategy what its record holds, generation by generation.

Limits bear on predicted costs, which cost nothing to know: candidates that break one are dropped
before they are evaluated.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from dataclasses import dataclass

import numpy as np

from search.strategies.pareto import Array
from space import Space
from space.genome import Genomes
from space.ops import Cost
from space.variation import mutate, sample

OVERSAMPLE = 16  # candidates drawn for each one that is wanted
DRAWS = 8  # how often they are drawn before a generation stays short


@dataclass(frozen=True)
class Task:
    """What a strategy is to solve: objectives to be minimised, limits, and how many to propose at a time."""

    space: Space
    costs: tuple[Cost | None, ...]  # of each objective; None where it is only known after evaluation
    constraint_violation: Callable[
        [Genomes], Array
    ]  # [N]; 0 where the limits are kept, inf where nothing runs
    seeds: Genomes  # to begin with; where some keep the limits, one is here
    population: int
    seed: int
    surrogate: bool = True


class Strategy(ABC):
    """What all strategies have in common: the generations told, and what was proposed."""

    accepts_foreign_evaluations = True  # it may be told what it would not have asked for

    def __init__(self, task: Task) -> None:
        self.task = task
        self.generation = 0
        self.seen: set[bytes] = set()

    @abstractmethod
    def ask(self) -> Genomes:
        """The next genomes to evaluate [N, G], distinct and never given before."""

    def tell(self, genomes: Genomes, values: Array) -> None:
        """Say what genomes [N, G] reached: values [N, M] by objective; not finite where one failed."""
        self.seen |= {row.tobytes() for row in genomes}
        self.generation += 1

    def predicted(self, genomes: Genomes) -> Array | None:
        """The values [N, M] that it expects of genomes; None where it expects nothing."""
        return None

    def rng(self) -> np.random.Generator:
        """The generator of this generation."""
        return np.random.default_rng([self.task.seed, self.generation])

    def fill(self, candidates: Genomes, count: int, rng: np.random.Generator) -> Genomes:
        """The first ``count`` new ones of candidates [N, G] that keep the limits, then others that do.

        Others are samples, and mutants of the seeds, of which one keeps the limits where any does.
        """
        task = self.task
        candidates = self.kept(candidates)
        near = self.kept(np.concatenate([task.seeds, candidates[:count]]))
        chosen = unseen(candidates, self.seen, count)
        for turn in range(DRAWS):
            if len(chosen) == count or not len(near):
                break
            more = self.kept(sample(task.space, rng, 2 * count if turn == 0 else OVERSAMPLE * count))
            if turn:
                picks = rng.integers(0, len(near), OVERSAMPLE * count)
                more = np.concatenate([more, self.kept(mutate(task.space, near[picks], rng))])
            chosen = unseen(np.concatenate([chosen, more]), self.seen, count)
            near = np.concatenate([near, more[:count]])
        return chosen

    def kept(self, genomes: Genomes) -> Genomes:
        """Those that keep the limits."""
        return genomes[self.task.constraint_violation(genomes) <= 0]


class Random(Strategy):
    """Samples that keep the limits."""

    def ask(self) -> Genomes:
        """The next genomes: samples; in the first generation the seeds before them."""
        first = self.task.seeds if self.generation == 0 else self.task.seeds[:0]
        return self.fill(first, self.task.population, self.rng())


def unseen(genomes: Genomes, seen: Set[bytes], count: int) -> Genomes:
    """The first ``count`` distinct rows of genomes [N, G] that are not in ``seen``."""
    chosen, taken = [], set()
    for row in genomes:
        key = row.tobytes()
        if key not in seen and key not in taken:
            taken.add(key)
            chosen.append(row)
            if len(chosen) == count:
                break
    return np.array(chosen, dtype=np.int16).reshape(len(chosen), genomes.shape[1])
