"""The devices of a search: their cards and predictors, opened without torch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from latency import Card, Predictor, ProfileConfig, load_card, load_predictor
from latency.card import outdated, profile_command
from latency.runtimes.registry import open_card_runtime
from search.engine.config import SearchConfig, make_problem, precision_of
from search.problem.feasibility import check_feasible
from search.problem.limit import Limit
from search.problem.problem import Problem
from space import InputError, Space
from space.io.progress import Reporter


def open_devices(
    devices: Path,
    names: Sequence[str],
    space: Space,
    profile: ProfileConfig,
    config: SearchConfig,
    reporter: Reporter,
) -> tuple[dict[str, Card], dict[str, Predictor]]:
    """The cards of devices and their predictors of a space, by name.

    It refuses limits that no architecture keeps according to the predictors, before torch is imported.

    Args:
        devices: the folder of the cards.
        names: of the devices; the first is meant where a limit or objective names none.
        space: the search space.
        profile: the threads and precision that were profiled.
        config: the limits and objectives.
        reporter: warns of cards that no longer fit their machine.

    Raises:
        InputError: a device is named twice, not known, or not profiled for the space; a limit or an
            objective is not understood.
        InfeasibleError: the limits cannot be met.
    """
    if len(set(names)) < len(names):
        raise InputError(f"devices: {', '.join(names)} names one twice")
    cards = {name: load_card(devices, name) for name in names}
    precisions = {name: precision_of(config, name, names[0]) for name in names}
    predictors = {
        name: open_predictor(space, profile, card, precisions[name] or profile.precision, reporter)
        for name, card in cards.items()
    }
    latencies = [p.cost(next(iter(p.models))) for p in predictors.values()]
    check_feasible(space, make_problem(space, predictors, config).constraints(), latencies)
    return cards, predictors


def check_counted_limits(space: Space, limits: Sequence[str]) -> None:
    """Refuse limits on what is counted without a device, such as parameters, if no architecture keeps them.

    Args:
        space: the search space.
        limits: of a search; those that need a device are ignored.

    Raises:
        InfeasibleError: the limits cannot be met.
        InputError: a limit is not understood.
    """
    parsed = [Limit.parse(text) for text in limits]
    counted = [replace(limit, device=None) for limit in parsed if not limit.metric.needs_device]
    check_feasible(space, Problem(space, limits=counted).constraints())


def open_predictor(
    space: Space, profile: ProfileConfig, card: Card, precision: str, reporter: Reporter
) -> Predictor:
    """The predictor of a card for a space.

    Args:
        space: the search space.
        profile: the threads that were profiled.
        card: the device's.
        precision: of the models.
        reporter: warns of a card that no longer fits its machine.

    Raises:
        InputError: the card was not profiled for the space in that precision.
    """
    runtime = card.fingerprint.runtime
    try:
        warning = outdated(card, open_card_runtime(card).fingerprint())
    except InputError:  # the card's runtime is not on this machine: nothing to compare
        warning = None
    if warning:
        reporter.warn(warning)
    path = card.predictor_path(space.name, runtime, profile.threads, precision)
    option = "" if precision == "fp32" else f" --precision {precision}"
    return load_predictor(path, space, profile_command(card.name) + option)
