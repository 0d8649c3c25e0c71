"""Profiling: measure some of a space's ops and a few whole models, and fit the predictor.

The latency of an op is the slope between two stack heights; a third height, for one op of each kind, checks
that the stack is linear. :mod:`latency.predictor.design` chooses the ops to measure. Measuring ops stops when
latencies are known accurately enough, or when the budget ends. Measurements are saved group by group, so that
an interrupted profiling resumes.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latency.card import load_card, open_card
from latency.config import ProfileConfig
from latency.device_runner.timer import Run, measure, pinned
from latency.device_runner.timing import Measurements
from latency.predictor.design import ModelRole, OpDesign, choose_models, op_design, stack_heights, stacks
from latency.predictor.initial_design import Point, initial_design
from latency.predictor.op_latencies import OpLatencies
from latency.predictor.predictor import Predictor
from latency.records import FIT_ROLES, Records, model_name, stack_name
from latency.runtimes.protocol import Runtime
from latency.runtimes.reference import reference_items, require_stable, time_references
from latency.runtimes.registry import graph_version, open_runtime
from space import Architecture, InputError, Space, Workload
from space.io.artefact import canonical_json, digest
from space.ops import space_ops

Array = NDArray[np.float64]
MODELS_PER_GROUP = 30  # whole models between two saves
BUILD_SECONDS = 0.3  # approximate time that a session takes to build
OPS_SHARE, MODELS_SHARE = 0.6, 0.35  # of the progress; memory is the rest
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
        InputError: the card is of another device, the machine is too noisy, the runtime is not available, or
            a workload is not possible.
    """
    devices = Path(devices)
    if config.threads > (os.cpu_count() or 1):
        raise InputError(f"profile.threads: {config.threads}, this machine has {os.cpu_count()} cores")
    runtime = open_runtime(config.runtime, config.threads, config.precision)
    workloads = config.parsed(space)
    card = open_card(devices, name, runtime.fingerprint())
    records = Records(card, space, runtime.name, config.threads, config.precision)
    with pinned(config.threads):
        session = _Session(records, config, runtime, report or (lambda _what, _share: None), prior)
        if config.max_noise is not None:
            reference_runtime = open_runtime(config.runtime, config.threads)
            card.aa_difference = require_stable(time_references(reference_runtime), config.max_noise)
        ops = session.ops(workloads)
        times = {w: records.op_times(ops, w) for w in workloads}
        chosen = choose_models(space, config.counts(), times)
        session.models(chosen, workloads)
    session.memory(chosen, workloads)
    predictor = records.predictor(ops, workloads, chosen)
    session.report("fitted", 1.0)
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
            f"device {name}: no ops of a space with the model configuration of {space.name}, "
            f"{config.runtime} on {config.threads} threads in {config.precision}; not usable as a prior"
        )
    return ops


def settings_digest(config: ProfileConfig) -> str:
    """Sha256 of the settings that a predictor depends on.

    Args:
        config: settings of the profiling.
    """
    return digest(canonical_json([config.model_dump(mode="json"), graph_version(config.runtime)]))


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
        self.checked: set[tuple[str, str]] = set()  # kinds and phases whose stack is known to be linear
        self.op_progress = ""  # accuracy of the ops so far, for reports
        self.points = 1  # ops and workloads that could be measured

    def _measure(
        self, what: str, items: Mapping[str, Run], rounds: int, share: tuple[float, float]
    ) -> Measurements:
        """Time a group of items together with the reference work."""

        def progress(done: int, maximum: int) -> None:
            self.report(what + self.op_progress, share[0] + (share[1] - share[0]) * done / maximum)

        self.report(what + self.op_progress, share[0])
        timed = {**items, **self.references}
        measured = measure(timed, self.anchors, self.config.timer(rounds), progress=progress)
        problems = measured.machine_problems()
        unsteady = sum(bool(measured.timings[name].problems()) for name in items)
        if unsteady:
            problems.append(f"{unsteady} of {len(items)} timings unsteady")
        self.card.problems += [f"{what}: {text}" for text in problems]
        return measured

    def ops(self, workloads: Sequence[Workload]) -> OpLatencies:
        """Measure ops until latencies are known accurately enough; returns the fit of all ops."""
        design = op_design(self.space, space_ops(self.space), workloads)
        self.points = len(design.points)
        known = self.records.ops()
        self._points([point for point in initial_design(design.points) if point not in known])
        while True:
            ops = self.records.fitted(self.prior)
            error = design.expected_error(ops)
            known = self.records.ops()
            left = [point for point in design.points if point not in known]
            done = len(design.points) - len(left)
            self.op_progress = f"; ops known to {error:.2%} from {done} of {len(design.points)}"
            seconds = ops.seconds(design.points)
            if not left or error <= self.config.op_error or self._time_for_models(design, seconds, workloads):
                return ops
            costs = np.array([self._cost(*pair) for pair in zip(design.points, seconds, strict=True)])
            self._points(design.choose(ops, costs, self.config.group, list(known)))

    def _cost(self, point: Point, seconds: float) -> float:
        """Approximate seconds that measuring an op takes."""
        block = self.config.block_ms * 1e-3
        heights = stack_heights(self.space, *point)
        return sum(self.config.min_rounds * max(block, h * seconds) + BUILD_SECONDS for h in heights)

    def _time_for_models(self, design: OpDesign, seconds: Array, workloads: Sequence[Workload]) -> bool:
        """True if the rest of the budget is only just enough for the whole models."""
        config = self.config
        if config.budget_minutes is None:
            return False
        if self._models_begun(workloads):  # more ops would change the choice of models
            return True
        count = config.optimal_models + config.random_models + config.held_out_models + config.repeated_models
        blocks = np.maximum(config.block_ms * 1e-3, (design.counts * seconds).sum(axis=1))
        rounds = (config.min_rounds + max(config.min_rounds, config.max_rounds)) / 2
        model_seconds = rounds * float(blocks.mean()) + BUILD_SECONDS
        spent = time.monotonic() - self.began
        return spent + count * len(workloads) * model_seconds > 60 * config.budget_minutes

    def _models_begun(self, workloads: Sequence[Workload]) -> bool:
        """True if an earlier profiling was interrupted between its whole models."""
        config, card = self.config, self.card
        path = card.predictor_path(self.space.name, self.runtime.name, config.threads, config.precision)
        done = path.exists()
        measured = {name.split("|")[2] for name in self.records.models()}
        return not done and measured == {str(w) for w in workloads}

    def _points(self, points: Sequence[Point]) -> None:
        """Measure ops in groups, each a random mixture of them."""
        order = np.random.default_rng(self.config.seed).permutation(len(points))
        groups = math.ceil(len(points) / self.config.group)
        for i in range(groups):
            self._op_group([points[k] for k in order[i::groups]])

    def _op_share(self, count: int) -> tuple[float, float]:
        """Shares of all work that are done before and after some further ops."""
        known = len(self.records.ops())
        before, after = (min(done / self.points, 1.0) for done in (known, known + count))
        return OPS_SHARE * before, OPS_SHARE * after

    def _op_group(self, points: Sequence[Point]) -> None:
        items: dict[str, Run] = {}
        new = {(op.kind, w.phase): (op, w) for op, w in points if (op.kind, w.phase) not in self.checked}
        self.checked |= set(new)
        for (op, height), workloads in stacks(self.space, points, list(new.values())).items():
            runs = self.runtime.stack(op, height, workloads, self.space.config)
            items |= {stack_name(op, height, w): run for w, run in runs.items()}
        measured = self._measure(
            f"measuring {len(points)} ops", items, self.config.op_rounds, self._op_share(len(points))
        )
        self.records.add_ops(points, measured.timings, measured.anchor_reference)

    def models(
        self, chosen: Mapping[ModelRole, Sequence[Architecture]], workloads: Sequence[Workload]
    ) -> None:
        """Measure the whole models that the card lacks."""
        known = self.records.models()
        wanted = [(role, a) for role, models in chosen.items() for a in models]
        missing = [(r, a) for r, a in wanted if any(model_name(r, a, w) not in known for w in workloads)]
        order = np.random.default_rng(self.config.seed).permutation(len(missing))
        groups = math.ceil(len(missing) / MODELS_PER_GROUP)
        for number in range(groups):
            group = [missing[i] for i in order[number::groups]]
            items: dict[str, Run] = {}
            for i, (role, architecture) in enumerate(group):
                runs = self.runtime.model(architecture, workloads, self.space.config, seed=i)
                items |= {model_name(role, architecture, w): run for w, run in runs.items()}
            share = (
                OPS_SHARE + MODELS_SHARE * number / groups,
                OPS_SHARE + MODELS_SHARE * (number + 1) / groups,
            )
            what = f"measuring whole models, {len(group)} of {len(missing)}"
            measured = self._measure(what, items, self.config.max_rounds, share)
            self.records.add_models(group, workloads, measured.timings)

    def memory(
        self, chosen: Mapping[ModelRole, Sequence[Architecture]], workloads: Sequence[Workload]
    ) -> None:
        """Measure the peak memory of whole models that the card lacks."""
        prefills = [w for w in workloads if w.phase == "prefill"]
        if not self.config.rss or not self.runtime.supports_rss:
            return
        wanted: list[tuple[ModelRole, Architecture]] = [(role, a) for role in FIT_ROLES for a in chosen[role]]
        wanted += [("held_out", a) for a in chosen["held_out"][: self.config.rss_models]]
        known = self.records.memory()
        missing = [(r, a) for r, a in wanted if any(model_name(r, a, w) not in known for w in prefills)]
        for done, (role, architecture) in enumerate(missing):
            share = OPS_SHARE + MODELS_SHARE
            self.report("measuring memory", share + (1 - share) * done / len(missing))
            try:
                found = self.runtime.rss(architecture, prefills, self.space.config)
            except OSError as error:  # the measured latencies are worth keeping
                self.card.problems.append(f"memory: {error}")
                self.card.save()
                return
            self.records.add_memory(role, architecture, found)
