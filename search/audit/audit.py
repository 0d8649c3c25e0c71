"""The audit: compares the supernet's ranking of architectures with stand-alone training.

Two sets of architectures are trained from scratch: one is spread over the axes of the space, the other has
equal predicted latency. Over the axes, size alone ranks well; a search needs the ranking among architectures
of one latency most. Each architecture is trained with the run's batches, optimiser and schedule, once for
each seed. The agreement of two seeds shows how much can be expected of a ranking; it is not an upper bound,
since the supernet is compared with the mean of both, which is less noisy. All are evaluated on the sequences
that the supernet's sub-networks are evaluated on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from latency import Predictor, load_card
from search.audit.page import write_audit_page
from search.audit.rank_correlation import RankCorrelations, rank_correlations, verdict
from search.audit.result import (
    SETS,
    AuditedArchitecture,
    AuditResult,
    AuditSettings,
    SetResult,
    StandAlone,
)
from search.audit.stratified import choose_diverse, choose_equal, sample_pool
from search.audit.trials import Trial, train_trials
from search.config import Run, open_trained
from search.engine.devices import open_predictor
from search.engine.evaluator import Failed
from search.engine.supernet_evaluator import evaluator
from space import Architecture, InputError, Space, Workload, genome
from space.cost import flops, params
from space.cpus import available_cpus
from space.io.artefact import canonical_json, digest
from space.io.progress import Reporter
from supernet.data.corpus import Corpus
from supernet.evaluate import EvaluationSet, Losses, evaluation_set, losses
from supernet.training.recipe import TrainConfig
from supernet.training.train import Trained, load_supernet, training_inputs

WITHIN = 0.10  # largest relative difference of predicted latencies in the second set
STEPS_SHARE = 0.25  # of the run's training steps


class AuditConfig(BaseModel):
    """Settings of an audit.

    Attributes:
        size: architectures of each set.
        seeds: trainings of each architecture; the agreement of seeds is unknown with one.
        steps: of each training; None for a quarter of the run's.
        batch: rows of a step; None for the run's.
        workload: at which predicted latencies are equal; None for the first prefill that was profiled.
        workers: parallel trainings; None for one a core.
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
        """The stand-alone training's configuration: the run's, from scratch, on one thread.

        Its seed differs from the supernet's, so that no batches or initial weights are shared. Settings of
        blockwise training fit no training from scratch, so the defaults of joint training replace them.

        Args:
            config: of the supernet's training.
        """
        if config.method == "blockwise":
            kept = config.model_dump(include={"data", "length", "precision", "seed"})
            config = TrainConfig.model_validate(kept)
        changes = {
            "steps": self.steps or max(1, round(STEPS_SHARE * config.steps)),
            "batch": self.batch or config.batch,
            "seed": config.seed + 1,
            "threads": 1,
            "workers": 0,
            "init": None,
        }
        return config.model_copy(update=changes)


def audit(run: Run, config: AuditConfig, device: str | None, reporter: Reporter) -> AuditResult:
    """Audit a run's supernet and write ``audit.json`` and ``audit.html``, unless they exist.

    Args:
        run: a run that was trained.
        config: settings.
        device: whose predicted latencies are equal; None for the run's.
        reporter: shows the progress.

    Raises:
        InputError: nothing was trained, there is no predictor for the device and workload, or the space has
            too few architectures.
        RuntimeError: a training failed repeatedly.
    """
    trained = open_trained(run)
    device = device or run.config.device
    workload, predictor = _predictor(run, config, device, reporter)
    data = evaluation_set(trained.corpus, run.config.search.front_windows, trained.length)
    training = config.training(run.config.train)
    settings = AuditSettings(
        steps=training.steps,
        batch=training.batch,
        length=trained.length,
        seeds=tuple(training.seed + i for i in range(config.seeds)),
        windows=len(data.tokens),
        architectures_per_set=config.size,
        device=device,
        workload=str(workload),
        within_percent=100 * WITHIN,
        choice_seed=config.seed,
    )
    inputs = {
        **training_inputs(run.space, training, trained.corpus),
        "supernet": trained.checkpoint.digest,
        "predictor": digest(canonical_json(predictor.identity())),
        "settings": digest(canonical_json(settings.to_json())),
    }
    path = run.folder / "audit" / "audit.json"
    finished = _finished(path, inputs)
    if finished is not None:
        reporter.skipped("audit")
        return finished
    sets, level = choose_sets(run.space, config, predictor, workload)
    members = list(dict.fromkeys(a for chosen in sets.values() for a in chosen))  # a member may be in both
    inside = _inside(trained, members, data, reporter)
    stand_alone = _stand_alone(run, trained.corpus, training, settings.seeds, members, data, config, reporter)
    latency = predictor.cost(workload)(genome.encode(run.space, members))
    architectures = tuple(
        AuditedArchitecture(
            architecture=architecture,
            sets=tuple(name for name, chosen in sets.items() if architecture in chosen),
            params=params(architecture, run.space.config),
            flops=flops(architecture, workload, run.space.config),
            predicted_latency_ms=1e3 * float(seconds),
            supernet=supernet,
            stand_alone=trainings,
        )
        for architecture, supernet, trainings, seconds in zip(
            members, inside, stand_alone, latency, strict=True
        )
    )
    result = AuditResult(
        space=run.space.name,
        supernet_step=trained.checkpoint.step,
        settings=settings,
        recall_share=data.recall_share,
        equal_latency_ms=1e3 * level,
        sets=judge(architectures, config.seed),
        architectures=architectures,
        inputs=inputs,
    )
    write_audit_page(path.with_name("audit.html"), result)
    result.write(path)
    return result


def _predictor(run: Run, config: AuditConfig, device: str, reporter: Reporter) -> tuple[Workload, Predictor]:
    """The workload at which latencies are equal, and the predictor.

    Raises:
        InputError: there is no such predictor, or the workload was not profiled.
    """
    profiled = run.config.profile
    try:
        predictor = open_predictor(
            run.space, profiled, load_card(run.devices, device), profiled.precision, reporter
        )
    except InputError as error:
        raise InputError(f"audit: the set of equal latency needs a predictor: {error}") from None
    text = config.workload
    if text:
        for name in ("threads", "precision"):
            text += "" if f"{name}=" in text else f",{name}={getattr(profiled, name)}"
        workload = Workload.parse(text)
    else:
        workload = next((w for w in predictor.models if w.phase == "prefill"), next(iter(predictor.models)))
    predictor.cost(workload)  # refuses a workload that was not profiled
    return workload, predictor


def _finished(path: Path, inputs: Mapping[str, str]) -> AuditResult | None:
    """The audit that exists, if it has exactly these inputs."""
    try:
        result = AuditResult.read(path)
    except InputError:
        return None
    return result if result.inputs == dict(inputs) else None


def choose_sets(
    space: Space, config: AuditConfig, predictor: Predictor, workload: Workload
) -> tuple[dict[str, list[Architecture]], float]:
    """Choose both sets of architectures.

    Args:
        space: that they are members of.
        config: their number and the seed.
        predictor: of latencies.
        workload: at which the latencies of the second set are equal.

    Returns:
        Architectures by set, and the latency of the second set in seconds.

    Raises:
        InputError: the space has too few architectures.
    """
    pool = sample_pool(space, config.seed)
    axes = choose_diverse(space, pool, config.size)
    equal, level = choose_equal(space, pool, predictor.cost(workload), WITHIN, config.size)
    return {"axes": genome.decode(space, axes), "equal_latency": genome.decode(space, equal)}, level


def _inside(
    trained: Trained, architectures: Sequence[Architecture], data: EvaluationSet, reporter: Reporter
) -> list[Losses]:
    """Losses of the architectures inside the supernet."""
    supernet = load_supernet(trained.space, trained.checkpoint)
    inside: list[Losses] = []
    with (
        reporter.stage("evaluate inside") as stage,
        evaluator(supernet, {"audit": data}, 0) as evaluate_many,
    ):
        for architecture, outcome in zip(architectures, evaluate_many(architectures, "audit"), strict=True):
            if isinstance(outcome, Failed):
                raise InputError(f"audit: {architecture.key} cannot be evaluated: {outcome.reason}")
            inside.append(losses(outcome))
            stage(len(inside) / len(architectures), f"{len(inside)} of {len(architectures)} architectures")
    return inside


def _stand_alone(
    run: Run,
    corpus: Corpus,
    training: TrainConfig,
    seeds: Sequence[int],
    architectures: Sequence[Architecture],
    data: EvaluationSet,
    config: AuditConfig,
    reporter: Reporter,
) -> list[tuple[StandAlone, ...]]:
    """Results of training each architecture from scratch with each seed."""
    trials = [
        _trial(run, training.model_copy(update={"seed": seed}), corpus, architecture, len(data.tokens))
        for architecture in architectures
        for seed in seeds
    ]
    workers = config.workers or available_cpus()
    results = iter(train_trials(run.space, trials, corpus, data, workers, reporter))
    return [tuple(StandAlone(seed=seed, losses=next(results)) for seed in seeds) for _ in architectures]


def _trial(run: Run, config: TrainConfig, corpus: Corpus, architecture: Architecture, windows: int) -> Trial:
    """The trial of an architecture; its folder's name contains the digest of its inputs."""
    training = training_inputs(run.space, config, corpus, architecture)
    name = f"{architecture.key}-s{config.seed}-{digest(canonical_json(training))[:8]}"
    return Trial(
        architecture=architecture,
        config=config,
        folder=(run.folder / "audit" / "trials" / name).resolve(),
        inputs=training | {"evaluation": digest(canonical_json({"windows": windows}))},
    )


def judge(architectures: Sequence[AuditedArchitecture], seed: int) -> dict[str, SetResult]:
    """Results by set.

    Args:
        architectures: of both sets.
        seed: of the bootstrap.
    """
    results = {}
    for name, where in SETS.items():
        members = [item for item in architectures if name in item.sets]
        loss = _correlations(members, "loss_nats", seed)
        if loss is None:
            raise ValueError(f"set {name}: a loss is missing")
        word, text = verdict(loss, where)
        results[name] = SetResult(
            architectures=tuple(item.key for item in members),
            loss=loss,
            verdict=word,
            text=text,
            recall_loss=_correlations(members, "recall_loss_nats", seed),
        )
    return results


def _correlations(members: Sequence[AuditedArchitecture], loss: str, seed: int) -> RankCorrelations | None:
    """Rank correlations with a stand-alone loss; None if it is undefined, as nothing can be recalled."""
    inside = [item.supernet[loss] for item in members]
    if None in inside:
        return None
    stand_alone = np.array([[one.losses[loss] for one in item.stand_alone] for item in members], float).T
    sizes = {
        "params": -np.array([float(item.params) for item in members]),
        "flops": -np.array([float(item.flops) for item in members]),
    }
    return rank_correlations(stand_alone, {"supernet": np.array(inside, float), **sizes}, seed)
