"""Measured search: search, measure the finalists, recalibrate the predictor, and search again.

Limits on latency and rss are compared with predictions, and a prediction's error on one architecture recurs
on similar ones. So the best members of a front are extracted, exported and measured on the device. The
measurements recalibrate the predictor, and the search continues with it, for at most
``VerifyConfig.searches`` rounds. The chosen model keeps the limits with a margin of 2%; if none does, without
a margin; if none does, the closest is reported and the exit code is 3.
"""

from collections.abc import Mapping
from pathlib import Path

from latency import Predictor
from search.engine.config import SearchConfig
from search.engine.entry import search_supernet
from search.engine.front import Front, Member
from search.engine.search import Outcomes
from search.select.measurements import (
    MEASURED_SEARCH,
    SAFETY_MARGIN,
    FinalistStore,
    MeasuredFinalist,
    MeasuredSearch,
    Round,
    choose_finalist,
)
from search.select.verifier import Verifier
from search.submodel.verify import require_card_is_here
from space import InfeasibleError, LimitMissedError
from space.io.artefact import file_digest
from space.io.errors import ParityError
from space.io.progress import Reporter

FINALISTS_PER_ROUND = 3
LATER_CONFIDENCE = 0.7  # of rounds after the first: their finalists are measured anyway
TARGET_USE = 0.94  # of a limit: a finalist that uses as much leaves little to gain by another round


def run_measured_search(
    folder: Path,
    verifier: Verifier,
    predictors: Mapping[str, Predictor],
    config: SearchConfig,
    reporter: Reporter,
) -> MeasuredSearch:
    """Search and measure until a finalist keeps the limits, and write ``measured_search.json``.

    Args:
        folder: the search's; later rounds search in ``rounds/2`` and ``rounds/3`` below it.
        verifier: extracts and measures finalists; its card is one of the predictors' devices.
        predictors: by device.
        config: of the search.
        reporter: shows the progress.

    Raises:
        InfeasibleError: the limits cannot be met according to the predictors.
        InputError: this machine is not the card's, or its timings are unstable.
    """
    require_card_is_here(verifier.card)
    rounds = _Rounds(folder, verifier, predictors, config, reporter)
    while len(rounds.done) < verifier.config.searches and rounds.run():
        rounds.recalibrate()
    return rounds.write()


class _Rounds:
    """The rounds of one measured search."""

    def __init__(
        self,
        folder: Path,
        verifier: Verifier,
        predictors: Mapping[str, Predictor],
        config: SearchConfig,
        reporter: Reporter,
    ) -> None:
        self.folder, self.verifier, self.config, self.reporter = folder, verifier, config, reporter
        self.predictors, self.current = predictors, dict(predictors)
        self.settings = config
        self.outcomes: Outcomes = {}
        self.searched: list[Path] = []
        self.done: list[Round] = []
        self.store: FinalistStore | None = None
        self.quality = "loss"

    @property
    def where(self) -> Path:
        """The folder of the next round's search."""
        return self.folder / "rounds" / str(len(self.done) + 1) if self.done else self.folder

    def run(self) -> bool:
        """Search once and measure the finalists.

        Returns:
            False if another round cannot help.

        Raises:
            InfeasibleError: the limits cannot be met in the first round.
        """
        where = self.where
        try:
            front = search_supernet(
                where, self.verifier.trained, self.current, self.settings, self.reporter, self.outcomes,
                self.predictors, tuple(self.searched),
            )  # fmt: skip
        except InfeasibleError:
            if not self.done:
                raise
            return False  # according to the recalibrated predictor, no architecture keeps the limits
        self.searched.append(where)
        if self.store is None:
            self.store = FinalistStore(self.folder / "measured.json", self._inputs(front))
        self.quality = front.ranking_quality
        measured = []
        for member in best_members(front, self.store.keys):
            measured.append(self.store.stored.get(member.key) or self._measure(member, front))
            self.store.add(measured[-1])
        self.done.append(
            Round(
                confidence=self.settings.confidence,
                evaluations=front.evaluations,
                finalists=tuple(measured),
            )
        )
        best = choose_finalist(self.store.used, self.quality)
        settled = best.passed and TARGET_USE <= best.used <= 1 - SAFETY_MARGIN
        measurable = any(item.parsed.metric.needs_device for item in front.limits)
        return bool(measured) and measurable and not settled

    def recalibrate(self) -> None:
        """Correct the predictor by all measurements, and lower the confidence for the rounds to come."""
        if self.store is None:
            raise RuntimeError(f"{self.folder}: no round was searched")
        device = self.verifier.card.name
        measurements = self.store.measurements(self.verifier.trained.space)
        self.current[device] = self.predictors[device].recalibrated(*measurements)
        update = {"confidence": min(LATER_CONFIDENCE, self.config.confidence), "baseline": "none"}
        self.settings = self.config.model_copy(update=update)

    def write(self) -> MeasuredSearch:
        """Choose the best finalist and write ``measured_search.json``, unless it is there already."""
        if self.store is None:
            raise RuntimeError(f"{self.folder}: no round was searched")
        inputs = {
            "supernet": self.verifier.trained.checkpoint.digest,
            "front": file_digest(self.folder / "front.json"),
        }
        result = MeasuredSearch(
            device=self.verifier.card.name,
            chosen=choose_finalist(self.store.used, self.quality),
            rounds=tuple(self.done),
            inputs=inputs,
        )
        path = self.folder / "measured_search.json"
        if not MEASURED_SEARCH.made_from(path, inputs) or MeasuredSearch.read(path) != result:
            result.write(path)
        return result

    def _inputs(self, front: Front) -> dict[str, str]:
        """The sha256 of what measurements of finalists depend on: the search, and the card's units."""
        names = ("supernet", "search")
        return {**{name: front.inputs[name] for name in names}, "card": self.verifier.card_digest}

    def _measure(self, member: Member, front: Front) -> MeasuredFinalist:
        choice = front.choice(member)
        submodel = self.verifier.extract(member.architecture, choice)
        return MeasuredFinalist.of(member, choice, self.verifier.verify(submodel, self.reporter))


def best_members(front: Front, measured: set[str], count: int = FINALISTS_PER_ROUND) -> list[Member]:
    """The best members of a front in quality that were not measured yet.

    Args:
        front: of a round.
        measured: keys of the members that were measured in earlier rounds.
        count: upper bound on their number.
    """
    ordered = sorted(front.members, key=lambda m: (m.quality(front.ranking_quality), m.key))
    return [m for m in ordered if m.key not in measured][:count]


def require_kept(measured: MeasuredSearch) -> None:
    """Refuse the result of a measured search whose chosen sub-model missed a limit or parity.

    Args:
        measured: the result.

    Raises:
        LimitMissedError: names the limits that the closest finalist missed, and by how much.
        ParityError: the closest finalist missed no limit, but differs from the plain model when exported.
    """
    if measured.passed:
        return
    chosen = measured.chosen
    missed = ", ".join(
        f"{item.bounded.text} ({100 * (item.used or 0.0):.1f}% of it)"
        for item in chosen.limits
        if item.missed
    )
    count = sum(len(one.finalists) for one in measured.rounds)
    if not missed:
        raise ParityError(
            f"none of {count} finalists kept the limits and equals the plain model when exported; "
            f"the closest, {chosen.key}, missed no limit but differs from it"
        )
    raise LimitMissedError(
        f"none of {count} finalists kept the limits; the closest, {chosen.key}, missed {missed}"
    )
