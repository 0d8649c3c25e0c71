"""Predicting the peak resident memory of an inference session.

``bytes = c0 + a * weights + s * states + p * peak activations + b * depth``, all coefficients >= 0, fitted
under relative error to the whole models that latency is fitted to. c0 and b are the runtime's own memory.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from latency.device_runner.timing import JsonObject
from latency.predictor.accuracy import MemoryErrors
from latency.predictor.bounds import conformal
from space import Space, Workload
from space.cost import op_activation_bytes, op_state_bytes, op_weight_bytes
from space.genome import Genomes
from space.ops import Cost, OpTables, depths

Array = NDArray[np.float64]
COEFFICIENTS = ("constant", "per_layer", "weights", "states", "activations")  # columns of the design
PRIOR_MEAN = (0.0, 0.0, 1.0, 1.0, 1.0)
PRIOR_WEIGHT = 0.1  # of a row of the prior, beside a model's 1


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Fitted coefficients of one workload.

    Attributes:
        constant: bytes of any model.
        per_layer: bytes.
        weights: bytes per byte of weights.
        states: bytes per byte of states.
        activations: bytes per byte of the largest activations.
        residuals: measured over predicted minus 1, each from a fit to the other models.
        errors: errors on models that no fit used; None if there were none.
    """

    constant: float
    per_layer: float
    weights: float
    states: float
    activations: float
    residuals: tuple[float, ...]
    errors: MemoryErrors | None = None

    def cost(self, space: Space, workload: Workload, confidence: float | None = None) -> Cost:
        """Peak resident bytes as a cost of the space.

        Args:
            space: the space.
            workload: the workload.
            confidence: probability with which a model stays below the cost; None means the mean.
        """
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
            constant=factor * self.constant,
            per_layer=factor * self.per_layer,
            max_op=OpTables(
                space, lambda op: factor * self.activations * op_activation_bytes(op, workload, model_config)
            ),
        )

    def times(self, factor: float) -> "MemoryModel":
        """The model with all predictions multiplied by a factor.

        Args:
            factor: the factor.
        """
        return replace(self, **{name: factor * getattr(self, name) for name in COEFFICIENTS})

    def to_json(self) -> JsonObject:
        """The model as a JSON object."""
        changed = {
            "residuals": list(self.residuals),
            "errors": asdict(self.errors) if self.errors else {},
        }
        return {**vars(self), **changed}

    @staticmethod
    def from_json(value: JsonObject) -> "MemoryModel":
        """Read a model; the inverse of :meth:`to_json`."""
        errors = MemoryErrors(**value["errors"]) if value["errors"] else None
        return MemoryModel(**{**value, "residuals": tuple(value["residuals"]), "errors": errors})

    def interpolate(self, other: "MemoryModel", share: float) -> "MemoryModel":
        """The model of a length between those of two models.

        Args:
            other: the model of the greater length.
            share: position between the lengths, from 0 (this model) to 1 (the other).
        """
        mixed = {n: (1 - share) * getattr(self, n) + share * getattr(other, n) for n in COEFFICIENTS}
        wider = max(self, other, key=lambda model: max(model.residuals))
        return replace(wider, **mixed, errors=None)


def fit_memory(
    space: Space,
    workload: Workload,
    fitted: Genomes,
    measured: Array,
    held_out: Genomes,
    held_out_measured: Array,
) -> MemoryModel:
    """Fit the peak memory of models, and test the fit on others.

    Args:
        space: the space.
        workload: the workload.
        fitted: models to fit on: [N, G].
        measured: their peak bytes: [N].
        held_out: models to test on: [M, G]; may be empty.
        held_out_measured: their peak bytes: [M].
    """
    design = _design(space, workload, fitted)
    solution = _solve(design, measured)
    keep = ~np.eye(len(measured), dtype=bool)
    left_out = [
        float(peak / (row @ _solve(design[rows], measured[rows])) - 1)
        for rows, row, peak in zip(keep, design, measured, strict=True)
    ]
    errors = None
    if len(held_out):
        off = np.abs(_design(space, workload, held_out) @ solution / held_out_measured - 1)
        errors = MemoryErrors(
            models=len(off), mape_percent=100 * float(off.mean()), worst_percent=100 * float(off.max())
        )
    constant, per_layer, weights, states, activations = map(float, solution)
    return MemoryModel(
        constant=constant,
        per_layer=per_layer,
        weights=weights,
        states=states,
        activations=activations,
        residuals=tuple(left_out),
        errors=errors,
    )


def _design(space: Space, workload: Workload, genomes: Genomes) -> Array:
    """Columns 1, depth, and bytes of weights, states and peak activations: [N, 5]."""
    model_config = space.config
    weights = OpTables(space, lambda op: op_weight_bytes(op, model_config, workload.precision)).totals(
        genomes
    )
    states = OpTables(space, lambda op: op_state_bytes(op, workload, model_config)).totals(genomes)
    peak = OpTables(space, lambda op: op_activation_bytes(op, workload, model_config)).greatest(genomes)
    return np.column_stack([np.ones(len(genomes)), depths(genomes), weights, states, peak])


def _solve(design: Array, measured: Array) -> Array:
    """Coefficients >= 0 of the least relative squares, with a weak prior."""
    rows = design / measured[:, None]
    scale = np.abs(rows).mean(axis=0) + 1e-30
    # The prior separates terms that vary together in small spaces.
    prior = PRIOR_WEIGHT * np.eye(rows.shape[1])
    goal = prior @ (np.array(PRIOR_MEAN) * scale)
    return np.asarray(
        nnls(np.vstack([rows / scale, prior]), np.concatenate([np.ones(len(rows)), goal]))[0] / scale
    )
