"""A sub-network for a latency or a size, without a search: Mix'n'Match (MatFormer, Devvrit et al. 2023).

FFN sizes are nested in every layer, so whoever keeps an architecture and changes only these has a whole
family at hand. The paper's rule picks its members: sizes never fall with depth, and change as little as
they can from layer to layer (its "least slope"). That leaves the first layers with one size and the rest
with the next larger one, a family in which each member holds the one before. The largest that keeps the
limit is taken. Footgun: a predicted latency need not rise along the family, so all members are priced.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latency import Predictor
from search.config import SearchConfig
from search.engine.devices import open_targets
from search.engine.make_front import predictions
from search.problem.limit import Constraint, Limit
from search.problem.milp import ROUNDING_TOLERANCE
from search.problem.problem import Problem
from search.select.picks import chosen_architecture
from search.workspace import Run
from space import Architecture, InfeasibleError, Space, genome
from space.genome import Genomes
from space.io.progress import Reporter

HOW = "mix'n'match"


def mixed(
    run: Run, search: str | None, pick: str, device: str | None, reporter: Reporter
) -> tuple[dict[str, Any], Architecture]:
    """What a limit given as a pick takes out of a run: as :func:`mix_and_match`, with the run's confidence.

    Args:
        run: that was trained.
        search: of the run, whose first pick is the base; None takes the space's largest architecture.
        pick: the limit.
        device: whose card predicts; None is the one that the limit names, or else the run's. Limits on
            parameters and memory need no card.
        reporter: told of a card that no longer fits its machine.

    Returns:
        What the architecture was chosen under, and the architecture.

    Raises:
        InputError: no such limit, search or card, or the card was not measured for it.
        InfeasibleError: no architecture of the space keeps the limit, or none of the family.
    """
    limit = Limit.parse(pick)
    base = chosen_architecture(run, search, None, None)[1] if search else genome.largest(run.space)
    config = SearchConfig(limits=(pick,), confidence=run.config.search.confidence)
    name = device or limit.device or (run.config.device if limit.metric.needs_device else None)
    predictors = open_targets(run.devices, [name], run.config, config, reporter)[1] if name else {}
    found, choice = mix_and_match(base, mix_problem(run.space, predictors, config.confidence), limit)
    return choice, found


def mix_problem(space: Space, predictors: Mapping[str, Predictor], confidence: float) -> Problem:
    """A problem for :func:`mix_and_match`; without predictors its limits are on parameters and memory."""
    return Problem(space, predictors=predictors, confidence=confidence)


def family(space: Space, base: Architecture) -> Genomes:
    """The genomes [M, G] of an architecture's family, the smallest first.

    With k layers that have an FFN and s sizes above 0, M = k * (s - 1) + 1: from one member to the next, one
    layer takes the next larger size, the last layer first. Layers without an FFN stay without.

    Raises:
        InputError: the architecture has a value that the space does not list.
    """
    row = genome.encode(space, [base])
    slots = np.flatnonzero(genome.split(row)[3][0])
    sizes = len(space.ffn_options) - 1  # that at index 0 is none
    steps = np.arange(len(slots) * (sizes - 1) + 1)
    low, grown = np.divmod(steps[:, None], max(1, len(slots)))
    rows = np.repeat(row, len(steps), axis=0)
    genome.split(rows)[3][:, slots] = 1 + low + (np.arange(len(slots)) >= len(slots) - grown)
    return rows


def mix_and_match(base: Architecture, problem: Problem, limit: Limit) -> tuple[Architecture, dict[str, Any]]:
    """The largest member of an architecture's family that keeps a limit.

    Args:
        base: a member of the problem's space, of which all is kept but the sizes of its FFNs.
        problem: the space and what predicts; its own limits and objectives do not matter.
        limit: latency and rss are held against the upper bound at the problem's confidence; percentages are
            of the space's largest architecture.

    Returns:
        The architecture, and what it was chosen under, as :func:`search.engine.front.member_choice` says it
        of a front's member. It has no ``loss_nats``, since nothing was evaluated, but ``picked``: ``how``,
        the key of the ``base``, and how many members the ``family`` has.

    Raises:
        InputError: the limit is on a device that is not given, or outside what was measured there.
        InfeasibleError: no member keeps it; says what the least is, and which has it.
    """
    space = problem.space
    problem = replace(problem, limits=(limit,))
    asked = problem.constraints()[0]
    rows = family(space, base)
    values = asked.cost(rows)
    for predictor in problem.predictors.values():  # what a device cannot run has no latency to be told
        values[~np.isfinite(predictor.cost(next(iter(predictor.models)))(rows))] = np.inf
    kept = np.flatnonzero(values <= asked.bound * (1 + ROUNDING_TOLERANCE))
    if not len(kept):
        raise InfeasibleError(_why_not(space, base, asked, rows, values))
    found = genome.decode(space, rows[kept[-1:]])[0]
    choice = {
        "limits": [{"limit": limit.text, "bound": asked.bound, "unit": limit.metric.unit.name}],
        "confidence": problem.confidence,
        "predicted": predictions(problem, found).to_json(),
        "picked": {"how": HOW, "base": base.key, "family": len(rows)},
    }
    return found, choice


def _why_not(
    space: Space, base: Architecture, asked: Constraint, rows: Genomes, values: NDArray[np.float64]
) -> str:
    """Why no member of a family [M, G] keeps a limit, from what they cost [M]."""
    least = int(values.argmin())
    reason = f"all of {base.key} need an op that the device lacks"
    if np.isfinite(values[least]):
        member = genome.decode(space, rows[least : least + 1])[0]
        reason = f"the least is {asked.show(float(values[least]))}, of {member.key} ({member.describe()})"
    return (
        f"space {space.name}: {asked.text} cannot be met by other FFN sizes of {base.key}: {reason}; "
        "`formfit search` may change more than these"
    )
