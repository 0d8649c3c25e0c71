"""Predicting the peak resident memory of an inference session from what it must hold.

``bytes = c0 + a * weights + s * states + p * peak activations + b * depth``, all >= 0, fitted to relative
errors on the whole models that latency is fitted on. c0 and b are what the runtime itself takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from latency.predictor.composition import conformal
from space import Space, Workload
from space.cost import op_activation_bytes, op_state_bytes, op_weight_bytes
from space.genome import Genomes
from space.ops import Cost, OpTables, depths

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """What was fitted for one workload.

    Attributes:
        once: bytes of any model.
        per_layer: bytes.
        weights: bytes per byte of weights; likewise states and activations.
        residuals: measured over predicted minus 1, each from a fit without its model.
        errors: on models that no fit saw, percent.
    """

    once: float
    per_layer: float
    weights: float
    states: float
    activations: float
    residuals: tuple[float, ...]
    errors: Mapping[str, Any]

    def cost(self, space: Space, workload: Workload, confidence: float | None = None) -> Cost:
        """Peak resident bytes as a cost: the mean, or what is passed with probability 1 - confidence."""
        model_config, factor = space.config, 1.0
        if confidence is not None:
            spread = max(1e-9, float(np.sqrt(np.mean(np.square(self.residuals)))))
            factor = 1 + spread * conformal([value / spread for value in self.residuals], confidence)
        return Cost(
            OpTables(
                space,
                lambda op: (
                    factor
                    * (
                        self.weights * op_weight_bytes(op, model_config, workload.precision)
                        + self.states * op_state_bytes(op, workload, model_config)
                    )
                ),
            ),
            constant=factor * self.once,
            per_layer=factor * self.per_layer,
            max_op=OpTables(
                space, lambda op: factor * self.activations * op_activation_bytes(op, workload, model_config)
            ),
        )

    def times(self, factor: float) -> "MemoryModel":
        """A model that predicts so many times as much."""
        names = ("once", "per_layer", "weights", "states", "activations")
        return replace(self, **{name: factor * getattr(self, name) for name in names})

    def to_json(self) -> dict[str, Any]:
        """As a plain JSON value."""
        return {**vars(self), "residuals": list(self.residuals), "errors": dict(self.errors)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "MemoryModel":
        """Read a model; the inverse of :meth:`to_json`."""
        return MemoryModel(**{**value, "residuals": tuple(value["residuals"])})

    def between(self, other: "MemoryModel", share: float) -> "MemoryModel":
        """The model of a length between those of this one and another."""
        names = ("once", "per_layer", "weights", "states", "activations")
        mixed = {n: (1 - share) * getattr(self, n) + share * getattr(other, n) for n in names}
        wider = max(self, other, key=lambda model: max(model.residuals))
        return replace(wider, **mixed, errors={})


def fit_memory(
    space: Space,
    workload: Workload,
    fitted: Genomes,
    measured: Array,
    held_out: Genomes,
    held_out_measured: Array,
) -> MemoryModel:
    """Fit the bytes of models, and test the fit on others."""
    design = _design(space, workload, fitted)
    solution = _solve(design, measured)
    keep = ~np.eye(len(measured), dtype=bool)
    left_out = [
        float(bytes_ / (row @ _solve(design[rows], measured[rows])) - 1)
        for rows, row, bytes_ in zip(keep, design, measured, strict=True)
    ]
    errors = {}
    if len(held_out):
        off = np.abs(_design(space, workload, held_out) @ solution / held_out_measured - 1)
        errors = {"models": len(off), "mape_percent": 100 * off.mean(), "worst_percent": 100 * off.max()}
    once, per_layer, weights, states, activations = map(float, solution)
    return MemoryModel(
        once=once,
        per_layer=per_layer,
        weights=weights,
        states=states,
        activations=activations,
        residuals=tuple(left_out),
        errors=errors,
    )


def _design(space: Space, workload: Workload, genomes: Genomes) -> Array:
    """Rows (1, depth, bytes of weights, states, peak activations): [N, 5]."""
    model_config = space.config
    weights = OpTables(space, lambda op: op_weight_bytes(op, model_config, workload.precision)).totals(
        genomes
    )
    states = OpTables(space, lambda op: op_state_bytes(op, workload, model_config)).totals(genomes)
    peak = OpTables(space, lambda op: op_activation_bytes(op, workload, model_config)).greatest(genomes)
    return np.column_stack([np.ones(len(genomes)), depths(genomes), weights, states, peak])


def _solve(design: Array, measured: Array) -> Array:
    """Coefficients >= 0 of the least relative squares; weights, states and activations are held near 1."""
    rows = design / measured[:, None]
    scale = np.abs(rows).mean(axis=0) + 1e-30
    pull = 0.1 * np.eye(rows.shape[1])  # the terms go together in small spaces
    goal = pull @ (np.array([0.0, 0.0, 1.0, 1.0, 1.0]) * scale)
    return np.asarray(
        nnls(np.vstack([rows / scale, pull]), np.concatenate([np.ones(len(rows)), goal]))[0] / scale
    )
