"""A search and what is made of its front: measured finalists, distilled finalists."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latency import Card, Predictor
from search.config import SearchConfig
from search.engine.front import member_choice
from search.engine.run import search_front
from search.problem.objective import QUALITIES
from search.select.finalist import FinalistsConfig
from search.select.measured_search import Workbench, make_workbench, run_measured_search
from search.select.successive_halving import distil_finalists, write_finalist
from search.submodel.export import export
from search.workspace import Run, open_supernet
from space import Architecture, InputError, LimitMissedError, Workload
from space.io.artefact import canonical_json, digest
from space.io.progress import Reporter
from space.precision import model_file
from supernet.data.corpus import load_corpus
from supernet.evaluate import evaluation_set


def search_run(
    run: Run,
    cards: Mapping[str, Card],
    predictors: Mapping[str, Predictor],
    config: SearchConfig,
    name: str,
    reporter: Reporter,
    *,
    verify: bool = False,
    finalists: int = 0,
) -> dict[str, Any]:
    """Search a run's supernet for devices.

    Returns:
        The front, with ``measured_search`` where finalists were measured, and what :func:`distilled` gives.

    Args:
        run: a run that was trained.
        cards: by device; the first is the one measured on.
        predictors: by device.
        config: of the search.
        name: the search's folder among the run's searches.
        reporter: told how far it is.
        verify: measure the finalists, and search again where they miss.
        finalists: distil so many of the best before one is chosen.

    Raises:
        InputError: the name is none for a folder; nothing was trained.
        InfeasibleError: the limits cannot be met.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"name {name!r}: letters, digits, '.', '_' and '-', the first a letter or digit")
    corpus = load_corpus(run.config.train.data)
    trained = run.trained(open_supernet(run, corpus), corpus)
    folder = run.folder / "searches" / name
    bench = make_workbench(run.folder / "submodels", trained, next(iter(cards.values())), run.config.verify)
    measured_search = run_measured_search(folder, bench, predictors, config, reporter) if verify else None
    found = search_front(folder, trained, predictors, config, reporter)
    if measured_search:
        found = {
            **found,
            "measured_search": {key: value for key, value in measured_search.items() if key != "header"},
        }
    if finalists:
        found = {**found, **distilled(folder, bench, found, config, finalists, reporter)}
    return found


def distilled(
    folder: Path,
    bench: Workbench,
    found: Mapping[str, Any],
    config: SearchConfig,
    count: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """The best few of a search after a short distillation.

    They are those that were measured to keep the limits, where some were; else the best of the front.

    Returns:
        ``finalists``, the best first, and ``tuned``: the folder of the first one's sub-model, ``KEY-NAME``,
        with what verification says of its limits and parity where finalists were measured.
    """
    quality = next(name for name in found["objectives"] if name in QUALITIES)
    members = {m["key"]: m for m in found["members"]}
    if "measured_search" in found:
        rows = [row for one in found["measured_search"]["rounds"] for row in one["finalists"]]
        members = {row["key"]: row for row in rows if row["kept"]}
    best = sorted(members.values(), key=lambda m: (m[f"{quality}_nats"], m["key"]))[:count]
    architectures = [Architecture.from_json(m["architecture"]) for m in best]
    data = evaluation_set(bench.trained.corpus, config.front_windows, bench.trained.length)
    settings = FinalistsConfig(count=count, seed=config.seed)
    # Another number, or others, train for other steps: they stand beside each other.
    place = folder / "finalists" / digest(canonical_json([quality, [m["key"] for m in best]]))[:8]
    ranked = distil_finalists(
        bench.trained, architectures, data, settings, quality, place, reporter, config.workers
    )
    if not ranked:
        return {"finalists": []}
    member = members[ranked[0].architecture.key]
    choice = member.get("choice") or member_choice(found, member)
    target = bench.submodels / f"{member['key']}-{folder.name}"
    inputs = {"supernet": bench.trained.checkpoint.digest}
    submodel = write_finalist(target, bench.trained, ranked[0], inputs, choice)
    predicted = choice["predicted"]["latency"].get(bench.card.name, {})
    precisions = sorted({"fp32", *(Workload.parse(text).precision for text in predicted)})
    if not all(model_file(target, p).exists() for p in precisions):
        export(submodel, ["onnx"], precisions)
    tuned = {"key": member["key"], "folder": str(target)}
    if "measured_search" in found:
        verified = bench.verified(submodel, reporter)
        tuned |= {name: verified[name] for name in ("limits", "parity", "latency")}
    return {"finalists": [one.to_json(place.resolve()) for one in ranked], "tuned": tuned}


def require_tuned(found: Mapping[str, Any]) -> None:
    """Refuse a distilled finalist that was measured and missed a limit.

    Raises:
        LimitMissedError: names the limits.
    """
    tuned = found.get("tuned", {})
    missed = ", ".join(item["limit"] for item in tuned.get("limits", []) if item["status"] == "missed")
    if missed:
        raise LimitMissedError(f"{tuned['folder']}: the distilled finalist missed {missed} when measured")
    if not tuned.get("parity", {"kept": True})["kept"]:
        raise LimitMissedError(
            f"{tuned['folder']}: the exported model differs from the plain one, see verify.json"
        )
