"""Choice of the whole models to measure.

Every model tells something about all of its ops, so the models are chosen that tell most together. Each is
the one that lowers the expected squared relative error of a population's latencies most, per second that it
takes to measure (variance reduction, Cohn et al. 1996). Several are chosen before any of them is measured,
because the variance of a Gaussian process does not depend on the measured values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from latency.predictor.op_latencies import OpLatencies, expected_latencies
from space import Architecture, InputError, Space, Workload, genome, variation

Array = NDArray[np.float64]
ModelRole = Literal["optimal", "random", "held_out", "repeat"]
MAX_DRAWS = 20  # rounds of drawing random architectures until enough are allowed
POPULATION = 300  # random architectures that models are chosen from, and whose latencies should be accurate
HELD_OUT_CANDIDATES = 10  # random architectures per held-out model, over whose latencies these are spread
MIN_MODELS = 3  # to fit on, and to test on
MODEL_SECONDS = 0.2  # approximate time that building a session and timing a short run takes
MODEL_RUNS = 40  # approximate number of runs in the timing of a long one


@dataclass(frozen=True)
class ModelCounts:
    """Numbers of whole models to measure.

    Attributes:
        optimal: maximum number of chosen models to fit on.
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
class ModelDesign:
    """Models of a space that may be measured.

    Attributes:
        space: the space.
        workloads: in which every model is measured.
        population: models to choose from, and whose latencies should be accurate.
        random: random models to fit on.
        held_out: models to test on, spread over the range of latencies.
        repeat: those that are measured twice.
    """

    space: Space
    workloads: tuple[Workload, ...]
    population: tuple[Architecture, ...]
    random: tuple[Architecture, ...]
    held_out: tuple[Architecture, ...]
    repeat: tuple[Architecture, ...]

    def expected(self) -> OpLatencies:
        """Latencies before anything was measured."""
        return expected_latencies(self.space, self.population, self.workloads)

    def expected_error(self, ops: OpLatencies) -> float:
        """Expected relative error of a latency (root mean square) due to the uncertainty of op latencies.

        Args:
            ops: op latencies fitted to the measurements so far.
        """
        variances = [np.diag(ops.covariance(self.population, w)[1]).mean() for w in self.workloads]
        return float(np.sqrt(np.mean(variances)))

    def choose(
        self, ops: OpLatencies, count: int, measured: Sequence[Architecture] = ()
    ) -> list[Architecture]:
        """Choose the next models to measure, by expected variance reduction per second.

        Mixers that no measured model has come first, since nothing is known of them.

        Args:
            ops: op latencies as they are known so far.
            count: maximum number of models, but for those that are needed for all mixers.
            measured: models that are not chosen again.
        """
        needed = self._covering({mixer for a in measured for mixer in _mixers(a)})
        known = {a.key for a in (*measured, *needed)}
        free = np.array([a.key not in known for a in self.population])
        found = [ops.covariance(self.population, w) for w in self.workloads]
        covariances = [covariance for _, covariance in found]
        costs = MODEL_SECONDS + MODEL_RUNS * sum(seconds for seconds, _ in found)
        noise = [np.full(len(free), ops.models[w.phase].white) for w in self.workloads]
        rest = max(0, count - len(needed))
        chosen = expected_variance_reduction(covariances, noise, np.asarray(costs), rest, free)
        return [*needed, *(self.population[i] for i in chosen)]

    def _covering(self, known: set[str]) -> list[Architecture]:
        """A few models that together have all mixers that are not known, greedily."""
        wanted = {mixer for a in self.population for mixer in _mixers(a)} - known
        found: list[Architecture] = []
        while wanted:
            best = max(self.population, key=lambda a: len(_mixers(a) & wanted))
            found.append(best)
            wanted -= _mixers(best)
        return found


def _mixers(architecture: Architecture) -> set[str]:
    """The mixers of a model."""
    return {layer.mixer for layer in architecture.layers} - {"none"}


def expected_variance_reduction(
    covariances: Sequence[Array],
    noises: Sequence[Array],
    costs: Array,
    count: int,
    free: NDArray[np.bool_],
) -> list[int]:
    """Choose observations greedily by the expected reduction of the mean variance per unit of cost.

    Args:
        covariances: prior covariance of the quantities, in each of several conditions: [P, P].
        noises: variance of an observation of each quantity, by condition: [P].
        costs: cost of observing each quantity, in all conditions together: [P].
        count: maximum number of observations.
        free: True for quantities that may be chosen: [P].

    Returns:
        Indices of the quantities, the most informative first.
    """
    left, current = free.copy(), [np.array(covariance) for covariance in covariances]
    chosen: list[int] = []
    for _ in range(min(count, int(free.sum()))):
        gain = sum(
            np.mean(covariance**2, axis=0) / (np.diag(covariance) + noise)
            for covariance, noise in zip(current, noises, strict=True)
        )
        best = int(np.argmax(np.where(left, gain / costs, -np.inf)))
        left[best] = False
        chosen.append(best)
        # Condition on the observation (a rank-one update), whatever its value will be.
        for covariance, noise in zip(current, noises, strict=True):
            row = covariance[best].copy()
            covariance -= np.outer(row, row) / (row[best] + noise[best])
    return chosen


def model_design(
    space: Space,
    workloads: Sequence[Workload],
    sizes: ModelCounts,
    runs: Callable[[Architecture], bool] = lambda _: True,
) -> ModelDesign:
    """Draw the models of a design.

    Held-out models are drawn with a seed of their own, are disjoint from the models of the fit, and are
    spread evenly over the range of latencies.

    Args:
        space: the space.
        workloads: in which every model is measured.
        sizes: numbers of models; fewer are drawn if ``runs`` allows too few.
        runs: returns True for architectures that the device can run.

    Raises:
        InputError: there are too few architectures to fit and test on.
    """
    candidates = _distinct(
        space, np.random.default_rng([sizes.seed, 2]), HELD_OUT_CANDIDATES * sizes.held_out, runs
    )
    held_out = _spread(space, candidates, sizes.held_out, workloads)
    taken = {a.key for a in held_out}
    rng = np.random.default_rng([sizes.seed, 1])
    pool = _distinct(space, rng, POPULATION + sizes.random, lambda a: runs(a) and a.key not in taken)
    if len(pool) < MIN_MODELS or len(held_out) < MIN_MODELS:
        raise InputError(
            f"space {space.name}: {len(pool)} architectures to fit on and {len(held_out)} to test on, "
            f"at least {MIN_MODELS} of each are needed"
        )
    drawn = min(sizes.random, len(pool) // 2)
    return ModelDesign(
        space=space,
        workloads=tuple(workloads),
        population=tuple(pool[drawn:]),
        random=tuple(pool[:drawn]),
        held_out=tuple(held_out),
        repeat=tuple(held_out[: sizes.repeated]),
    )


def _spread(
    space: Space, drawn: Sequence[Architecture], count: int, workloads: Sequence[Workload]
) -> list[Architecture]:
    """A choice from drawn architectures, spread evenly over the order of their expected latencies.

    The order is random, so that the first few are spread as well.
    """
    if not drawn:
        return []
    expected = expected_latencies(space, drawn, workloads)
    order = np.argsort(expected.covariance(drawn, workloads[0])[0])
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
