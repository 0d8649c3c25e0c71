"""Search settings: strategies by name, their defaults, and the objectives of a problem."""

import pytest
from pydantic import ValidationError

from search.engine.config import SearchConfig, make_problem, require_objectives
from search.problem.objective import Objective
from search.strategies.registry import STRATEGIES, register_strategy
from search.strategies.strategy import Random
from search.testing import contract_space
from space import InputError
from space.io.config import parse


def test_unknown_strategy_is_refused_with_the_names() -> None:
    names = "nsga2, mip-nsga2, hat, random, optuna-nsga2, optuna-tpe"
    with pytest.raises(InputError, match=f"strategy.*'evolution': not one of {names}"):
        parse(SearchConfig, {"strategy": "evolution"}, "config.yaml")


def test_strategy_gives_population_and_generations() -> None:
    assert SearchConfig().size == (24, 12)
    assert SearchConfig(strategy="hat").size == (125, 30)
    assert SearchConfig(strategy="hat", population=10, generations=2).size == (10, 2)


def test_registered_strategy_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STRATEGIES, "_values", dict(STRATEGIES._values))
    register_strategy("third", Random, population=7, generations=3, max_objectives=3)
    config = SearchConfig(strategy="third")
    assert config.size == (7, 3)
    with pytest.raises(
        InputError, match="it has at most 3 objectives, not loss, recall_loss, params, memory@8"
    ):
        require_objectives(config, [*map(Objective.parse, ("loss", "recall_loss", "params", "memory@8"))])
    with pytest.raises(InputError, match="strategy 'third' is registered already"):
        register_strategy("third", lambda task: Random(task))


def test_baseline_is_none_or_random() -> None:
    assert SearchConfig().baseline == "none"
    with pytest.raises(ValidationError, match="baseline"):
        SearchConfig(baseline="hat")


def test_problem_without_a_device_needs_objectives() -> None:
    space = contract_space()
    with pytest.raises(InputError, match="there is no device"):
        make_problem(space, {}, SearchConfig())
    problem = make_problem(space, {}, SearchConfig(objectives=("loss", "params"), limits=("params<=50%",)))
    assert problem.names == ("loss", "params")
    assert problem.qualities == ("loss", "recall_loss")
