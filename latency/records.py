"""Measurements of one space under fixed conditions: rows of a card in, a predictor out.

Profiling this machine and reading a kit's result end in the same rows and the same fit.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from latency.card import Card
from latency.device_runner.timing import Timing
from latency.predictor.design import ModelRole
from latency.predictor.fit import HeldOutModels, fit_predictor
from latency.predictor.memory import MemoryModel, fit_memory
from latency.predictor.op_latencies import OpLatencies, TimedModel, fit_op_latencies
from latency.predictor.predictor import Predictor
from latency.runtimes.protocol import ANCHOR_SIDE
from latency.runtimes.reference import card_scale
from latency.runtimes.registry import graph_version
from space import Architecture, Space, Workload, genome
from space.io.artefact import canonical_json

if TYPE_CHECKING:
    import pandas as pd

    from space.genome import Genomes

MAX_SPEEDUP = 64.0  # over the anchor's FLOPs per second; no op is faster
MIN_MEMORY_MODELS = 6  # whole models that memory is fitted on
NORMAL_95 = 1.96  # half-width of a 95% interval in standard deviations
FIT_ROLES: tuple[ModelRole, ...] = ("optimal", "random")
Array = NDArray[np.float64]


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
        return canonical_json(self.space.config.to_json())

    def add_models(
        self,
        models: Sequence[tuple[ModelRole, Architecture]],
        workloads: Sequence[Workload],
        timings: Mapping[str, Timing],
        group: str,
    ) -> None:
        """Add the latencies of whole models that were measured in a run, in the card's units.

        Args:
            models: role and architecture of the measured models.
            workloads: workloads that each of them was measured in.
            timings: timings of the run, with those of the reference work.
            group: label of the run.
        """
        scales = card_scale(self.card, self.threads, timings)
        rows = []
        for role, architecture in models:
            for workload in workloads:
                timing = timings[model_name(role, architecture, workload)]
                rows.append(
                    {
                        **self.conditions,
                        "model_config": self.model_config,
                        "space": self.space.hash,
                        "role": role,
                        "workload": str(workload),
                        "key": architecture.key,
                        "architecture": canonical_json(architecture.to_json()),
                        "seconds": timing.seconds * scales[workload.phase],
                        "half_width": timing.half_width,
                        "timing": canonical_json(timing.to_json()),
                        "group": group,
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

    def timed(self) -> list[TimedModel]:
        """The measured models to fit on: those of every space with this model configuration."""
        rows = self._rows("models", model_config=self.model_config)
        if len(rows):
            rows = rows[rows["role"].isin(FIT_ROLES)]
        if not len(rows):
            return []
        names = ("architecture", "workload", "seconds", "half_width", "group")
        return [
            TimedModel(
                architecture=Architecture.from_json(json.loads(a)),
                workload=Workload.parse(w),
                seconds=seconds,
                noise=half_width / NORMAL_95,
                group=group,
            )
            for a, w, seconds, half_width, group in zip(*(rows[name] for name in names), strict=True)
        ]

    def architectures(self, role: ModelRole, workloads: Sequence[Workload]) -> list[Architecture]:
        """The models of this space with a role that were measured in all of some workloads.

        Args:
            role: use of the models.
            workloads: the workloads.
        """
        rows = self._rows("models", space=self.space.hash, role=role)
        if not len(rows):
            return []
        rows = rows[rows["workload"].isin([str(w) for w in workloads])]
        found = rows.groupby("architecture", sort=False)["workload"].nunique()
        return [Architecture.from_json(json.loads(a)) for a in found.index[found == len(workloads)]]

    def uncertain(self, half_width: float) -> set[str]:
        """Names of the models of this space whose interval is wider than allowed.

        Args:
            half_width: maximum relative half-width of the interval.
        """
        return {name for name, value in self._named("models", "half_width").items() if value > half_width}

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
        """Infer the latencies of all ops from the measured models.

        Args:
            source: op latencies of a known device.
        """
        return fit_op_latencies(self.space, self.timed(), source)

    def predictor(
        self,
        workloads: Sequence[Workload],
        chosen: Mapping[ModelRole, Sequence[Architecture]],
        source: OpLatencies | None = None,
    ) -> Predictor:
        """Fit the predictor to measured models, and test it on others.

        Args:
            workloads: workloads of the predictor.
            chosen: measured architectures of this space by role.
            source: op latencies of a known device, as a prior.
        """
        seconds = self.models()

        def repeatability(w: Workload) -> float | None:
            """Mean relative difference between two measurements of a model, percent."""
            pairs = [
                (seconds[model_name("repeat", a, w)], seconds[model_name("held_out", a, w)])
                for a in chosen["repeat"]
            ]
            return 100 * float(np.mean([abs(again / first - 1) for again, first in pairs])) if pairs else None

        held_out = HeldOutModels(
            architectures=chosen["held_out"],
            seconds={
                w: np.array([seconds[model_name("held_out", a, w)] for a in chosen["held_out"]])
                for w in workloads
            },
            repeatability={w: repeatability(w) for w in workloads},
        )
        roles = {a.key: role for role in FIT_ROLES for a in chosen[role]}
        predictor = fit_predictor(self.space, workloads, self.timed(), roles, held_out, source)
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
