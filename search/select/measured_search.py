"""Keeping a promise: search, measure the finalists, learn from what they missed, search again.

A limit on latency is held against a prediction, and what a prediction misses of one architecture it
misses of those like it. So the best few of a front are extracted, exported and measured on the device;
what was measured recalibrates the predictor, and the search goes on from there, at most three times.
What is handed over was measured to keep the limits, with room for the difference between two runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from latency import Card, Predictor
from latency.predictor.predictor import RUNS_APART
from search.config import SearchConfig, VerifyConfig
from search.engine.front import member_choice
from search.engine.run import search_front
from search.engine.search import Known
from search.problem.limit import Limit
from search.problem.objective import QUALITIES
from search.select.picks import MEASURED_SEARCH
from search.submodel.export import export, models_digest
from search.submodel.verify import VERIFICATION, require_card_is_here, verify
from space import Architecture, InfeasibleError, LimitMissedError, Space, Workload, genome
from space.io.artefact import (
    Artefact,
    canonical_json,
    check_inputs,
    digest,
    file_digest,
)
from space.io.progress import Reporter
from space.precision import model_file
from supernet.evaluate import EvaluationSet, evaluation_set
from supernet.extract import SUBMODEL, SubModel, read_submodel, write_submodel
from supernet.supernet import Supernet
from supernet.training.train import Trained, load_supernet

MEASURED_FINALISTS = Artefact("measured finalists", "formfit search --verify")
MADE_BY = "formfit search --verify"
MEASURED = 3  # finalists a round
LATER = 0.7  # confidence of the later rounds, whose finalists are measured anyway
SAFETY_MARGIN = RUNS_APART  # of a limit: what the same model may take longer in another run
ENOUGH = 0.94  # of a limit: whoever uses as much leaves little to be found


@dataclass(frozen=True)
class Workbench:
    """Where sub-models are extracted to and measured."""

    submodels: Path
    trained: Trained
    card: Card
    config: VerifyConfig
    supernet: Callable[[], Supernet]  # loaded when it is needed
    judged_by: Callable[[], EvaluationSet]  # what losses of exported graphs are taken on, likewise

    def extracted(self, architecture: Architecture, choice: Mapping[str, Any]) -> SubModel:
        """The sub-model of an architecture with its graph, extracted where it is not there.

        ``choice`` is what it was chosen under, see :func:`search.engine.front.member_choice`.
        """
        inputs = {
            "supernet": self.trained.checkpoint.digest,
            "chosen": digest(canonical_json(dict(choice))),
        }
        folder = self.submodels / architecture.key
        made = SUBMODEL.made_from(folder / "architecture.json", inputs)
        predicted = choice["predicted"]["latency"].get(self.card.name, {})
        precisions = sorted({"fp32", *(Workload.parse(text).precision for text in predicted)})
        if made and all(model_file(folder, p).exists() for p in precisions):
            return read_submodel(folder)
        submodel = write_submodel(folder, self.supernet(), architecture, inputs, choice, self.trained.text)
        export(submodel, ["onnx"], precisions)
        return submodel

    def verified(self, submodel: SubModel, reporter: Reporter) -> dict[str, Any]:
        """What verification says of a sub-model, measured where it is not known."""
        settings = digest(canonical_json(self.config.model_dump(mode="json")))
        card = digest(canonical_json([self.card.name, self.card.fingerprint, self.card.references]))
        inputs = {
            "model": models_digest(submodel),
            "settings": settings,
            "card": card,
        }
        path = submodel.folder / "verify.json"
        if VERIFICATION.made_from(path, inputs):
            return VERIFICATION.read(path)
        with reporter.stage(f"verify {submodel.architecture.key}") as stage:
            stage(0.0, submodel.architecture.describe())
            return verify(submodel, self.card, self.config, inputs, self.judged_by())


class Finalists:
    """Those that were measured, over all rounds; ``measured.json`` keeps them, none is measured twice."""

    def __init__(self, path: Path, inputs: Mapping[str, str]) -> None:
        self.path, self.inputs = path, dict(inputs)
        self.rows: list[dict[str, Any]] = []  # in use, in the order in which they came
        self.kept: dict[str, dict[str, Any]] = {}  # in the file, by key
        if path.exists():
            value = MEASURED_FINALISTS.read(path)
            check_inputs(path, value, self.inputs)
            self.kept = {row["key"]: row for row in value["measured"]}

    @property
    def keys(self) -> set[str]:
        """Of those in use."""
        return {row["key"] for row in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        """Keep one that was measured just now, or before."""
        self.rows.append(row)
        if row["key"] not in self.kept:
            self.kept[row["key"]] = row
            MEASURED_FINALISTS.write(self.path, self.inputs, {"measured": list(self.kept.values())})

    def best(self, quality: str) -> dict[str, Any]:
        """The best in quality that keeps the limits with room; else the one nearest to that."""
        return best_kept(self.rows, quality)

    def seconds(self, space: Space) -> tuple[genome.Genomes, dict[Workload, Any], dict[Workload, Any]]:
        """The genomes [N, G], their latencies [N] by workload, and their peak bytes [N] where measured."""
        architectures = [Architecture.from_json(row["architecture"]) for row in self.rows]
        found = []
        for name, unit in (("latency_ms", 1e-3), ("rss_bytes", 1.0)):
            texts = self.rows[0][name]
            found.append(
                {Workload.parse(w): np.array([unit * row[name][w] for row in self.rows]) for w in texts}
            )
        return genome.encode(space, architectures), found[0], found[1]


def best_kept(rows: Sequence[dict[str, Any]], quality: str) -> dict[str, Any]:
    """The best in quality of rows that keep the limits with room; else the one nearest to that."""
    roomy = [row for row in rows if row["kept"] and row["used"] <= 1 - SAFETY_MARGIN]
    if roomy:
        return min(roomy, key=lambda row: (row[f"{quality}_nats"], row["key"]))
    return min(rows, key=lambda row: (not row["kept"], row["used"]))


def make_workbench(submodels: Path, trained: Trained, card: Card, config: VerifyConfig) -> Workbench:
    """A workbench of a trained supernet."""
    supernet = cache(partial(load_supernet, trained.space, trained.checkpoint))
    judged_by = cache(partial(evaluation_set, trained.corpus, trained.text.windows, trained.length))
    return Workbench(submodels, trained, card, config, supernet, judged_by)


def run_measured_search(
    folder: Path,
    bench: Workbench,
    predictors: Mapping[str, Predictor],
    config: SearchConfig,
    reporter: Reporter,
) -> dict[str, Any]:
    """Search and measure until a measured sub-model keeps the limits, and write ``measured_search.json``.

    Args:
        folder: the search's; later rounds search in ``rounds/2`` and ``rounds/3`` below it.
        bench: where and how finalists are measured; its card is one of the predictors'.
        predictors: by device.
        config: of the search.
        reporter: told how far it is.

    Raises:
        InfeasibleError: the limits cannot be met, as far as can be predicted.
        InputError: this machine is not the card's, or too noisy.
    """
    require_card_is_here(bench.card)
    device = bench.card.name
    known: Known = {}
    rounds: list[dict[str, Any]] = []
    before: list[Path] = []
    current, settings, where = dict(predictors), config, folder
    finalists: Finalists | None = None
    quality = "loss"
    while len(rounds) < bench.config.searches:
        try:
            front = search_front(
                where, bench.trained, current, settings, reporter, known, predictors, tuple(before)
            )
        except InfeasibleError:
            if not rounds:
                raise
            break  # as measured, nothing keeps them
        if finalists is None:
            finalists = Finalists(folder / "measured.json", _measured_inputs(front, bench))
        quality = next(name for name in front["objectives"] if name in QUALITIES)
        new = _best_members(front, quality, finalists.keys)
        for member in new:
            finalists.add(finalists.kept.get(member["key"]) or _measured(member, front, bench, reporter))
        rounds.append(
            {
                "confidence": settings.confidence,
                "evaluations": front["evaluations"],
                "finalists": finalists.rows[len(finalists.rows) - len(new) :],
            }
        )
        best = finalists.best(quality)
        settled = best["kept"] and ENOUGH <= best["used"] <= 1 - SAFETY_MARGIN
        if not new or settled or not any(_is_predicted(item["limit"]) for item in front["limits"]):
            break
        current[device] = predictors[device].recalibrated(*finalists.seconds(bench.trained.space))
        later = {"confidence": min(LATER, config.confidence), "baseline": "none"}
        settings = config.model_copy(update=later)
        before.append(where)
        where = folder / "rounds" / str(len(rounds) + 1)
    if finalists is None:
        raise RuntimeError(f"{folder}: no round was searched")
    best = finalists.best(quality)
    body = {"device": device, "kept": best["kept"], "chosen": best, "rounds": rounds}
    inputs = {"supernet": bench.trained.checkpoint.digest, "front": file_digest(folder / "front.json")}
    path = folder / "measured_search.json"
    if MEASURED_SEARCH.made_from(path, inputs):
        value = MEASURED_SEARCH.read(path)
        if all(value.get(name) == part for name, part in body.items()):
            return value
    MEASURED_SEARCH.write(path, inputs, body)
    return MEASURED_SEARCH.read(path)


def _measured_inputs(front: Mapping[str, Any], bench: Workbench) -> dict[str, str]:
    """What measurements of finalists belong to: the search, and the units of the card."""
    inputs = front["header"]["inputs"]
    card = digest(canonical_json([bench.card.name, bench.card.fingerprint, bench.card.references]))
    return {"supernet": inputs["supernet"], "search": inputs["search"], "card": card}


def _measured(
    member: Mapping[str, Any], front: Mapping[str, Any], bench: Workbench, reporter: Reporter
) -> dict[str, Any]:
    """Extract and verify a member; what is kept of it."""
    choice = member_choice(front, member)
    submodel = bench.extracted(Architecture.from_json(member["architecture"]), choice)
    return _row(member, choice, bench.verified(submodel, reporter))


def require_kept(measured_search: Mapping[str, Any]) -> None:
    """Refuse a promise that was not kept.

    Raises:
        LimitMissedError: names the limits that the nearest finalist missed, and by how much.
    """
    if measured_search["kept"]:
        return
    chosen = measured_search["chosen"]
    missed = [item for item in chosen["limits"] if item["status"] == "missed"]
    by = ", ".join(f"{item['limit']} ({100 * item['used']:.1f}% of it)" for item in missed)
    count = sum(len(one["finalists"]) for one in measured_search["rounds"])
    what = f"missed {by}" if missed else "computes something else than the plain model"
    raise LimitMissedError(f"none of {count} finalists kept the limits; the nearest, {chosen['key']}, {what}")


def _is_predicted(limit: str) -> bool:
    """Whether a limit bears on what is only known after measuring."""
    return Limit.parse(limit).metric.needs_device


def _best_members(front: Mapping[str, Any], quality: str, measured: set[str]) -> list[dict[str, Any]]:
    """The best members of a front in quality that were not measured yet."""
    ordered = sorted(front["members"], key=lambda m: (m[f"{quality}_nats"], m["key"]))
    return [m for m in ordered if m["key"] not in measured][:MEASURED]


def _row(member: Mapping[str, Any], choice: Mapping[str, Any], verified: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a finalist; how much it uses is of limits on what only measuring tells."""
    judged = [item for item in verified["limits"] if "used" in item and _is_predicted(item["limit"])]
    tightest = max(judged, key=lambda item: item["used"], default={"used": 0.0, "limit": None})
    return {
        "key": member["key"],
        "architecture": member["architecture"],
        "loss_nats": member["loss_nats"],
        "recall_loss_nats": member["recall_loss_nats"],
        "predicted": member["predicted"],
        "latency_ms": {w: item["measured_latency_ms"] for w, item in verified["latency"].items()},
        "rss_bytes": verified["rss_bytes"],
        "limits": verified["limits"],
        "used": tightest["used"],
        "tightest": tightest["limit"],
        "kept": all(item["status"] != "missed" for item in verified["limits"]) and verified["parity"]["kept"],
        "choice": dict(choice),
    }
