"""Latency of ops of one kind as a function of their sizes: a roofline and a Gaussian process.

``log t = log(sum over terms of c * work) + g(features)``. The sum is an additive roofline: the work of an op
(a call, FLOPs, bytes), each at a rate of the device, all rates >= 0. The process ``g`` models the log
efficiency that the roofline leaves unexplained (Rasmussen and Williams 2006). If another device is known, its
latency replaces the roofline in a second model. The two are averaged with weights from their leave-one-out
likelihoods, separately for each kind of op.

Measurements contain outliers: in some published tables a quarter of the rows are 20% too slow. The
roofline is therefore fitted to absolute relative errors, and the process to Student-t noise, by reweighting.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize, nnls
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel

from latency.device_runner.timing import JsonObject

Array = NDArray[np.float64]
STUDENT_T_DOF = 4.0  # degrees of freedom of the noise
OUTLIER_SHARE = 0.1  # expected share of outliers
OUTLIER_SPREAD = 0.3  # their standard deviation, log seconds
MIN_NOISE = 0.003  # relative; no timing repeats better
MAX_KERNEL_ROWS = 300  # observations that the kernel is fitted to; predictions use all of them
KERNEL_ROUNDS = 3  # alternations of fitting the kernel and the outlier weights
REWEIGHTINGS = 15  # of the outlier weights in each round
ROOFLINE_ITERATIONS = 10
TREND_ITERATIONS = 20
INITIAL_SPREAD = 0.05  # of the kernel, log seconds
INITIAL_LENGTH = 4.0  # of the kernel, doublings of a size
INITIAL_WHITE = 0.01  # standard deviation of op effects, log seconds
PRIOR_SPREAD = 1.0  # of the kernel's log hyperparameters around their initial values
NORMAL_SQUARE_MEDIAN = 2.198  # ratio of a squared normal's mean to its median


@dataclass(frozen=True)
class Observations:
    """Measured ops, one row each.

    Attributes:
        features: logarithms to base 2 of the sizes: [N, D].
        work: terms of the roofline in any units; all >= 0, and at least one above 0 in every row: [N, K].
        seconds: latencies: [N].
        noise: relative standard deviation of each timing: [N].
        source: latencies of the same ops on a known device, s: [N]; None if there is none.
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
        rates: seconds per unit of work of the roofline: [K]; None if the mean is a known device's latency.
        offset: center of the residuals.
        theta: logarithms of the kernel's hyperparameters, in scikit-learn's order.
        inputs: [N, D], or [N, D + 1] with the known device's latency.
        residuals: log seconds minus mean and offset: [N].
        noise: variance of each, including ``white`` and outlier weights: [N].
        white: variance of op effects.
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
        """Cholesky factor of the observations' covariance."""
        return cho_factor(self.kernel(self.inputs) + np.diag(self.noise), lower=True)

    @cached_property
    def solved(self) -> Array:
        """Inverse covariance times the residuals: [N]."""
        return np.asarray(cho_solve(self.factor, self.residuals))

    @cached_property
    def precision(self) -> Array:
        """Inverse variance of each residual given the others: [N]."""
        return np.diag(cho_solve(self.factor, np.eye(len(self.residuals))))

    def posterior(self, inputs: Array) -> tuple[Array, Array]:
        """Mean and covariance of the process.

        Args:
            inputs: [M, D] or [M, D + 1], as :attr:`inputs`.

        Returns:
            Mean: [M]; covariance: [M, M].
        """
        across = self.kernel(inputs, self.inputs)
        covariance = self.kernel(inputs) - across @ cho_solve(self.factor, across.T)
        return across @ self.solved, covariance

    def op_effect(self) -> Array:
        """Expected deviation of each observed op from the process, log seconds: [N].

        A deviation is split between the op's effect and timing noise in the ratio of their variances.
        """
        off = self.residuals - self.kernel(self.inputs) @ self.solved
        return np.asarray(self.white / self.noise * off)

    def loo_residuals(self) -> Array:
        """Each residual minus its prediction from the others: [N] (Rasmussen and Williams 2006, 5.4.2)."""
        return np.asarray(self.solved / self.precision)

    def loo_log_density(self) -> Array:
        """Log density of each residual given the others, up to a constant: [N]; the same source."""
        return np.asarray(0.5 * np.log(self.precision) - 0.5 * self.solved**2 / self.precision)

    def to_json(self) -> JsonObject:
        """The process as a JSON object."""
        # Not vars(): it also holds the cached properties.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}

    @staticmethod
    def from_json(value: JsonObject) -> "Process":
        """Read a process; the inverse of :meth:`to_json`."""
        arrays: JsonObject = {name: np.array(v) if isinstance(v, list) else v for name, v in value.items()}
        return Process(**arrays)


@dataclass(frozen=True)
class OpModel:
    """Fitted model of one kind of op.

    Attributes:
        processes: a process around the roofline, and one around a known device's latency if there is one.
    """

    processes: tuple[Process, ...]

    @cached_property
    def weights(self) -> Array:
        """Weight of each process, by its leave-one-out likelihood: [P]."""
        score = np.array([process.loo_log_density().sum() for process in self.processes])
        raised = np.exp(score - score.max())
        return np.asarray(raised / raised.sum())

    def predict(self, features: Array, work: Array, source: Array | None = None) -> tuple[Array, Array]:
        """Mean and covariance of log seconds.

        Args:
            features: logarithms to base 2 of the sizes: [M, D].
            work: terms of the roofline: [M, K].
            source: latencies on the known device, s: [M].

        Returns:
            Mean: [M]; covariance: [M, M].
        """
        means, covariances = [], []
        for process in self.processes:
            inputs, base = _base(process.rates, features, work, source)
            residual, covariance = process.posterior(inputs)
            means.append(process.offset + base + residual)
            covariances.append(covariance)
        mean = np.einsum("p,pm->m", self.weights, np.array(means))
        # The covariance of a mixture: within each process, and between their means.
        covariance = sum(
            weight * (within + np.outer(m - mean, m - mean))
            for weight, m, within in zip(self.weights, means, covariances, strict=True)
        )
        return mean, np.asarray(covariance)

    @property
    def white(self) -> float:
        """Variance of op effects, in squared log seconds."""
        return float(self.weights @ [process.white for process in self.processes])

    @property
    def timing(self) -> float:
        """Median variance of a timing, in squared log seconds."""
        first = self.processes[0]
        return float(np.median(first.noise)) - first.white

    def op_effect(self) -> Array:
        """Expected deviation of each observed op from the model, log seconds: [N]."""
        return np.asarray(self.weights @ np.array([process.op_effect() for process in self.processes]))


def fit_op_model(seen: Observations) -> OpModel:
    """Fit the model of a kind of op.

    Args:
        seen: measured ops of that kind.
    """
    processes = [_fit(seen, fit_rates(seen.work, seen.seconds))]
    if seen.source is not None:
        processes.append(_fit(seen, None))
    return OpModel(tuple(processes))


def fit_rates(work: Array, seconds: Array) -> Array:
    """Rates of the roofline that minimise the mean absolute relative error.

    Args:
        work: terms of the roofline: [N, K].
        seconds: latencies: [N].

    Returns:
        Seconds per unit of each term, >= 0: [K].
    """
    scale = np.maximum(work.max(axis=0), 1e-30)
    rows = work / scale / seconds[:, None]
    # A weak prior at 0 decides between terms that vary together.
    prior = 1e-2 * np.diag(np.abs(rows).mean(axis=0))
    weights = np.ones(len(rows))
    found = np.zeros(work.shape[1])
    # Least absolute deviations by iteratively reweighted least squares.
    for _ in range(ROOFLINE_ITERATIONS):
        root = np.sqrt(weights)
        target = np.concatenate([root, np.zeros(len(prior))])
        found = nnls(np.vstack([rows * root[:, None], prior]), target)[0]
        off = np.abs(rows @ found - 1)
        weights = 1 / np.maximum(off, 0.3 * np.median(off) + 1e-4)
        weights /= weights.mean()
    return np.asarray(found / scale)


def _base(rates: Array | None, features: Array, work: Array, source: Array | None) -> tuple[Array, Array]:
    """Inputs of a process [N, D], and its mean in log seconds [N]."""
    if rates is not None:
        return features, np.log(work @ rates)
    if source is None:
        raise ValueError("the latency of the known device is needed")
    return np.column_stack([features, np.log2(source)]), np.log(source)


def kernel(columns: int) -> Kernel:
    """The covariance function before it is fitted: Matern 3/2 over sizes in doublings.

    Args:
        columns: number of inputs.
    """
    lengths = np.full(columns, INITIAL_LENGTH)
    return ConstantKernel(INITIAL_SPREAD**2, (1e-8, 1.0)) * Matern(lengths, (0.1, 1e3), nu=1.5)


def _fit(seen: Observations, rates: Array | None) -> Process:
    """Fit the kernel, the noise and the outlier weights of the observations alternately.

    The fit is done twice: without outlier weights, and with Student-t weights that start from the deviations
    from a stiff trend. The fit with the better leave-one-out likelihood is kept.
    """
    inputs, base = _base(rates, seen.features, seen.work, seen.source)
    residuals = np.log(seen.seconds) - base
    offset = float(np.median(residuals))
    residuals = residuals - offset
    timed = np.maximum(seen.noise, MIN_NOISE) ** 2
    rows = np.random.default_rng(0).permutation(len(residuals))[:MAX_KERNEL_ROWS]
    start = kernel(inputs.shape[1]) + WhiteKernel(INITIAL_WHITE**2, (1e-6, 0.1))
    found: list[tuple[float, Process]] = []
    for excess, rounds in (
        (np.zeros(len(residuals)), 1),
        (_excess(residuals - _trend(inputs, residuals), timed), KERNEL_ROUNDS),
    ):
        for _ in range(rounds):
            search = GaussianProcessRegressor(start, alpha=(timed + excess)[rows], optimizer=_with_prior)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the bounds are meant to be reachable
                search.fit(inputs[rows], residuals[rows])
            # The last hyperparameter is that of the white kernel.
            theta, white = search.kernel_.theta[:-1], float(np.exp(search.kernel_.theta[-1]))
            for _ in range(REWEIGHTINGS if rounds > 1 else 1):
                process = Process(rates, offset, theta, inputs, residuals, timed + white + excess, white)
                # Variance of a leave-one-out residual if it is no outlier.
                expected = np.maximum(1 / process.precision - excess, timed)
                excess = _excess(process.loo_residuals(), expected)
        # Likelihood of the residuals under a mixture of usual ones and outliers, which are only ever slow.
        off = process.loo_residuals()
        usual, outlying = (norm.pdf(off, scale=np.sqrt(expected + w**2)) for w in (0.0, OUTLIER_SPREAD))
        mixture = (1 - OUTLIER_SHARE) * usual + OUTLIER_SHARE * 2 * outlying * (off > 0)
        found.append((float(np.log(mixture).sum()), process))
    return max(found, key=lambda pair: pair[0])[1]


def _excess(off: Array, least: Array) -> Array:
    """Variance that Student-t noise adds to that of usual deviations.

    Args:
        off: deviations from the prediction of the others: [N].
        least: minimum variance of usual deviations: [N].

    Returns:
        Variance: [N].
    """
    usual = least * max(1.0, NORMAL_SQUARE_MEDIAN * float(np.median(off**2 / least)))
    slow = np.maximum(off, 0.0)  # disturbances only slow a timing down: see docs/adr/0005
    return np.asarray(usual * np.maximum(0.0, (STUDENT_T_DOF + slow**2 / usual) / (STUDENT_T_DOF + 1) - 1))


def _trend(inputs: Array, residuals: Array) -> Array:
    """A parabola in each input, by least absolute deviations: too stiff to follow an outlier."""
    middle = inputs - inputs.mean(axis=0)
    design = np.column_stack([np.ones(len(inputs)), middle, middle**2])
    prior = 1e-3 * np.eye(design.shape[1])
    weights = np.ones(len(residuals))
    fitted = np.zeros(len(residuals))
    for _ in range(TREND_ITERATIONS):
        system = design.T @ (weights[:, None] * design) + prior
        fitted = design @ np.linalg.solve(system, design.T @ (weights * residuals))
        off = np.abs(residuals - fitted)
        weights = 1 / np.maximum(off, 0.1 * float(np.median(off)) + 1e-5)
        weights /= weights.mean()
    return np.asarray(fitted)


Objective = Callable[..., tuple[float, Array]]


def _with_prior(objective: Objective, start: Array, bounds: Array) -> tuple[Array, float]:
    """Maximise the evidence times a prior around the kernel's initial values, against overfitting few rows.

    This is an optimizer as scikit-learn calls it: ``objective`` is the negative log evidence.
    """

    def loss(theta: Array) -> tuple[float, Array]:
        value, gradient = objective(theta, eval_gradient=True)
        away = (theta - start) / PRIOR_SPREAD
        return value + 0.5 * float(away @ away), gradient + away / PRIOR_SPREAD

    box = list(zip(*bounds.T, strict=True))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=box, options={"maxiter": 60})
    return np.asarray(found.x), float(found.fun)
