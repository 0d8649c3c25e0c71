"""Latency of a model from the latencies of its ops.

``T = c0 + s [has full attention] + sum over op kinds k of a_k (latency of the ops of kind k) + b depth
+ sum over j of r_j max(0, bytes - B_j) - d saved(bytes)``

This is a Bayesian linear model with the prior a_k ~ N(1, 0.03), relative error and coefficients >= 0, fitted
to about twenty whole models. ``s`` is the work that the full-attention layers of a model share; its prior is
the intercept of their stacks.

The hinges model the memory hierarchy. Ops are measured in stacks that hold about as many bytes as the median
model. A model that holds more reads its weights and states from a slower level. The B_j are fixed quantiles
over a sample of the space. A sum of such hinges is convex, so it is a maximum of functions that are additive
over ops, and limits on it stay exact: see :class:`space.ops.Cost`.

The saving models a cache. A model that fits into a cache does not read the bytes again that its ops read in
the larger stacks. A model that exceeds the cache finds less of itself there, the larger it is. ``saved`` is
all bytes up to one size and falls linearly to zero at another. Both sizes are fitted, and kept only if they
predict left-out models better.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear
from scipy.stats import t as student

from space import Space, Workload
from space.cost import op_held_bytes
from space.genome import Genomes
from space.ops import OpTables, depths, has_full
from space.variation import sample

PRIOR_SPREAD = 0.03  # of a_k around 1
CONSTANT_SPREAD = 0.5  # of s around the measured intercept, as a share of it
OVERHEAD_SPREAD = 0.05  # of c0 and depth * b, as a share of the median latency
HINGE_SPREAD = 0.3  # of a hinge's cost over the median bytes, as a share of the median latency
HINGES = (0.25, 0.5, 0.75, 0.9)  # quantiles of the bytes that a model holds
CACHE_SIZES = tuple(2**18 * 2 ** (i / 2) for i in range(13))  # bytes, 256 KiB to 16 MiB
SPILL_FACTORS = (1.5, 2.0, 3.0, 4.0)  # of the cache size, at which nothing is saved
MIN_IMPROVEMENT = 0.9  # maximum ratio of the left-out errors with and without a saving that is kept
MAX_SAVED_SHARE = 0.8  # of a model's latency without the saving
MIN_NOISE = 0.005  # relative; below the repeatability of any timing here
INITIAL_NOISE = 0.02  # relative
NOISE_ITERATIONS = 4
SAMPLED_MODELS = 2001  # of the space, for quantiles
Array = NDArray[np.float64]

# Columns of a design matrix: 1, attention constant, kinds, depth, hinges.
LEADING_COLUMNS = 2


@dataclass(frozen=True)
class OpTimes:
    """Latencies of a space's ops in one workload.

    Attributes:
        workload: the workload.
        by_key: seconds by op key.
        attention_constant: seconds that full-attention layers spend once per model.
    """

    workload: Workload
    by_key: Mapping[str, float]
    attention_constant: float = 0.0


@dataclass(frozen=True)
class Saving:
    """Time that models save by fitting into a cache.

    Attributes:
        full: bytes of a model up to which all of them are saved.
        gone: bytes from which none are saved.
        rate: seconds per saved byte; 0 if nothing is saved.
    """

    full: float = 0.0
    gone: float = 1.0
    rate: float = 0.0

    @property
    def fall(self) -> float:
        """Saved bytes lost per further byte, between the two sizes."""
        return self.full / (self.gone - self.full)

    def saved(self, held: Array) -> Array:
        """Saved bytes of models.

        Args:
            held: bytes that each model holds: [N].

        Returns:
            Bytes: [N].
        """
        return np.maximum(0.0, np.minimum(held, self.fall * (self.gone - held)))


NO_SAVING = Saving()


@dataclass(frozen=True)
class Composition:
    """Fitted coefficients of one workload.

    Attributes:
        coefficients: in the order of the columns of :func:`design_matrix`: [C].
        rate: seconds per saved byte.
        noise: relative standard deviation of the residuals beyond timing noise.
    """

    coefficients: Array
    rate: float = 0.0
    noise: float = 0.0

    @property
    def constant(self) -> float:
        """c0, seconds."""
        return float(self.coefficients[0])

    @property
    def attention_factor(self) -> float:
        """Fitted s as a multiple of the measured attention constant."""
        return float(self.coefficients[1])

    @property
    def kinds(self) -> list[float]:
        """a_k, in the order of :func:`space.ops.op_kinds`."""
        return [float(a) for a in self.coefficients[LEADING_COLUMNS : -1 - len(HINGES)]]

    @property
    def per_layer(self) -> float:
        """b, seconds."""
        return float(self.coefficients[-1 - len(HINGES)])

    @property
    def hinges(self) -> list[float]:
        """r_j, seconds per median bytes."""
        return [float(r) for r in self.coefficients[-len(HINGES) :]]

    def __call__(self, design: Array, saved: Array | float = 0.0) -> Array:
        """Predicted latencies.

        Args:
            design: rows of a design matrix: [N, C].
            saved: bytes that each model saves: [N].

        Returns:
            Seconds: [N].
        """
        plain = np.asarray(design @ self.coefficients)
        return np.maximum((1 - MAX_SAVED_SHARE) * plain, plain - self.rate * saved)


@lru_cache(maxsize=64)
def hinge_bytes(space: Space, workload: Workload) -> tuple[float, tuple[float, ...]]:
    """Positions of the hinges in a space.

    Args:
        space: the space.
        workload: the workload.

    Returns:
        The median bytes that a model of the space holds, and the bytes at which each hinge starts.
    """
    held = held_bytes(space, workload, sample(space, np.random.default_rng(0), SAMPLED_MODELS))
    return float(np.median(held)), tuple(float(b) for b in np.quantile(held, HINGES))


def held_bytes(space: Space, workload: Workload, genomes: Genomes) -> Array:
    """Bytes of the weights and states of models.

    Args:
        space: their space.
        workload: the workload, which determines the size of states.
        genomes: the models: [N, G].

    Returns:
        Bytes: [N].
    """
    return OpTables(space, lambda op: op_held_bytes(op, workload, space.config)).totals(genomes)


def design_matrix(space: Space, times: OpTimes, genomes: Genomes) -> Array:
    """Terms of the latency that the coefficients multiply.

    Args:
        space: the space.
        times: latencies of its ops.
        genomes: the models: [N, G].

    Returns:
        Columns 1, attention constant (0 without full attention), op latencies by kind, depth, and hinges in
        units of the median bytes: [N, 3 + kinds + hinges].
    """
    constant = times.attention_constant * has_full(space, genomes)
    typical, starts = hinge_bytes(space, times.workload)
    held = held_bytes(space, times.workload, genomes)
    over = np.maximum(0.0, held[:, None] - np.array(starts)) / typical
    sums = op_sums(space, times, genomes)
    return np.column_stack([np.ones(len(genomes)), constant, sums, depths(genomes), over])


def op_sums(space: Space, times: OpTimes, genomes: Genomes) -> Array:
    """Op latencies of models, summed by kind.

    Args:
        space: the space.
        times: latencies of its ops.
        genomes: the models: [N, G].

    Returns:
        Seconds: [N, kinds].
    """
    return OpTables(space, lambda op: times.by_key[op.key]).by_kind(genomes)


def fit_composition(design: Array, seconds: Array, timing: Array, saved: Array | None = None) -> Composition:
    """Maximum a posteriori coefficients under relative error, none below 0.

    Args:
        design: of :func:`design_matrix`: [N, C].
        seconds: measured latency of each model: [N].
        timing: relative standard deviation of each timing; the error of the model is added to it: [N].
        saved: bytes that each model saves, see :class:`Saving`: [N]; None means none.
    """
    columns = design.shape[1]
    kinds = columns - LEADING_COLUMNS - 1 - len(HINGES)
    typical = float(np.median(seconds))
    depth = float(np.median(design[:, LEADING_COLUMNS + kinds]))
    # Prior mean and standard deviation of every coefficient, in the order of the columns.
    hinges = np.zeros(len(HINGES))
    mean = np.concatenate([[0.0, 1.0], np.ones(kinds), [0.0], hinges])
    overhead = OVERHEAD_SPREAD * typical
    spread = np.concatenate(
        [
            [overhead, CONSTANT_SPREAD],
            np.full(kinds, PRIOR_SPREAD),
            [overhead / max(depth, 1.0)],
            hinges + HINGE_SPREAD * typical,
        ]
    )
    unit = 1.0
    if saved is not None and saved.any():
        # A coefficient >= 0 times a negative column: a saving can only lower the latency.
        unit = float(saved.max())
        design = np.column_stack([design, -saved / unit])
        mean, spread = np.append(mean, 0.0), np.append(spread, typical)
    noise = INITIAL_NOISE
    coefficients = mean
    # The weights of the rows depend on the noise, and the noise on the residuals: fit them alternately.
    for _ in range(NOISE_ITERATIONS):
        error = np.sqrt(noise**2 + timing**2)
        # Relative error makes every target 1; the prior is one more row for each coefficient.
        rows = np.vstack([design / (seconds * error)[:, None], np.diag(1 / spread)])
        target = np.concatenate([1 / error, mean / spread])
        # Solving in units of the prior's spread keeps the problem well conditioned.
        scaled = lsq_linear(rows * spread, target, bounds=(0, np.inf), method="bvls")
        coefficients = scaled.x * spread
        residuals = design @ coefficients / seconds - 1
        # Timing noise explains a part of the residuals' variance; the rest is the model's error.
        noise = max(MIN_NOISE, float(np.sqrt(max(0.0, np.mean(residuals**2 - timing**2)))))
    rate = float(coefficients[columns]) / unit if len(coefficients) > columns else 0.0
    return Composition(coefficients[:columns], rate, noise)


def fit_saving(design: Array, held: Array, seconds: Array, timing: Array) -> Saving:
    """Cache sizes that explain the latencies of models best.

    Args:
        design: of :func:`design_matrix`: [N, C].
        held: bytes that each model holds: [N].
        seconds: measured latency of each model: [N].
        timing: relative standard deviation of each timing: [N].

    Returns:
        The saving without its rate; :data:`NO_SAVING` if none predicts left-out models better.
    """
    shapes = [Saving(full, full * factor) for full in CACHE_SIZES for factor in SPILL_FACTORS]
    fits = [(fit_composition(design, seconds, timing, s.saved(held)).noise, s) for s in shapes]
    _, best = min(fits, key=lambda pair: pair[0])

    def error(saved: Array | None) -> float:
        return float(np.abs(leave_one_out(design, seconds, timing, saved)).mean())

    return best if error(best.saved(held)) <= MIN_IMPROVEMENT * error(None) else NO_SAVING


def leave_one_out(design: Array, seconds: Array, timing: Array, saved: Array | None = None) -> Array:
    """Relative residuals of models, each predicted by a fit to the others.

    Args:
        design: of :func:`design_matrix`: [N, C].
        seconds: measured latency of each model: [N].
        timing: relative standard deviation of each timing: [N].
        saved: bytes that each model saves: [N]; None means none.

    Returns:
        Measured over predicted, minus 1: [N].
    """
    saved = np.zeros(len(seconds)) if saved is None else saved
    predicted = np.empty(len(seconds))
    for i, rows in enumerate(~np.eye(len(seconds), dtype=bool)):
        fit = fit_composition(design[rows], seconds[rows], timing[rows], saved[rows])
        predicted[i] = fit(design[i], saved[i])
    return np.asarray(seconds / predicted - 1)


def conformal(residuals: Sequence[float], confidence: float) -> float:
    """Bound that a further residual exceeds with probability at most ``1 - confidence``; at least 0.

    This is the split-conformal quantile (Vovk, Gammerman and Shafer 2005). With too few residuals for the
    confidence, it is the larger of the maximum residual and Student's t quantile.

    Args:
        residuals: exchangeable residuals in units of their standard deviation.
        confidence: between 0 and 1.
    """
    ordered = np.sort(residuals)
    count = len(ordered)
    rank = math.ceil((count + 1) * confidence)
    found = float(ordered[min(rank, count) - 1])
    if rank > count > 1:
        found = max(found, float(student.ppf(confidence, count - 1)))
    return max(0.0, found)
