"""What a card holds of one space under fixed conditions: measurements in, a predictor out.

Profiling here and unpacking what a kit measured elsewhere end in the same rows and the same fit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from latency.card import Card
from latency.device_runner.timing import Timing
from latency.predictor.composition import OpTimes
from latency.predictor.design import stack_heights
from latency.predictor.fit import fit_predictor
from latency.predictor.memory import MemoryModel, fit_memory
from latency.predictor.op_latencies import OpLatencies, Point, fit_op_latencies
from latency.predictor.predictor import Predictor
from latency.runtimes.onnxruntime import ANCHOR_SIDE
from space import Architecture, Space, Workload, genome
from space.mixers import mixers_of_class
from space.cost import op_flops
from space.io.artefact import canonical_json
from space.onnx.graph import version_for
from space.ops import Op, space_ops

LINEAR_WITHIN = 0.03
FASTEST = 64.0  # no op does its FLOPs so many times faster than the reference product
LEAST_MODELS = 6  # whole models that memory is fitted on
Array = NDArray[np.float64]


def stack_name(op: Op, height: int, workload: Workload) -> str:
    """What the timing of a stack is called."""
    return f"{op.key}|{height}|{workload}"


def model_name(role: str, architecture: Architecture, workload: Workload) -> str:
    """What the timing of a whole model is called."""
    return f"{role}|{architecture.key}|{workload}"


def least_anchored(work: float, anchor: float) -> float:
    """What no work of so many FLOPs takes less than, where the reference product takes ``anchor`` seconds."""
    return work / (2 * ANCHOR_SIDE**3 / anchor * FASTEST)


@dataclass
class Records:
    """The rows of a card that were measured for a space under fixed conditions."""

    card: Card
    space: Space
    runtime: str
    threads: int
    precision: str = "fp32"

    @property
    def conditions(self) -> dict[str, Any]:
        """What identifies a measurement beside what was measured."""
        asked = {"runtime": self.runtime, "threads": self.threads, "precision": self.precision}
        return {**asked, "graphs": version_for(self.runtime)}

    @cached_property
    def model_config(self) -> str:
        """What ops of different spaces must have in common."""
        return canonical_json(vars(self.space.config))

    def add_ops(self, points: Sequence[Point], timings: Mapping[str, Timing], anchor: float) -> None:
        """Add what stacks of ops took in a run, in the card's units; each must be a line.

        Args:
            points: that were measured.
            timings: of the run, the reference work among them.
            anchor: seconds of the run's reference product.
        """
        rows, scales = [], self.card.scale(self.threads, timings)
        for op, workload in points:
            low, high = stack_heights(self.space, op, workload)
            ends = [timings[stack_name(op, height, workload)] for height in (low, high)]
            slope = (ends[1].seconds - ends[0].seconds) / (high - low)
            middle = (low + high) // 2
            third = timings.get(stack_name(op, middle, workload))
            if third:
                off = third.seconds / (ends[0].seconds + (middle - low) * slope) - 1
                if abs(off) > LINEAR_WITHIN:
                    self.card.problems.append(
                        f"{op.key} {workload}: {middle} copies are {off:+.1%} from the line"
                    )
            work = high * op_flops(op, workload, self.space.config)
            if ends[1].seconds < least_anchored(work, anchor):
                self.card.problems.append(f"{op.key} {workload}: faster than this machine can be")
            scale = scales[workload.phase]
            # A slope lost in noise still costs something; no op is free.
            seconds = max(slope, 1e-3 * ends[1].seconds / high)
            spread = math.hypot(*(t.half_width * t.seconds for t in ends)) / (high - low)
            rows.append(
                {
                    **self.conditions,
                    "frame": self.model_config,
                    "workload": str(workload),
                    "op": op.key,
                    "seconds": seconds * scale,
                    "half_width": spread / seconds,
                    "intercept": (ends[0].seconds - low * slope) * scale,
                    "timing": canonical_json([t.to_json() for t in ends]),
                }
            )
        self.card.save()
        self.card.append("ops", rows)

    def add_models(
        self,
        models: Sequence[tuple[str, Architecture]],
        workloads: Sequence[Workload],
        timings: Mapping[str, Timing],
    ) -> None:
        """Add what whole models took in a run, in the card's units."""
        scales = self.card.scale(self.threads, timings)
        rows = []
        for role, architecture in models:
            for workload in workloads:
                timing = timings[model_name(role, architecture, workload)]
                rows.append(
                    {
                        **self.conditions,
                        "space": self.space.hash,
                        "role": role,
                        "workload": str(workload),
                        "key": architecture.key,
                        "architecture": canonical_json(architecture.to_json()),
                        "seconds": timing.seconds * scales[workload.phase],
                        "half_width": timing.half_width,
                        "timing": canonical_json(timing.to_json()),
                    }
                )
        self.card.save()
        self.card.append("models", rows)

    def add_memory(self, role: str, architecture: Architecture, found: Mapping[Workload, int]) -> None:
        """Add the peak bytes of a whole model."""
        rows = [
            {
                **self.conditions,
                "space": self.space.hash,
                "role": role,
                "workload": str(workload),
                "key": architecture.key,
                "bytes": value,
            }
            for workload, value in found.items()
        ]
        self.card.append("memory", rows)

    def memory(self) -> dict[str, int]:
        """Peak bytes of each whole model that was measured, by :func:`model_name`."""
        return self._named("memory", "bytes")

    def ops(self) -> dict[Point, tuple[float, float]]:
        """Seconds of each op that was measured, and their relative standard deviation."""
        rows = self._rows("ops", {"frame": self.model_config})
        if not len(rows):
            return {}
        columns = zip(rows["op"], rows["workload"], rows["seconds"], rows["half_width"], strict=True)
        return {(Op.parse(op), Workload.parse(w)): (seconds, half / 1.96) for op, w, seconds, half in columns}

    def models(self) -> dict[str, float]:
        """Seconds of each whole model that was measured, by :func:`model_name`."""
        return self._named("models", "seconds")

    def _named(self, table: str, column: str) -> dict[str, Any]:
        rows = self._rows(table, {"space": self.space.hash})
        if not len(rows):
            return {}
        names = rows["role"] + "|" + rows["key"] + "|" + rows["workload"]
        return dict(zip(names, rows[column], strict=True))

    def fitted(self, source: OpLatencies | None = None) -> OpLatencies:
        """What the measured ops say of all of them."""
        return fit_op_latencies(self.space.config, self.ops(), source)

    def op_times(self, ops: OpLatencies, workload: Workload) -> OpTimes:
        """What the ops of the space take in a workload, and what full attention computes once."""
        names = space_ops(self.space)
        seconds = ops.seconds([(op, workload) for op in names])
        rows = self._rows("ops", {"frame": self.model_config, "workload": str(workload)})
        full = rows["op"].str.split("-").str[0].isin(mixers_of_class("full")) if len(rows) else pd.Series(dtype=bool)
        shared = max(0.0, float(rows["intercept"][full].median())) if full.any() else 0.0
        return OpTimes(workload, {op.key: float(s) for op, s in zip(names, seconds, strict=True)}, shared)

    def predictor(
        self, ops: OpLatencies, workloads: Sequence[Workload], chosen: Mapping[str, Sequence[Architecture]]
    ) -> Predictor:
        """Fit the predictor to the whole models that were chosen for it, and test it on the others."""
        models, widths = self.models(), self._named("models", "half_width")

        def column(*roles: str, of: Mapping[str, float] = models) -> dict[Workload, Array]:
            return {
                w: np.array([of[model_name(r, a, w)] for r in roles for a in chosen[r]]) for w in workloads
            }

        def floor(w: Workload) -> float | None:
            """By how much a second measurement of a model differs on average, percent."""
            pairs = [[models[model_name(r, a, w)] for r in ("repeat", "held_out")] for a in chosen["repeat"]]
            return 100 * float(np.mean([abs(again / first - 1) for again, first in pairs])) if pairs else None

        predictor = fit_predictor(
            self.space,
            ops,
            {w: self.op_times(ops, w) for w in workloads},
            genome.encode(self.space, [*chosen["optimal"], *chosen["random"]]),
            column("optimal", "random"),
            {w: values / 1.96 for w, values in column("optimal", "random", of=widths).items()},
            genome.encode(self.space, chosen["held_out"]),
            column("held_out"),
            {w: floor(w) for w in workloads},
            len(chosen["random"]),
        )
        return replace(predictor, memory=self._memory_models(workloads, chosen))

    def _memory_models(
        self, workloads: Sequence[Workload], chosen: Mapping[str, Sequence[Architecture]]
    ) -> dict[Workload, MemoryModel]:
        """The memory of each workload that it was measured in."""
        measured = self.memory()
        found = {}
        for w in workloads:
            rows: dict[bool, list[tuple[Architecture, int]]] = {True: [], False: []}
            for role, group in chosen.items():
                for a in group:
                    if model_name(role, a, w) in measured:
                        rows[role in ("optimal", "random")].append((a, measured[model_name(role, a, w)]))
            if len(rows[True]) < LEAST_MODELS:
                continue
            genomes = [genome.encode(self.space, [a for a, _ in rows[fit]]) for fit in (True, False)]
            columns = [np.array([value for _, value in rows[fit]], float) for fit in (True, False)]
            found[w] = fit_memory(self.space, w, genomes[0], columns[0], genomes[1], columns[1])
        return found

    def _rows(self, table: str, columns: Mapping[str, Any]) -> pd.DataFrame:
        rows = self.card.table(table)
        for key, value in {**self.conditions, **columns}.items():
            if len(rows):
                rows = rows[rows[key] == value] if key in rows else rows.iloc[:0]
        return rows
