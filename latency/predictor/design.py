"""What to measure: ops, one after the other where they tell most a second, and whole models.

The ops begin with a D-optimal few of each kind and phase. Then each next one is that which lowers the
expected squared relative error of a population's latencies most, over the seconds that it takes to
measure (variance reduction, Cohn et al. 1996); several are chosen before they are measured, because a
Gaussian process knows what a measurement will be worth before it knows its value.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from latency.predictor.composition import OpTimes, design_matrix, held_bytes, op_sums
from latency.predictor.op_latencies import OpLatencies, Point, features, grouped
from space import Architecture, InputError, Space, Workload, genome, variation
from space.cost import op_held_bytes
from space.ops import Op, count_ops
from space.precision import matrix_bytes

Array = NDArray[np.float64]
STACKS = (5, 48)  # least and most copies in the taller stack
STACK_BYTES = 12 * 2**20  # that it holds at least in decoding: a third of it is beyond a core's cache
FEW_TOKENS = 64  # up to which a run is slowed by the reading of its weights
POPULATION = 200  # architectures whose latencies are to be right
DRAWN = 20  # times as many architectures are drawn as are wanted, at most
LEAST_MODELS = 3  # to fit on, and to test on
SPARE_SEEDS = 3  # seeds beyond one for each size that varies


@dataclass(frozen=True)
class ModelCounts:
    """How many whole models are measured: for the fit (D-optimal and random), held out, and repeated."""

    optimal: int
    random: int
    held_out: int
    repeated: int
    seed: int


@dataclass(frozen=True)
class OpDesign:
    """The points that can be measured, and what each is worth.

    Attributes:
        points: every op of the space in every workload.
        counts: of each point in each architecture of a population and workload: [M, P].
    """

    points: tuple[Point, ...]
    counts: Array

    def expected_error(self, ops: OpLatencies) -> float:
        """The expected relative error of a latency, root mean square, from what ops are not known to be."""
        shares, covariance = self._shares(ops)
        return float(np.sqrt(np.mean(np.einsum("mp,mp->m", shares @ covariance, shares))))

    def choose(self, ops: OpLatencies, costs: Array, count: int, measured: Sequence[Point]) -> list[Point]:
        """The next points to measure, by what they tell a second.

        Args:
            ops: what is known.
            costs: seconds that measuring each point takes: [P].
            count: how many.
            measured: those that are not chosen again.
        """
        shares, covariance = self._shares(ops)
        known = set(measured)
        free = np.array([point not in known for point in self.points])
        noise = np.array([ops.timing_noise(point) for point in self.points])
        chosen = most_telling(covariance, shares, noise, costs, count, free)
        return [self.points[i] for i in chosen]

    def _shares(self, ops: OpLatencies) -> tuple[Array, Array]:
        """Each point's share of each latency [M, P], and the covariance of log seconds [P, P]."""
        mean, covariance = ops.posterior(self.points)
        covariance = covariance + np.diag([ops.own_variance(point) for point in self.points])
        parts = self.counts * np.exp(mean)
        return parts / parts.sum(axis=1, keepdims=True), covariance


def most_telling(
    covariance: Array, wanted: Array, noise: Array, costs: Array, count: int, free: NDArray[np.bool_]
) -> list[int]:
    """What to observe so that some sums become known, one after the other, by what each tells a unit of cost.

    Args:
        covariance: of what can be observed: [P, P].
        wanted: the weights of what can be observed in each sum: [M, P].
        noise: variance of an observation of each: [P].
        costs: of observing each: [P].
        count: how many to choose, at most.
        free: which may be chosen: [P].
    """
    across, left = wanted @ covariance, free.copy()  # [M, P]
    chosen: list[int] = []
    for _ in range(min(count, int(free.sum()))):
        variance = np.diag(covariance) + noise
        gain = np.where(left, np.mean(across**2, axis=0) / variance / costs, -np.inf)
        best = int(np.argmax(gain))
        left[best] = False
        chosen.append(best)
        row = covariance[best] / variance[best]
        across = across - np.outer(across[:, best], row)
        covariance = covariance - np.outer(covariance[:, best], row)
    return chosen


def op_design(space: Space, ops: Sequence[Op], workloads: Sequence[Workload]) -> OpDesign:
    """The design of a space's ops (those that the device can run) in some workloads."""
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


def seeds(points: Sequence[Point], spare: int = SPARE_SEEDS) -> list[Point]:
    """A D-optimal few of each kind and phase: one for each size that varies, and some more."""
    found = []
    for places in grouped(points).values():
        some = [points[i] for i in places]
        sizes = features(some)
        varying = sizes[:, np.ptp(sizes, axis=0) > 0]
        scaled = (varying - varying.mean(axis=0)) / np.maximum(np.ptp(varying, axis=0), 1e-9)
        design = np.column_stack([np.ones(len(some)), scaled, scaled**2])
        found += [some[i] for i in d_optimal([design], varying.shape[1] + spare)]
    return found


def stack_heights(space: Space, op: Op, workload: Workload) -> tuple[int, int]:
    """The copies of an op in its two stacks.

    The taller one holds about the bytes of the median model of its width in that workload, so that weights
    and states come from where a model's come from; a few copies of a small op would sit in the core's own
    cache. It is 12 MiB at least: were one stack within that cache and the other beyond it, their slope would
    be no op's latency. What a model saves that a cache holds is the composition's to say. Where a run reads
    many tokens, its weights are read once for all of them, and few copies do.
    """
    high = STACKS[0]
    if workload.batch * workload.tokens <= FEW_TOKENS:
        each = op_held_bytes(op, workload, space.config)
        if op.kind == "head":  # a stack of heads has no embeddings to be tied to
            each += matrix_bytes(space.vocab_size, op.width, workload.precision)
        wanted = max(STACK_BYTES, median_bytes(space, op.width, workload))
        high = int(np.clip(round(wanted / max(each, 1)), *STACKS))
    return max(2, high // 3), high


def stacks(
    space: Space, points: Sequence[Point], thirds: Sequence[Point] = ()
) -> dict[tuple[Op, int], list[Workload]]:
    """The stacks that measuring points takes, with their workloads; some have a third height between."""
    found: dict[tuple[Op, int], list[Workload]] = {}
    for op, workload in points:
        low, high = stack_heights(space, op, workload)
        for height in (low, high, *([(low + high) // 2] if (op, workload) in thirds else [])):
            found.setdefault((op, height), []).append(workload)
    return found


@lru_cache(maxsize=64)
def median_bytes(space: Space, width: int, workload: Workload) -> float:
    """The median bytes of weights and states of the models of a width, over a fixed sample of the space."""
    sampled = variation.sample(space, np.random.default_rng(0), 2001)
    some = sampled[sampled[:, 0] == space.width.index(width)]
    return float(np.median(held_bytes(space, workload, some)))


def choose_models(
    space: Space,
    sizes: ModelCounts,
    ops: Mapping[Workload, OpTimes],
    runs: Callable[[Architecture], bool] = lambda _: True,
) -> dict[str, list[Architecture]]:
    """The whole models to measure: ``optimal`` and ``random`` to fit, ``held_out`` and ``repeat``.

    The held-out ones are drawn with a seed of their own, none of them is among the others, and
    they are spread over the latencies that there are. ``runs`` says which models the device can run;
    where it is few of them, fewer are chosen.

    Raises:
        InputError: there are too few to fit and test on.
    """
    held_out = _spread(
        space,
        _distinct(space, np.random.default_rng([sizes.seed, 2]), 10 * sizes.held_out, runs),
        sizes.held_out,
        ops,
    )
    taken = {a.key for a in held_out}
    rng = np.random.default_rng([sizes.seed, 1])
    pool = _distinct(space, rng, 600, lambda a: runs(a) and a.key not in taken)
    if len(pool) < LEAST_MODELS or len(held_out) < LEAST_MODELS:
        raise InputError(
            f"space {space.name}: {len(pool)} architectures to fit on and {len(held_out)} to test on, "
            f"at least {LEAST_MODELS} of each are needed"
        )
    rows = genome.encode(space, pool)
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
    """``count`` of the drawn ones, evenly over the order of their op sums.

    They stand in random order, so that the first few are spread as well.
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
    """Up to ``count`` different random architectures of those allowed."""
    found: dict[str, Architecture] = {}
    for _ in range(DRAWN):
        drawn = genome.decode(space, variation.sample(space, rng, count))
        found |= {a.key: a for a in drawn if runs(a)}
        if len(found) >= count:
            break
    return list(islice(found.values(), count))


def d_optimal(designs: Sequence[NDArray[np.float64]], count: int) -> list[int]:
    """Rows that make the information of several designs [N, P] over the same rows large, greedily.

    Each pick maximises the sum over designs of log det(I/100 + X^T X), by the matrix
    determinant lemma (Fedorov 1972 gives the criterion).
    """
    inverses = [np.eye(design.shape[1]) * 100.0 for design in designs]
    chosen: list[int] = []
    for _ in range(min(count, len(designs[0]))):
        gain = sum(
            np.log1p(np.einsum("ij,jk,ik->i", design, inverse, design))
            for design, inverse in zip(designs, inverses, strict=True)
        )
        gain = np.asarray(gain)
        gain[chosen] = -np.inf
        best = int(np.argmax(gain))
        chosen.append(best)
        for i, design in enumerate(designs):
            v = inverses[i] @ design[best]
            inverses[i] = inverses[i] - np.outer(v, v) / (1 + design[best] @ v)
    return chosen
