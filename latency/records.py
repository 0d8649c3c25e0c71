"""Measurements of one space under fixed conditions: rows of a card in, a predictor out.

Profiling this machine and reading a kit's result end in the same rows and the same fit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from latency.card import Card
from latency.device_runner.timing import Timing
from latency.predictor.composition import OpTimes
from latency.predictor.design import ModelRole, stack_heights
from latency.predictor.fit import MeasuredModels, fit_predictor
from latency.predictor.initial_design import Point
from latency.predictor.memory import MemoryModel, fit_memory
from latency.predictor.op_latencies import OpLatencies, fit_op_latencies
from latency.predictor.predictor import Predictor
from latency.runtimes.protocol import ANCHOR_SIDE
from latency.runtimes.reference import card_scale
from latency.runtimes.registry import graph_version
from space import Architecture, Space, Workload, genome
from space.cost import op_flops
from space.io.artefact import canonical_json
from space.mixers import MIXERS
from space.ops import Op, space_ops

if TYPE_CHECKING:
    import pandas as pd

    from space.genome import Genomes

MAX_NONLINEARITY = 0.03  # relative deviation of a third stack height from the line through two
MAX_SPEEDUP = 64.0  # over the anchor's FLOPs per second; no op is faster
MIN_SLOPE = 1e-3  # of an op's mean latency in the taller stack
MIN_MEMORY_MODELS = 6  # whole models that memory is fitted on
NORMAL_95 = 1.96  # half-width of a 95% interval in standard deviations
FIT_ROLES: tuple[ModelRole, ...] = ("optimal", "random")
Array = NDArray[np.float64]


def stack_name(op: Op, height: int, workload: Workload) -> str:
    """Name of the timing of a stack.

    Args:
        op: the op.
        height: number of copies.
        workload: the workload.
    """
    return f"{op.key}|{height}|{workload}"


def model_name(role: str, architecture: Architecture, workload: Workload) -> str:
    """Name of the timing of a whole model.

    Args:
        role: use of the model, see :func:`latency.predictor.design.choose_models`.
        architecture: the architecture.
        workload: the workload.
    """
    return f"{role}|{architecture.key}|{workload}"


def min_plausible_seconds(flops: float, anchor: float) -> float:
    """Lower bound of the time of any work, from the speed of the anchor.

    Args:
        flops: FLOPs of the work.
        anchor: time of the anchor, a product of two matrices of side ``ANCHOR_SIDE``, s.

    Returns:
        Seconds.
    """
    return flops / (2 * ANCHOR_SIDE**3 / anchor * MAX_SPEEDUP)


@dataclass
class Records:
    """The rows of a card that were measured for one space under fixed conditions.

    Attributes:
        card: the card.
        space: the space.
        runtime: name of the runtime.
        threads: number of threads.
        precision: precision of the models.
    """

    card: Card
    space: Space
    runtime: str
    threads: int
    precision: str = "fp32"

    @property
    def conditions(self) -> dict[str, str | int]:
        """Columns that identify a measurement besides the measured op or model."""
        return {
            "runtime": self.runtime,
            "threads": self.threads,
            "precision": self.precision,
            "graphs": graph_version(self.runtime),
        }

    @cached_property
    def model_config(self) -> str:
        """JSON of the model configuration, which ops of different spaces share only if it is equal."""
        return canonical_json(vars(self.space.config))

    def add_ops(self, points: Sequence[Point], timings: Mapping[str, Timing], anchor: float) -> None:
        """Add the latencies of ops that were measured in a run.

        The latency of an op is the slope of its stacks' times over their heights, in the card's units.

        Args:
            points: the measured ops and workloads.
            timings: timings of the run, with those of the reference work.
            anchor: time of the run's anchor, s.
        """
        scales = card_scale(self.card, self.threads, timings)
        rows = [self._op_row(point, timings, anchor, scales[point[1].phase]) for point in points]
        self.card.save()
        self.card.append("ops", rows)

    def _op_row(
        self, point: Point, timings: Mapping[str, Timing], anchor: float, scale: float
    ) -> dict[str, object]:
        op, workload = point
        low, high = stack_heights(self.space, op, workload)
        ends = [timings[stack_name(op, height, workload)] for height in (low, high)]
        slope = (ends[1].seconds - ends[0].seconds) / (high - low)
        middle = (low + high) // 2
        third = timings.get(stack_name(op, middle, workload))
        if third:
            off = third.seconds / (ends[0].seconds + (middle - low) * slope) - 1
            if abs(off) > MAX_NONLINEARITY:
                self.card.problems.append(
                    f"{op.key} {workload}: {middle} copies are {off:+.1%} from the line"
                )
        work = high * op_flops(op, workload, self.space.config)
        if ends[1].seconds < min_plausible_seconds(work, anchor):
            self.card.problems.append(f"{op.key} {workload}: faster than this machine can be")
        # Noise may hide a slope or turn it negative, but no op is free.
        seconds = max(slope, MIN_SLOPE * ends[1].seconds / high)
        spread = math.hypot(*(t.half_width * t.seconds for t in ends)) / (high - low)
        return {
            **self.conditions,
            "model_config": self.model_config,
            "workload": str(workload),
            "op": op.key,
            "seconds": seconds * scale,
            "half_width": spread / seconds,
            "intercept": (ends[0].seconds - low * slope) * scale,
            "timing": canonical_json([t.to_json() for t in ends]),
        }

    def add_models(
        self,
        models: Sequence[tuple[ModelRole, Architecture]],
        workloads: Sequence[Workload],
        timings: Mapping[str, Timing],
    ) -> None:
        """Add the latencies of whole models that were measured in a run, in the card's units.

        Args:
            models: role and architecture of the measured models.
            workloads: workloads that each of them was measured in.
            timings: timings of the run, with those of the reference work.
        """
        scales = card_scale(self.card, self.threads, timings)
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

    def add_memory(
        self, role: ModelRole, architecture: Architecture, peak_bytes: Mapping[Workload, int]
    ) -> None:
        """Add the peak memory of a whole model.

        Args:
            role: use of the model.
            architecture: the architecture.
            peak_bytes: by workload.
        """
        rows = [
            {
                **self.conditions,
                "space": self.space.hash,
                "role": role,
                "workload": str(workload),
                "key": architecture.key,
                "bytes": value,
            }
            for workload, value in peak_bytes.items()
        ]
        self.card.append("memory", rows)

    def memory(self) -> dict[str, float]:
        """Peak bytes of each measured whole model, by :func:`model_name`."""
        return self._named("memory", "bytes")

    def ops(self) -> dict[Point, tuple[float, float]]:
        """Seconds of each measured op and workload, and their relative standard deviation."""
        rows = self._rows("ops", model_config=self.model_config)
        if not len(rows):
            return {}
        columns = zip(rows["op"], rows["workload"], rows["seconds"], rows["half_width"], strict=True)
        return {
            (Op.parse(op), Workload.parse(w)): (seconds, half_width / NORMAL_95)
            for op, w, seconds, half_width in columns
        }

    def models(self) -> dict[str, float]:
        """Seconds of each measured whole model, by :func:`model_name`."""
        return self._named("models", "seconds")

    def _named(self, table: str, column: str) -> dict[str, float]:
        rows = self._rows(table, space=self.space.hash)
        if not len(rows):
            return {}
        names = rows["role"] + "|" + rows["key"] + "|" + rows["workload"]
        return dict(zip(names, rows[column], strict=True))

    def fitted(self, source: OpLatencies | None = None) -> OpLatencies:
        """Fit the latencies of all ops to the measured ones.

        Args:
            source: op latencies of a known device.
        """
        return fit_op_latencies(self.space.config, self.ops(), source)

    def op_times(self, ops: OpLatencies, workload: Workload) -> OpTimes:
        """Latencies of all ops of the space in a workload, and the constant of full attention.

        Args:
            ops: fitted op latencies.
            workload: a measured workload.
        """
        names = space_ops(self.space)
        seconds = ops.seconds([(op, workload) for op in names])
        rows = self._rows("ops", model_config=self.model_config, workload=str(workload))
        # The work that full-attention layers share appears as the intercept of their stacks.
        constant = 0.0
        if len(rows):
            known = MIXERS.known_names()  # listing all mixers would load plug-ins
            kinds = [name for name in known if MIXERS.get(name).mixer_class == "full"]
            full = rows["op"].str.split("-").str[0].isin(kinds)
            constant = max(0.0, float(rows["intercept"][full].median())) if full.any() else 0.0
        by_key = {op.key: float(s) for op, s in zip(names, seconds, strict=True)}
        return OpTimes(workload, by_key, constant)

    def predictor(
        self,
        ops: OpLatencies,
        workloads: Sequence[Workload],
        chosen: Mapping[ModelRole, Sequence[Architecture]],
    ) -> Predictor:
        """Fit the predictor to measured models, and test it on others.

        Args:
            ops: fitted op latencies.
            workloads: workloads of the predictor.
            chosen: measured architectures by role.
        """
        seconds, widths = self.models(), self._named("models", "half_width")

        def column(source: Mapping[str, float], *roles: ModelRole) -> dict[Workload, Array]:
            return {
                w: np.array([source[model_name(r, a, w)] for r in roles for a in chosen[r]])
                for w in workloads
            }

        def repeatability(w: Workload) -> float | None:
            """Mean relative difference between two measurements of a model, percent."""
            pairs = [
                (seconds[model_name("repeat", a, w)], seconds[model_name("held_out", a, w)])
                for a in chosen["repeat"]
            ]
            return 100 * float(np.mean([abs(again / first - 1) for again, first in pairs])) if pairs else None

        predictor = fit_predictor(
            self.space,
            ops,
            {w: self.op_times(ops, w) for w in workloads},
            MeasuredModels(
                genomes=genome.encode(self.space, [a for role in FIT_ROLES for a in chosen[role]]),
                seconds=column(seconds, *FIT_ROLES),
                spread={w: values / NORMAL_95 for w, values in column(widths, *FIT_ROLES).items()},
                drawn=len(chosen["random"]),
            ),
            MeasuredModels(
                genomes=genome.encode(self.space, chosen["held_out"]), seconds=column(seconds, "held_out")
            ),
            {w: repeatability(w) for w in workloads},
        )
        return replace(predictor, memory=self._memory_models(workloads, chosen))

    def _memory_models(
        self, workloads: Sequence[Workload], chosen: Mapping[ModelRole, Sequence[Architecture]]
    ) -> dict[Workload, MemoryModel]:
        """Memory models of the workloads with enough measurements."""
        measured = self.memory()

        def rows(w: Workload, roles: Sequence[ModelRole]) -> tuple["Genomes", Array]:
            pairs = [(a, model_name(role, a, w)) for role in roles for a in chosen.get(role, ())]
            pairs = [(a, name) for a, name in pairs if name in measured]
            genomes = genome.encode(self.space, [a for a, _ in pairs])
            return genomes, np.array([measured[name] for _, name in pairs], float)

        others = [role for role in chosen if role not in FIT_ROLES]
        found = {}
        for w in workloads:
            genomes, peak_bytes = rows(w, FIT_ROLES)
            if len(peak_bytes) >= MIN_MEMORY_MODELS:
                found[w] = fit_memory(self.space, w, genomes, peak_bytes, *rows(w, others))
        return found

    def _rows(self, table: str, **columns: str) -> "pd.DataFrame":
        """The rows of a table under the conditions, and with the given values of further columns."""
        rows = self.card.table(table)
        for name, value in {**self.conditions, **columns}.items():
            if len(rows):
                rows = rows[rows[name] == value] if name in rows else rows.iloc[:0]
        return rows
