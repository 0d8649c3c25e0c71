"""Device cards as the command ``devices`` shows them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.cli.output import make_table
from search.cli.tables import error_table
from space.io.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from latency import Card
    from latency.device_runner.fingerprint import Fingerprint
    from latency.predictor.accuracy import PredictorErrors

SECONDS_PER_DAY = 86400


@dataclass(frozen=True, kw_only=True)
class CardSummary:
    """A device card beside this machine.

    Attributes:
        card: the card.
        here: fingerprint of this machine with the card's runtime.
        predictors: errors of the fitted predictors, by file and workload.
        ops: seconds of each op and their relative standard deviation, by file and workload.
    """

    card: "Card"
    here: "Fingerprint"
    predictors: "Mapping[str, Mapping[str, PredictorErrors]]"
    ops: "Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]]"

    @property
    def age_days(self) -> float:
        """Days since the card was measured; 0 if it was not."""
        if self.card.measured is None:
            return 0.0
        elapsed = datetime.now(UTC) - datetime.fromisoformat(self.card.measured)
        return elapsed.total_seconds() / SECONDS_PER_DAY

    @property
    def differences(self) -> list[str]:
        """Fields in which this machine differs from the card's, one line each."""
        from latency.card import differences

        return differences(self.card.fingerprint, self.here)

    @property
    def warning(self) -> str | None:
        """A line if the runtime of this machine has another version; else None."""
        from latency.card import outdated

        return outdated(self.card, self.here)

    def to_json(self, details: bool) -> dict[str, Any]:
        """The JSON object that ``formfit devices --json`` prints for a card.

        Args:
            details: add the latencies of ops.
        """
        card, ops = self.card, self.ops if details else {}
        return {
            "name": card.name,
            "measured": card.measured,
            "age_days": self.age_days,
            "fingerprint": card.fingerprint.to_json(),
            "this_machine": not self.differences,
            "differences": self.differences,
            "warning": self.warning,
            "aa_difference_percent": None if card.aa_difference is None else 100 * card.aa_difference,
            "unsupported": card.unsupported,
            "predictors": {
                name: {workload: errors.to_json() for workload, errors in by_workload.items()}
                for name, by_workload in self.predictors.items()
            },
            "op_latencies": {
                name: {
                    workload: {
                        op: {"seconds": seconds, "relative_spread": spread}
                        for op, (seconds, spread) in by_op.items()
                    }
                    for workload, by_op in by_workload.items()
                }
                for name, by_workload in ops.items()
            },
            "problems": card.problems,
        }


def summarise_card(devices: Path, name: str) -> CardSummary:
    """Read a card and the errors of its predictors, without the libraries that run models.

    Args:
        devices: folder of all cards.
        name: of the card.

    Raises:
        InputError: there is no such card, or one of its files is not whole.
    """
    from latency import load_card
    from latency.predictor.accuracy import read_op_latencies, read_predictor_errors
    from latency.runtimes.registry import local_fingerprint

    card = load_card(devices, name)
    files = sorted((card.folder / "predictors").glob("*.json"))
    try:
        here = local_fingerprint(card.fingerprint.runtime)
    except InputError:  # this machine does not have the card's runtime
        here = local_fingerprint("onnxruntime")
    predictors = {path.stem: read_predictor_errors(path) for path in files}
    ops = {path.stem: read_op_latencies(path) for path in files}
    return CardSummary(card=card, here=here, predictors=predictors, ops=ops)


def card_tables(devices: Path, cards: Sequence[CardSummary], details: bool) -> "list[Table]":
    """A table of cards; with ``details`` the errors and op latencies of the first one's predictors too.

    Args:
        devices: folder of all cards.
        cards: to show.
        details: show the errors and op latencies.
    """
    rows = [
        [
            summary.card.name,
            f"{summary.age_days:.0f} days",
            f"{summary.card.fingerprint.cpu}, {summary.card.fingerprint.runtime_version}",
            "no" if summary.differences else "yes",
            "\n".join(summary.predictors) or "-",
            "\n".join(map(_worst_error, summary.predictors.values())) or "-",
        ]
        for summary in cards
    ]
    columns = ["name", "age", "measured on", "this machine", "predictors", "worst MAPE"]
    tables = [make_table(f"Devices in {devices}", columns, rows)]
    if details:
        tables += map(error_table, cards[0].predictors.values())
        tables += [table for name, found in cards[0].ops.items() for table in op_tables(name, found)]
    return tables


def op_tables(predictor: str, latencies: "Mapping[str, Mapping[str, tuple[float, float]]]") -> "list[Table]":
    """The latencies of ops with their relative standard deviations, a table for each phase.

    Args:
        predictor: name of the predictor.
        latencies: seconds and relative standard deviation of each op, by workload.
    """
    tables = []
    for phase in dict.fromkeys(workload.split("@")[0] for workload in latencies):
        of_phase = {w: by_op for w, by_op in latencies.items() if w.split("@")[0] == phase}
        ops = dict.fromkeys(op for by_op in of_phase.values() for op in by_op)
        rows = [[op, *(_latency(by_op.get(op)) for by_op in of_phase.values())] for op in ops]
        columns = ["op", *(w.removeprefix(phase).split(",")[0] for w in of_phase)]
        tables.append(make_table(f"Ops of {predictor}: {phase}, us", columns, rows))
    return tables


def _latency(value: tuple[float, float] | None) -> str:
    """An op's latency in microseconds with its deviation; a dash for one that the device cannot run."""
    if value is None:
        return "-"
    seconds, spread = value
    return f"{1e6 * seconds:.1f}" if math.isnan(spread) else f"{1e6 * seconds:.1f} ±{spread:.0%}"


def _worst_error(errors: "Mapping[str, PredictorErrors]") -> str:
    """The largest held-out MAPE of a predictor's workloads."""
    held_out = [item.test.held_out.mape_percent for item in errors.values() if item.test]
    return f"{max(held_out):.2f}%" if held_out else "-"
