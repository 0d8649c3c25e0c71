"""Test suites that every strategy, metric and quality objective passes, for use with pytest.

Subclass one in a test file and name what is registered::

    from search.testing import StrategyContract

    class TestHillClimbing(StrategyContract):
        name = "hill-climbing"
"""
# ruff: noqa: S101

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from latency import Predictor
from search.problem.limit import Limit
from search.problem.metric import METRICS, Metric
from search.problem.milp import least
from search.problem.objective import QUALITIES, Objective
from search.problem.solution_pool import best_architectures
from search.strategies.registry import STRATEGIES, StrategyEntry, make_strategy
from search.strategies.strategy import Strategy, Task
from space import Space, Workload, genome
from space.cost import params_cost
from space.genome import Genomes
from space.ops import Cost
from space.slot_scores import SlotScores
from space.variation import sample

SAMPLES = 4000


def contract_space(**changes: object) -> Space:
    """A small space of a few thousand architectures.

    Args:
        changes: fields of the space, or of its ``layer`` and ``hybrid``.
    """
    value: dict[str, object] = {
        "name": "contract",
        "vocab_size": 19,
        "max_seq_len": 64,
        "head_dim": 16,
        "width": [16, 32, 48],
        "depth": [1, 2, 3],
    }
    layer: dict[str, object] = {
        "mixer": ["attention", "linear", "gated_deltanet"],
        "heads": [1, 2],
        "ffn": [0, 16, 32],
    }
    hybrid: dict[str, object] = {"ratios": ["full", 1, "linear"]}
    for key, change in changes.items():
        part = next((part for part in (layer, hybrid) if key in part), value)
        part[key] = change
    return Space.model_validate({**value, "layer": layer, "hybrid": hybrid})


def synthetic_loss(space: Space, genomes: Genomes) -> NDArray[np.float64]:
    """A loss [N] that every gene has a part in, and that more parameters lower.

    Args:
        space: of the genomes.
        genomes: [N, G].
    """
    weights = np.random.default_rng(7).random((genome.encoding(space).genes, 8))
    parts = weights[np.arange(genomes.shape[1]), genomes]
    return np.asarray(2.0 + parts.mean(axis=1) - 2e-5 * params_cost(space)(genomes))


def contract_task(
    objectives: int = 2,
    *,
    max_params: float = np.inf,
    population: int = 10,
    space: Space | None = None,
    seed: int = 3,
) -> Task:
    """A task of one quality, then the number of parameters as often as objectives are left.

    Args:
        objectives: their number.
        max_params: the limit on parameters.
        population: architectures of a generation.
        space: None: :func:`contract_space`.
        seed: of the strategy.
    """
    chosen = space or contract_space()
    cost = params_cost(chosen)

    def constraint_violation(genomes: Genomes) -> NDArray[np.float64]:
        return np.maximum(0.0, cost(genomes) / max_params - 1)

    def best(scores: SlotScores, bounds: Sequence[float], factor: float, number: int) -> Genomes:
        costs = [cost] * objectives
        return best_architectures(scores, costs, [factor * max_params, *bounds[1:]], number)

    return Task(
        space=chosen,
        objective_costs=(None, *[cost] * (objectives - 1)),
        constraint_violation=constraint_violation,
        initial_genomes=genome.encode(chosen, [genome.smallest(chosen), genome.largest(chosen)]),
        population=population,
        seed=seed,
        best_architectures=best,
    )


def objective_values(task: Task, genomes: Genomes) -> NDArray[np.float64]:
    """The objectives [N, M] of genomes [N, G]: :func:`synthetic_loss` and the task's costs.

    Args:
        task: what is solved.
        genomes: to be evaluated.
    """
    loss = synthetic_loss(task.space, genomes)
    return np.stack([loss if cost is None else cost(genomes) for cost in task.objective_costs], axis=1)


class StrategyContract:
    """Tests of a registered strategy.

    Attributes:
        name: of the strategy.
        exhaustive: it finds all architectures within the limits where they are few.
    """

    name: ClassVar[str]
    exhaustive: ClassVar[bool] = True

    @property
    def entry(self) -> StrategyEntry:
        """The registered strategy."""
        return STRATEGIES.get(self.name)

    def task(self, max_params: float = np.inf, space: Space | None = None, **changes: int) -> Task:
        """A task with as many objectives as the strategy can minimise, at most two.

        Args:
            max_params: the limit on parameters.
            space: None: :func:`contract_space`.
            changes: the population or the seed.
        """
        objectives = min(2, self.entry.max_objectives or 2)
        return contract_task(objectives, max_params=max_params, space=space, **changes)

    def make(self, task: Task) -> Strategy:
        """The strategy of a task, after its probes if it has any.

        Args:
            task: what it is to solve.
        """
        strategy = make_strategy(self.name, task)
        while len(probes := strategy.probes()):
            strategy.tell_probes(probes, objective_values(task, probes))
        return strategy

    def test_generations_are_new_members_within_the_limits(self) -> None:
        """Every generation has its full size, and no architecture twice."""
        space = contract_space()
        top = genome.encode(space, [genome.largest(space)])
        task = self.task(max_params=0.5 * float(params_cost(space)(top)[0]))
        strategy = self.make(task)
        seen: set[bytes] = set()
        for generation in range(5):
            asked = strategy.ask()
            share = self.entry.relative_offspring if generation else 1.0
            assert len(asked) == round(share * task.population)
            assert genome.contains(space, asked).all()
            assert (task.constraint_violation(asked) == 0).all()
            keys = {row.tobytes() for row in asked}
            assert len(keys) == len(asked)
            assert not keys & seen
            seen |= keys
            strategy.tell(asked, objective_values(task, asked))

    def test_resumed_strategy_equals_uninterrupted(self) -> None:
        """A strategy that is told a record proposes the same as the one that made it."""
        task = self.task()
        first = self.make(task)
        record = []
        for _ in range(4):
            asked = first.ask()
            values = objective_values(task, asked)
            values[1] = np.nan  # one evaluation failed
            first.tell(asked, values)
            record.append((asked, values))
        second = self.make(task)
        for asked, values in record:
            second.tell(asked, values)
        np.testing.assert_array_equal(second.ask(), first.ask())

    def test_another_seed_proposes_others(self) -> None:
        """The first generation depends on the seed."""
        first, second = self.make(self.task()), self.make(self.task(seed=4))
        assert not np.array_equal(first.ask(), second.ask())

    def test_exhausted_space_ends_the_search(self) -> None:
        """All architectures of a tiny space are proposed, and then none."""
        space = contract_space(
            width=[16],
            depth=[1, 2],
            heads=[1],
            ffn=[16],
            mixer=["attention", "linear"],
            ratios=["full", "linear"],
        )
        task = self.task(space=space, population=4)
        strategy = self.make(task)
        proposed = 0
        for _ in range(12):
            asked = strategy.ask()
            if not len(asked):
                break
            proposed += len(asked)
            strategy.tell(asked, objective_values(task, asked))
        assert not len(strategy.ask())
        assert proposed == genome.size(space)

    def test_few_architectures_within_the_limits_are_all_found(self) -> None:
        """Under a limit that hardly any architecture keeps."""
        if not self.exhaustive:
            return
        space = contract_space()
        params = params_cost(space)
        rows = sample(space, np.random.default_rng(0), SAMPLES)
        bound = float(np.sort(np.unique(params(rows)))[3])
        task = self.task(max_params=bound)
        strategy = self.make(task)
        proposed: set[bytes] = set()
        while len(asked := strategy.ask()):
            proposed |= {row.tobytes() for row in asked}
            strategy.tell(asked, objective_values(task, asked))
        assert {row.tobytes() for row in rows[params(rows) <= bound]} <= proposed


class MetricContract:
    """Tests of a registered metric.

    Attributes:
        name: of the metric.
        length: tokens of the workload, where the metric takes one.
    """

    name: ClassVar[str]
    length: ClassVar[int] = 32

    @property
    def metric(self) -> Metric:
        """The registered metric."""
        return METRICS.get(self.name)

    @property
    def workload(self) -> Workload | None:
        """The workload that the metric is asked for; None where it takes none."""
        phase = self.metric.phase
        return None if phase is None else Workload(phase=phase, length=self.length)

    def space(self) -> Space:
        """The space whose architectures are priced."""
        return contract_space()

    def predictor(self) -> Predictor | None:
        """A predictor of :meth:`space`; override it for a metric that needs a device."""
        return None

    def cost(self, confidence: float | None = None) -> Cost:
        """The metric's cost of the space.

        Args:
            confidence: of an upper bound; None: the mean.
        """
        return self.metric.cost(self.space(), self.predictor(), self.workload, confidence)

    def rows(self) -> Genomes:
        """Genomes of the space, the smallest and largest among them."""
        space = self.space()
        ends = genome.encode(space, [genome.smallest(space), genome.largest(space)])
        return np.concatenate([ends, sample(space, np.random.default_rng(0), 200)])

    def test_limit_is_parsed_in_every_unit(self) -> None:
        """A limit's canonical text is read as the same limit."""
        where = self.name if self.workload is None else f"{self.name}@{self.length}"
        for unit, factor in self.metric.unit.parsed.items():
            limit = Limit.parse(f"{where} <= 2 {unit}")
            assert limit == Limit.parse(limit.text)
            assert limit.bound == 2 * factor
            assert limit.metric is self.metric
        assert Limit.parse(f"{where}<=50%").relative

    def test_objective_is_the_metric(self) -> None:
        """The text of the metric in limits is an objective too."""
        text = self.name if self.workload is None else f"{self.name}@{self.length}"
        objective = Objective.parse(text)
        assert objective.metric is self.metric
        assert objective.workload == self.workload

    def test_values_are_positive_and_finite(self) -> None:
        """One value for each architecture."""
        values = self.cost()(self.rows())
        assert values.shape == (len(self.rows()),)
        assert np.isfinite(values).all()
        assert (values > 0).all()

    def test_upper_bound_is_not_below_the_mean(self) -> None:
        """A confidence makes a metric no smaller."""
        assert (self.cost(0.975)(self.rows()) >= self.cost()(self.rows()) * (1 - 1e-12)).all()

    def test_measured_count_equals_the_cost(self) -> None:
        """The value at verification is that of the search, where nothing has to be measured."""
        space, rows = self.space(), self.rows()[:20]
        if self.metric.count is not None:
            architectures = genome.decode(space, rows)
            counts = [self.metric.count(a, space.config, self.workload) for a in architectures]
            np.testing.assert_allclose(self.cost()(rows), np.array(counts, float), rtol=1e-9)

    def test_least_value_is_found(self) -> None:
        """No sampled architecture has less than the exact minimum."""
        value, architecture = least(self.space(), self.cost())
        row = genome.encode(self.space(), [architecture])
        assert float(self.cost()(row)[0]) <= value * (1 + 1e-6)
        assert value <= self.cost()(self.rows()).min() * (1 + 1e-6)


class ObjectiveContract:
    """Tests of a registered quality objective.

    Attributes:
        name: of the objective.
        vocab_size: of the model that it is evaluated on.
    """

    name: ClassVar[str]
    vocab_size: ClassVar[int] = 19

    def test_objective_is_a_quality(self) -> None:
        """Its name is an objective that is evaluated."""
        assert Objective.parse(self.name).is_quality

    def test_value_is_finite_and_the_same_again(self) -> None:
        """On a model whose logits depend on the last token, and sequences of which half can be recalled."""
        import torch

        from supernet.evaluate import EvaluationSet

        evaluate = QUALITIES.get(self.name).evaluate
        if evaluate is None:
            return
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self.vocab_size, (6, 17))
        recallable = np.arange(16)[None].repeat(6, axis=0) % 2 == 0
        data = EvaluationSet(tokens=tokens[:, :-1], targets=tokens[:, 1:], recallable=recallable)
        table = torch.tensor(rng.normal(size=(self.vocab_size, self.vocab_size)), dtype=torch.float32)
        first, second = [evaluate(lambda tokens_BT: table[tokens_BT], data) for _ in range(2)]
        assert np.isfinite(first)
        assert float(first) == float(second)
