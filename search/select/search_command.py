"""A search of a run: its front, the finalists that were measured, and those that were distilled."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latency import Card, Predictor
from search.config import Run, open_trained
from search.engine.choice import Choice
from search.engine.config import FinalistsConfig, SearchConfig, make_problem
from search.engine.entry import search_supernet
from search.engine.front import FRONT, Front, Member
from search.engine.verification import Verification
from search.select.baselines import baselines, removal_order
from search.select.finalist import Finalist
from search.select.measured_search import run_measured_search
from search.select.measurements import SAFETY_MARGIN, MeasuredSearch
from search.select.picks import Selection
from search.select.successive_halving import distil_baselines, distil_finalists, write_finalist
from search.select.verifier import Verifier
from search.submodel.export import export
from space import LimitMissedError
from space.io.artefact import canonical_json, digest
from space.io.errors import ParityError
from space.io.progress import Reporter
from space.precision import model_file
from supernet.evaluate import evaluation_set, loss_name

JsonObject = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TunedSubModel:
    """The sub-model of the best distilled finalist.

    Attributes:
        key: the architecture's key.
        folder: the sub-model's.
        verification: None if finalists were not measured.
    """

    key: str
    folder: Path
    verification: Verification | None = None

    def to_json(self, root: Path | None = None) -> JsonObject:
        """The JSON object, with limits, parity and latency if it was measured.

        Args:
            root: a folder that the sub-model's is relative to in the object.
        """
        folder = self.folder.relative_to(root) if root else self.folder
        value: JsonObject = {"key": self.key, "folder": str(folder)}
        if self.verification:
            measured = self.verification.to_json()
            value |= {name: measured[name] for name in ("limits", "parity", "latency")}
        return value


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Finalists after a short distillation.

    Attributes:
        folder: that ``finalists.json`` is in.
        finalists: the best first.
        tuned: the sub-model of the first one; None without finalists.
        baselines: trained beside them, by name, the best first.
    """

    folder: Path
    finalists: tuple[Finalist, ...]
    baselines: Mapping[str, Finalist] = field(default_factory=dict)
    tuned: TunedSubModel | None = None

    def to_json(self, root: Path | None = None) -> JsonObject:
        """The JSON object.

        Args:
            root: a folder that the sub-model's is relative to in the object.
        """
        folder = self.folder.resolve()
        value: JsonObject = {"finalists": [item.to_json(folder) for item in self.finalists]}
        if self.baselines:
            value["baselines"] = [{"name": n, **one.to_json(folder)} for n, one in self.baselines.items()]
        return value if self.tuned is None else {**value, "tuned": self.tuned.to_json(root)}


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The result of the command ``search``.

    Attributes:
        front: of the first round.
        measured: None if finalists were not measured.
        distillation: None if no finalists were distilled.
    """

    front: Front
    measured: MeasuredSearch | None = None
    distillation: Distillation | None = None

    def to_json(self) -> JsonObject:
        """The front's JSON object with its header; results of the further steps stand beside its keys."""
        measured = {"measured_search": self.measured.to_json()} if self.measured else {}
        distilled = self.distillation.to_json() if self.distillation else {}
        header = FRONT.header(self.front.inputs)
        return {"header": header, **self.front.to_json(), **measured, **distilled}


def search_and_select(
    run: Run,
    cards: Mapping[str, Card],
    predictors: Mapping[str, Predictor],
    config: SearchConfig,
    name: str,
    reporter: Reporter,
    *,
    verify: bool = False,
    distill_top: int = 0,
) -> SearchResult:
    """Search a run's supernet for devices.

    Args:
        run: a run that was trained.
        cards: by device; finalists are measured on the first.
        predictors: by device.
        config: of the search.
        name: the search's folder among the run's searches.
        reporter: shows the progress.
        verify: measure the finalists, and search again if they miss a limit.
        distill_top: the number of finalists that are distilled before one is chosen.

    Raises:
        InputError: the name cannot be a folder's, or nothing was trained.
        InfeasibleError: the limits cannot be met.
    """
    folder = run.search_folder(name)
    trained = open_trained(run)
    verifier = Verifier(run.folder / "submodels", trained, next(iter(cards.values())), run.config.verify)
    measured = run_measured_search(folder, verifier, predictors, config, reporter) if verify else None
    front = search_supernet(folder, trained, predictors, config, reporter)
    result = SearchResult(front=front, measured=measured)
    if not distill_top:
        return result
    finalists = run.config.finalists.model_copy(update={"count": distill_top})
    distillation = distil_best(folder, verifier, result, predictors, config, finalists, reporter)
    return SearchResult(front=front, measured=measured, distillation=distillation)


def candidates(result: SearchResult) -> dict[str, tuple[Member, Choice]]:
    """The members that may become finalists, with their choices, by key.

    Args:
        result: of a search. If finalists were measured, those that kept the limits, with a margin if any did:
            a distilled one is measured again; else the whole front.
    """
    if result.measured:
        kept = [f for f in result.measured.finalists.values() if f.passed]
        safe = [f for f in kept if f.used <= 1 - SAFETY_MARGIN]
        return {f.key: (f.member, f.choice) for f in safe or kept}
    return {m.key: (m, result.front.choice(m)) for m in result.front.members}


def distil_best(
    folder: Path,
    verifier: Verifier,
    result: SearchResult,
    predictors: Mapping[str, Predictor],
    config: SearchConfig,
    finalists: FinalistsConfig,
    reporter: Reporter,
) -> Distillation:
    """Distil the best members of a search for a short time, and write the sub-model of the best one.

    Args:
        folder: the search's.
        verifier: extracts sub-models, and verifies the best one if finalists were measured.
        result: of the search.
        predictors: by device, of the limits that baselines keep.
        config: of the search.
        finalists: their number, and how they are trained.
        reporter: shows the progress.
    """
    quality, members = result.front.ranking_quality, candidates(result)
    best = sorted(members, key=lambda key: (members[key][0].quality(quality), key))[: finalists.count]
    trained = verifier.trained
    # Other finalists are trained for other numbers of steps: each set has a folder of its own.
    place = folder / "finalists" / digest(canonical_json([quality, best, finalists.model_dump()]))[:8]
    data = evaluation_set(trained.corpus, config.front_windows, trained.length)
    ranked = distil_finalists(
        trained, [members[key][0].architecture for key in best], data, finalists, quality, place, reporter,
        config.workers, config.seed,
    )  # fmt: skip
    if not ranked:
        return Distillation(folder=place, finalists=())
    beside: dict[str, Finalist] = {}
    if finalists.baselines:
        order = removal_order(trained.checkpoint.folder.parent, trained.space)
        uniform = baselines(make_problem(trained.space, predictors, config), order, config.seed)
        beside = distil_baselines(
            trained,
            uniform,
            len(best),
            data,
            finalists,
            quality,
            place,
            reporter,
            config.workers,
            config.seed,
        )
        _compare(ranked[0], beside, quality, reporter)
    key = ranked[0].architecture.key
    selection = Selection(architecture=ranked[0].architecture, choice=members[key][1])
    target = verifier.submodels / f"{key}-{folder.name}"
    inputs = {"supernet": trained.checkpoint.digest}
    submodel = write_finalist(target, trained, ranked[0], inputs, selection.chosen)
    precisions = selection.precisions(verifier.card.name)
    if not all(model_file(target, p).exists() for p in precisions):
        export(submodel, ("onnx",), precisions)
    verification = verifier.verify(submodel, reporter) if result.measured else None
    tuned = TunedSubModel(key=key, folder=target, verification=verification)
    return Distillation(folder=place, finalists=tuple(ranked), tuned=tuned, baselines=beside)


def _compare(best: Finalist, beside: Mapping[str, Finalist], quality: str, reporter: Reporter) -> None:
    """Warn if a baseline is better than the best finalist."""
    name = loss_name(quality)
    ours = (best.after or best.before)[name]
    for baseline, other in beside.items():
        theirs = (other.after or {}).get(name)
        if ours is not None and theirs is not None and theirs < ours:
            reporter.warn(
                f"baseline {baseline} ({other.architecture.key}) has {quality} {theirs:.4f} after the same "
                f"training, the best finalist {ours:.4f}"
            )


def require_tuned(distillation: Distillation) -> None:
    """Refuse a distilled finalist that was measured and missed a limit or parity.

    Args:
        distillation: of a search's finalists.

    Raises:
        LimitMissedError: names the limits.
        ParityError: the exported model differs from the plain one.
    """
    tuned = distillation.tuned
    if tuned is None or tuned.verification is None:
        return
    if tuned.verification.missed:
        missed = ", ".join(tuned.verification.missed)
        raise LimitMissedError(f"{tuned.folder}: the distilled finalist missed {missed} when measured")
    if not tuned.verification.parity.kept:
        raise ParityError(f"{tuned.folder}: the exported model differs from the plain one; see verify.json")
