"""Whether limits can be met at all: decided exactly, before a search starts.

All slots of a space have the same options and the same costs, so an architecture costs what
its *counts* cost: how many layers take each mixer with its heads, and how many each FFN. The
hybrid rule speaks of counts too (``space.all_patterns``); slots matter only in that the forced
ones must be full, and every pattern has enough full layers for them.

One cost: the dynamic programme over slots collapses to the cheapest option of each class, for
each width, pattern and level of the peak (:func:`least`). That at most so many linear kinds
are allowed cannot bind there, since the cheapest layer is of one kind.

Several together: one integer programme a width over the counts (:func:`feasible`). The solver
works to 1e-6 of what it is given, so its rows are scaled, and whatever it finds is priced
again, exactly; where that still shows a bound passed, the found counts alone are cut away and
the rest is searched on. A cost that is the greatest of several sums is bounded by bounding each; one that is
the lesser of two costs is bounded where either is, so both are tried.
Infinity in a table marks an op that cannot be had; peaks are never negative.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from search.problem.limit import Constraint, within
from search.problem.milp import (
    alternatives,
    feasible,
    least,
    lowered,
    most_room,
    optimum,
    split_maxima,
)
from space import Architecture, InfeasibleError, Space
from space.genome import Genomes, decode, encode
from space.ops import Cost

_NEAR = 5e-3  # relative: how near the nearest point is come
_LACKS = "every architecture needs an op that the device lacks"


def check_feasible(space: Space, asked: Sequence[Constraint]) -> None:
    """Refuse limits that no architecture of the space keeps.

    Raises:
        InfeasibleError: names each limit that cannot be met even alone, with the least possible value
            and an architecture that has it; or, where there is none, the fewest limits that
            cannot be met together, each with the least value that the others leave.
    """
    alone = []
    for one in asked:
        value, architecture = least(space, one.cost)
        exact = not one.cost.max_with and not one.cost.min_with
        if not within(value, one.bound) and (exact or not _together(space, [one])):
            reason = f"the least is {_has(one.show(value), architecture)}" if np.isfinite(value) else _LACKS
            alone.append(f"{one.text} cannot be met: {reason}")
    if alone:
        raise InfeasibleError(f"space {space.name}: {'; '.join(alone)}{_nearest_text(space, asked)}")
    if not asked or _together(space, asked):
        return
    for size in range(2, len(asked) + 1):
        for some in combinations(asked, size):
            if not _together(space, some):
                text = f"{_conflict(space, some)}{_nearest_text(space, asked)}"
                raise InfeasibleError(f"space {space.name}: {text}")


def least_relaxation(space: Space, asked: Sequence[Constraint]) -> tuple[float, Architecture] | None:
    """The architecture whose greatest cost over its bound is least, within 0.5%, and that ratio.

    None where every architecture needs an op that a device lacks.
    """
    costs, bounds = [one.cost for one in asked], [one.bound for one in asked]

    def within_times(factor: float) -> tuple[float, Genomes] | None:
        found = most_room(space, costs, [factor * one for one in bounds], bounds)
        if found is None:
            return None
        return max(float(c(found)[0]) / b for c, b in zip(costs, bounds, strict=True)), found

    start = within_times(math.inf)  # the least sum of all
    if start is None:
        return None
    high, best = start
    low = max(least(space, cost)[0] / bound for cost, bound in zip(costs, bounds, strict=True))
    while high > low * (1 + _NEAR):
        middle = math.sqrt(low * high)
        found = within_times(middle)
        if found is None:
            low = middle
        else:
            high, best = found
    return high, decode(space, best)[0]


def _nearest_text(space: Space, asked: Sequence[Constraint]) -> str:
    """What comes nearest to limits that cannot be met, for people; nothing for a single one."""
    found = least_relaxation(space, asked) if len(asked) > 1 else None
    if found is None:
        return ""
    factor, architecture = found
    row = encode(space, [architecture])
    values = ", ".join(f"{one.limit.subject} {one.show(float(one.cost(row)[0]))}" for one in asked)
    return f"; with all limits {factor:.3g} times as large {_has(values, architecture)} would do"


def _together(space: Space, asked: Sequence[Constraint]) -> bool:
    return feasible(space, [one.cost for one in asked], [one.bound for one in asked]) is not None


def _conflict(space: Space, some: Sequence[Constraint]) -> str:
    """What each of the limits can reach where the others are met; all but any one can be met together."""
    leasts = []
    for one in some:
        others = [other for other in some if other is not one]
        costs, bounds = [other.cost for other in others], [other.bound for other in others]
        found = [
            _least_beside(space, first, rest, bounds) for first, *rest in alternatives([one.cost, *costs])
        ]
        genomes = [genome for genome in found if genome is not None]
        met = " and ".join(other.limit.text for other in others)
        if not genomes:
            leasts.append(f"with {met}, {_LACKS}")
        else:
            genome = min(genomes, key=lambda genome: float(one.cost(genome)[0]))
            value = _has(one.show(float(one.cost(genome)[0])), decode(space, genome)[0])
            leasts.append(f"with {met}, the least {one.limit.subject} is {value}")
    names = f"{', '.join(one.text for one in some[:-1])} and {some[-1].text}"
    return f"{names} cannot be met together, though each alone can: {'; '.join(leasts)}"


def _least_beside(
    space: Space, cost: Cost, others: Sequence[Cost], bounds: Sequence[float]
) -> Genomes | None:
    """The genome [1, G] of the least of a cost where others keep their bounds; None if there is none."""
    sums, limits = split_maxima([replace(cost, max_with=()), *others], [np.inf, *bounds])
    genome = optimum(space, sums, limits, [1.0] + [0.0] * (len(sums) - 1))
    return None if genome is None else lowered(space, cost, genome, others, bounds)


def _has(value: str, architecture: Architecture) -> str:
    return f"{value}, of {architecture.key} ({architecture.describe()})"
