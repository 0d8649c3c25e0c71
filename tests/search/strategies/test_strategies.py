"""The contract of every strategy; the surrogate against textbook formulas; the sizes of HAT."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from search.strategies.hat import Hat
from search.strategies.nsga2 import NSGA2, children
from search.strategies.pareto import hypervolume
from search.strategies.registry import make_strategy
from search.strategies.strategy import Random, unseen
from search.strategies.surrogate import MIN_EVALUATIONS, Surrogate, features, kernel
from search.testing import StrategyContract, contract_space, contract_task, objective_values
from space import genome, variation
from space.cost import params_cost


class TestNSGA2(StrategyContract):
    name = "nsga2"


class TestMipNSGA2(StrategyContract):
    name = "mip-nsga2"


class TestHat(StrategyContract):
    name = "hat"


class TestRandom(StrategyContract):
    name = "random"


class TestOptunaNSGA2(StrategyContract):
    name = "optuna-nsga2"
    exhaustive = False


class TestOptunaTPE(StrategyContract):
    name = "optuna-tpe"
    exhaustive = False


def test_first_generation_is_spread_over_the_costs() -> None:
    """More evenly than as many plain samples, whose middle is crowded, over a range no smaller."""
    space = contract_space()
    costs = params_cost(space)
    squares, extents, middle = {}, {}, {}
    for name in ("nsga2", "random"):
        found = np.sort(costs(make_strategy(name, contract_task(population=30)).ask()))
        extents[name], squares[name] = np.ptp(found), (np.diff(found) ** 2).sum()
        middle[name] = np.median(np.diff(found))
    assert extents["nsga2"] >= extents["random"]
    assert squares["nsga2"] < squares["random"]
    assert middle["nsga2"] > 1.5 * middle["random"]


def test_replayed_surrogate_chooses_the_same_settings() -> None:
    """After each of eight generations of noisy values, several of which double what is known."""
    task = contract_task()
    first, rng = NSGA2(task), np.random.default_rng(5)
    record = []
    for _ in range(8):
        asked = first.ask()
        values = objective_values(task, asked) + rng.normal(0, 0.05, (len(asked), 1)) * [1, 0]
        first.tell(asked, values)
        record.append((asked, values))
        second = NSGA2(task)
        for genomes, found in record:
            second.tell(genomes, found)
        assert second.surrogate is not None
        assert first.surrogate is not None
        assert second.surrogate.settings == first.surrogate.settings
        np.testing.assert_array_equal(second.ask(), first.ask())


def test_nsga2_beats_random_and_a_surrogate_improves_nsga2() -> None:
    task = contract_task(population=12)
    everyone = np.unique(variation.sample(task.space, np.random.default_rng(0), 20000), axis=0)
    points = objective_values(task, everyone)
    reference = points.max(axis=0)

    def reached(make: type, seed: int, surrogate: bool) -> float:
        strategy = make(replace(task, seed=seed, surrogate=surrogate))
        parts = []
        for _ in range(8):
            asked = strategy.ask()
            parts.append(objective_values(task, asked))
            strategy.tell(asked, parts[-1])
        return hypervolume(np.concatenate(parts), reference)

    means = [
        np.mean([reached(make, seed, surrogate) for seed in range(4)])
        for make, surrogate in ((Random, False), (NSGA2, False), (NSGA2, True))
    ]
    assert means[0] < means[1] < means[2]


def test_hat_keeps_the_best_fifth_as_parents() -> None:
    task = contract_task(1, population=25)
    strategy = Hat(task)
    asked = strategy.ask()
    values = objective_values(task, asked)
    strategy.tell(asked, values)
    best = np.argsort(values[:, 0], kind="stable")[:5]
    np.testing.assert_array_equal(strategy.parents, asked[best])
    assert len(strategy.ask()) == 20


def test_children_are_members_and_resemble_both_parents() -> None:
    task = contract_task()
    parents = variation.sample(task.space, np.random.default_rng(1), 6)
    born = children(task, parents, 200, np.random.default_rng(2))
    assert genome.contains(task.space, born).all()
    same = (born[:, None] == parents[None]).mean(axis=2)
    assert (np.sort(same, axis=1)[:, -2:] > 0.3).all(axis=1).mean() > 0.9


def test_unseen_keeps_the_order() -> None:
    rows = np.array([[1, 1], [2, 2], [1, 1], [3, 3], [4, 4]], np.int16)
    found = unseen(rows, {rows[3].tobytes()}, 3)
    np.testing.assert_array_equal(found, [[1, 1], [2, 2], [4, 4]])


def test_surrogate_equals_a_textbook_gaussian_process() -> None:
    """Its expectation and its choice of settings, from the textbook's formulas with dense inverses."""
    task = contract_task()
    surrogate = Surrogate(task)
    rows = unseen(variation.sample(task.space, np.random.default_rng(0), 200), set(), 40)
    values = objective_values(task, rows)
    values[3] = np.nan
    surrogate.tell(rows[: MIN_EVALUATIONS - 1], values[: MIN_EVALUATIONS - 1])
    assert not surrogate.ready
    surrogate.tell(rows[MIN_EVALUATIONS - 1 :], values[MIN_EVALUATIONS - 1 :])
    assert surrogate.ready
    new = variation.sample(task.space, np.random.default_rng(1), 30)
    found = surrogate(new)
    np.testing.assert_array_equal(found[:, 1], params_cost(task.space)(new))
    good = np.isfinite(values).all(axis=1)
    logs = np.log(values[good, 0])
    target = (logs - logs.mean()) / logs.std()
    known, seen = features(task.space, rows[good]), features(task.space, new)
    from search.strategies.surrogate import GRID

    def covariance(setting: tuple) -> np.ndarray:
        matrix = kernel(known, known, setting) + setting[3] * np.eye(len(target))
        return matrix * float(target @ np.linalg.inv(matrix) @ target) / len(target)

    likelihoods = [multivariate_normal(cov=covariance(s)).logpdf(target) for s in GRID]
    best = GRID[int(np.argmax(likelihoods))]
    assert surrogate.settings[0] == best
    matrix = kernel(known, known, best) + best[3] * np.eye(len(target))
    expected = kernel(seen, known, best) @ np.linalg.inv(matrix) @ target
    np.testing.assert_allclose(found[:, 0], np.exp(logs.mean() + logs.std() * expected), rtol=1e-8)


def test_kernel_equals_its_formula() -> None:
    space = contract_space()
    rows = variation.sample(space, np.random.default_rng(0), 12)
    a = features(space, rows)
    assert ((a.sums >= 0) & (a.sums <= 1)).all()
    matrix = kernel(a, a, ((1.0, 0.5, 0.25), 0.4, 3.0, 0.0))
    for i in range(12):
        for j in range(12):
            differ = int((rows[i] != rows[j]).sum())
            apart = float(((a.sums[i] - a.sums[j]) ** 2).sum())
            expected = 1 - differ / rows.shape[1] + 0.5 * np.exp(-apart / 0.32) + 0.25 * np.exp(-differ / 3)
            assert matrix[i, j] == pytest.approx(expected, rel=1e-9)
    assert np.linalg.eigvalsh(matrix).min() > -1e-9
