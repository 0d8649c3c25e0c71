"""How the latencies of ops make that of a model.

``T = c0 + s [has full attention] + sum over kinds k of a_k (op latencies of kind k) + b depth
+ sum over j of r_j max(0, bytes - B_j) - d saved(bytes)``, all coefficients >= 0, a Bayesian linear model
with the prior a_k ~ N(1, 0.03) and relative error, fitted on about twenty whole models. ``s`` is what the
full-attention layers of a model compute once together; its prior is the intercept of their stacks.

The hinges are the memory hierarchy: ops are measured amid about the bytes of a median model, and a model
whose weights and states are more than that fetches them from farther away. B_j are fixed quantiles over a
sample of the space. A sum of such hinges is convex, so it is the greatest of functions that add up over ops,
and limits on it stay exact: see :class:`space.ops.Cost`.

What is saved is the cache's part: a model that a cache holds whole does not fetch what ops in a stack beyond
it fetched, and the more it exceeds the cache, the less of it is still there when it is read again: ``saved``
is all of the bytes up to some number, and from there falls linearly to nothing at another. Both numbers are
fitted, and kept only where that predicts models that were left out better.
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
SHARED_SPREAD = 0.5  # of s around the measured intercept, as a share of it
OVERHEAD_SPREAD = 0.05  # of c0 and depth * b, as a share of the median latency
HINGE_SPREAD = 0.3  # of what a hinge adds over the median bytes, as a share of the median latency
HINGES = (0.25, 0.5, 0.75, 0.9)  # quantiles of the bytes that a model holds
FULL_BYTES = tuple(2**18 * 2 ** (i / 2) for i in range(13))  # that a cache may hold: 256 KiB to 16 MiB
GONE_TIMES = (1.5, 2.0, 3.0, 4.0)  # so many times as much, and nothing is saved
BETTER = 0.9  # of the error left out, at most, for a saving to be believed
MOST_SAVED = 0.8  # of what a model would take without
LEAST_NOISE = 0.005  # relative; below what any timing here repeats to
Array = NDArray[np.float64]


@dataclass(frozen=True)
class OpTimes:
    """What op measurements say of one workload, seconds."""

    workload: Workload
    by_key: Mapping[str, float]
    shared: float = 0.0  # by full-attention layers, once a model


@dataclass(frozen=True)
class Saving:
    """What models save that a cache holds: ``rate`` seconds a byte, none where it is 0."""

    full: float = 0.0  # bytes up to which all are saved
    gone: float = 1.0  # bytes from which none are
    rate: float = 0.0

    @property
    def fall(self) -> float:
        """Saved bytes lost with each byte more, between the two."""
        return self.full / (self.gone - self.full)

    def saved(self, held: Array) -> Array:
        """The saved bytes of models that hold so many: [N]."""
        return np.maximum(0.0, np.minimum(held, self.fall * (self.gone - held)))


NO_SAVING = Saving()


@dataclass(frozen=True)
class Composition:
    """The coefficients of one workload, in the order of the columns of :func:`design_matrix`.

    ``rate`` is of the saved bytes; ``noise`` the relative spread of what is left.
    """

    coefficients: Array
    rate: float = 0.0
    noise: float = 0.0

    @property
    def constant(self) -> float:
        """c0, seconds."""
        return float(self.coefficients[0])

    @property
    def shared(self) -> float:
        """S over its prior."""
        return float(self.coefficients[1])

    @property
    def kinds(self) -> list[float]:
        """a_k, in the order of `op_kinds`."""
        return [float(a) for a in self.coefficients[2 : -1 - len(HINGES)]]

    @property
    def per_layer(self) -> float:
        """b, seconds."""
        return float(self.coefficients[-1 - len(HINGES)])

    @property
    def hinges(self) -> list[float]:
        """r_j, seconds for the median bytes."""
        return [float(r) for r in self.coefficients[-len(HINGES) :]]

    def __call__(self, design: Array, saved: Array | float = 0.0) -> Array:
        """Predicted seconds of rows of a design matrix, of models that save so many bytes: [N]."""
        plain = np.asarray(design @ self.coefficients)
        return np.maximum((1 - MOST_SAVED) * plain, plain - self.rate * saved)


@lru_cache(maxsize=64)
def hinge_bytes(space: Space, workload: Workload) -> tuple[float, tuple[float, ...]]:
    """The median bytes that a model of the space holds, and where the hinges are."""
    held = held_bytes(space, workload, sample(space, np.random.default_rng(0), 2001))
    return float(np.median(held)), tuple(float(b) for b in np.quantile(held, HINGES))


def held_bytes(space: Space, workload: Workload, genomes: Genomes) -> Array:
    """Bytes of the weights and states of models: [N]."""
    return OpTables(space, lambda op: op_held_bytes(op, workload, space.config)).totals(genomes)


def design_matrix(space: Space, times: OpTimes, genomes: Genomes) -> Array:
    """Rows (1, shared where there is full attention, op latency by kind, depth, hinges).

    Shape [N, 3 + kinds + hinges]; hinges in units of the median bytes.
    """
    shared = times.shared * has_full(space, genomes)
    typical, starts = hinge_bytes(space, times.workload)
    held = held_bytes(space, times.workload, genomes)
    over = np.maximum(0.0, held[:, None] - np.array(starts)) / typical
    sums = op_sums(space, times, genomes)
    return np.column_stack([np.ones(len(genomes)), shared, sums, depths(genomes), over])


def op_sums(space: Space, times: OpTimes, genomes: Genomes) -> Array:
    """Op latencies summed by kind: [N, kinds]."""
    return OpTables(space, lambda op: times.by_key[op.key]).by_kind(genomes)


def fit_composition(design: Array, seconds: Array, timing: Array, saved: Array | None = None) -> Composition:
    """The maximum a posteriori coefficients under relative error, none below 0.

    Args:
        design: of :func:`design_matrix`.
        seconds: of each model: [N].
        timing: relative standard deviation of each timing; what the model misses comes on top: [N].
        saved: bytes that each saves, see :class:`Saving`: [N]; None: none saves any.
    """
    kinds = design.shape[1] - 3 - len(HINGES)
    typical = float(np.median(seconds))
    depth = float(np.median(design[:, 2 + kinds]))
    hinges = np.zeros(len(HINGES))
    mean = np.concatenate([[0.0, 1.0], np.ones(kinds), [0.0], hinges])
    overhead = OVERHEAD_SPREAD * typical
    spread = np.concatenate(
        [
            [overhead, SHARED_SPREAD],
            np.full(kinds, PRIOR_SPREAD),
            [overhead / max(depth, 1.0)],
            hinges + HINGE_SPREAD * typical,
        ]
    )
    if saved is not None and saved.any():
        unit = float(saved.max())
        design = np.column_stack([design, -saved / unit])
        mean, spread = np.append(mean, 0.0), np.append(spread, typical)
    noise = 0.02
    coefficients = mean
    for _ in range(4):  # the noise and the coefficients in turn
        error = np.sqrt(noise**2 + timing**2)
        rows = np.vstack([design / (seconds * error)[:, None], np.diag(1 / spread)])
        target = np.concatenate([1 / error, mean / spread])
        scaled = lsq_linear(rows * spread, target, bounds=(0, np.inf), method="bvls")
        coefficients = scaled.x * spread
        residuals = design @ coefficients / seconds - 1
        noise = max(LEAST_NOISE, float(np.sqrt(max(0.0, np.mean(residuals**2 - timing**2)))))
    columns = 3 + kinds + len(HINGES)
    rate = float(coefficients[columns]) / unit if len(coefficients) > columns else 0.0
    return Composition(coefficients[:columns], rate, noise)


def fit_saving(design: Array, held: Array, seconds: Array, timing: Array) -> Saving:
    """The saving that explains models [N] best, without its rate; none where it predicts them no better.

    ``held`` are the bytes that each holds, the rest is as of :func:`fit_composition`.
    """
    shapes = [Saving(full, full * times) for full in FULL_BYTES for times in GONE_TIMES]
    fits = [(fit_composition(design, seconds, timing, s.saved(held)).noise, s) for s in shapes]
    _, best = min(fits, key=lambda pair: pair[0])

    def error(saved: Array | None) -> float:
        return float(np.abs(leave_one_out(design, seconds, timing, saved)).mean())

    return best if error(best.saved(held)) <= BETTER * error(None) else NO_SAVING


def leave_one_out(design: Array, seconds: Array, timing: Array, saved: Array | None = None) -> Array:
    """Relative residuals, measured over predicted minus 1, each from a fit without its row."""
    saved = np.zeros(len(seconds)) if saved is None else saved
    predicted = np.empty(len(seconds))
    for i, rows in enumerate(~np.eye(len(seconds), dtype=bool)):
        fit = fit_composition(design[rows], seconds[rows], timing[rows], saved[rows])
        predicted[i] = fit(design[i], saved[i])
    return np.asarray(seconds / predicted - 1)


def conformal(residuals: Sequence[float], confidence: float) -> float:
    """What a further residual exceeds with probability at most ``1 - confidence``; at least 0.

    Where there are too few residuals for that, it is the greatest of them or Student's quantile, whichever
    is more; they are taken to be in units of their own spread.
    """
    ordered = np.sort(residuals)
    count = len(ordered)
    rank = math.ceil((count + 1) * confidence)
    found = float(ordered[min(rank, count) - 1])
    if rank > count > 1:
        found = max(found, float(student.ppf(confidence, count - 1)))
    return max(0.0, found)
