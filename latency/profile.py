"""Profiling: measure some of a space's ops and a few whole models, and fit the predictor.

An op costs the slope between two stack heights; a third height, for one op of each kind, checks that the
stack is linear. Which ops are measured is for :mod:`latency.predictor.design` to say; it stops when
latencies are known well enough, or at the end of a budget. What is measured is saved group by group, so
that a profiling that was stopped goes on where it was.
"""

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from latency.card import Card, load_card, open_card
from latency.device_runner.io_binding import Run
from latency.device_runner.timer import TimerConfig, measure, pinned
from latency.device_runner.timing import Measurements
from latency.predictor.design import (
    ModelCounts,
    OpDesign,
    choose_models,
    op_design,
    seeds,
    stack_heights,
    stacks,
)
from latency.predictor.op_latencies import OpLatencies, Point
from latency.predictor.predictor import Predictor
from latency.records import Records, model_name, stack_name
from latency.runtimes import rss
from latency.runtimes.onnxruntime import OnnxRuntime
from latency.runtimes.protocol import Runtime
from latency.runtimes.reference import reference_items, require_stable, time_references
from latency.runtimes.registry import open_runtime
from space import Architecture, InputError, Space, Workload
from space.io.artefact import canonical_json, digest
from space.onnx.graph import version_for
from space.ops import space_ops

Array = NDArray[np.float64]
MODEL_GROUP = 30  # whole models between two saves
BUILD_SECONDS = 0.3  # about what a session takes to build
Report = Callable[[str, float], None]  # what is going on, and the share that is done


class ProfileConfig(BaseModel):
    """How a device is profiled."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workloads: tuple[str, ...] = ()  # none: prefill and decode at the space's context
    threads: Annotated[int, Field(gt=0)] = 1
    optimal_models: Annotated[int, Field(ge=4)] = 12
    random_models: Annotated[int, Field(ge=2)] = 8
    held_out_models: Annotated[int, Field(ge=3)] = 30
    repeated_models: Annotated[int, Field(ge=1)] = 8
    block_ms: Annotated[float, Field(gt=0)] = 3.0
    min_rounds: Annotated[int, Field(ge=2)] = 50
    op_rounds: Annotated[int, Field(ge=2)] = 50  # at most, of a stack: ops are many, and smoothed
    max_rounds: Annotated[int, Field(ge=2)] = 120  # at most, of a whole model
    group: Annotated[int, Field(gt=1)] = 48  # timings of ops between two saves
    # The expected relative error at which ops are known well enough.
    op_error: Annotated[float, Field(gt=0)] = 0.01
    # For everything; ops stop when models must begin.
    budget_minutes: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    runtime: Literal["onnxruntime", "torch", "torch-compiled", "torch-cuda", "torch-cuda-compiled"] = (
        "onnxruntime"
    )
    precision: Literal["fp32", "int8", "int8-dynamic"] = "fp32"  # of the models that will be shipped
    rss: bool = True  # memory is measured too, where the system tells it
    rss_models: Annotated[int, Field(ge=1)] = 10  # of those held out, to test the fit
    # Between two timings of the same work, see latency.reference; None: whatever there is.
    max_noise: Annotated[float, Field(gt=0)] | None = 0.1

    def timer(self, rounds: int) -> TimerConfig:
        """The timer's settings, with so many rounds at most."""
        most = max(self.min_rounds, rounds)
        return TimerConfig(
            block_ms=self.block_ms, min_rounds=self.min_rounds, max_rounds=most, seed=self.seed
        )

    def counts(self) -> ModelCounts:
        """How many whole models are measured."""
        return ModelCounts(
            optimal=self.optimal_models,
            random=self.random_models,
            held_out=self.held_out_models,
            repeated=self.repeated_models,
            seed=self.seed,
        )

    def parsed(self, space: Space) -> list[Workload]:
        """The workloads to profile.

        Raises:
            InputError: one is malformed, longer than the space's context, or of other threads or precision.
        """
        texts = self.workloads or tuple(f"{phase}@{space.max_seq_len}" for phase in ("prefill", "decode"))
        found = []
        for text in texts:
            for name in ("threads", "precision"):
                text += "" if f"{name}=" in text else f",{name}={getattr(self, name)}"
            workload = Workload.parse(text)
            if workload.length > space.max_seq_len:
                raise InputError(
                    f"workload {text}: longer than the context {space.max_seq_len} of space {space.name}"
                )
            if workload.threads != self.threads:
                raise InputError(f"workload {text}: profiling runs on {self.threads} threads")
            if workload.precision != self.precision:
                raise InputError(f"workload {text}: profiling is of {self.precision}; give --precision")
            found.append(workload)
        return found


def profile(
    space: Space,
    devices: Path,
    name: str,
    config: ProfileConfig,
    report: Report | None = None,
    prior: OpLatencies | None = None,
) -> Predictor:
    """Measure what is missing on this machine's card and fit the predictor of a space.

    Args:
        space: whose ops are measured.
        devices: the folder of the cards.
        name: of the card.
        config: how it is done.
        report: told what is going on.
        prior: of a device that is known already; what is like it need not be measured again.

    Raises:
        InputError: the card is of another device, the machine is too noisy, or a workload is not possible.
    """
    if config.threads > (os.cpu_count() or 1):
        raise InputError(f"profile.threads: {config.threads}, this machine has {os.cpu_count()} cores")
    runtime = open_runtime(config.runtime, config.threads, config.precision)
    workloads = config.parsed(space)
    card = open_card(devices, name, runtime.fingerprint())
    records = Records(card, space, runtime.name, config.threads, config.precision)
    with pinned(config.threads):
        session = _Session(records, config, runtime, report or (lambda _what, _share: None), prior)
        if config.max_noise is not None:
            plain = open_runtime(config.runtime, config.threads)
            card.aa_difference = require_stable(time_references(plain), config.max_noise)
        ops = session.ops(workloads)
        times = {w: records.op_times(ops, w) for w in workloads}
        chosen = choose_models(space, config.counts(), times)
        session.models(chosen, workloads)
    session.memory(chosen, workloads)
    predictor = records.predictor(ops, workloads, chosen)
    session.report("fitted", 1.0)
    path = card.predictor_path(space.name, runtime.name, config.threads, config.precision)
    made_of = {"settings": settings_digest(config), "card": card_digest(card)}
    predictor.save(path, {**made_of, "graphs": str(version_for(runtime.name))})
    return predictor


def load_prior(space: Space, devices: Path, name: str, config: ProfileConfig) -> OpLatencies:
    """What the card of a known device says of the ops of a space.

    Raises:
        InputError: there is no such card, or it has no ops like those of the space.
    """
    card = load_card(devices, name)
    found = Records(card, space, config.runtime, config.threads, config.precision).fitted()
    if not found.models:
        raise InputError(
            f"device {name}: no ops of a space with the frame of {space.name}, {config.runtime} on "
            f"{config.threads} threads in {config.precision}; as a prior it says nothing"
        )
    return found


def minutes(text: str) -> float:
    """Minutes of a time such as ``90s``, ``10m`` or ``1.5h``.

    Raises:
        InputError: the text has another form.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh])", text.strip())
    if not match or not float(match[1]):
        raise InputError(f"budget {text!r}: expected a time above 0 such as 90s, 10m or 1.5h")
    return float(match[1]) * {"s": 1 / 60, "m": 1.0, "h": 60.0}[match[2]]


def settings_digest(config: ProfileConfig) -> str:
    """The hash of the settings that a predictor was made under."""
    return digest(canonical_json([config.model_dump(mode="json"), version_for(config.runtime)]))


def card_digest(card: Card) -> str:
    """The hash of the fingerprint and the units that a predictor refers to."""
    return digest(canonical_json([card.fingerprint, card.references]))


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
        self.references = reference_items(open_runtime(config.runtime, config.threads))  # fp32, as units are
        self.began = time.monotonic()
        self.checked: set[tuple[str, str]] = set()  # kinds and phases whose stack was seen to be linear
        self.expected = ""  # what is known of ops, for people
        self.points = 1  # that could be measured

    def _measure(
        self, what: str, items: Mapping[str, Run], rounds: int, share: tuple[float, float]
    ) -> Measurements:
        """Time one group, and the reference work with it."""

        def progress(done: int, most: int) -> None:
            self.report(what + self.expected, share[0] + (share[1] - share[0]) * done / most)

        self.report(what + self.expected, share[0])
        timed = {**items, **self.references}
        measured = measure(timed, self.anchors, self.config.timer(rounds), progress=progress)
        machine = measured.machine_problems()
        unsteady = sum(bool(measured.timings[name].problems()) for name in items)
        if unsteady:
            machine.append(f"{unsteady} of {len(items)} timings unsteady")
        self.card.problems += [f"{what}: {text}" for text in machine]
        return measured

    def ops(self, workloads: Sequence[Workload]) -> OpLatencies:
        """Measure ops until latencies are known well enough; what is known of all of them."""
        design = op_design(self.space, space_ops(self.space), workloads)
        self.points = len(design.points)
        known = self.records.ops()
        self._points([point for point in seeds(design.points) if point not in known])
        while True:
            ops = self.records.fitted(self.prior)
            error = design.expected_error(ops)
            known = self.records.ops()
            left = [point for point in design.points if point not in known]
            done = len(design.points) - len(left)
            self.expected = f"; ops known to {error:.2%} from {done} of {len(design.points)}"
            seconds = ops.seconds(design.points)
            if not left or error <= self.config.op_error or self._time_for_models(design, seconds, workloads):
                return ops
            costs = np.array([self._cost(*pair) for pair in zip(design.points, seconds, strict=True)])
            self._points(design.choose(ops, costs, self.config.group, list(known)))

    def _cost(self, point: Point, seconds: float) -> float:
        """About the seconds that measuring an op takes."""
        block = self.config.block_ms * 1e-3
        heights = stack_heights(self.space, *point)
        return sum(self.config.min_rounds * max(block, h * seconds) + BUILD_SECONDS for h in heights)

    def _time_for_models(self, design: OpDesign, seconds: Array, workloads: Sequence[Workload]) -> bool:
        """Whether what is left of the budget is just enough for the whole models."""
        config = self.config
        if config.budget_minutes is None:
            return False
        if self._models_begun(workloads):  # other ops would choose others
            return True
        count = config.optimal_models + config.random_models + config.held_out_models + config.repeated_models
        blocks = np.maximum(config.block_ms * 1e-3, (design.counts * seconds).sum(axis=1))
        rounds = (config.min_rounds + max(config.min_rounds, config.max_rounds)) / 2
        each = rounds * float(blocks.mean()) + BUILD_SECONDS
        spent = time.monotonic() - self.began
        return spent + count * len(workloads) * each > 60 * config.budget_minutes

    def _models_begun(self, workloads: Sequence[Workload]) -> bool:
        """Whether an earlier run was stopped between its whole models."""
        config, card = self.config, self.card
        path = card.predictor_path(self.space.name, self.runtime.name, config.threads, config.precision)
        done = path.exists()
        measured = {name.split("|")[2] for name in self.records.models()}
        return not done and measured == {str(w) for w in workloads}

    def _points(self, points: Sequence[Point]) -> None:
        """Measure points in groups, each with a bit of everything."""
        order = np.random.default_rng(self.config.seed).permutation(len(points))
        groups = math.ceil(len(points) / self.config.group)
        for i in range(groups):
            self._op_group([points[k] for k in order[i::groups]])

    def _op_share(self, count: int) -> tuple[float, float]:
        """The shares of the work that are done before and after so many further points."""
        known = len(self.records.ops())
        return 0.6 * min(known / self.points, 1.0), 0.6 * min((known + count) / self.points, 1.0)

    def _op_group(self, points: Sequence[Point]) -> None:
        items: dict[str, Run] = {}
        new = {(op.kind, w.phase): (op, w) for op, w in points if (op.kind, w.phase) not in self.checked}
        self.checked |= set(new)
        for (op, height), some in stacks(self.space, points, list(new.values())).items():
            runs = self.runtime.stack(op, height, some, self.space.config)
            items |= {stack_name(op, height, w): run for w, run in runs.items()}
        measured = self._measure(
            f"measuring {len(points)} ops", items, self.config.op_rounds, self._op_share(len(points))
        )
        self.records.add_ops(points, measured.timings, measured.anchor_reference)

    def models(self, chosen: Mapping[str, Sequence[Architecture]], workloads: Sequence[Workload]) -> None:
        """Measure the whole models that are missing."""
        known = self.records.models()
        wanted = [(role, a) for role, group in chosen.items() for a in group]
        missing = [(r, a) for r, a in wanted if any(model_name(r, a, w) not in known for w in workloads)]
        order = np.random.default_rng(self.config.seed).permutation(len(missing))
        groups = math.ceil(len(missing) / MODEL_GROUP)
        for turn in range(groups):
            some = [missing[i] for i in order[turn::groups]]
            items: dict[str, Run] = {}
            for i, (role, architecture) in enumerate(some):
                runs = self.runtime.model(architecture, workloads, self.space.config, seed=i)
                items |= {model_name(role, architecture, w): run for w, run in runs.items()}
            share = 0.6 + 0.35 * turn / groups, 0.6 + 0.35 * (turn + 1) / groups
            what = f"measuring whole models, {len(some)} of {len(missing)}"
            measured = self._measure(what, items, self.config.max_rounds, share)
            self.records.add_models(some, workloads, measured.timings)

    def memory(self, chosen: Mapping[str, Sequence[Architecture]], workloads: Sequence[Workload]) -> None:
        """Measure the peak memory of the whole models that is missing."""
        prefills = [w for w in workloads if w.phase == "prefill"]
        if not self.config.rss or not isinstance(self.runtime, OnnxRuntime) or not rss.STATUS.exists():
            return
        wanted = [(role, a) for role in ("optimal", "random") for a in chosen[role]]
        wanted += [("held_out", a) for a in chosen["held_out"][: self.config.rss_models]]
        known = self.records.memory()
        missing = [(r, a) for r, a in wanted if any(model_name(r, a, w) not in known for w in prefills)]
        for done, (role, architecture) in enumerate(missing):
            self.report("measuring memory", 0.95 + 0.05 * done / len(missing))
            try:
                found = self.runtime.memory(architecture, prefills, self.space.config)
            except OSError as error:  # latency is worth keeping all the same
                self.card.problems.append(f"memory: {error}")
                self.card.save()
                return
            self.records.add_memory(role, architecture, found)
