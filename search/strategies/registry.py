"""Search strategies by name.

A plug-in adds one by :func:`register_strategy`; a configuration then names it::

    class HillClimbing(Strategy):
        def ask(self): ...

    register_strategy("hill-climbing", HillClimbing, population=8, generations=50)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from space.registry import Registry

if TYPE_CHECKING:
    from search.strategies.strategy import Strategy, Task

MakeStrategy = Callable[["Task"], "Strategy"]


@dataclass(frozen=True, kw_only=True)
class StrategyEntry:
    """A strategy with its defaults.

    Attributes:
        make: gives the strategy of a task.
        population: architectures of a generation, where the configuration gives no number.
        generations: of a search, where the configuration gives no number.
        max_objectives: that it can minimise; None: any number.
        relative_offspring: architectures of a generation after the first, as a share of the population.
    """

    make: MakeStrategy
    population: int = 24
    generations: int = 12
    max_objectives: int | None = None
    relative_offspring: float = 1.0


STRATEGIES: Registry[StrategyEntry] = Registry("strategy")


def register_strategy(
    name: str,
    make: MakeStrategy,
    *,
    population: int = 24,
    generations: int = 12,
    max_objectives: int | None = None,
    relative_offspring: float = 1.0,
) -> None:
    """Make a strategy known to configurations.

    Args:
        name: of the strategy.
        make: gives the strategy of a task; a subclass of :class:`search.strategies.strategy.Strategy` does.
        population: architectures of a generation, where the configuration gives no number.
        generations: of a search, where the configuration gives no number.
        max_objectives: that it can minimise; None: any number.
        relative_offspring: architectures of a generation after the first, as a share of the population.

    Raises:
        InputError: another strategy has the name.
    """
    entry = StrategyEntry(
        make=make,
        population=population,
        generations=generations,
        max_objectives=max_objectives,
        relative_offspring=relative_offspring,
    )
    STRATEGIES.register(name, entry)


def make_strategy(name: str, task: "Task") -> "Strategy":
    """The strategy of a name for a task.

    Args:
        name: a registered one.
        task: what it is to solve.

    Raises:
        InputError: no strategy has the name.
    """
    return STRATEGIES.get(name).make(task)


# The built-in strategies import their libraries when one is made: naming one takes no time.


def _nsga2(task: "Task") -> "Strategy":
    from search.strategies.nsga2 import NSGA2

    return NSGA2(task)


def _mip_nsga2(task: "Task") -> "Strategy":
    from search.strategies.mip_nsga2 import MipNSGA2

    return MipNSGA2(task)


def _hat(task: "Task") -> "Strategy":
    from search.strategies.hat import Hat

    return Hat(task)


def _random(task: "Task") -> "Strategy":
    from search.strategies.strategy import Random

    return Random(task)


def _optuna_nsga2(task: "Task") -> "Strategy":
    from search.strategies.optuna import nsga2

    return nsga2(task)


def _optuna_tpe(task: "Task") -> "Strategy":
    from search.strategies.optuna import tpe

    return tpe(task)


register_strategy("nsga2", _nsga2)
register_strategy("mip-nsga2", _mip_nsga2)
register_strategy("hat", _hat, population=125, generations=30, max_objectives=1, relative_offspring=0.8)
register_strategy("random", _random)
register_strategy("optuna-nsga2", _optuna_nsga2)
register_strategy("optuna-tpe", _optuna_tpe)
