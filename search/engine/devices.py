"""The devices that a search is for, and whether their limits can be met: told without loading torch."""

from collections.abc import Sequence
from pathlib import Path

from latency import Card, Predictor, load_card, load_predictor
from latency.card import outdated, profile_command
from latency.runtimes.registry import open_card_runtime
from search.config import RunConfig, SearchConfig, make_problem, precision_of
from search.problem.feasibility import check_feasible
from space import InputError
from space.io.progress import Reporter


def open_targets(
    devices: Path, names: Sequence[str], run: RunConfig, config: SearchConfig, reporter: Reporter
) -> tuple[dict[str, Card], dict[str, Predictor]]:
    """The cards of devices and their predictors of a run's space, by name.

    Args:
        devices: the folder of the cards.
        names: the first is meant where a limit names none.
        run: whose space it is.
        config: what is searched for.
        reporter: told of cards that no longer fit their machine.

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
        name: open_predictor(run, card, precisions[name] or run.profile.precision, reporter)
        for name, card in cards.items()
    }
    check_feasible(run.space, make_problem(run.space, predictors, config).constraints())
    return cards, predictors


def open_predictor(run: RunConfig, card: Card, precision: str, reporter: Reporter) -> Predictor:
    """A card's predictor of a run's space in a precision; warns where the card no longer fits its machine.

    Raises:
        InputError: the card was not profiled for the space in that precision.
    """
    runtime = str(card.fingerprint.get("runtime"))
    try:
        warning = outdated(card, open_card_runtime(card).fingerprint())
    except InputError:  # the card's runtime is not on this machine: nothing to compare
        warning = None
    if warning:
        reporter.warn(warning)
    path = card.predictor_path(run.space.name, runtime, run.profile.threads, precision)
    option = "" if precision == "fp32" else f" --precision {precision}"
    return load_predictor(path, run.space, profile_command(card.name) + option)
