"""One contract for every strategy; the surrogate against textbook formulas; HAT's numbers."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from search.strategies.hat import Hat
from search.strategies.nsga2 import NSGA2, children
from search.strategies.pareto import hypervolume
from search.strategies.registry import make_strategy
from search.strategies.strategy import Random, Task, unseen
from search.strategies.surrogate import LEAST, Surrogate, features, kernel
from space import Space, genome, variation
from space.cost import params_cost
from space.genome import Genomes
from tests.contracts import tiny_space

NAMES = ["nsga2", "hat", "random", "optuna-nsga2", "optuna-tpe"]


def wide() -> Space:
    return tiny_space(
        width=[16, 32, 48], depth=[1, 2, 3], mixer=["attention", "linear", "gated_deltanet"], ffn=[0, 16, 32]
    )


def quality(space: Space, genomes: Genomes) -> np.ndarray:
    """A loss that every gene has a part in, and that size lowers: [N]."""
    weights = np.random.default_rng(7).random((genome.encoding(space).genes, 8))
    parts = weights[np.arange(genomes.shape[1]), genomes]
    return np.asarray(2.0 + parts.mean(axis=1) - 2e-5 * params_cost(space)(genomes))


def make_task(
    name: str, *, most_params: float = np.inf, population: int = 10, space: Space | None = None
) -> Task:
    space = space or wide()
    params = params_cost(space)

    def constraint_violation(genomes: Genomes) -> np.ndarray:
        return np.maximum(0.0, params(genomes) / most_params - 1)

    return Task(
        space=space,
        costs=(None,) if name == "hat" else (None, params),
        constraint_violation=constraint_violation,
        seeds=genome.encode(space, [genome.smallest(space), genome.largest(space)]),
        population=population,
        seed=3,
    )


def values_of(task: Task, genomes: Genomes) -> np.ndarray:
    found = quality(task.space, genomes)
    return np.stack([found if cost is None else cost(genomes) for cost in task.costs], axis=1)


@pytest.mark.parametrize("name", NAMES)
def test_generations_are_new_members_within_the_limits(name: str) -> None:
    space = wide()
    top = genome.encode(space, [genome.largest(space)])
    task = make_task(name, most_params=0.5 * float(params_cost(space)(top)[0]))
    strategy = make_strategy(name, task)
    seen: set[bytes] = set()
    for turn in range(5):
        asked = strategy.ask()
        assert len(asked) == (8 if name == "hat" and turn else 10)
        assert genome.contains(space, asked).all()
        assert (task.constraint_violation(asked) == 0).all()
        keys = {row.tobytes() for row in asked}
        assert len(keys) == len(asked)
        assert not keys & seen
        seen |= keys
        strategy.tell(asked, values_of(task, asked))


def test_the_first_generation_lies_far_apart_in_cost() -> None:
    """More evenly than as many plain samples, whose middle is crowded, over a range no smaller."""
    space = wide()
    costs = params_cost(space)
    squares, extents, middle = {}, {}, {}
    for name in ("nsga2", "random"):
        found = np.sort(costs(make_strategy(name, make_task(name, population=30)).ask()))
        extents[name], squares[name] = np.ptp(found), (np.diff(found) ** 2).sum()
        middle[name] = np.median(np.diff(found))
    assert extents["nsga2"] >= extents["random"]
    assert squares["nsga2"] < squares["random"]
    assert middle["nsga2"] > 1.5 * middle["random"]


@pytest.mark.parametrize("name", NAMES)
def test_one_that_was_told_a_record_goes_on_like_the_one_that_made_it(name: str) -> None:
    task = make_task(name)
    first = make_strategy(name, task)
    record = []
    for _ in range(4):
        asked = first.ask()
        values = values_of(task, asked)
        values[1] = np.nan  # one fails
        first.tell(asked, values)
        record.append((asked, values))
    second = make_strategy(name, task)
    for asked, values in record:
        second.tell(asked, values)
    np.testing.assert_array_equal(second.ask(), first.ask())


def test_a_replay_chooses_the_surrogates_settings_at_the_same_evaluations() -> None:
    """After each of eight generations of noisy values, several of which double what is known."""
    task = make_task("nsga2")
    first, rng = NSGA2(task), np.random.default_rng(5)
    record = []
    for _ in range(8):
        asked = first.ask()
        values = values_of(task, asked) + rng.normal(0, 0.05, (len(asked), 1)) * [1, 0]
        first.tell(asked, values)
        record.append((asked, values))
        second = NSGA2(task)
        for genomes, found in record:
            second.tell(genomes, found)
        assert second.surrogate is not None
        assert first.surrogate is not None
        assert second.surrogate.settings == first.surrogate.settings
        np.testing.assert_array_equal(second.ask(), first.ask())


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_asks_for_others(name: str) -> None:
    task = make_task(name)
    other = replace(task, seed=4)
    assert not np.array_equal(make_strategy(name, task).ask(), make_strategy(name, other).ask())


@pytest.mark.parametrize("name", NAMES)
def test_a_space_that_is_used_up_ends(name: str) -> None:
    space = tiny_space(
        width=[16],
        depth=[1, 2],
        heads=[1],
        ffn=[16],
        mixer=["attention", "linear"],
        ratios=["full", "linear"],
    )
    task = make_task(name, space=space, population=4)
    strategy = make_strategy(name, task)
    found = 0
    for _ in range(12):
        asked = strategy.ask()
        if not len(asked):
            break
        found += len(asked)
        strategy.tell(asked, values_of(task, asked))
    assert not len(strategy.ask())
    assert found == genome.size(space)


@pytest.mark.parametrize("name", ["nsga2", "hat", "random"])
def test_a_few_architectures_within_the_limits_are_all_found(name: str) -> None:
    space = wide()
    rows = variation.sample(space, np.random.default_rng(0), 4000)
    bound = float(np.sort(np.unique(params_cost(space)(rows)))[3])
    task = make_task(name, most_params=bound)
    strategy = make_strategy(name, task)
    found = []
    while len(asked := strategy.ask()):
        found.append(asked)
        strategy.tell(asked, values_of(task, asked))
    everyone = np.unique(rows[params_cost(space)(rows) <= bound], axis=0)
    assert {row.tobytes() for row in everyone} <= {row.tobytes() for part in found for row in part}


def test_evolution_beats_random_and_its_surrogate_beats_evolution_alone() -> None:
    task = make_task("nsga2", population=12)
    everyone = np.unique(variation.sample(task.space, np.random.default_rng(0), 20000), axis=0)
    points = values_of(task, everyone)
    reference = points.max(axis=0)

    def reached(make: type, seed: int, surrogate: bool) -> float:
        strategy = make(replace(task, seed=seed, surrogate=surrogate))
        parts = []
        for _ in range(8):
            asked = strategy.ask()
            parts.append(values_of(task, asked))
            strategy.tell(asked, parts[-1])
        return hypervolume(np.concatenate(parts), reference)

    means = [
        np.mean([reached(make, seed, surrogate) for seed in range(4)])
        for make, surrogate in ((Random, False), (NSGA2, False), (NSGA2, True))
    ]
    assert means[0] < means[1] < means[2]


def test_hats_children_come_from_its_parents() -> None:
    task = make_task("hat", population=25)
    strategy = Hat(task)
    asked = strategy.ask()
    values = values_of(task, asked)
    strategy.tell(asked, values)
    best = np.argsort(values[:, 0], kind="stable")[:5]
    np.testing.assert_array_equal(strategy.parents, asked[best])
    assert len(strategy.ask()) == 20


def test_children_are_members_and_come_from_both_parents() -> None:
    task = make_task("nsga2")
    parents = variation.sample(task.space, np.random.default_rng(1), 6)
    born = children(task, parents, 200, np.random.default_rng(2))
    assert genome.contains(task.space, born).all()
    same = (born[:, None] == parents[None]).mean(axis=2)
    assert (np.sort(same, axis=1)[:, -2:] > 0.3).all(axis=1).mean() > 0.9


def test_unseen_keeps_the_order_and_leaves_out_what_was_given() -> None:
    rows = np.array([[1, 1], [2, 2], [1, 1], [3, 3], [4, 4]], np.int16)
    found = unseen(rows, {rows[3].tobytes()}, 3)
    np.testing.assert_array_equal(found, [[1, 1], [2, 2], [4, 4]])


def test_the_surrogate_is_a_gaussian_process() -> None:
    """Its expectation and its choice of settings, from the textbook's formulas with dense inverses."""
    task = make_task("nsga2")
    surrogate = Surrogate(task)
    rows = unseen(variation.sample(task.space, np.random.default_rng(0), 200), set(), 40)
    values = values_of(task, rows)
    values[3] = np.nan
    surrogate.tell(rows[: LEAST - 1], values[: LEAST - 1])
    assert not surrogate.ready
    surrogate.tell(rows[LEAST - 1 :], values[LEAST - 1 :])
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


def test_the_kernel_by_hand() -> None:
    space = wide()
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
