"""Claim: an adapted model is closer to its parent than uniform cuts of the parent that are as fast.

For each limit, the run is searched, the best models are distilled from the parent, and so are the baselines
of search/select/baselines.py under the same limit, from the same batches. All are measured on the device, in
fp32 and int8, and evaluated on held-out English and Python: KL from the parent, loss, and loss of the tokens
that can be recalled from the context. Intervals are 95%, of a paired bootstrap over windows.

It needs a run whose blocks are fitted, and a card of this machine; it resumes after an interruption:

    formfit adapt PARENT --context 4096 --limit 'decode@1024<=70%' --out RUN
    python benchmarks/adapt.py --run RUN --english DIR --python DIR
"""

import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import outcome
from numpy.typing import NDArray
from torch import Tensor

from latency import load_card
from search.cli.output import Bars
from search.config import Run, open_run, open_trained
from search.engine.choice import Choice
from search.engine.devices import open_devices
from search.engine.front import Front
from search.select.finalist import Finalist
from search.select.search_command import Distillation, search_and_select
from search.select.successive_halving import write_finalist
from search.submodel.export import export
from search.submodel.verify import graph_loss, measure_submodel
from space import Architecture, InputError, Workload, genome
from space.precision import model_file
from supernet.data.corpus import DataConfig, load_corpus
from supernet.evaluate import KL, EvaluationSet, Parent, evaluate, evaluation_set, run_parent
from supernet.extract import SubModel, read_submodel, write_submodel
from supernet.training.train import Trained, load_supernet

LIMITS = (
    "decode@4096<=70%", "decode@4096<=50%", "decode@1024<=70%", "decode@1024<=50%", "prefill@512<=70%"
)  # fmt: skip
RESAMPLES = 2000
INT8_WINDOWS = 8
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Text:
    """Held-out windows of one kind of text, and the parent's states on each."""

    windows: list[EvaluationSet]
    parents: list[Parent]


def single(data: EvaluationSet, index: int) -> EvaluationSet:
    """Return one window of an evaluation."""
    row = slice(index, index + 1)
    return replace(
        data,
        tokens=data.tokens[row],
        targets=data.targets[row],
        recallable=data.recallable[row],
        text_bytes=None,
    )


def read_text(trained: Trained, path: Path, windows: int, length: int, weights: Mapping[str, Tensor]) -> Text:
    """Read held-out text, by the split of the run: no document of it was trained on."""
    data = trained.text.data.model_copy(update={"path": path, "limit_mb": None})
    whole = evaluation_set(load_corpus(DataConfig.model_validate(data.model_dump())), windows, length)
    each = [single(whole, index) for index in range(windows)]
    largest, config = genome.largest(trained.space), replace(trained.space.config, max_seq_len=length)
    return Text(each, [run_parent(weights, largest, config, one) for one in each])


def losses(
    weights: Mapping[str, Tensor], architecture: Architecture, trained: Trained, text: Text
) -> dict[str, Array]:
    """Return KL, loss and loss of recalled tokens of every window [N]."""
    found: dict[str, list[float]] = {"kl": [], "loss_nats": [], "recall_loss_nats": []}
    for one, parent in zip(text.windows, text.parents, strict=True):
        quality = evaluate(weights, architecture, trained.space.config, one, parent=parent)
        found["kl"].append(quality.extra[KL])
        found["loss_nats"].append(quality.loss_nats)
        found["recall_loss_nats"].append(quality.recall_loss_nats)
    return {name: np.array(values) for name, values in found.items()}


def means(values: dict[str, Array]) -> dict[str, float]:
    """Return the mean over windows of each figure; windows without recalled tokens do not count there."""
    return {name: float(np.nanmean(value)) for name, value in values.items()}


def interval(differences: Array) -> list[float]:
    """Return the 95% interval of the mean of paired differences [N]."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(differences), (RESAMPLES, len(differences)))
    return [float(x) for x in np.quantile(differences[rows].mean(axis=1), [0.025, 0.975])]


def on_device(
    submodel: SubModel, run: Run, trained: Trained, workload: Workload, card: Any
) -> dict[str, Any]:
    """Return latencies in ms and the loss in nats, in fp32 and int8."""
    precisions = ("fp32", "int8")
    if not all(model_file(submodel.folder, p).exists() for p in precisions):
        export(submodel, ("onnx",), precisions)
    data = evaluation_set(trained.corpus, INT8_WINDOWS, trained.length)
    found = {}
    for precision in precisions:
        one = replace(workload, precision=precision)
        measured = measure_submodel(submodel, card, [one], run.config.verify)[str(one)]
        found[precision] = {
            "latency_ms": measured.latency_ms,
            "interval_ms": list(measured.interval_ms),
            "problems": list(measured.problems),
            "loss_nats": graph_loss(model_file(submodel.folder, precision), data),
            "bytes": model_file(submodel.folder, precision).stat().st_size,
        }
    return found


def one_limit(run: Run, trained: Trained, texts: dict[str, Text], limit: str, count: int) -> dict[str, Any]:
    """Search, distil, measure and evaluate under one limit."""
    reporter, device = Bars(), run.config.device
    workload = Workload.parse(limit.partition("<=")[0])
    config = run.config.search.model_copy(
        update={"limits": (limit,), "objectives": ("kl", f"latency:{workload}")}
    )
    name = re.sub("[^A-Za-z0-9.]+", "-", limit).strip("-")
    cards, predictors = open_devices(run.devices, [device], run.space, run.config.profile, config, reporter)
    began = time.monotonic()
    result = search_and_select(run, cards, predictors, config, name, reporter, verify=True, distill_top=count)
    seconds = time.monotonic() - began
    if result.distillation is None or not result.distillation.finalists:
        raise InputError(f"{limit}: no finalist kept it")
    models = {"searched": result.distillation.finalists[0], **result.distillation.baselines}
    rows: dict[str, Any] = {}
    each: dict[str, dict[str, dict[str, Array]]] = {}
    for title, finalist in models.items():
        folder = run.folder / "submodels" / f"{finalist.architecture.key}-{name}"
        choice = Choice(loss_nats=(finalist.after or finalist.before)["loss_nats"])
        inputs = {"supernet": trained.checkpoint.digest}
        if title != "searched":
            submodel = write_finalist(folder, trained, finalist, inputs, choice.to_json())
        else:
            submodel = searched_model(result.distillation)
        weights = dict(submodel.model().state_dict())
        each[title] = {
            kind: losses(weights, finalist.architecture, trained, text) for kind, text in texts.items()
        }
        rows[title] = row_of(finalist) | {
            "texts": {kind: means(values) for kind, values in each[title].items()},
            "device": on_device(submodel, run, trained, workload, cards[device]),
        }
        sys.stderr.write(f"{limit}, {title}: {json.dumps(rows[title]['texts'])}\n")
    ours = each.pop("searched")
    for title, theirs in each.items():
        rows[title]["kl_above_the_searched"] = {
            kind: {
                "mean": float((theirs[kind]["kl"] - ours[kind]["kl"]).mean()),
                "interval_95": interval(theirs[kind]["kl"] - ours[kind]["kl"]),
            }
            for kind in texts
        }
    front = Front.read(run.folder / "searches" / name / "front.json")
    return {
        "limit": limit,
        "search_and_distillation_seconds": seconds,
        "evaluations": front.evaluations,
        "scores": {k: vars(v) for k, v in front.scores.items()},
        "models": rows,
    }


def searched_model(distillation: Distillation) -> SubModel:
    """Return the sub-model of the best finalist."""
    if distillation.tuned is None:
        raise InputError("the best finalist was not written")
    return read_submodel(distillation.tuned.folder)


def row_of(finalist: Finalist) -> dict[str, Any]:
    """Return what a finalist is and how it was trained."""
    return {
        "key": finalist.architecture.key,
        "architecture": finalist.architecture.describe(),
        "before": finalist.before,
        "after": finalist.after,
        "steps": finalist.steps,
    }


def parent_row(
    run: Run, trained: Trained, texts: dict[str, Text], limits: list[str], card: Any
) -> dict[str, Any]:
    """Return the parent's figures."""
    largest = genome.largest(run.space)
    supernet = load_supernet(run.space, trained.checkpoint)
    submodel = write_submodel(
        run.folder / "submodels" / f"{largest.key}-parent", supernet, largest, {}, {}, trained.text
    )
    weights = dict(submodel.model().state_dict())
    workloads = dict.fromkeys(Workload.parse(limit.partition("<=")[0]) for limit in limits)
    return {
        "texts": {kind: means(losses(weights, largest, trained, text)) for kind, text in texts.items()},
        "device": {str(w): on_device(submodel, run, trained, w, card) for w in workloads},
    }


def ahead(row: dict[str, Any]) -> bool:
    """Return if the searched model is ahead of every baseline beyond the interval, on both texts."""
    return all(
        kind["interval_95"][0] > 0
        for title, model in row["models"].items()
        if title != "searched"
        for kind in model["kl_above_the_searched"].values()
    )


def main() -> int:
    parser = outcome.options(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, help="a run whose blocks are fitted")
    parser.add_argument("--devices", type=Path, default=Path("devices"))
    parser.add_argument("--english", type=Path, required=True, help="file or folder of English text")
    parser.add_argument("--python", type=Path, required=True, help="file or folder of Python text")
    parser.add_argument("--limit", nargs="+", default=list(LIMITS))
    parser.add_argument("--count", type=int, default=2, help="finalists")
    parser.add_argument("--steps", type=int, default=50, help="of the distillation, of --batch rows each")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--windows", type=int, default=12, help="held-out windows of each text")
    parser.add_argument("--length", type=int, default=1024, help="their length")
    arguments = parser.parse_args()
    run = open_run(arguments.run, arguments.devices)
    finalists = {"steps": arguments.steps, "batch": arguments.batch, "baselines": True}
    finalists |= {"distillation": 1.0, "learning_rate": 1e-4}
    settings = run.config.finalists.model_copy(update=finalists)
    run = replace(run, config=run.config.model_copy(update={"finalists": settings}))
    trained = open_trained(run)
    weights = dict(load_supernet(run.space, trained.checkpoint).weights(genome.largest(run.space)))
    texts = {
        "english": read_text(trained, arguments.english, arguments.windows, arguments.length, weights),
        "python": read_text(trained, arguments.python, arguments.windows, arguments.length, weights),
    }
    rows = [one_limit(run, trained, texts, limit, arguments.count) for limit in arguments.limit]
    card = load_card(run.devices, run.config.device)
    body = {
        "parent": parent_row(run, trained, texts, arguments.limit, card),
        "tokens": settings.training(arguments.count, trained.length).steps * arguments.batch * trained.length,
        "windows": arguments.windows,
        "length": arguments.length,
        "limits": rows,
    }
    won = sum(map(ahead, rows))
    checks = {
        f"ahead of every baseline under {won} of {len(rows)} limits, at least 4 of 5": 5 * won
        >= 4 * len(rows)
    }
    return outcome.write("adapt", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
