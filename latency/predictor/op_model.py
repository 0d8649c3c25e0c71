"""The latency of what was not measured, from what was: a roofline and a Gaussian process.

``log t = log(sum over terms of c * work) + g(features)``. The sum is an additive roofline: what an op does
(a call, FLOPs, bytes), each at a rate of the device, all rates >= 0. The process ``g`` is what the op
leaves of it, its log efficiency (Rasmussen and Williams 2006). Where another device is known, its latency
takes the roofline's place in a second model; the two are averaged by their evidence, op kind by op kind.

Measurements hold outliers: a quarter of some published tables is 20% too slow. So the roofline is fitted to
absolute relative errors, and the process to Student-t noise, by reweighting.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize, nnls
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel

Array = NDArray[np.float64]
FREEDOM = 4.0  # degrees of the Student-t noise
ODD, WIDE = 0.1, 0.3  # the share of outliers that is expected, and their spread (log seconds)
LEAST_NOISE = 0.003  # relative; no timing repeats better
OPTIMISED = 300  # at most so many observations settle the kernel; all of them make the prediction
ROUNDS, REWEIGHTINGS = 3, 15  # of settling the kernel, and in each of finding outliers
SPREAD, LENGTH, WHITE, PRIOR = 0.05, 4.0, 0.01, 1.0  # where the kernel starts, and how far it strays (log)


@dataclass(frozen=True)
class Observations:
    """What was measured: one row each.

    Attributes:
        features: logarithms to base 2 of the sizes that vary: [N, D].
        work: what each row does, in any units: [N, K]; all >= 0, and one of them above 0 in every row.
        seconds: [N].
        noise: relative standard deviation of each timing: [N].
        source: seconds that a known device takes for the same: [N], or None.
    """

    features: Array
    work: Array
    seconds: Array
    noise: Array
    source: Array | None = None


@dataclass(frozen=True)
class Process:
    """A mean and a Gaussian process around it, conditioned on residuals in log seconds.

    Attributes:
        rates: of the roofline, seconds per unit of work; None where the mean is a known device's latency.
        offset: what the residuals are centred on.
        theta: the kernel's hyperparameters, logarithms as scikit-learn orders them.
        inputs: [N, D], or [N, D + 1] with the known device's latency.
        residuals: log seconds less mean and offset: [N].
        noise: variance of each: [N].
        white: variance of what is each op's own, beside its timing's noise.
    """

    rates: Array | None
    offset: float
    theta: Array
    inputs: Array
    residuals: Array
    noise: Array
    white: float

    @cached_property
    def kernel(self) -> Kernel:
        """The covariance function."""
        return kernel(self.inputs.shape[1]).clone_with_theta(self.theta)

    @cached_property
    def factor(self) -> tuple[Array, bool]:
        """The Cholesky factor of the observations' covariance."""
        return cho_factor(self.kernel(self.inputs) + np.diag(self.noise), lower=True)

    @cached_property
    def solved(self) -> Array:
        """The inverse covariance times the residuals: [N]."""
        return np.asarray(cho_solve(self.factor, self.residuals))

    def posterior(self, inputs: Array) -> tuple[Array, Array]:
        """Mean [M] and covariance [M, M] of the process."""
        across = self.kernel(inputs, self.inputs)
        covariance = self.kernel(inputs) - across @ cho_solve(self.factor, across.T)
        return across @ self.solved, covariance

    def own(self) -> Array:
        """By how much each observation is expected to lie off the process, in log seconds: [N]."""
        off = self.residuals - self.kernel(self.inputs) @ self.solved
        return np.asarray(self.white / self.noise * off)

    def to_json(self) -> dict[str, Any]:
        """As a plain JSON value."""
        return {
            name: v.tolist() if isinstance(v, np.ndarray) else v
            for name, v in vars(self).items()
            if name in FIELDS
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Process":
        """Read a process; the inverse of :meth:`to_json`."""
        arrays: dict[str, Any] = {
            name: np.array(v) if isinstance(v, list) else v for name, v in value.items()
        }
        return Process(**arrays)

    @cached_property
    def precision(self) -> Array:
        """One over the variance of each residual given the others: [N]."""
        return np.diag(cho_solve(self.factor, np.eye(len(self.residuals))))

    def surprises(self) -> Array:
        """Each residual less what the others say of it: [N] (Rasmussen and Williams 2006, 5.4.2)."""
        return np.asarray(self.solved / self.precision)

    def left_out(self) -> Array:
        """Log density of each residual given the others, less a constant: [N]; the same source."""
        return np.asarray(0.5 * np.log(self.precision) - 0.5 * self.solved**2 / self.precision)


FIELDS = frozenset(field.name for field in fields(Process))


@dataclass(frozen=True)
class OpModel:
    """A fitted model of one kind of op: a process on the roofline, and perhaps one on a known device."""

    processes: tuple[Process, ...]

    @cached_property
    def weights(self) -> Array:
        """How much each process counts, by how well it predicts what it is not shown."""
        score = np.array([process.left_out().sum() for process in self.processes])
        raised = np.exp(score - score.max())
        return np.asarray(raised / raised.sum())

    def predict(self, features: Array, work: Array, source: Array | None = None) -> tuple[Array, Array]:
        """The mean of log seconds and its covariance: [M], [M, M]."""
        means, covariances = [], []
        for process in self.processes:
            inputs, base = _base(process.rates, features, work, source)
            residual, covariance = process.posterior(inputs)
            means.append(process.offset + base + residual)
            covariances.append(covariance)
        mean = np.einsum("p,pm->m", self.weights, np.array(means))
        covariance = sum(
            weight * (each + np.outer(m - mean, m - mean))
            for weight, m, each in zip(self.weights, means, covariances, strict=True)
        )
        return mean, np.asarray(covariance)

    @property
    def white(self) -> float:
        """The variance of what is an op's own."""
        return float(self.weights @ [process.white for process in self.processes])

    @property
    def timing(self) -> float:
        """The median variance of a timing."""
        first = self.processes[0]
        return float(np.median(first.noise)) - first.white

    def own(self) -> Array:
        """By how much each observation is expected to lie off the model, in log seconds: [N]."""
        return np.asarray(self.weights @ np.array([process.own() for process in self.processes]))


def fit_op_model(seen: Observations) -> OpModel:
    """Fit a kind of op."""
    processes = [_fit(seen, fit_rates(seen.work, seen.seconds))]
    if seen.source is not None:
        processes.append(_fit(seen, None))
    return OpModel(tuple(processes))


def fit_rates(work: Array, seconds: Array) -> Array:
    """Seconds per unit of each term, >= 0, that make the mean absolute relative error small: [K]."""
    scale = np.maximum(work.max(axis=0), 1e-30)
    rows = work / scale / seconds[:, None]
    pull = 1e-2 * np.diag(np.abs(rows).mean(axis=0))  # towards 0, where the terms cannot be told apart
    weights = np.ones(len(rows))
    found = np.zeros(work.shape[1])
    for _ in range(10):
        root = np.sqrt(weights)
        found = nnls(np.vstack([rows * root[:, None], pull]), np.concatenate([root, np.zeros(len(pull))]))[0]
        off = np.abs(rows @ found - 1)
        weights = 1 / np.maximum(off, 0.3 * np.median(off) + 1e-4)
        weights /= weights.mean()
    return np.asarray(found / scale)


def _base(rates: Array | None, features: Array, work: Array, source: Array | None) -> tuple[Array, Array]:
    """A process's inputs [N, D], and log seconds before it [N]."""
    if rates is not None:
        return features, np.log(work @ rates)
    if source is None:
        raise ValueError("the latency of the known device is needed")
    return np.column_stack([features, np.log2(source)]), np.log(source)


def kernel(columns: int) -> Kernel:
    """What varies with the sizes, in doublings; before it is fitted to anything."""
    lengths = np.full(columns, LENGTH)
    return ConstantKernel(SPREAD**2, (1e-8, 1.0)) * Matern(lengths, (0.1, 1e3), nu=1.5)


def _fit(seen: Observations, rates: Array | None) -> Process:
    """Kernel, noise and weights of the observations in turn."""
    inputs, base = _base(rates, seen.features, seen.work, seen.source)
    residuals = np.log(seen.seconds) - base
    offset = float(np.median(residuals))
    residuals = residuals - offset
    timed = np.maximum(seen.noise, LEAST_NOISE) ** 2
    some = np.random.default_rng(0).permutation(len(residuals))[:OPTIMISED]
    start = kernel(inputs.shape[1]) + WhiteKernel(WHITE**2, (1e-6, 0.1))
    # All that is odd is structure; or what is off a stiff trend, and then off the rest, is an outlier. What
    # predicts the rest better is kept.
    found: list[tuple[float, Process]] = []
    for excess, rounds in (
        (np.zeros(len(residuals)), 1),
        (_excess(residuals - _trend(inputs, residuals), timed), ROUNDS),
    ):
        for _ in range(rounds):
            search = GaussianProcessRegressor(start, alpha=(timed + excess)[some], optimizer=_with_prior)
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", ConvergenceWarning
                )  # a bound that is reached is meant to be one
                search.fit(inputs[some], residuals[some])
            theta, white = search.kernel_.theta[:-1], float(np.exp(search.kernel_.theta[-1]))
            for _ in range(REWEIGHTINGS if rounds > 1 else 1):
                process = Process(rates, offset, theta, inputs, residuals, timed + white + excess, white)
                expected = np.maximum(1 / process.precision - excess, timed)  # variance of a surprise
                excess = _excess(process.surprises(), expected)
        off = process.surprises()
        usual, odd = (norm.pdf(off, scale=np.sqrt(expected + w**2)) for w in (0.0, WIDE))
        score = float(np.log((1 - ODD) * usual + ODD * 2 * odd * (off > 0)).sum())
        found.append((score, process))
    return max(found, key=lambda pair: pair[0])[1]


def _excess(off: Array, least: Array) -> Array:
    """The variance that Student-t noise gives deviations beyond that of the usual ones: [N].

    ``off`` are deviations from what the others say, ``least`` the variance that the usual ones have at least.
    """
    usual = least * max(1.0, 2.198 * float(np.median(off**2 / least)))  # 2.198: of a normal's squares
    slow = np.maximum(off, 0.0)  # what disturbs a timing makes it slower: see docs/adr/0005
    return np.asarray(usual * np.maximum(0.0, (FREEDOM + slow**2 / usual) / (FREEDOM + 1) - 1))


def _trend(inputs: Array, residuals: Array) -> Array:
    """A parabola in each input, by least absolute deviations: too stiff to follow an outlier."""
    middle = inputs - inputs.mean(axis=0)
    design = np.column_stack([np.ones(len(inputs)), middle, middle**2])
    pull = 1e-3 * np.eye(design.shape[1])
    weights = np.ones(len(residuals))
    fitted = np.zeros(len(residuals))
    for _ in range(20):
        system = design.T @ (weights[:, None] * design) + pull
        fitted = design @ np.linalg.solve(system, design.T @ (weights * residuals))
        off = np.abs(residuals - fitted)
        weights = 1 / np.maximum(off, 0.1 * float(np.median(off)) + 1e-5)
        weights /= weights.mean()
    return np.asarray(fitted)


def _with_prior(objective: Callable[..., Any], start: Array, bounds: Array) -> tuple[Array, float]:
    """An optimiser of the evidence times a prior around the kernel's start: few rows must not overfit it."""

    def loss(theta: Array) -> Any:
        value, gradient = objective(theta, eval_gradient=True)
        away = (theta - start) / PRIOR
        return value + 0.5 * float(away @ away), gradient + away / PRIOR

    box = list(zip(*bounds.T, strict=True))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=box, options={"maxiter": 60})
    return np.asarray(found.x), float(found.fun)
