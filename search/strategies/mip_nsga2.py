"""NSGA-II that starts from, and is led by, the solutions of an integer programme.

Every block is scored by replacing it alone in the space's largest architecture, the parent, as in Puzzle
(Bercovich et al. 2024). The architectures of least total score within the limits, exact by an integer
programme, are evaluated among the first generation; later scores have terms of neighbouring blocks, fitted to
all evaluations (:mod:`search.strategies.additive_score`), and the programme's answers are evaluated until
they stay the same. The rest of each generation is NSGA-II's (:mod:`search.strategies.nsga2`), which finds
what the scores do not see.
"""

import numpy as np
from threadpoolctl import ThreadpoolController

from search.strategies.additive_score import Fit, Measured, fit, rank_agreement, replacements
from search.strategies.nsga2 import NSGA2
from search.strategies.pareto import Array
from search.strategies.strategy import ScoreAgreement, Task, unseen
from space.genome import Genomes
from space.slot_scores import SlotScores

LEVELS = 6  # bounds of a cost, evenly spaced, under which the programme is solved
TIGHTNESS = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8)  # of the limits, without a cost among the objectives
FIRST_SOLUTIONS = 2  # architectures of a level in the first generation
SHARE = 0.5  # of a generation, at most, that the programme proposes


class MipNSGA2(NSGA2):
    """NSGA-II with proposals of an integer programme.

    The first objective without a cost is the quality that is scored.

    Args:
        task: the problem; it has to say which architectures score best.

    Raises:
        ValueError: it does not.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if task.best_architectures is None:
            raise ValueError("mip-nsga2: a task with best_architectures is needed")
        self.best_architectures = task.best_architectures
        self.quality = task.objective_costs.index(None)
        self.measured = Measured(task.space)
        self.genomes = np.empty((0, task.initial_genomes.shape[1]), np.int16)
        self.qualities = np.empty(0)  # of the genomes
        self.pools = ThreadpoolController()

    def probes(self) -> Genomes:
        """The parent, its single replacements and first removals; then the removals after these."""
        removals = self.measured.removals()[1]
        if self.measured.values:
            return removals
        return np.concatenate([replacements(self.task.space), removals])

    def tell_probes(self, genomes: Genomes, values: Array) -> None:
        """Take the values of probes.

        Args:
            genomes: [N, G].
            values: objectives [N, M]; not finite where an evaluation failed.
        """
        self.measured.tell(genomes, values[:, self.quality])

    def ask(self) -> Genomes:
        """The next genomes: the programme's solutions, then those of NSGA-II."""
        fitted = self.fitted()
        others = super().ask()
        if fitted is None:
            return others
        solutions = self.kept(self._solutions(fitted.scores))
        most = max(1, int(SHARE * self.task.population))
        first = unseen(solutions, self.seen, most)
        return self.fill(np.concatenate([first, others]), len(others), self.rng())

    def tell(self, genomes: Genomes, values: Array) -> None:
        """Take the evaluations of a generation.

        Args:
            genomes: [N, G].
            values: objectives [N, M], minimised; not finite where an evaluation failed.
        """
        super().tell(genomes, values)
        finite = np.isfinite(values[:, self.quality])
        self.genomes = np.concatenate([self.genomes, genomes[finite]])
        self.qualities = np.concatenate([self.qualities, values[finite, self.quality]])

    def fitted(self) -> Fit | None:
        """The scores fitted to all evaluations; None without an evaluation of the parent."""
        scores = self.measured.scores() if self.measured.values else None
        if scores is None:
            return None
        with self.pools.limit(limits=1):  # as in the surrogate: more threads would change the last bits
            return fit(scores, self.genomes, self.qualities)

    def score_agreement(self) -> dict[int, ScoreAgreement]:
        """Rank correlation of the scores with the evaluations, by objective."""
        fitted = self.fitted()
        if fitted is None or len(self.genomes) < 3:
            return {}
        before = rank_agreement(fitted.sums, self.qualities)
        after = rank_agreement(fitted.left_out, self.qualities)
        if not np.isfinite([before, after]).all():
            return {}
        agreement = ScoreAgreement(
            evaluations=len(self.genomes),
            probes=len(self.measured.values),
            kendall_tau=before,
            kendall_tau_with_pairs=after,
        )
        return {self.quality: agreement}

    def _solutions(self, scores: SlotScores) -> Genomes:
        """The programme's solutions, the best of each level first [N, G].

        A level is a bound on one cost among the objectives, between its least value in the population and
        that of the best score of all; without such a cost, it is a share of the limits.
        """
        task, number = self.task, FIRST_SOLUTIONS if self.generation == 0 else 1
        costs = task.objective_costs
        free = [np.inf] * len(costs)
        best = self.best_architectures(scores, free, 1.0, number)
        if not len(best):
            return best
        levels = [best]
        if all(cost is None for cost in costs):
            levels += [self.best_architectures(scores, free, share, number) for share in TIGHTNESS[1:]]
        near = np.concatenate([self.kept(task.initial_genomes), self.parents])
        for i, cost in enumerate(costs):
            if cost is None:
                continue
            high, low = float(cost(best)[0]), float(cost(near).min(initial=np.inf))
            for level in range(1, LEVELS):
                bounds = [*free]
                bounds[i] = high + (low - high) * level / LEVELS
                if 0 < bounds[i] < high:
                    levels.append(self.best_architectures(scores, bounds, 1.0, number))
        deepest = max(map(len, levels))
        return np.concatenate([level[place : place + 1] for place in range(deepest) for level in levels])
