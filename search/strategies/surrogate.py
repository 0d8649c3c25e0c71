"""Predicting the quality of architectures from those that were evaluated.

A Gaussian process on the logarithm of each quality. Its kernel adds up what is known to matter: the share
of genes that two architectures have in common (an additive effect of every gene), a Gaussian of what they
are made of altogether (width, depth, layers of every mixer, heads and FFN sizes), and an exponential of the
number of genes in which they differ. The weights of the three, two lengths and the noise are those of the
greatest marginal likelihood in a small grid; the scale has a closed form (Rasmussen and Williams 2006, 5.4).
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from threadpoolctl import ThreadpoolController

from search.strategies.pareto import Array, survivors
from search.strategies.strategy import Task
from space import Space
from space.genome import Genomes, encoding, split
from space.ops import depths

LEAST = 20  # evaluations before anything is predicted
MOST = 300  # that are fitted: half of them the best, half the last
GROWTH = 2.0  # of the evaluations, until the kernel's parameters are chosen anew
Weights = tuple[float, float, float]
# The weights of the three parts, the length of the second, the genes of the third, and the noise.
Setting = tuple[Weights, float, float, float]
WEIGHTS: tuple[Weights, ...] = ((1.0, 1.0, 0.1), (1.0, 0.3, 0.1), (0.3, 1.0, 0.3), (1.0, 0.3, 0.3))
GRID: tuple[Setting, ...] = tuple(product(WEIGHTS, (0.4, 0.8), (3.0,), (1e-3, 1e-2, 1e-1)))


@dataclass(frozen=True)
class Features:
    """What the kernel sees of N genomes."""

    genes: Array  # [N, values of all genes] one where a gene has a value
    sums: Array  # [N, F] between 0 and 1


def features(space: Space, genomes: Genomes) -> Features:
    """The features of genomes [N, G]."""
    enc = encoding(space)
    width, mixer, heads, ffn = split(genomes)
    starts = np.concatenate([[0], np.cumsum(enc.cardinalities)])
    genes = np.zeros((len(genomes), starts[-1]))
    genes[np.arange(len(genomes))[:, None], starts[:-1] + genomes] = 1.0
    sizes, counts = np.array(space.ffn_options), np.array([h for h, _ in space.head_options])
    headed = ~enc.headless[mixer] * counts[heads]
    sums = [
        np.array(space.width)[width] / max(space.width),
        depths(genomes) / enc.slots,
        sizes[ffn].sum(axis=1) / enc.slots / max(*sizes, 1),
        headed.sum(axis=1) / enc.slots / max(counts),
        *((mixer == option).sum(axis=1) / enc.slots for option in range(1, len(space.mixer_options))),
    ]
    return Features(genes, np.stack(sums, axis=1))


def kernel(a: Features, b: Features, setting: Setting) -> Array:
    """The kernel [N, K] between two sets, without noise."""
    weights, length, genes, _ = setting
    count = b.genes[0].sum()
    common = a.genes @ b.genes.T
    apart = (a.sums**2).sum(axis=1)[:, None] + (b.sums**2).sum(axis=1) - 2 * a.sums @ b.sums.T
    near = np.exp(-0.5 * np.maximum(apart, 0.0) / length**2)
    few = np.exp((common - count) / genes)
    return np.asarray(weights[0] * common / count + weights[1] * near + weights[2] * few)


class Surrogate:
    """Foretells the objectives of genomes: costs exactly, qualities by Gaussian processes."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.genomes = np.empty((0, task.seeds.shape[1]), np.int16)
        self.values = np.empty((0, len(task.costs)))
        self.pools = ThreadpoolController()
        self.best = np.empty(0, np.int64)  # rows of the best evaluations
        self.fitted = False
        self.chosen_at = 0  # evaluations when the kernel's parameters were chosen
        self.settings = {i: GRID[0] for i, cost in enumerate(task.costs) if cost is None}
        self.units: dict[int, tuple[float, float]] = {}  # mean and spread of the logarithms
        self.factors: dict[int, tuple[float, float, Array]] = {}

    @property
    def ready(self) -> bool:
        """Whether enough is known to predict anything."""
        return len(self.genomes) >= LEAST

    def tell(self, genomes: Genomes, values: Array) -> None:
        """Learn what genomes reached; failures teach nothing."""
        good = np.isfinite(values).all(axis=1)
        new = np.arange(len(self.genomes), len(self.genomes) + int(good.sum()))
        self.genomes = np.concatenate([self.genomes, genomes[good]])
        self.values = np.concatenate([self.values, values[good]])
        rivals = np.concatenate([self.best, new])
        self.best = rivals[survivors(self.values[rivals], np.zeros(len(rivals)), MOST // 2)]
        self.fitted = False
        if self.ready and len(self.genomes) >= GROWTH * self.chosen_at:  # so a replay does the same
            self.chosen_at = len(self.genomes)
            with self.pools.limit(limits=1):
                self._choose()

    def __call__(self, genomes: Genomes) -> Array:
        """The expected objectives [N, M] of genomes [N, G].

        On one thread: small matrices gain nothing by more, and the last bits do not depend on how many.
        """
        with self.pools.limit(limits=1):
            return self._expected(genomes)

    def _expected(self, genomes: Genomes) -> Array:
        if not self.fitted:
            self._fit()
        found = np.empty((len(genomes), len(self.task.costs)))
        seen = features(self.task.space, genomes)
        for i, cost in enumerate(self.task.costs):
            if cost is not None:
                found[:, i] = cost(genomes)
                continue
            middle, scale, factors = self.factors[i]
            alike = kernel(seen, self.known, self.settings[i])
            found[:, i] = np.exp(middle + scale * (alike @ factors))
        return found

    def _fit(self) -> None:
        for i, target in self._targets().items():
            middle, scale = self.units[i]
            self.factors[i] = middle, scale, self._fits(self.settings[i], target)[1]
        self.fitted = True

    def _choose(self) -> None:
        """The settings of the greatest marginal likelihood for what is known."""
        for i, target in self._targets().items():
            self.settings[i] = max(GRID, key=lambda setting: self._fits(setting, target)[0])

    def _targets(self) -> dict[int, Array]:
        """The standardised logarithms [N] of each quality, of the evaluations that are fitted."""
        last = np.arange(max(0, len(self.genomes) - MOST // 2), len(self.genomes))
        rows = np.union1d(self.best, last)
        self.known = features(self.task.space, self.genomes[rows])
        found = {}
        for i in self.settings:
            values = np.log(self.values[rows, i])
            self.units[i] = float(values.mean()), float(values.std()) or 1.0
            found[i] = (values - self.units[i][0]) / self.units[i][1]
        return found

    def _fits(self, setting: Setting, target: Array) -> tuple[float, Array]:
        """The log marginal likelihood of a setting, up to a constant, and the process's factors [N]."""
        matrix = kernel(self.known, self.known, setting)
        matrix[np.diag_indices_from(matrix)] += setting[3]
        factor = cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)
        factors = cho_solve(factor, target, check_finite=False)
        scale = float(target @ factors) / len(target)
        return -0.5 * len(target) * np.log(scale) - float(np.log(np.diag(factor[0])).sum()), factors
