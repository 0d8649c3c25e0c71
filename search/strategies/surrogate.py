"""A surrogate that predicts the qualities of architectures from evaluations.

Each quality is a Gaussian process on its logarithm (on its values where some are negative, or all are 0; a 0
counts as the least value above). The kernel
is a sum of three: the share of genes that two architectures have in common (an additive effect of each gene),
a Gaussian of their distance in aggregate features (width, depth, layers of each mixer, heads and FFN sizes),
and an exponential of the number of genes in which they differ. Their weights, two length scales and the noise
maximise the marginal likelihood over a small grid; the scale has a closed form (Rasmussen and Williams 2006,
section 5.4).

Shapes: N and K genomes, G genes, M objectives, F aggregate features.
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

MIN_EVALUATIONS = 20  # before anything is predicted
MAX_FITTED = 300  # evaluations: half of them the best, half the latest
REFIT_GROWTH = 2.0  # of the evaluations, until the kernel's parameters are chosen again
Weights = tuple[float, float, float]
# Weights of the three kernels, length scales of the second and third, and the variance of the noise.
Setting = tuple[Weights, float, float, float]
WEIGHTS: tuple[Weights, ...] = ((1.0, 1.0, 0.1), (1.0, 0.3, 0.1), (0.3, 1.0, 0.3), (1.0, 0.3, 0.3))
GRID: tuple[Setting, ...] = tuple(product(WEIGHTS, (0.4, 0.8), (3.0,), (1e-3, 1e-2, 1e-1)))


@dataclass(frozen=True)
class Features:
    """Inputs of the kernel.

    Attributes:
        genes: one-hot genes [N, options of all genes].
        sums: aggregate features [N, F], between 0 and 1.
    """

    genes: Array
    sums: Array


def features(space: Space, genomes: Genomes) -> Features:
    """The kernel's inputs of genomes.

    Args:
        space: of the genomes.
        genomes: [N, G].
    """
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
    """The kernel matrix [N, K] between two sets of genomes, without noise.

    Args:
        a: features of N genomes.
        b: features of K genomes.
        setting: the kernel's parameters.
    """
    weights, length, genes, _ = setting
    count = b.genes[0].sum()
    common = a.genes @ b.genes.T
    squared = (a.sums**2).sum(axis=1)[:, None] + (b.sums**2).sum(axis=1) - 2 * a.sums @ b.sums.T
    gaussian = np.exp(-0.5 * np.maximum(squared, 0.0) / length**2)  # rounding may leave -1e-17
    exponential = np.exp((common - count) / genes)
    return np.asarray(weights[0] * common / count + weights[1] * gaussian + weights[2] * exponential)


class Surrogate:
    """Predicts objectives: costs exactly, qualities by Gaussian processes.

    Args:
        task: an objective without a cost is a quality.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.genomes = np.empty((0, task.initial_genomes.shape[1]), np.int16)
        self.values = np.empty((0, len(task.objective_costs)))
        self.pools = ThreadpoolController()
        self.best = np.empty(0, np.int64)  # rows of the best evaluations
        self.fitted = False
        self.fitted_features = features(task.space, self.genomes)  # of the evaluations that are fitted
        self.chosen_at = 0  # evaluations when the kernel's parameters were chosen
        self.settings = {i: GRID[0] for i, cost in enumerate(task.objective_costs) if cost is None}
        self.units: dict[int, tuple[float, float]] = {}  # mean and standard deviation of the logarithms
        self.has_logarithm: dict[int, bool] = {}  # all values of a quality are positive
        self.factors: dict[int, tuple[float, float, Array]] = {}

    @property
    def ready(self) -> bool:
        """True after enough evaluations."""
        return len(self.genomes) >= MIN_EVALUATIONS

    def tell(self, genomes: Genomes, values: Array) -> None:
        """Add evaluations; failed ones are left out.

        Args:
            genomes: [N, G].
            values: objectives [N, M]; not finite where an evaluation failed.
        """
        good = np.isfinite(values).all(axis=1)
        new = np.arange(len(self.genomes), len(self.genomes) + int(good.sum()))
        self.genomes = np.concatenate([self.genomes, genomes[good]])
        self.values = np.concatenate([self.values, values[good]])
        rivals = np.concatenate([self.best, new])
        self.best = rivals[survivors(self.values[rivals], np.zeros(len(rivals)), MAX_FITTED // 2)]
        self.fitted = False
        if (
            self.ready and len(self.genomes) >= REFIT_GROWTH * self.chosen_at
        ):  # in `tell`, so that a resumed search refits at the same counts
            self.chosen_at = len(self.genomes)
            with self.pools.limit(limits=1):
                self._choose()

    def __call__(self, genomes: Genomes) -> Array:
        """The expected objectives [N, M].

        One thread computes them: more gain nothing for small matrices, and would change the last bits.

        Args:
            genomes: [N, G].
        """
        with self.pools.limit(limits=1):
            return self._expected(genomes)

    def _expected(self, genomes: Genomes) -> Array:
        if not self.fitted:
            self._fit()
        expected = np.empty((len(genomes), len(self.task.objective_costs)))
        new = features(self.task.space, genomes)
        for i, cost in enumerate(self.task.objective_costs):
            if cost is not None:
                expected[:, i] = cost(genomes)
                continue
            mean, scale, factors = self.factors[i]
            values = mean + scale * (kernel(new, self.fitted_features, self.settings[i]) @ factors)
            expected[:, i] = np.exp(values) if self.has_logarithm[i] else values
        return expected

    def _fit(self) -> None:
        for i, target in self._targets().items():
            mean, scale = self.units[i]
            self.factors[i] = mean, scale, self._fits(self.settings[i], target)[1]
        self.fitted = True

    def _choose(self) -> None:
        """Choose the settings that maximise the marginal likelihood of the evaluations."""
        for i, target in self._targets().items():
            self.settings[i] = max(GRID, key=lambda setting: self._fits(setting, target)[0])

    def _targets(self) -> dict[int, Array]:
        """The standardised logarithms [N] of each quality; N evaluations are fitted."""
        last = np.arange(max(0, len(self.genomes) - MAX_FITTED // 2), len(self.genomes))
        rows = np.union1d(self.best, last)
        self.fitted_features = features(self.task.space, self.genomes[rows])
        targets = {}
        for i in self.settings:
            values = self.values[rows, i]
            self.has_logarithm[i] = bool((values >= 0).all() and (values > 0).any())
            if self.has_logarithm[i]:
                values = np.log(np.maximum(values, values[values > 0].min()))
            self.units[i] = float(values.mean()), float(values.std()) or 1.0
            targets[i] = (values - self.units[i][0]) / self.units[i][1]
        return targets

    def _fits(self, setting: Setting, target: Array) -> tuple[float, Array]:
        """The log marginal likelihood of a setting, up to a constant, and the weights [N] of its mean."""
        matrix = kernel(self.fitted_features, self.fitted_features, setting)
        matrix[np.diag_indices_from(matrix)] += setting[3]
        factor = cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)
        factors = cho_solve(factor, target, check_finite=False)
        scale = float(target @ factors) / len(target)
        return -0.5 * len(target) * np.log(scale) - float(np.log(np.diag(factor[0])).sum()), factors
