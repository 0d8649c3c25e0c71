"""Feasibility of limits, decided exactly before a search starts.

One limit without a footprint is decided by the dynamic programme of :mod:`search.problem.dynamic_program`,
others by the integer programmes of :mod:`search.problem.milp`. Error messages name the fewest limits that
cannot be met together, the least value that each can have, and the least common factor on all limits that
makes them feasible.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from search.problem.limit import Constraint, within
from search.problem.milp import feasible, least, most_room, optimum
from space import Architecture, InfeasibleError, Space
from space.genome import Genomes, decode, encode
from space.ops import Cost

RELAXATION_TOLERANCE = 5e-3  # relative: distance from the least relaxation at which the search stops
_LACKS = "every architecture needs an op that the device lacks"


def check_feasible(space: Space, asked: Sequence[Constraint], latencies: Sequence[Cost] = ()) -> None:
    """Refuse limits that no architecture of a space keeps.

    Args:
        space: the search space.
        asked: the limits on it.
        latencies: one of each device that has to run the architecture; infinite where it lacks an op.

    Raises:
        InfeasibleError: names each limit that cannot be met even alone, with the least possible value
            and an architecture that has it; if there is none, the fewest limits that cannot be met together,
            each with the least value that the others leave; if there are none, the lack of an op.
    """
    impossible = _impossible(space, asked)
    if impossible:
        raise InfeasibleError(f"space {space.name}: {'; '.join(impossible)}{_relaxation(space, asked)}")
    if len(asked) < 2 and not latencies:  # decided by the least value
        return
    costs, bounds = [one.cost for one in asked], [one.bound for one in asked]
    runs = [math.inf] * len(latencies)
    if feasible(space, [*costs, *latencies], [*bounds, *runs]) is not None:
        return
    for size in range(2, len(asked) + 1):
        for subset in combinations(asked, size):
            if not _are_feasible(space, subset):
                text = f"{_conflict(space, subset)}{_relaxation(space, asked)}"
                raise InfeasibleError(f"space {space.name}: {text}")
    within_limits = " within the limits" if asked else ""
    raise InfeasibleError(f"space {space.name}: no architecture runs on the device{within_limits}")


def _impossible(space: Space, asked: Sequence[Constraint]) -> list[str]:
    """A sentence for each limit that cannot be met even alone."""
    impossible = []
    for one in asked:
        value, architecture = least(space, one.cost)
        if not within(value, one.bound):
            reason = f"the least is {_has(one.show(value), architecture)}" if np.isfinite(value) else _LACKS
            impossible.append(f"{one.text} cannot be met: {reason}")
    return impossible


def least_relaxation(space: Space, asked: Sequence[Constraint]) -> tuple[float, Architecture] | None:
    """The least factor on all bounds that makes limits feasible, within 0.5%, and its architecture.

    Args:
        space: the search space.
        asked: the limits on it.

    Returns:
        None if every architecture needs an op that a device lacks.
    """
    costs, bounds = [one.cost for one in asked], [one.bound for one in asked]

    def within_times(factor: float) -> tuple[float, Genomes] | None:
        found = most_room(space, costs, [factor * one for one in bounds], bounds)
        if found is None:
            return None
        return max(float(c(found)[0]) / b for c, b in zip(costs, bounds, strict=True)), found

    start = within_times(math.inf)  # the least sum of costs over bounds
    if start is None:
        return None
    high, best = start
    low = max(least(space, cost)[0] / bound for cost, bound in zip(costs, bounds, strict=True))
    while high > low * (1 + RELAXATION_TOLERANCE):
        middle = math.sqrt(low * high)
        found = within_times(middle)
        if found is None:
            low = middle
        else:
            high, best = found
    return high, decode(space, best)[0]


def _relaxation(space: Space, asked: Sequence[Constraint]) -> str:
    """The least relaxation of limits that cannot be met, as a clause; empty for a single limit."""
    found = least_relaxation(space, asked) if len(asked) > 1 else None
    if found is None:
        return ""
    factor, architecture = found
    row = encode(space, [architecture])
    values = ", ".join(f"{one.limit.subject} {one.show(float(one.cost(row)[0]))}" for one in asked)
    keeps = f"{_name(architecture)} would keep them all, with {values}"
    return f"; if every limit were {factor:.3g} times as large, {keeps}"


def _are_feasible(space: Space, asked: Sequence[Constraint]) -> bool:
    return feasible(space, [one.cost for one in asked], [one.bound for one in asked]) is not None


def _conflict(space: Space, some: Sequence[Constraint]) -> str:
    """For each limit, the least value among architectures that keep the others, which alone are feasible."""
    leasts = []
    for one in some:
        others = [other for other in some if other is not one]
        costs, bounds = [other.cost for other in others], [other.bound for other in others]
        genome = optimum(space, [one.cost, *costs], [math.inf, *bounds], [1.0] + [0.0] * len(costs))
        met = " and ".join(other.limit.text for other in others)
        if genome is None:
            leasts.append(f"with {met}, {_LACKS}")
        else:
            value = _has(one.show(float(one.cost(genome)[0])), decode(space, genome)[0])
            leasts.append(f"with {met}, the least {one.limit.subject} is {value}")
    names = f"{', '.join(one.text for one in some[:-1])} and {some[-1].text}"
    return f"{names} cannot be met together, though each alone can: {'; '.join(leasts)}"


def _has(value: str, architecture: Architecture) -> str:
    return f"{value}, of {_name(architecture)}"


def _name(architecture: Architecture) -> str:
    return f"{architecture.key} ({architecture.describe()})"
