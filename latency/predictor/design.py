"""Choice of measurements: the most informative ops, and whole models.

Measuring ops begins with a D-optimal initial design of each kind and phase. Each further op is the one that
lowers the expected squared relative error of a population's latencies most, per second that it takes to
measure (variance reduction, Cohn et al. 1996). Several are chosen before any of them is measured, because the
variance of a Gaussian process does not depend on the measured values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from latency.predictor.composition import SAMPLED_MODELS, OpTimes, design_matrix, held_bytes, op_sums
from latency.predictor.initial_design import Point, d_optimal
from latency.predictor.op_latencies import OpLatencies
from space import Architecture, InputError, Space, Workload, genome, variation
from space.cost import op_held_bytes
from space.ops import Op, count_ops
from space.precision import matrix_bytes

Array = NDArray[np.float64]
ModelRole = Literal["optimal", "random", "held_out", "repeat"]
STACK_HEIGHTS = (5, 48)  # minimum and maximum copies in the taller stack
MIN_STACK_BYTES = 12 * 2**20  # in decoding; a third of it still exceeds a core's cache
MAX_READING_TOKENS = 64  # up to which reading the weights dominates the time of a run
POPULATION = 200  # architectures whose latencies should be accurate
MAX_DRAWS = 20  # rounds of drawing random architectures until enough are allowed
CANDIDATES = 600  # random architectures that the D-optimal models are chosen from
HELD_OUT_CANDIDATES = 10  # random architectures per held-out model, over whose latencies these are spread
MIN_MODELS = 3  # to fit on, and to test on


@dataclass(frozen=True)
class ModelCounts:
    """Numbers of whole models to measure.

    Attributes:
        optimal: D-optimal models to fit on.
        random: random models to fit on.
        held_out: models to test on.
        repeated: held-out models that are measured twice.
        seed: seed of the choice.
    """

    optimal: int
    random: int
    held_out: int
    repeated: int
    seed: int


@dataclass(frozen=True)
class OpDesign:
    """The ops that can be measured, and their part in the latencies of a population.

    Attributes:
        points: every op in every workload: P of them.
        counts: number of times that each occurs in each architecture and workload: [M, P].
    """

    points: tuple[Point, ...]
    counts: Array

    def expected_error(self, ops: OpLatencies) -> float:
        """Expected relative error of a latency (root mean square) due to the uncertainty of op latencies.

        Args:
            ops: op latencies fitted to the measurements so far.
        """
        shares, covariance = self._shares(ops)
        return float(np.sqrt(np.mean(np.einsum("mp,mp->m", shares @ covariance, shares))))

    def choose(self, ops: OpLatencies, costs: Array, count: int, measured: Sequence[Point]) -> list[Point]:
        """Choose the next points to measure, by expected variance reduction per second.

        Args:
            ops: op latencies fitted to the measurements so far.
            costs: seconds that measuring each point takes: [P].
            count: maximum number of points.
            measured: points that are not chosen again.
        """
        shares, covariance = self._shares(ops)
        known = set(measured)
        free = np.array([point not in known for point in self.points])
        noise = np.array([ops.timing_noise(point) for point in self.points])
        chosen = expected_variance_reduction(covariance, shares, noise, costs, count, free)
        return [self.points[i] for i in chosen]

    def _shares(self, ops: OpLatencies) -> tuple[Array, Array]:
        """Share of each point in each latency [M, P], and the covariance of log seconds [P, P]."""
        mean, covariance = ops.posterior(self.points)
        covariance = covariance + np.diag([ops.op_effect_variance(point) for point in self.points])
        parts = self.counts * np.exp(mean)
        return parts / parts.sum(axis=1, keepdims=True), covariance


def expected_variance_reduction(
    covariance: Array, wanted: Array, noise: Array, costs: Array, count: int, free: NDArray[np.bool_]
) -> list[int]:
    """Choose observations greedily by the expected variance reduction of some sums per unit of cost.

    Args:
        covariance: prior covariance of the quantities that can be observed: [P, P].
        wanted: weights of the quantities in each sum: [M, P].
        noise: variance of an observation of each quantity: [P].
        costs: cost of observing each quantity: [P].
        count: maximum number of observations.
        free: True for quantities that may be chosen: [P].

    Returns:
        Indices of the quantities, the most informative first.
    """
    across, left = wanted @ covariance, free.copy()  # covariance of sums and quantities: [M, P]
    chosen: list[int] = []
    for _ in range(min(count, int(free.sum()))):
        variance = np.diag(covariance) + noise
        gain = np.where(left, np.mean(across**2, axis=0) / variance / costs, -np.inf)
        best = int(np.argmax(gain))
        left[best] = False
        chosen.append(best)
        # Condition on the observation (a rank-one update), whatever its value will be.
        row = covariance[best] / variance[best]
        across = across - np.outer(across[:, best], row)
        covariance = covariance - np.outer(covariance[:, best], row)
    return chosen


def op_design(space: Space, ops: Sequence[Op], workloads: Sequence[Workload]) -> OpDesign:
    """The points of a space, and their part in the latencies of a random population.

    Args:
        space: the space.
        ops: its ops that the device can run.
        workloads: workloads of interest.
    """
    rng = np.random.default_rng(0)
    drawn = genome.decode(space, variation.sample(space, rng, POPULATION))
    points = tuple((op, workload) for op in ops for workload in workloads)
    place = {point: i for i, point in enumerate(points)}
    rows = []
    for architecture in drawn:
        for workload in workloads:
            row = np.zeros(len(points))
            for op, count in count_ops(architecture).items():
                if (op, workload) in place:
                    row[place[op, workload]] = count
            rows.append(row)
    return OpDesign(points, np.array(rows))


def stack_heights(space: Space, op: Op, workload: Workload) -> tuple[int, int]:
    """Numbers of copies of an op in its shorter and its taller stack.

    In decoding the taller stack holds about as many bytes as the median model of the op's width, so that
    weights and states are read from the same level of the memory hierarchy as in a model. A few copies of a
    small op would stay in the core's cache. It holds at least 12 MiB: with one stack within that cache and
    the other beyond it, the slope between them would not be the latency of an op. The composition models the
    time that small models save in a cache. A run over many tokens reads its weights once for all of them,
    and a few copies are enough.

    Args:
        space: the space.
        op: one of its ops.
        workload: the workload.
    """
    high = STACK_HEIGHTS[0]
    if workload.batch * workload.tokens <= MAX_READING_TOKENS:
        op_bytes = op_held_bytes(op, workload, space.config)
        if op.kind == "head":  # in a stack it has no embedding to share its matrix with
            op_bytes += matrix_bytes(space.vocab_size, op.width, workload.precision)
        wanted = max(MIN_STACK_BYTES, median_bytes(space, op.width, workload))
        high = int(np.clip(round(wanted / max(op_bytes, 1)), *STACK_HEIGHTS))
    return max(2, high // 3), high


def stacks(
    space: Space, points: Sequence[Point], thirds: Sequence[Point] = ()
) -> dict[tuple[Op, int], list[Workload]]:
    """Stacks to time for some points.

    Args:
        space: the space.
        points: points to measure.
        thirds: points that are measured at a third height in between, to check that a stack is linear.

    Returns:
        Workloads by op and height.
    """
    found: dict[tuple[Op, int], list[Workload]] = {}
    for op, workload in points:
        low, high = stack_heights(space, op, workload)
        for height in (low, high, *([(low + high) // 2] if (op, workload) in thirds else [])):
            found.setdefault((op, height), []).append(workload)
    return found


@lru_cache(maxsize=64)
def median_bytes(space: Space, width: int, workload: Workload) -> float:
    """Median bytes of weights and states of the models of a width, over a fixed sample of the space.

    Args:
        space: the space.
        width: one of its residual widths.
        workload: the workload, which determines the size of states.
    """
    sampled = variation.sample(space, np.random.default_rng(0), SAMPLED_MODELS)
    of_width = sampled[sampled[:, 0] == space.width.index(width)]
    return float(np.median(held_bytes(space, workload, of_width)))


def choose_models(
    space: Space,
    sizes: ModelCounts,
    ops: Mapping[Workload, OpTimes],
    runs: Callable[[Architecture], bool] = lambda _: True,
) -> dict[ModelRole, list[Architecture]]:
    """Choose the whole models to measure.

    Held-out models are drawn with a seed of their own, are disjoint from the models of the fit, and are
    spread evenly over the range of latencies.

    Args:
        space: the space.
        sizes: numbers of models; fewer are chosen if ``runs`` allows too few.
        ops: op latencies by workload.
        runs: returns True for architectures that the device can run.

    Returns:
        Architectures by role: ``optimal`` and ``random`` to fit on, ``held_out`` to test on, and ``repeat``,
        the held-out models to measure twice.

    Raises:
        InputError: there are too few architectures to fit and test on.
    """
    held_out = _spread(
        space,
        _distinct(space, np.random.default_rng([sizes.seed, 2]), HELD_OUT_CANDIDATES * sizes.held_out, runs),
        sizes.held_out,
        ops,
    )
    taken = {a.key for a in held_out}
    rng = np.random.default_rng([sizes.seed, 1])
    pool = _distinct(space, rng, CANDIDATES, lambda a: runs(a) and a.key not in taken)
    if len(pool) < MIN_MODELS or len(held_out) < MIN_MODELS:
        raise InputError(
            f"space {space.name}: {len(pool)} architectures to fit on and {len(held_out)} to test on, "
            f"at least {MIN_MODELS} of each are needed"
        )
    rows = genome.encode(space, pool)
    # Errors are relative, so the information of a model is that of its row over its latency.
    relative = [
        design_matrix(space, latencies, rows) / op_sums(space, latencies, rows).sum(axis=1, keepdims=True)
        for latencies in ops.values()
    ]
    scaled = [design / np.maximum(np.abs(design).max(axis=0), 1e-12) for design in relative]
    chosen = [pool[i] for i in d_optimal(scaled, sizes.optimal)]
    taken |= {a.key for a in chosen}
    drawn = _distinct(space, rng, sizes.random, lambda a: runs(a) and a.key not in taken)
    repeated = held_out[: sizes.repeated]
    return {"optimal": chosen, "random": drawn, "held_out": held_out, "repeat": repeated}


def _spread(
    space: Space, drawn: Sequence[Architecture], count: int, ops: Mapping[Workload, OpTimes]
) -> list[Architecture]:
    """A choice from drawn architectures, spread evenly over the order of their op sums.

    The order is random, so that the first few are spread as well.
    """
    if not drawn:
        return []
    latencies = next(iter(ops.values()))
    order = np.argsort(op_sums(space, latencies, genome.encode(space, drawn)).sum(axis=1))
    places = np.unique(np.linspace(0, len(drawn) - 1, count).round().astype(int))
    return [drawn[order[place]] for place in np.random.default_rng(len(drawn)).permutation(places)]


def _distinct(
    space: Space, rng: np.random.Generator, count: int, runs: Callable[[Architecture], bool]
) -> list[Architecture]:
    """Up to ``count`` distinct random architectures that are allowed."""
    found: dict[str, Architecture] = {}
    for _ in range(MAX_DRAWS):
        drawn = genome.decode(space, variation.sample(space, rng, count))
        found |= {a.key: a for a in drawn if runs(a)}
        if len(found) >= count:
            break
    return list(islice(found.values(), count))
