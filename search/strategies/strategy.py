"""The interface of search strategies: ask for genomes, tell their objectives.

A strategy proposes generations of genomes that keep the limits, none of them twice. Limits bound predicted
costs, which are known without an evaluation, so candidates that break one are dropped at once.

The proposals are a function of the task and the evaluations told before: random numbers come from the task's
seed and the number of generations told. A search that was interrupted therefore continues after its record is
told to a new strategy, generation by generation.

Shapes: N genomes, G genes, M objectives.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np

from search.strategies.pareto import Array
from space import Space
from space.genome import Genomes
from space.ops import Cost
from space.slot_scores import SlotScores
from space.variation import mutate, sample

OVERSAMPLE = 16  # candidates drawn for each genome that is wanted
MAX_DRAWS = 8  # before a generation stays short


BestArchitectures = Callable[[SlotScores, Sequence[float], float, int], Genomes]
"""The genomes [at most N, G] with the least scores, best first.

The arguments are the scores, an upper bound on the cost of each objective (infinite: none, as for a quality),
a factor on the bounds of all limits, and N.
"""


@dataclass(frozen=True, kw_only=True)
class ScoreAgreement:
    """Agreement of a strategy's scores of blocks with the evaluations of whole architectures.

    Attributes:
        evaluations: architectures of the generations, whose quality is known.
        probes: architectures that were evaluated for the scores, beside the generations.
        kendall_tau: rank correlation of the sum of scores with the quality, between -1 and 1.
        kendall_tau_with_pairs: the same with terms of neighbouring blocks; each architecture is predicted by
            a fit to the others.
    """

    evaluations: int
    probes: int
    kendall_tau: float
    kendall_tau_with_pairs: float


@dataclass(frozen=True)
class Task:
    """A problem as a strategy sees it.

    Attributes:
        space: the search space.
        objective_costs: the cost of each objective [M]; None for a quality, which has to be evaluated.
        constraint_violation: of genomes [N, G], a number [N] each: 0 if all limits are kept, infinite if a
            device cannot run the architecture.
        initial_genomes: [S, G] to start from; one keeps the limits if any architecture does.
        population: genomes of a generation.
        seed: of the random numbers.
        surrogate: candidates may be screened by predicted quality.
        best_architectures: the exact solver of the task's limits, for strategies that score blocks.
    """

    space: Space
    objective_costs: tuple[Cost | None, ...]
    constraint_violation: Callable[[Genomes], Array]
    initial_genomes: Genomes
    population: int
    seed: int
    surrogate: bool = True
    best_architectures: BestArchitectures | None = None


class Strategy(ABC):
    """Base of all strategies; it counts generations and remembers their genomes.

    Args:
        task: the problem.

    Attributes:
        accepts_foreign_evaluations: evaluations that the strategy did not ask for may be told too.
        task: the problem.
        generation: the number of generations told.
        seen: the genomes told, as bytes.
    """

    accepts_foreign_evaluations = True

    def __init__(self, task: Task) -> None:
        self.task = task
        self.generation = 0
        self.seen: set[bytes] = set()

    @abstractmethod
    def ask(self) -> Genomes:
        """The next genomes to evaluate [N, G].

        They keep the limits, are distinct and were not told before. N is at most the population; it is 0 if
        the space has no others.
        """

    def tell(self, genomes: Genomes, values: Array) -> None:
        """Take the evaluations of a generation.

        Args:
            genomes: [N, G].
            values: objectives [N, M], minimised; not finite where an evaluation failed.
        """
        self.seen |= {row.tobytes() for row in genomes}
        self.generation += 1

    def probes(self) -> Genomes:
        """Genomes [N, G] to evaluate before the next generation; none by default.

        They need neither keep the limits nor be of the space, and are not part of the front. What a strategy
        asks next depends on the probes that it was told; it ends with none.
        """
        return self.task.initial_genomes[:0]

    def tell_probes(self, genomes: Genomes, values: Array) -> None:
        """Take the evaluations of probes.

        Args:
            genomes: [N, G].
            values: objectives [N, M], minimised; not finite where an evaluation failed.
        """
        raise NotImplementedError("the strategy asked for no probes")

    def score_agreement(self) -> dict[int, ScoreAgreement]:
        """Agreement of the strategy's scores with the evaluations, by objective; none by default."""
        return {}

    def predicted(self, genomes: Genomes) -> Array | None:
        """Predicted objectives [N, M]; None without a surrogate.

        Args:
            genomes: [N, G].
        """
        return None

    def rng(self) -> np.random.Generator:
        """The random number generator of this generation."""
        return np.random.default_rng([self.task.seed, self.generation])

    def fill(self, candidates: Genomes, count: int, rng: np.random.Generator) -> Genomes:
        """The first new candidates that keep the limits, filled up with others.

        The others are samples, then also mutants of the initial genomes, candidates and samples.

        Args:
            candidates: [N, G], in order of preference.
            count: the number of genomes wanted; fewer are returned if no others are found.
            rng: draws samples and mutants.
        """
        task = self.task
        candidates = self.kept(candidates)
        near = self.kept(np.concatenate([task.initial_genomes, candidates[:count]]))
        chosen = unseen(candidates, self.seen, count)
        for turn in range(MAX_DRAWS):
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
        """The rows that keep the limits.

        Args:
            genomes: [N, G].
        """
        return genomes[self.task.constraint_violation(genomes) <= 0]


class Random(Strategy):
    """Random search: samples that keep the limits."""

    def ask(self) -> Genomes:
        """The next genomes: samples, after the initial genomes in the first generation."""
        first = self.task.initial_genomes if self.generation == 0 else self.task.initial_genomes[:0]
        return self.fill(first, self.task.population, self.rng())


def unseen(genomes: Genomes, seen: Set[bytes], count: int) -> Genomes:
    """The first distinct rows that were not seen.

    Args:
        genomes: [N, G].
        seen: rows to leave out, as bytes.
        count: the greatest number of rows.
    """
    chosen, taken = [], set()
    for row in genomes:
        key = row.tobytes()
        if key not in seen and key not in taken:
            taken.add(key)
            chosen.append(row)
            if len(chosen) == count:
                break
    return np.array(chosen, dtype=np.int16).reshape(len(chosen), genomes.shape[1])
