"""Mix'n'Match: a sub-network for a limit without a search (MatFormer, Devvrit et al. 2023).

FFN sizes are nested in every layer, so changing only these turns one architecture into a family. The paper's
rule picks its members: sizes never decrease with depth and change as little as possible from layer to layer
(its "least slope"). The first layers then have one size and the others the next larger one, and each member
of the family contains the one before. The largest member that keeps the limit is selected. A predicted
latency need not increase along the family, so the cost of every member is computed.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from latency import Predictor
from search.config import Run
from search.engine.choice import BoundedLimit, Choice, FamilyPick
from search.engine.config import SearchConfig
from search.engine.devices import open_devices
from search.engine.make_front import predictions
from search.problem.limit import Constraint, Limit, within
from search.problem.problem import Problem
from search.select.picks import Selection, select_member
from space import Architecture, InfeasibleError, Space, genome
from space.genome import Genomes
from space.io.progress import Reporter

RULE = "mix'n'match"


def select_by_limit(
    run: Run, search: str | None, text: str, device: str | None, reporter: Reporter
) -> Selection:
    """The selection of :func:`mix_and_match` for a limit, at the confidence of the run's search.

    Args:
        run: that was trained.
        search: of the run, whose first pick is the base; None for the space's largest architecture.
        text: the limit.
        device: whose card predicts; None for the one that the limit names, or else the run's. Limits on
            parameters and memory need no card.
        reporter: warned of a card that does not fit its machine any more.

    Raises:
        InputError: there is no such limit, search or card, or the card was not profiled for the workload.
        InfeasibleError: no architecture of the space keeps the limit, or none of the family.
    """
    limit = Limit.parse(text)
    base = select_member(run, search, None).architecture if search else genome.largest(run.space)
    config = SearchConfig(limits=(text,), confidence=run.config.search.confidence)
    name = device or limit.device or (run.config.device if limit.metric.needs_device else None)
    predictors = {}
    if name:
        profile = run.config.profile
        predictors = open_devices(run.devices, [name], run.space, profile, config, reporter)[1]
    return mix_and_match(base, mix_problem(run.space, predictors, config.confidence), limit)


def mix_problem(space: Space, predictors: Mapping[str, Predictor], confidence: float) -> Problem:
    """A problem for :func:`mix_and_match`.

    Args:
        space: of the architectures.
        predictors: by device; without any, limits can be on parameters and memory only.
        confidence: of the upper estimate that is compared with the limit.
    """
    return Problem(space, predictors=predictors, confidence=confidence)


def family(space: Space, base: Architecture) -> Genomes:
    """The family of an architecture, smallest first.

    With k layers that have an FFN and s sizes above 0, M = k * (s - 1) + 1: from one member to the next, one
    layer takes the next larger size, the last layer first. Layers without an FFN stay without.

    Args:
        space: of the architecture.
        base: the architecture.

    Returns:
        Genomes [M, G].

    Raises:
        InputError: the architecture has a value that the space does not list.
    """
    row = genome.encode(space, [base])
    slots = np.flatnonzero(genome.split(row)[3][0])
    sizes = len(space.ffn_options) - 1  # index 0 is no FFN
    steps = np.arange(len(slots) * (sizes - 1) + 1)
    low, grown = np.divmod(steps[:, None], max(1, len(slots)))
    rows = np.repeat(row, len(steps), axis=0)
    genome.split(rows)[3][:, slots] = 1 + low + (np.arange(len(slots)) >= len(slots) - grown)
    return rows


def mix_and_match(base: Architecture, problem: Problem, limit: Limit) -> Selection:
    """The largest member of an architecture's family that keeps a limit.

    Args:
        base: a member of the problem's space; only the sizes of its FFNs change.
        problem: the space and the predictors; its own limits and objectives are ignored.
        limit: on a device, the upper estimate at the problem's confidence is compared with it; percentages
            are of the largest architecture's mean prediction.

    Returns:
        The architecture with its choice, which has ``picked`` and no ``loss_nats``, since nothing was
        evaluated.

    Raises:
        InputError: the limit is on a device that is not given, or outside the profiled workloads.
        InfeasibleError: no member keeps it; names the smallest cost and the member that has it.
    """
    space = problem.space
    problem = replace(problem, limits=(limit,))
    constraint = problem.constraints()[0]
    rows = family(space, base)
    costs = constraint.cost(rows)
    for predictor in problem.predictors.values():
        # Without a predicted latency, the device cannot run a member.
        costs[~np.isfinite(predictor.cost(next(iter(predictor.models)))(rows))] = np.inf
    kept = np.flatnonzero(within(costs, constraint.bound))
    if not len(kept):
        raise InfeasibleError(_why_not(space, base, constraint, rows, costs))
    architecture = genome.decode(space, rows[kept[-1:]])[0]
    choice = Choice(
        limits=(BoundedLimit(text=limit.text, bound=constraint.bound, unit=limit.metric.unit.name),),
        confidence=problem.confidence,
        predicted=predictions(problem, architecture),
        picked=FamilyPick(how=RULE, base=base.key, family=len(rows)),
    )
    return Selection(architecture=architecture, choice=choice)


def _why_not(
    space: Space, base: Architecture, constraint: Constraint, rows: Genomes, costs: NDArray[np.float64]
) -> str:
    """The reason why no member of a family [M, G] with costs [M] keeps a limit."""
    least = int(costs.argmin())
    reason = f"all of {base.key} need an op that the device lacks"
    if np.isfinite(costs[least]):
        member = genome.decode(space, rows[least : least + 1])[0]
        reason = f"the least is {constraint.show(float(costs[least]))}, of {member.key} ({member.describe()})"
    return (
        f"space {space.name}: {constraint.text} cannot be met by other FFN sizes of {base.key}: {reason}; "
        "`formfit search` may change more than these"
    )
