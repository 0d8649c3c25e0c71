"""The architectures with the least scores within limits: the best, and the next best ones.

The programme of :mod:`search.problem.slot_program` has lines below each footprint on a range of its sums. A
solution is priced exactly; where it breaks a bound, the range is split at the piece that it lies on. A
solution that is taken, or that breaks a bound by less than the solver sees, is cut away, which gives the next
best. Parts are taken in the order of their best scores, so the first architectures that keep the bounds are
the best.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from search.problem.dynamic_program import Ints
from search.problem.integer_program import Range
from search.problem.limit import Constraint, within
from search.problem.milp import Width
from search.problem.slot_program import SlotProgram
from space.genome import Genomes, encoding
from space.ops import Cost
from space.slot_scores import SlotScores


@dataclass(frozen=True)
class _Node:
    """Some of the architectures of one width, and the best of them.

    Attributes:
        program: of the width.
        ranges: of the sums of each footprint.
        cuts: columns of solutions that are not among them.
        genome: the best by the programme [1, G].
        columns: of the best.
    """

    program: SlotProgram
    ranges: tuple[Range, ...]
    cuts: tuple[Ints, ...]
    genome: Genomes
    columns: Ints


def best_architectures(
    scores: SlotScores, costs: Sequence[Cost], bounds: Sequence[float], number: int
) -> Genomes:
    """The genomes [at most number, G] with the least scores whose costs are within bounds, best first.

    Args:
        scores: of architectures of a space, finite.
        costs: to be bounded.
        bounds: of the costs; infinite: the cost need only be finite.
        number: of architectures; fewer are returned if no more keep the bounds.
    """
    space = scores.space
    limits, order = np.array(bounds, float), count()
    found: dict[bytes, Genomes] = {}
    nodes: list[tuple[float, int, _Node]] = []

    def add(program: SlotProgram, ranges: tuple[Range, ...], cuts: tuple[Ints, ...]) -> None:
        solved = program.solve(ranges, cuts)
        if solved is not None:
            node = _Node(program, ranges, cuts, *solved)
            heapq.heappush(nodes, (float(scores(node.genome)[0]), next(order), node))

    for index in range(len(space.width)):
        width = Width(space, index, costs, limits, np.zeros(len(costs)))
        if len(width.patterns):
            program = SlotProgram(scores, index, width.terms, width.patterns, number)
            add(program, program.ranges, ())
    while nodes and len(found) < number:
        _, _, node = heapq.heappop(nodes)
        kept = all(
            within(float(cost(node.genome)[0]), bound) for cost, bound in zip(costs, bounds, strict=True)
        )
        if kept:
            found.setdefault(node.genome.tobytes(), node.genome)
        parts = [] if kept else list(node.program.split(node.ranges, node.genome))
        for ranges in parts:
            add(node.program, ranges, node.cuts)
        if not parts and len(found) < number:
            add(node.program, node.ranges, (*node.cuts, node.columns))
    return np.concatenate([*found.values(), np.zeros((0, encoding(space).genes), np.int16)])


def pool_within(
    constraints: Sequence[Constraint], latencies: Sequence[Cost], objective_costs: Sequence[Cost | None]
) -> Callable[[SlotScores, Sequence[float], float, int], Genomes]:
    """A function that gives the best architectures within a problem's limits.

    Its arguments are the scores, an upper bound on the cost of each objective (ignored for a quality), a
    factor on the bounds of all limits, and the number of architectures.

    Args:
        constraints: the limits.
        latencies: one of each device that has to run the architectures.
        objective_costs: of the objectives; None for a quality.
    """

    def best(scores: SlotScores, objective_bounds: Sequence[float], factor: float, number: int) -> Genomes:
        bounded = [(item.cost, factor * item.bound) for item in constraints]
        bounded += [(latency, math.inf) for latency in latencies]
        of_objectives = zip(objective_costs, objective_bounds, strict=True)
        bounded += [(cost, bound) for cost, bound in of_objectives if cost is not None]
        return best_architectures(scores, [c for c, _ in bounded], [b for _, b in bounded], number)

    return best
