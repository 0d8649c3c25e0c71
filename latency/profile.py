"""Profiling: measure a space's ops and a few whole models, and fit the predictor.

An op costs the slope between two stack heights; a third height, for one op of each kind,
checks that the stack is linear. Whole models are chosen for the fit (D-optimally, from the
op latencies) and at random (for the fit, and others for the test). What is measured is
saved group by group, so that a profiling that was stopped goes on where it was.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from latency.card import Card, open_card
from latency.predictor import OpLatencies, Predictor, design_matrix, fit_predictor, op_sums
from latency.runtime import OnnxRuntime, Run
from latency.timer import TimerConfig, measure, pinned
from latency.timing import Measurements, Timing
from space import Architecture, InputError, Space, Workload, genome
from space.architecture import FULL_MIXERS
from space.cost import op_params, params_cost
from space.files import canonical_json, digest
from space.ops import Op, space_ops

LINEAR_WITHIN = 0.03
STACKS = (6, 24)  # least and most copies in the taller stack
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
    block_ms: Annotated[float, Field(gt=0)] = 5.0
    min_rounds: Annotated[int, Field(ge=2)] = 30
    max_rounds: Annotated[int, Field(ge=2)] = 60
    group: Annotated[int, Field(gt=0)] = 64  # ops measured between two saves
    seed: Annotated[int, Field(ge=0)] = 0

    def timer(self) -> TimerConfig:
        """The timer's settings."""
        return TimerConfig(
            block_ms=self.block_ms, min_rounds=self.min_rounds, max_rounds=self.max_rounds, seed=self.seed
        )

    def parsed(self, space: Space) -> list[Workload]:
        """The workloads to profile.

        Raises:
            InputError: one is malformed, longer than the space's context, or of other threads.
        """
        texts = self.workloads or tuple(f"{phase}@{space.context}" for phase in ("prefill", "decode"))
        found = []
        for text in texts:
            workload = Workload.parse(text if "threads=" in text else f"{text},threads={self.threads}")
            if workload.length > space.context:
                raise InputError(
                    f"workload {text}: longer than the context {space.context} of space {space.name}"
                )
            if workload.threads != self.threads:
                raise InputError(f"workload {text}: profiling runs on {self.threads} threads")
            found.append(workload)
        return found


def profile(
    space: Space, devices: Path, name: str, config: ProfileConfig, report: Report | None = None
) -> Predictor:
    """Measure what is missing on this machine's card and fit the predictor of a space.

    Raises:
        InputError: the card is of another device, or a workload is not possible here.
    """
    report = report or (lambda _what, _share: None)
    runtime = OnnxRuntime(config.threads)
    workloads = config.parsed(space)
    card = open_card(devices, name, runtime.fingerprint())
    with pinned(config.threads):
        session = _Session(space, card, config, runtime, report)
        ops = session.ops(workloads)
        architectures = choose_models(space, config, ops)
        models = session.models(architectures, workloads)

    def column(role: str) -> dict[Workload, NDArray[np.float64]]:
        keys = [a.key for a in architectures[role]]
        return {w: np.array([models[role, key, str(w)] for key in keys]) for w in workloads}

    repeats = column("repeat")
    count = config.repeated_models
    repeat_error = {
        w: 100 * float(np.abs(values / column("held_out")[w][:count] - 1).mean())
        for w, values in repeats.items()
    }
    predictor = fit_predictor(
        space,
        ops,
        genome.encode(space, architectures["fit"]),
        column("fit"),
        genome.encode(space, architectures["held_out"]),
        column("held_out"),
        repeat_error,
    )
    path = card.predictor_path(space.name, runtime.name, config.threads, "fp32")
    predictor.save(path, {"settings": settings_digest(config), "card": card_digest(card)})
    return predictor


def settings_digest(config: ProfileConfig) -> str:
    """The hash of the settings that a predictor was made under."""
    return digest(canonical_json(config.model_dump(mode="json")))


def card_digest(card: Card) -> str:
    """The hash of the fingerprint and the anchor that a predictor refers to."""
    return digest(canonical_json([card.fingerprint, card.anchor_reference]))


class _Session:
    """One profiling on one card: measures in groups and saves after each."""

    def __init__(
        self, space: Space, card: Card, config: ProfileConfig, runtime: OnnxRuntime, report: Report
    ) -> None:
        self.space, self.card, self.config, self.runtime, self.report = space, card, config, runtime, report
        self.anchors = runtime.anchors()
        self.identity = {"runtime": runtime.name, "threads": config.threads, "precision": "fp32"}
        self.frame = canonical_json(vars(space.frame))

    def _known(self, table: str, columns: Mapping[str, Any]) -> pd.DataFrame:
        """Rows of a table that were measured under the same conditions."""
        rows = self.card.table(table)
        for key, value in {**self.identity, **columns}.items():
            if len(rows):
                rows = rows[rows[key] == value]
        return rows

    def _measure(self, what: str, items: Mapping[str, Run], share: tuple[float, float]) -> dict[str, Timing]:
        """Time one group, in units of the card's anchor."""

        def progress(done: int, most: int) -> None:
            self.report(what, share[0] + (share[1] - share[0]) * done / most)

        self.report(what, share[0])
        measured: Measurements = measure(items, self.anchors, self.config.timer(), progress=progress)
        if self.card.anchor_reference is None:
            self.card.anchor_reference = measured.anchor_reference
        self.scale = self.card.anchor_reference / measured.anchor_reference
        machine = measured.machine_problems()
        unsteady = sum(bool(t.problems()) for t in measured.timings.values())
        if unsteady:
            machine.append(f"{unsteady} of {len(items)} timings unsteady")
        self.card.problems = [*self.card.problems, *(f"{what}: {text}" for text in machine)][-50:]
        return measured.timings

    def ops(self, workloads: Sequence[Workload]) -> dict[Workload, OpLatencies]:
        """The latency of every op of the space in every workload."""
        rows = self._known("ops", {"frame": self.frame})
        have = set(zip(rows["op"], rows["workload"], strict=True)) if len(rows) else set()
        missing = [op for op in space_ops(self.space) if any((op.key, str(w)) not in have for w in workloads)]
        order = np.random.default_rng(self.config.seed).permutation(len(missing))
        shuffled = [missing[i] for i in order]  # so that every group holds a bit of everything
        groups = max(1, math.ceil(len(missing) / self.config.group))
        checked: set[str] = set()
        for i in range(groups if missing else 0):
            self._op_group(
                shuffled[i::groups], workloads, checked, (0.6 * i / groups, 0.6 * (i + 1) / groups)
            )
        rows = self._known("ops", {"frame": self.frame})
        keys = {op.key for op in space_ops(self.space)}
        found = {}
        for workload in workloads:
            mine = rows[(rows["workload"] == str(workload)) & rows["op"].isin(keys)]
            full = mine["op"].str.split("-").str[0].isin(FULL_MIXERS)
            shared = float(mine["intercept"][full].median()) if full.any() else 0.0
            found[workload] = OpLatencies(
                dict(zip(mine["op"], mine["seconds"], strict=True)), max(0.0, shared)
            )
        return found

    def _op_group(
        self, ops: Sequence[Op], workloads: Sequence[Workload], checked: set[str], share: tuple[float, float]
    ) -> None:
        items: dict[str, Run] = {}
        for op in ops:
            low, high = stack_heights(self.space, op)
            heights = [low, high]
            if op.kind not in checked:
                heights.append((low + high) // 2)
                checked.add(op.kind)
            for height in heights:
                runs = self.runtime.stack(op, height, workloads, self.space.frame)
                items |= {f"{op.key}|{height}|{w}": run for w, run in runs.items()}
        timings = self._measure(f"measuring {len(ops)} ops", items, share)
        rows = []
        for op in ops:
            low, high = stack_heights(self.space, op)
            middle = (low + high) // 2
            for w in workloads:
                ends = [timings[f"{op.key}|{height}|{w}"] for height in (low, high)]
                slope = (ends[1].seconds - ends[0].seconds) / (high - low)
                third = timings.get(f"{op.key}|{middle}|{w}")
                if third:
                    expected = ends[0].seconds + (middle - low) * slope
                    if abs(third.seconds / expected - 1) > LINEAR_WITHIN:
                        off = f"{third.seconds / expected - 1:+.1%}"
                        self.card.problems.append(f"{op.key} {w}: {middle} copies are {off} from the line")
                # A slope lost in noise still costs something; no op is free.
                floor = 1e-3 * ends[1].seconds / high
                spread = math.hypot(*(t.half_width * t.seconds for t in ends)) / (high - low)
                seconds = max(slope, floor)
                rows.append(
                    {
                        **self.identity,
                        "frame": self.frame,
                        "workload": str(w),
                        "op": op.key,
                        "seconds": seconds * self.scale,
                        "half_width": spread / seconds,
                        "intercept": (ends[0].seconds - low * slope) * self.scale,
                        "timing": canonical_json([t.to_json() for t in ends]),
                    }
                )
        self.card.save()
        self.card.append("ops", rows)

    def models(
        self, architectures: Mapping[str, Sequence[Architecture]], workloads: Sequence[Workload]
    ) -> dict[tuple[str, str, str], float]:
        """Latencies by (role, key, workload), seconds."""
        wanted = [(role, a) for role, group in architectures.items() for a in group]
        identity = {"space": self.space.hash}
        table = self._read_models(identity)
        missing = [(r, a) for r, a in wanted if any((r, a.key, str(w)) not in table for w in workloads)]
        if missing:
            items: dict[str, Run] = {}
            for i, (role, architecture) in enumerate(missing):
                runs = self.runtime.model(architecture, workloads, self.space.frame, seed=i)
                items |= {f"{role}|{architecture.key}|{w}": run for w, run in runs.items()}
            timings = self._measure(f"measuring {len(missing)} whole models", items, (0.6, 1.0))
            rows = []
            for role, architecture in missing:
                for w in workloads:
                    timing = timings[f"{role}|{architecture.key}|{w}"]
                    rows.append(
                        {
                            **self.identity,
                            **identity,
                            "role": role,
                            "workload": str(w),
                            "key": architecture.key,
                            "architecture": canonical_json(architecture.to_json()),
                            "seconds": timing.seconds * self.scale,
                            "half_width": timing.half_width,
                            "timing": canonical_json(timing.to_json()),
                        }
                    )
            self.card.save()
            self.card.append("models", rows)
            table = self._read_models(identity)
        return table

    def _read_models(self, identity: Mapping[str, Any]) -> dict[tuple[str, str, str], float]:
        rows = self._known("models", identity)
        if not len(rows):
            return {}
        keys = zip(rows["role"], rows["key"], rows["workload"], strict=True)
        return dict(zip(keys, rows["seconds"], strict=True))


def stack_heights(space: Space, op: Op) -> tuple[int, int]:
    """The copies of an op in its two stacks.

    The taller one has about the bytes of the space's median model, so that its weights come from
    where a model's weights come from; a few copies of a small op would sit in the core's own cache.
    """
    each = max(1, op_params(op, space.frame))
    if op.kind == "head":  # a stack of heads has no embeddings to be tied to
        each += op.width * space.vocabulary
    high = int(np.clip(round(median_params(space) / each), *STACKS))
    return max(2, high // 3), high


@lru_cache(maxsize=64)
def median_params(space: Space) -> float:
    """The median number of parameters over a fixed sample of the space."""
    return float(np.median(params_cost(space)(genome.sample(space, np.random.default_rng(0), 501))))


def choose_models(
    space: Space, config: ProfileConfig, ops: Mapping[Workload, OpLatencies]
) -> dict[str, list[Architecture]]:
    """The whole models to measure: ``fit`` (D-optimal, then random), ``held_out`` and ``repeat``.

    The held-out ones are drawn with a seed of their own, none of them is among the others, and
    they are spread over the latencies that there are.
    """
    rng = np.random.default_rng([config.seed, 1])
    held_out = _spread(space, np.random.default_rng([config.seed, 2]), config.held_out_models, ops)
    taken = {a.key for a in held_out}
    pool = genome.decode(space, genome.sample(space, rng, 600))
    pool = [a for a in {a.key: a for a in pool}.values() if a.key not in taken]
    rows = genome.encode(space, pool)
    relative = [
        design_matrix(space, latencies, rows) / op_sums(space, latencies, rows).sum(axis=1, keepdims=True)
        for latencies in ops.values()
    ]
    scaled = [design / np.maximum(np.abs(design).max(axis=0), 1e-12) for design in relative]
    chosen = [pool[i] for i in d_optimal(scaled, config.optimal_models)]
    taken |= {a.key for a in chosen}
    chosen += _distinct(space, rng, config.random_models, taken)
    return {"fit": chosen, "held_out": held_out, "repeat": held_out[: config.repeated_models]}


def _spread(
    space: Space, rng: np.random.Generator, count: int, ops: Mapping[Workload, OpLatencies]
) -> list[Architecture]:
    """``count`` of ten times as many random architectures, evenly over the order of their op sums.

    They stand in random order, so that the first few are spread as well.
    """
    drawn = list(_distinct(space, rng, 10 * count, set()))
    latencies = next(iter(ops.values()))
    order = np.argsort(op_sums(space, latencies, genome.encode(space, drawn)).sum(axis=1))
    places = np.unique(np.linspace(0, len(drawn) - 1, count).round().astype(int))
    return [drawn[order[place]] for place in rng.permutation(places)]


def _distinct(space: Space, rng: np.random.Generator, count: int, taken: set[str]) -> Iterator[Architecture]:
    """Up to ``count`` random architectures whose keys are not taken."""
    for architecture in genome.decode(space, genome.sample(space, rng, 20 * count)):
        if count and architecture.key not in taken:
            taken = taken | {architecture.key}
            count -= 1
            yield architecture


def d_optimal(designs: Sequence[NDArray[np.float64]], count: int) -> list[int]:
    """Rows that make the information of several designs [N, P] over the same rows large, greedily.

    Each pick maximises the sum over designs of log det(I/100 + X^T X), by the matrix
    determinant lemma (Fedorov 1972 gives the criterion).
    """
    inverses = [np.eye(design.shape[1]) * 100.0 for design in designs]
    chosen: list[int] = []
    for _ in range(min(count, len(designs[0]))):
        gain = sum(
            np.log1p(np.einsum("ij,jk,ik->i", design, inverse, design))
            for design, inverse in zip(designs, inverses, strict=True)
        )
        gain = np.asarray(gain)
        gain[chosen] = -np.inf
        best = int(np.argmax(gain))
        chosen.append(best)
        for i, design in enumerate(designs):
            v = inverses[i] @ design[best]
            inverses[i] = inverses[i] - np.outer(v, v) / (1 + design[best] @ v)
    return chosen
