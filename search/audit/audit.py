"""The audit: does the supernet rank architectures as training each of them alone does?

Two sets of architectures are trained from scratch, one spread over the axes of the space, one at
equal predicted latency: over the axes size alone ranks well, while a search needs the ranking most
among architectures of one latency. Each is trained with the run's own batches, optimiser and
schedule, and again with another seed: how well two seeds agree says what can be asked of a ranking.
It is no bound, since the supernet is held against the mean of both, which is less noisy. All are
evaluated on the windows on which the supernet's sub-networks are.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from latency import Predictor, load_card
from search.audit.page import AUDIT, SETS, write_audit_page
from search.audit.rank_correlation import agreement, verdict
from search.audit.stratified import choose_equal, choose_spread, sample_pool
from search.audit.trials import Trial, train_trials
from search.engine.devices import open_predictor
from search.engine.evaluator import Failed
from search.engine.supernet_evaluator import evaluator
from search.workspace import Run, open_supernet
from space import Architecture, InputError, Space, Workload, genome
from space.cost import flops, params
from space.io.artefact import canonical_json, digest
from space.io.progress import Reporter
from supernet.data.corpus import Corpus, load_corpus
from supernet.evaluate import EvaluationSet, Quality, evaluation_set, losses
from supernet.training.checkpoint import Checkpoint
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_supernet, training_inputs

WITHIN = 0.10  # of one predicted latency
SHARE = 0.25  # of the run's training steps, where no number is given


class AuditConfig(BaseModel):
    """How a supernet is audited.

    Attributes:
        size: architectures of each set.
        seeds: trainings of each architecture; with one, nothing says how well two agree.
        steps: of each training; None is a quarter of the run's.
        batch: rows of a step; None is the run's.
        workload: at which predicted latencies are equal; None is the first prefill that was measured.
        workers: trainings at a time; None is one a core.
        seed: of the choice of architectures and of the bootstrap.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Annotated[int, Field(ge=3)] = 12
    seeds: Annotated[int, Field(gt=0)] = 2
    steps: Annotated[int, Field(gt=0)] | None = None
    batch: Annotated[int, Field(gt=0)] | None = None
    workload: str | None = None
    workers: Annotated[int, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    def training(self, config: TrainConfig) -> TrainConfig:
        """How each architecture is trained: as the run says, from scratch, on one thread.

        The first seed is another than the supernet's, so that neither batches nor initial weights
        are shared with it.
        """
        changes = {
            "steps": self.steps or max(1, round(SHARE * config.steps)),
            "batch": self.batch or config.batch,
            "seed": config.seed + 1,
            "threads": 1,
            "workers": 0,
            "init": None,
        }
        return config.model_copy(update=changes)


def audit(run: Run, config: AuditConfig, device: str | None, reporter: Reporter) -> dict[str, Any]:
    """Audit a run's supernet; returns the content of ``RUN/audit/audit.json``.

    An audit that was stopped goes on; trainings that are finished are not run again.

    Args:
        run: a run whose supernet is trained.
        config: how to audit it.
        device: whose predictor says which latencies are equal; None is the run's.
        reporter: shows how far it is.

    Raises:
        InputError: there is no supernet or no predictor of its space, or a training refused its input.
    """
    corpus = load_corpus(run.config.train.data)
    checkpoint = open_supernet(run, corpus)
    device = device or run.config.device
    workload, predictor = _predictor(run, config, device, reporter)
    length = run.config.train.length or run.space.max_seq_len
    data = evaluation_set(corpus, run.config.search.front_windows, length)
    training = config.training(run.config.train)
    seeds = [training.seed + i for i in range(config.seeds)]
    settings = {
        "steps": training.steps,
        "batch": training.batch,
        "length": length,
        "seeds": seeds,
        "windows": len(data.tokens),
        "architectures_per_set": config.size,
        "device": device,
        "workload": str(workload),
        "within_percent": 100 * WITHIN,
        "choice_seed": config.seed,
    }
    inputs = {
        **training_inputs(run.space, training, corpus),
        "supernet": checkpoint.digest,
        "predictor": digest(canonical_json(predictor.identity())),
        "settings": digest(canonical_json(settings)),
    }
    path = run.folder / "audit" / "audit.json"
    done = _finished(path, inputs)
    if done is not None:
        reporter.skipped("audit")
        return done
    sets, level = choose_sets(run.space, config, predictor, workload)
    members = list(dict.fromkeys(a for chosen in sets.values() for a in chosen))  # some may be in both
    inside = _inside(run.space, checkpoint, members, data, reporter)
    trials = [
        _trial(run, training.model_copy(update={"seed": seed}), corpus, architecture, len(data.tokens))
        for architecture in members
        for seed in seeds
    ]
    workers = config.workers or os.cpu_count() or 1
    reached = iter(train_trials(run.space, trials, corpus, data, workers, reporter))
    latency = predictor.cost(workload)(genome.encode(run.space, members))
    rows = [
        {
            "key": architecture.key,
            "architecture": architecture.to_json(),
            "sets": [name for name, chosen in sets.items() if architecture in chosen],
            "params": params(architecture, run.space.config),
            "flops": flops(architecture, workload, run.space.config),
            "predicted_latency_ms": 1e3 * float(seconds),
            "supernet": losses(quality),
            "alone": [{"seed": seed, **next(reached)} for seed in seeds],
        }
        for architecture, quality, seconds in zip(members, inside, latency, strict=True)
    ]
    judged = judge(rows, config.seed)
    body = {
        "verdict": " ".join(judged[name]["text"] for name in SETS),
        "space": run.space.name,
        "supernet_step": checkpoint.step,
        "settings": settings,
        "recall_share": data.recall_share,
        "equal_latency_ms": 1e3 * level,
        "sets": judged,
        "architectures": rows,
    }
    write_audit_page(path.with_name("audit.html"), body)
    AUDIT.write(path, inputs, body)
    return AUDIT.read(path)


def _predictor(run: Run, config: AuditConfig, device: str, reporter: Reporter) -> tuple[Workload, Predictor]:
    """The workload at which latencies are to be equal, and the predictor that says so."""
    profiled = run.config.profile
    try:
        predictor = open_predictor(run.config, load_card(run.devices, device), profiled.precision, reporter)
    except InputError as error:
        raise InputError(f"audit: the set of equal latency needs a predictor: {error}") from None
    text = config.workload
    if text:
        for name in ("threads", "precision"):
            text += "" if f"{name}=" in text else f",{name}={getattr(profiled, name)}"
        workload = Workload.parse(text)
    else:
        workload = next((w for w in predictor.models if w.phase == "prefill"), next(iter(predictor.models)))
    predictor.cost(workload)  # refuses one that was not measured
    return workload, predictor


def _finished(path: Path, inputs: Mapping[str, str]) -> dict[str, Any] | None:
    """The audit that is there already, if it was made from these inputs."""
    try:
        value = AUDIT.read(path)
    except InputError:
        return None
    return value if value["header"]["inputs"] == dict(inputs) else None


def choose_sets(
    space: Space, config: AuditConfig, predictor: Predictor, workload: Workload
) -> tuple[dict[str, list[Architecture]], float]:
    """Both sets of architectures, and the latency of the second in seconds."""
    pool = sample_pool(space, config.seed)
    axes = choose_spread(space, pool, config.size)
    equal, level = choose_equal(space, pool, predictor.cost(workload), WITHIN, config.size)
    return {"axes": genome.decode(space, axes), "equal_latency": genome.decode(space, equal)}, level


def _inside(
    space: Space,
    checkpoint: Checkpoint,
    architectures: Sequence[Architecture],
    data: EvaluationSet,
    reporter: Reporter,
) -> list[Quality]:
    """What the architectures reach inside the supernet."""
    found: list[Quality] = []
    with (
        reporter.stage("evaluate inside") as stage,
        evaluator(load_supernet(space, checkpoint), {"audit": data}, 0) as evaluate_all,
    ):
        for architecture, outcome in zip(architectures, evaluate_all(architectures, "audit"), strict=True):
            if isinstance(outcome, Failed):
                raise InputError(f"audit: {architecture.key} cannot be evaluated: {outcome.reason}")
            found.append(outcome)
            stage(len(found) / len(architectures), f"{len(found)} of {len(architectures)} architectures")
    return found


def _trial(run: Run, config: TrainConfig, corpus: Corpus, architecture: Architecture, windows: int) -> Trial:
    """The trial of an architecture; the folder's name says what is trained, so that none takes another's."""
    training = training_inputs(run.space, config, corpus, architecture)
    name = f"{architecture.key}-s{config.seed}-{digest(canonical_json(training))[:8]}"
    return Trial(
        architecture=architecture,
        config=config,
        folder=(run.folder / "audit" / "trials" / name).resolve(),
        inputs=training | {"evaluation": digest(canonical_json({"windows": windows}))},
    )


def judge(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The figures of each set and the verdict on it, from the rows of ``audit.json``."""
    found: dict[str, Any] = {}
    for name, where in SETS.items():
        members = [row for row in rows if name in row["sets"]]
        value: dict[str, Any] = {"architectures": [row["key"] for row in members]}
        for loss in ("loss", "recall_loss"):
            column = f"{loss}_nats"
            inside = [row["supernet"][column] for row in members]
            if None in inside:  # nothing in the windows can be recalled
                value[loss] = None
                continue
            alone = np.array([[item[column] for item in row["alone"]] for row in members]).T
            predictors = {"supernet": np.array(inside)}
            for size in ("params", "flops"):
                predictors[size] = -np.array([float(row[size]) for row in members])
            figures = agreement(alone, predictors, seed)
            value[loss] = figures.to_json()
            if loss == "loss":
                value["verdict"], value["text"] = verdict(figures, where)
        found[name] = value
    return found
