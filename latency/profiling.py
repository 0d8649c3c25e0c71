"""Profiling: measure whole models of a space, and infer the latencies of its ops.

:mod:`latency.predictor.design` chooses the models to measure. Choosing stops when latencies are known
accurately enough, or when the budget ends. Models that were drawn at random follow, for the intervals, and
held-out models, for the test. Measurements are saved group by group, so that an interrupted profiling
resumes.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from latency.card import load_card, open_card
from latency.config import ProfileConfig
from latency.device_runner.timer import Run, measure, pinned
from latency.device_runner.timing import Measurements
from latency.predictor.design import ModelDesign, ModelRole, model_design
from latency.predictor.op_latencies import OpLatencies
from latency.predictor.predictor import Predictor
from latency.records import FIT_ROLES, Records, model_name
from latency.runtimes.protocol import Runtime
from latency.runtimes.reference import reference_items, require_stable, time_references
from latency.runtimes.registry import graph_version, open_runtime
from space import Architecture, InputError, Space, Workload
from space.cpus import slow_cpus
from space.io.artefact import canonical_json, digest
from space.io.machine import check_threads

CHOSEN_PER_FIT = 16  # models that are chosen before the next fit
MAX_HALF_WIDTH = 0.05  # relative; a timing that is less certain is measured again
MAX_DEVIATION = (
    0.1  # relative deviation from what the other models say, above which a model is measured again
)
MAX_DEVIATIONS = 5.0  # and in expected standard deviations
CHOSEN_SHARE, OTHERS_SHARE = 0.5, 0.42  # of the progress; memory is the rest
Report = Callable[[str, float], None]  # called with the current work and the share of all that is done


def profile(
    space: Space,
    devices: str | Path,
    name: str,
    config: ProfileConfig,
    report: Report | None = None,
    prior: OpLatencies | None = None,
) -> Predictor:
    """Measure what this machine's card lacks, and fit the predictor of a space.

    Args:
        space: the space whose ops and models are measured.
        devices: folder of all cards.
        name: name of this machine's card.
        config: settings.
        report: called with the current work and the share of all that is done.
        prior: op latencies of a known device; ops that behave alike need not be measured again.

    Returns:
        The predictor, which is also written to the card.

    Raises:
        InputError: the card is of another device, the machine is too noisy, the runtime is not available, a
            workload is not possible, or the predictor is too inaccurate to be used.
    """
    devices = Path(devices)
    check_threads("profile.threads", config.threads)
    runtime = open_runtime(config.runtime, config.threads, config.precision)
    workloads = config.parsed(space)
    card = open_card(devices, name, runtime.fingerprint())
    records = Records(card, space, runtime.name, config.threads, config.precision)
    with pinned(config.threads) as cpus:
        if line := slow_cpus(cpus):
            card.problems.append(line)
        session = _Session(records, config, runtime, report or (lambda _what, _share: None), prior)
        if config.max_noise is not None:
            reference_runtime = open_runtime(config.runtime, config.threads)
            card.aa_difference = require_stable(time_references(reference_runtime), config.max_noise)
    design = model_design(space, workloads, config.counts())
    session.choose(design)
    session.others(design)
    chosen = session.measured(design)
    session.memory(chosen, workloads)
    predictor = records.predictor(workloads, chosen, prior)
    session.report("fitted", 1.0)
    if config.max_error is not None:
        require_accurate(predictor, config.max_error, name)
    path = card.predictor_path(space.name, runtime.name, config.threads, config.precision)
    inputs = {"settings": settings_digest(config), "card": card.digest}
    predictor.save(path, {**inputs, "graphs": str(graph_version(runtime.name))})
    return predictor


def load_prior(space: Space, devices: Path, name: str, config: ProfileConfig) -> OpLatencies:
    """Fit the op latencies of a known device, as a prior for another one.

    Args:
        space: the space whose ops will be profiled.
        devices: folder of all cards.
        name: name of the known device's card.
        config: runtime, threads and precision.

    Raises:
        InputError: there is no such card, or it has no measurements of such ops.
    """
    card = load_card(devices, name)
    ops = Records(card, space, config.runtime, config.threads, config.precision).fitted()
    if not ops.models:
        raise InputError(
            f"device {name}: no models of a space with the model configuration of {space.name}, "
            f"{config.runtime} on {config.threads} threads in {config.precision}; not usable as a prior"
        )
    return ops


def require_accurate(predictor: Predictor, max_error: float, device: str) -> None:
    """Refuse a predictor that knows nothing beyond the sizes of models.

    Args:
        predictor: a predictor that was tested on held-out models.
        max_error: mean relative error that is accepted in any case.
        device: name of the card, for the error.

    Raises:
        InputError: on a workload the error is larger, and not below that of a fit on FLOPs and parameters by
            more than its standard error.
    """
    for workload, model in predictor.models.items():
        test = model.errors.test if model.errors else None
        if test is None:
            continue
        ours, plain = test.held_out, test.flops_and_params
        deviation = ours.standard_error_percent
        if ours.mape_percent > 100 * max_error and ours.mape_percent + deviation > plain.mape_percent:
            raise InputError(
                f"device {device}, {workload}: predictions are {ours.mape_percent:.1f}% off on {ours.models} "
                f"models that were not fitted, a fit on FLOPs and parameters {plain.mape_percent:.1f}%; the "
                "predictor is not written. Stop other programs, move the card away and profile again, "
                "or raise profile.max_error"
            )


def settings_digest(config: ProfileConfig) -> str:
    """Sha256 of the settings that a predictor depends on.

    Args:
        config: settings of the profiling.
    """
    return digest(canonical_json([config.model_dump(mode="json"), graph_version(config.runtime)]))


def _now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class _Session:
    """One profiling on one card: measures in groups and saves after each."""

    def __init__(
        self,
        records: Records,
        config: ProfileConfig,
        runtime: Runtime,
        report: Report,
        prior: OpLatencies | None,
    ) -> None:
        self.records, self.config, self.runtime, self.report = records, config, runtime, report
        self.prior = prior
        self.card, self.space = records.card, records.space
        self.anchors = runtime.anchors()
        # In fp32 whatever the models' precision: the card's units must not depend on it.
        self.references = reference_items(open_runtime(config.runtime, config.threads))
        self.began = time.monotonic()
        self.seconds_per_model: list[float] = []
        self.seed = 0  # of the weights of the next model

    def choose(self, design: ModelDesign) -> None:
        """Measure models that tell op latencies apart, until these are known accurately enough."""
        workloads, most = design.workloads, self.config.optimal_models
        while True:
            done = self.records.architectures("optimal", workloads)
            timed = self.records.timed()
            phases = {item.workload.phase for item in timed}
            fitted = phases >= {w.phase for w in workloads}
            ops = self.records.fitted(self.prior) if fitted else design.expected()
            text = f"{len(done)} of at most {most} chosen models"
            if fitted:
                error = design.expected_error(ops)
                text += f", ops known to {error:.2%}"
                if done and error <= self.config.error:
                    break
            count = min(CHOSEN_PER_FIT, most - len(done))
            if count <= 0 or (done and self._time_for_others(design)):
                break
            chosen = design.choose(ops, count, done)
            if not chosen:
                break
            ends = [CHOSEN_SHARE * n / most for n in (len(done), len(done) + len(chosen))]
            self._models([("optimal", a) for a in chosen], workloads, text, (ends[0], ends[1]))

    def others(self, design: ModelDesign) -> None:
        """Measure the random and the held-out models that the card lacks, and again what is doubtful."""
        wanted: list[tuple[ModelRole, Architecture]] = [("random", a) for a in design.random]
        wanted += [("held_out", a) for a in design.held_out]
        missing = self._missing(wanted, design.workloads)
        order = np.random.default_rng(self.config.seed).permutation(len(missing))
        repeated = self._missing([("repeat", a) for a in design.repeat], design.workloads)
        start, end = CHOSEN_SHARE, CHOSEN_SHARE + OTHERS_SHARE
        middle = start + (end - start) * 0.85
        self._models(
            [missing[i] for i in order], design.workloads, "random and held-out models", (start, middle)
        )
        self._models(repeated, design.workloads, "held-out models again", (middle, end))
        doubtful = self._doubtful(design)
        if doubtful:
            self._models(doubtful, design.workloads, "doubtful models again", (end, end))
            for role, architecture in self._doubtful(design):
                self.card.problems.append(
                    f"model {architecture.key} ({role}): doubtful also when measured again"
                )
            self.card.save()

    def measured(self, design: ModelDesign) -> dict[ModelRole, list[Architecture]]:
        """The measured models of the space by role."""
        chosen = self.records.architectures("optimal", design.workloads)
        return {
            "optimal": chosen,
            "random": list(design.random),
            "held_out": list(design.held_out),
            "repeat": list(design.repeat),
        }

    def _missing(
        self, wanted: Sequence[tuple[ModelRole, Architecture]], workloads: Sequence[Workload]
    ) -> list[tuple[ModelRole, Architecture]]:
        known = self.records.models()
        return [
            (role, a) for role, a in wanted if any(model_name(role, a, w) not in known for w in workloads)
        ]

    def _time_for_others(self, design: ModelDesign) -> bool:
        """True if the rest of the budget is only just enough for the models that are not chosen."""
        if self.config.budget_minutes is None:
            return False
        others = len(design.random) + len(design.held_out) + len(design.repeat) + CHOSEN_PER_FIT
        per_model = float(np.mean(self.seconds_per_model)) if self.seconds_per_model else 0.0
        return time.monotonic() - self.began + others * per_model > 60 * self.config.budget_minutes

    def _doubtful(self, design: ModelDesign) -> list[tuple[ModelRole, Architecture]]:
        """Models with a timing that is uncertain, or far from what the other models say."""
        names = self.records.uncertain(MAX_HALF_WIDTH)
        timed = self.records.timed()
        ops = self.records.fitted(self.prior)
        far: set[str] = set()
        for phase, model in ops.models.items():
            rows = [item for item in timed if item.workload.phase == phase]
            for item, off, deviation in zip(rows, *model.left_out(), strict=True):
                if abs(off) > max(MAX_DEVIATION, MAX_DEVIATIONS * deviation):
                    far.add(item.architecture.key)
        return [
            (role, a)
            for role, models in self.measured(design).items()
            for a in models
            if (role in FIT_ROLES and a.key in far)
            or any(model_name(role, a, w) in names for w in design.workloads)
        ]

    def _models(
        self,
        models: Sequence[tuple[ModelRole, Architecture]],
        workloads: Sequence[Workload],
        what: str,
        share: tuple[float, float],
    ) -> None:
        """Measure models in groups, each saved."""
        groups = math.ceil(len(models) / self.config.group)
        for number in range(groups):
            group = models[number::groups]
            began = time.monotonic()
            part = [share[0] + (share[1] - share[0]) * n / groups for n in (number, number + 1)]
            with pinned(self.config.threads):  # not while fitting: its library runs threads of its own
                items = self._built(group, workloads)
                measured = self._measure(f"measuring {what}", items, (part[0], part[1]))
            self.records.add_models(group, workloads, measured.timings, _now())
            self.seconds_per_model.append((time.monotonic() - began) / len(group))

    def _built(
        self, group: Sequence[tuple[ModelRole, Architecture]], workloads: Sequence[Workload]
    ) -> dict[str, Run]:
        """Runners of models with weights of their own, by name."""
        items: dict[str, Run] = {}
        for role, architecture in group:
            runs = self.runtime.model(architecture, workloads, self.space.config, seed=self.seed)
            items |= {model_name(role, architecture, w): run for w, run in runs.items()}
            self.seed += 1
        return items

    def _measure(self, what: str, items: Mapping[str, Run], share: tuple[float, float]) -> Measurements:
        """Time a group of items together with the reference work."""

        def progress(done: int, maximum: int) -> None:
            self.report(what, share[0] + (share[1] - share[0]) * done / maximum)

        self.report(what, share[0])
        timed = {**items, **self.references}
        measured = measure(timed, self.anchors, self.config.timer(), progress=progress)
        problems = measured.machine_problems()
        unsteady = sum(bool(measured.timings[name].problems()) for name in items)
        if unsteady:
            problems.append(f"{unsteady} of {len(items)} timings unsteady")
        self.card.problems += [f"{what}: {text}" for text in problems]
        return measured

    def memory(
        self, chosen: Mapping[ModelRole, Sequence[Architecture]], workloads: Sequence[Workload]
    ) -> None:
        """Measure the peak memory of whole models that the card lacks."""
        prefills = [w for w in workloads if w.phase == "prefill"]
        if not prefills or not self.config.rss or not self.runtime.supports_rss:
            return
        wanted: list[tuple[ModelRole, Architecture]] = [(role, a) for role in FIT_ROLES for a in chosen[role]]
        wanted = wanted[: self.config.rss_fit_models]
        wanted += [("held_out", a) for a in chosen["held_out"][: self.config.rss_models]]
        known = self.records.memory()
        missing = [(r, a) for r, a in wanted if any(model_name(r, a, w) not in known for w in prefills)]
        for done, (role, architecture) in enumerate(missing):
            share = CHOSEN_SHARE + OTHERS_SHARE
            self.report("measuring memory", share + (1 - share) * done / len(missing))
            try:
                found = self.runtime.rss(architecture, prefills, self.space.config)
            except OSError as error:  # the measured latencies are worth keeping
                self.card.problems.append(f"memory: {error}")
                self.card.save()
                return
            self.records.add_memory(role, architecture, found)
