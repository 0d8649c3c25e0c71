"""Latency of ops as a function of their sizes, inferred from the times of sums of ops.

An observation is the time of a run in which op ``p`` occurs ``n_p`` times: a whole model, or a single op.
It is modelled as ``sum_p n_p t_p``, with ``log t_p = log(sum over terms of rate * work) + g(features)``.
The sum over terms is an additive roofline: the work of an op (a call, FLOPs, bytes), each at a rate of the
device, which is known to a factor. The process ``g`` models the log efficiency that the roofline leaves
unexplained. Each kind of op has rates and a process of its own (Rasmussen and Williams 2006). The logarithm
of a sum is linearised at the current estimate (an op's part in it is its share of the time), which makes
the posterior Gaussian, and the estimate is iterated. Weighing many ops at once, each in many sums, is a
weighing design (Hotelling 1944).

If another device is known, its latency of an op replaces the roofline in a second model. The two are
averaged with weights from their leave-one-out likelihoods.

Measurements contain outliers: in some published tables a quarter of the rows are 20% too slow. The roofline
is therefore fitted to absolute relative errors, and the process to Student-t noise, by reweighting.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag, cho_factor, cho_solve
from scipy.optimize import minimize, nnls
from scipy.stats import norm
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern

from latency.device_runner.timing import JsonObject

Array = NDArray[np.float64]
STUDENT_T_DOF = 4.0  # degrees of freedom of the noise
OUTLIER_SHARE = 0.1  # expected share of outliers
OUTLIER_SPREAD = 0.3  # their standard deviation, log seconds
MIN_NOISE = 0.003  # relative; no timing repeats better
MAX_KERNEL_ROWS = 300  # observations that the kernel is fitted to; predictions use all of them
KERNEL_ROUNDS = 3  # alternations of fitting the kernel and the outlier weights
REWEIGHTINGS = 15  # of the outlier weights in each round
ROWS_PER_TREND = 3  # observations per coefficient of the trend, below which no outliers are looked for
LINEARISATIONS = 6  # of the logarithm of the sums
ROOFLINE_ITERATIONS = 10
TREND_ITERATIONS = 20
RATE_SPREAD = 1.0  # of the logarithm of a rate around its first estimate
MIN_RATE_SHARE = 1e-4  # of a term in the work of its kind, in the first estimate
INITIAL_SPREAD = 0.05  # of the kernel, log seconds
INITIAL_LENGTH = 4.0  # of the kernel, doublings of a size
INITIAL_WHITE = 0.01  # standard deviation of a run's own effect, log seconds
SPREAD_BOUNDS, LENGTH_BOUNDS, WHITE_BOUNDS = (1e-8, 1.0), (0.1, 1e3), (1e-6, 0.1)  # variances and doublings
PRIOR_SPREAD = 1.0  # of the kernel's log hyperparameters around their initial values
MAX_STEP = 1.0  # of a log rate in one linearisation
NORMAL_SQUARE_MEDIAN = 2.198  # ratio of a squared normal's mean to its median


@dataclass(frozen=True)
class Ops:
    """Ops of one kind, one row each.

    Attributes:
        features: logarithms to base 2 of the sizes: [P, D].
        work: terms of the roofline in any units; all >= 0, and at least one above 0 in every row: [P, K].
        source: latencies of the same ops on a known device, s: [P]; None if there is none.
    """

    features: Array
    work: Array
    source: Array | None = None


@dataclass(frozen=True)
class Observations:
    """Measured runs, one row each.

    Attributes:
        ops: the ops that occur in them, by kind.
        counts: how often each op occurs in each run, in the order of ``ops``: [N, P]; need not be whole.
        seconds: latencies: [N].
        noise: relative standard deviation of each timing: [N].
        groups: label of each run; runs of one label are left out together: [N]. None: each run alone.
    """

    ops: Mapping[str, Ops]
    counts: Array
    seconds: Array
    noise: Array
    groups: Sequence[str] | None = None

    @staticmethod
    def of_ops(ops: Ops, seconds: Array, noise: Array) -> "Observations":
        """Observations of single ops of one kind.

        Args:
            ops: the ops.
            seconds: their latencies: [P].
            noise: relative standard deviation of each timing: [P].
        """
        return Observations({"op": ops}, np.eye(len(seconds)), seconds, noise)


@dataclass(frozen=True)
class KindModel:
    """Fitted latency of the ops of one kind.

    Attributes:
        rates: seconds per unit of work: [K]; of a known device, seconds per second of it: [1].
        theta: logarithms of the kernel's hyperparameters, in scikit-learn's order.
        inputs: features of the ops that were observed: [P, D], or [P, D + 1] with the known device's latency.
        weights: what each of them adds to the process: [P].
    """

    rates: Array
    theta: Array
    inputs: Array
    weights: Array

    @cached_property
    def kernel(self) -> Kernel:
        """The covariance function of the process."""
        return kernel(self.inputs.shape[1]).clone_with_theta(self.theta)

    def log_seconds(self, inputs: Array, work: Array) -> Array:
        """Logarithm of the latencies.

        Args:
            inputs: as :attr:`inputs`: [M, D].
            work: [M, K].
        """
        return np.asarray(np.log(work @ self.rates) + self.kernel(inputs, self.inputs) @ self.weights)

    def rate_shares(self, work: Array) -> Array:
        """Share of each term in the roofline: [M, K]."""
        parts = work * self.rates
        return np.asarray(parts / parts.sum(axis=1, keepdims=True))

    def prior_covariance(self, inputs: Array, work: Array, others: Array, others_work: Array) -> Array:
        """Covariance of the log latencies of some ops with those of others, before observations: [M, L]."""
        rates = RATE_SPREAD**2 * self.rate_shares(work) @ self.rate_shares(others_work).T
        return np.asarray(rates + self.kernel(inputs, others))

    def to_json(self) -> JsonObject:
        """The model as a JSON object."""
        return {name: getattr(self, name).tolist() for name in ("rates", "theta", "inputs", "weights")}

    @staticmethod
    def from_json(value: JsonObject) -> "KindModel":
        """Read a model; the inverse of :meth:`to_json`."""
        inputs = np.array(value["inputs"], dtype=np.float64)
        return KindModel(
            np.array(value["rates"]), np.array(value["theta"]), inputs, np.array(value["weights"])
        )


@dataclass(frozen=True)
class Fit:
    """The observations of a fit, for intervals and leave-one-out residuals.

    Attributes:
        work: of the observed ops, by kind: [P, K].
        information: inverse covariance of the observations, brought to the ops: [all P, all P].
        residuals: log seconds of each run minus its prediction from the other groups: [N].
        deviations: their expected standard deviations: [N].
    """

    work: Mapping[str, Array]
    information: Array
    residuals: Array
    deviations: Array

    @property
    def log_density(self) -> float:
        """Leave-one-out log likelihood, up to a constant (Rasmussen and Williams 2006, 5.4.2)."""
        return float(-np.log(self.deviations).sum() - 0.5 * np.square(self.residuals / self.deviations).sum())


@dataclass(frozen=True)
class Process:
    """Latencies of ops of several kinds, on a roofline or on a known device's latencies.

    Attributes:
        kinds: by kind of op.
        from_source: True if a known device's latencies replace the roofline.
        white: variance of a run's own effect, squared log seconds.
        fit: the observations; None once it was saved.
    """

    kinds: Mapping[str, KindModel]
    from_source: bool
    white: float
    fit: Fit | None = None

    def log_seconds(self, ops: Mapping[str, Ops]) -> Array:
        """Logarithm of the latencies of ops, in their order: [M]."""
        rows = {kind: _inputs_and_work(some, self.from_source) for kind, some in ops.items()}
        return np.concatenate([self.kinds[kind].log_seconds(*pair) for kind, pair in rows.items()])

    def covariance(self, ops: Mapping[str, Ops]) -> Array:
        """Posterior covariance of the log latencies of ops, in their order: [M, M]."""
        if self.fit is None:
            raise ValueError("a model that was read from a file has no covariance")
        blocks, across = [], []
        for kind, some in ops.items():
            inputs, work = _inputs_and_work(some, self.from_source)
            model = self.kinds[kind]
            blocks.append(model.prior_covariance(inputs, work, inputs, work))
            columns = [
                model.prior_covariance(inputs, work, model.inputs, self.fit.work[kind])
                if known == kind
                else np.zeros((len(inputs), len(self.kinds[known].inputs)))
                for known in self.kinds
            ]
            across.append(np.hstack(columns))
        joined = np.vstack(across)
        return np.asarray(block_diag(*blocks) - joined @ self.fit.information @ joined.T)


@dataclass(frozen=True)
class OpModel:
    """Fitted latencies of ops of several kinds.

    Attributes:
        processes: one on a roofline, and one on a known device's latencies if there is one.
        weights: weight of each process, by its leave-one-out likelihood: [processes].
    """

    processes: tuple[Process, ...]
    weights: tuple[float, ...]

    def log_seconds(self, ops: Mapping[str, Ops]) -> Array:
        """Mean log latencies.

        Args:
            ops: M ops by kind.

        Returns:
            In the order of ``ops``: [M].
        """
        return np.asarray(
            sum(w * p.log_seconds(ops) for w, p in zip(self.weights, self.processes, strict=True))
        )

    def predict(self, ops: Mapping[str, Ops]) -> tuple[Array, Array]:
        """Mean and covariance of the log latencies of M ops: [M], [M, M].

        Args:
            ops: by kind.

        Raises:
            ValueError: the model was read from a file, which has no covariance.
        """
        mean = self.log_seconds(ops)
        # The covariance of a mixture: within each process, and between their means.
        covariance = np.zeros((len(mean), len(mean)))
        for weight, process in zip(self.weights, self.processes, strict=True):
            if weight:
                off = process.log_seconds(ops) - mean
                covariance += weight * (process.covariance(ops) + np.outer(off, off))
        return mean, covariance

    @property
    def white(self) -> float:
        """Variance of a run's own effect, in squared log seconds."""
        return sum(w * process.white for w, process in zip(self.weights, self.processes, strict=True))

    def left_out(self) -> tuple[Array, Array]:
        """Left-out residuals of the observations in log seconds, and their expected deviations: [N], [N]."""
        fits = [process.fit for process in self.processes if process.fit is not None]
        residuals = np.array([fit.residuals for fit in fits])
        deviations = np.array([fit.deviations for fit in fits])
        return np.asarray(self.weights @ residuals), np.asarray(self.weights @ deviations)

    def to_json(self) -> JsonObject:
        """The model as a JSON object, without its observations."""
        return {
            "weights": list(self.weights),
            "processes": [
                {
                    "from_source": process.from_source,
                    "white": process.white,
                    "kinds": {kind: model.to_json() for kind, model in process.kinds.items()},
                }
                for process in self.processes
            ],
        }

    @staticmethod
    def from_json(value: JsonObject) -> "OpModel":
        """Read a model; the inverse of :meth:`to_json`."""
        processes = [
            Process(
                kinds={kind: KindModel.from_json(model) for kind, model in item["kinds"].items()},
                from_source=item["from_source"],
                white=item["white"],
            )
            for item in value["processes"]
        ]
        return OpModel(tuple(processes), tuple(value["weights"]))


def fit_op_model(seen: Observations) -> OpModel:
    """Fit the latencies of ops to the times of runs.

    Args:
        seen: measured runs.
    """
    processes = [_fit(seen, from_source=False)]
    if all(some.source is not None for some in seen.ops.values()):
        processes.append(_fit(seen, from_source=True))
    score = np.array([process.fit.log_density for process in processes if process.fit is not None])
    raised = np.exp(score - score.max())
    return OpModel(tuple(processes), tuple(float(w) for w in raised / raised.sum()))


def unmeasured(ops: Mapping[str, Ops], rates: Array) -> OpModel:
    """The model of a device before it was measured, for choosing what to measure first.

    Args:
        ops: the ops, by kind.
        rates: expected seconds per unit of work, of every kind: [K].
    """
    kinds = {}
    for kind, some in ops.items():
        columns = some.features.shape[1]
        kinds[kind] = KindModel(rates, kernel(columns).theta, np.zeros((0, columns)), np.zeros(0))
    work = {kind: some.work[:0] for kind, some in ops.items()}
    fit = Fit(work, np.zeros((0, 0)), np.zeros(0), np.zeros(0))
    return OpModel((Process(kinds, False, INITIAL_WHITE**2, fit),), (1.0,))


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


def kernel(columns: int) -> Kernel:
    """The covariance function before it is fitted: Matern 3/2 over sizes in doublings.

    Args:
        columns: number of inputs.
    """
    lengths = np.full(columns, INITIAL_LENGTH)
    return ConstantKernel(INITIAL_SPREAD**2, SPREAD_BOUNDS) * Matern(lengths, LENGTH_BOUNDS, nu=1.5)


def _inputs_and_work(ops: Ops, from_source: bool) -> tuple[Array, Array]:
    """Inputs of a process [P, D], and the work that its rates multiply [P, K]."""
    if not from_source:
        return ops.features, ops.work
    if ops.source is None:
        raise ValueError("the latency of the known device is needed")
    return np.column_stack([ops.features, np.log2(ops.source)]), ops.source[:, None]


@dataclass(frozen=True)
class _Problem:
    """Observations in the form that a process is fitted to.

    Attributes:
        inputs: by kind: [P, D].
        work: by kind: [P, K].
        counts: [N, all P].
        log_seconds: [N].
        timed: variance of each timing: [N].
        first: log rates of the first estimate, by kind.
    """

    inputs: Sequence[Array]
    work: Sequence[Array]
    counts: Array
    log_seconds: Array
    timed: Array
    first: Sequence[Array]

    @cached_property
    def start(self) -> Array:
        """Initial hyperparameters: those of each kind's kernel, and the white variance."""
        thetas = [kernel(inputs.shape[1]).theta for inputs in self.inputs]
        return np.concatenate([*thetas, [np.log(INITIAL_WHITE**2)]])

    def thetas(self, theta: Array) -> list[Array]:
        """Hyperparameters of each kind's kernel."""
        ends = np.cumsum([inputs.shape[1] + 1 for inputs in self.inputs])
        return np.split(theta[:-1], ends[:-1])

    def blocks(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Values of all ops [all P], by kind."""
        return np.split(values, np.cumsum([len(inputs) for inputs in self.inputs])[:-1])


@dataclass(frozen=True)
class _Linear:
    """A linearisation: ``residuals = shares @ (deviation of the log latencies) + noise``.

    Attributes:
        shares: share of each op in each run: [N, all P].
        residuals: [N].
        rate_shares: share of each term in each op, by kind: [P, K].
    """

    shares: Array
    residuals: Array
    rate_shares: Sequence[Array]

    @property
    def rate_covariance(self) -> Array:
        """Covariance of the ops' log latencies from their rates: [all P, all P]."""
        return np.asarray(block_diag(*[RATE_SPREAD**2 * a @ a.T for a in self.rate_shares]))


@dataclass
class _State:
    """The current estimate: log rates by kind, and the process at the observed ops [all P]."""

    rates: list[Array]
    process: Array

    def linearised(self, problem: _Problem) -> _Linear:
        shares, base, moved = [], [], []
        for work, rates, first in zip(problem.work, self.rates, problem.first, strict=True):
            parts = work * np.exp(rates)
            total = parts.sum(axis=1)
            shares.append(parts / total[:, None])
            base.append(np.log(total))
            moved.append(shares[-1] @ (rates - first))
        parts = problem.counts * np.exp(np.concatenate(base) + self.process)
        totals = parts.sum(axis=1)
        of_ops = parts / totals[:, None]
        deviation = np.concatenate(moved) + self.process
        return _Linear(of_ops, problem.log_seconds - np.log(totals) + of_ops @ deviation, shares)


def _fit(seen: Observations, *, from_source: bool) -> Process:
    """Fit the rates, the kernels, the noise and the outlier weights of the observations alternately.

    The fit is done without outlier weights and, if there are enough observations, with Student-t weights that
    start from the deviations from a stiff trend. The fit with the better leave-one-out likelihood is kept.
    """
    pairs = [_inputs_and_work(ops, from_source) for ops in seen.ops.values()]
    problem = _Problem(
        inputs=[inputs for inputs, _ in pairs],
        work=[work for _, work in pairs],
        counts=seen.counts,
        log_seconds=np.log(seen.seconds),
        timed=np.maximum(seen.noise, MIN_NOISE) ** 2,
        first=_first_rates([work for _, work in pairs], seen.counts, seen.seconds),
    )
    none = np.zeros(len(seen.seconds))
    begun = _State([first.copy() for first in problem.first], np.zeros(seen.counts.shape[1]))
    starts: list[tuple[Array, int]] = [(none, 1)]
    linear = begun.linearised(problem)
    if sum(2 * inputs.shape[1] + 1 for inputs in problem.inputs) * ROWS_PER_TREND <= len(none):
        off = linear.residuals - _trend(linear.shares, problem.inputs, linear.residuals)
        starts.append((_excess(off, problem.timed), KERNEL_ROUNDS))
    found = [_alternated(problem, excess, rounds) for excess, rounds in starts]
    _, state, theta, variance = max(found, key=lambda item: item[0])
    return _conditioned(seen, problem, state, theta, variance, from_source)


def _first_rates(work: Sequence[Array], counts: Array, seconds: Array) -> list[Array]:
    """Logarithms of the first estimate of the rates, by kind; no term of a kind is left without a share."""
    ops = np.cumsum([len(rows) for rows in work])[:-1]
    terms = np.cumsum([rows.shape[1] for rows in work])[:-1]
    parts = zip(np.split(counts, ops, axis=1), work, strict=True)
    sums = np.hstack([part @ rows for part, rows in parts])
    used = sums.max(axis=0) > 0
    rates = np.zeros(sums.shape[1])
    rates[used] = fit_rates(sums[:, used], seconds)
    unseen = MIN_RATE_SHARE * float(np.median(seconds))  # of an op without which the sums explain the runs
    found = []
    for rows, some in zip(work, np.split(rates, terms), strict=True):
        mean = rows.mean(axis=0)
        least = MIN_RATE_SHARE * max(float(mean @ some), unseen)
        floor = np.where(mean > 0, least / np.maximum(mean, 1e-30), 1e-300)
        found.append(np.log(np.maximum(some, floor)))
    return found


def _alternated(problem: _Problem, excess: Array, rounds: int) -> tuple[float, _State, Array, Array]:
    """Fit kernels and linearisation, with outlier weights if there are several rounds.

    Returns:
        The log likelihood of the left-out residuals under a mixture of usual ones and outliers, the estimate,
        the hyperparameters and the variance of each observation.
    """
    state = _State([first.copy() for first in problem.first], np.zeros(problem.counts.shape[1]))
    theta = problem.start
    rows = np.random.default_rng(0).permutation(len(problem.timed))[:MAX_KERNEL_ROWS]
    off = expected = np.zeros(0)
    for _ in range(rounds):
        for turn in range(LINEARISATIONS):
            linear = state.linearised(problem)
            if turn % 2:  # not at the first estimate of the rates
                theta = _fitted_theta(problem, linear, problem.timed + excess, rows, theta)
            _step(problem, state, linear, theta, problem.timed + np.exp(theta[-1]) + excess)
        linear = state.linearised(problem)
        covariance = _op_covariance(problem, theta) + linear.rate_covariance
        through = linear.shares @ covariance @ linear.shares.T
        white = np.exp(theta[-1])
        for _ in range(REWEIGHTINGS if rounds > 1 else 1):
            inverse = np.linalg.inv(through + np.diag(problem.timed + white + excess))
            precision = np.diag(inverse)
            off = inverse @ linear.residuals / precision
            expected = np.maximum(1 / precision - excess, problem.timed)
            if rounds > 1:
                excess = _excess(off, expected)
    usual, outlying = (norm.pdf(off, scale=np.sqrt(expected + w**2)) for w in (0.0, OUTLIER_SPREAD))
    # Outliers are only ever slow.
    mixture = (1 - OUTLIER_SHARE) * usual + OUTLIER_SHARE * 2 * outlying * (off > 0)
    return float(np.log(mixture).sum()), state, theta, problem.timed + np.exp(theta[-1]) + excess


def _op_covariance(problem: _Problem, theta: Array) -> Array:
    """Covariance of the processes at the observed ops: [all P, all P]."""
    pairs = zip(problem.inputs, problem.thetas(theta), strict=True)
    return np.asarray(block_diag(*[kernel(x.shape[1]).clone_with_theta(some)(x) for x, some in pairs]))


def _step(problem: _Problem, state: _State, linear: _Linear, theta: Array, variance: Array) -> None:
    """Move the estimate to the posterior mean of a linearisation (Gauss-Newton)."""
    process = _op_covariance(problem, theta)
    through = linear.shares @ (process + linear.rate_covariance) @ linear.shares.T
    solved = cho_solve(cho_factor(through + np.diag(variance), lower=True), linear.residuals)
    by_op = linear.shares.T @ solved
    state.process = process @ by_op
    for i, (first, shares, some) in enumerate(
        zip(problem.first, linear.rate_shares, problem.blocks(by_op), strict=True)
    ):
        wanted = first + RATE_SPREAD**2 * shares.T @ some
        state.rates[i] = state.rates[i] + np.clip(wanted - state.rates[i], -MAX_STEP, MAX_STEP)


def _conditioned(
    seen: Observations, problem: _Problem, state: _State, theta: Array, variance: Array, from_source: bool
) -> Process:
    """The process at the estimate, with what is needed for its covariance."""
    linear = state.linearised(problem)
    covariance = _op_covariance(problem, theta) + linear.rate_covariance
    inverse = np.asarray(
        np.linalg.inv(linear.shares @ covariance @ linear.shares.T + np.diag(variance)), np.float64
    )
    solved = inverse @ linear.residuals
    weights = problem.blocks(linear.shares.T @ solved)
    kinds = {
        kind: KindModel(np.exp(rates), some, inputs, weight)
        for kind, rates, some, inputs, weight in zip(
            seen.ops, state.rates, problem.thetas(theta), problem.inputs, weights, strict=True
        )
    }
    residuals, deviations = _left_out(inverse, solved, seen.groups)
    fit = Fit(
        work=dict(zip(seen.ops, problem.work, strict=True)),
        information=linear.shares.T @ inverse @ linear.shares,
        residuals=residuals,
        deviations=deviations,
    )
    return Process(kinds, from_source, float(np.exp(theta[-1])), fit)


def _left_out(inverse: Array, solved: Array, groups: Sequence[str] | None) -> tuple[Array, Array]:
    """Residual of each observation from the other groups [N], and its expected standard deviation [N].

    Args:
        inverse: inverse covariance of the observations: [N, N].
        solved: the same times the residuals: [N].
        groups: label of each observation.
    """
    labels = np.arange(len(solved)) if groups is None else np.unique(groups, return_inverse=True)[1]
    residuals, deviations = np.empty(len(solved)), np.empty(len(solved))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        covariance = np.linalg.inv(inverse[np.ix_(rows, rows)])
        residuals[rows] = covariance @ solved[rows]
        deviations[rows] = np.sqrt(np.diag(covariance))
    return residuals, deviations


def _fitted_theta(
    problem: _Problem, linear: _Linear, variance: Array, rows: NDArray[np.int64], theta: Array
) -> Array:
    """Hyperparameters with the greatest evidence times a prior around their initial values.

    The prior is against overfitting few rows.
    """
    shares, residuals, noise = linear.shares[rows], linear.residuals[rows], variance[rows]
    used = np.asarray(shares.any(axis=0))
    kept = [inputs[mask] for inputs, mask in zip(problem.inputs, problem.blocks(used), strict=True)]
    shares, rates = shares[:, used], linear.rate_covariance[np.ix_(used, used)]
    ends = np.cumsum([0, *(len(inputs) for inputs in kept)])
    start = problem.start

    def loss(theta: Array) -> tuple[float, Array]:
        blocks, gradients = [], []
        for inputs, some in zip(kept, problem.thetas(theta), strict=True):
            of_kind = kernel(inputs.shape[1]).clone_with_theta(some)
            if not len(inputs):
                blocks.append(np.zeros((0, 0)))
                gradients.append(np.zeros((0, 0, len(some))))
                continue
            block, gradient = of_kind(inputs, eval_gradient=True)
            blocks.append(block)
            gradients.append(gradient)
        total = shares @ (block_diag(*blocks) + rates) @ shares.T + np.diag(noise + np.exp(theta[-1]))
        factor = cho_factor(total, lower=True)
        solved = cho_solve(factor, residuals)
        slope = cho_solve(factor, np.eye(len(residuals))) - np.outer(solved, solved)
        by_op = shares.T @ slope @ shares
        parts = [
            0.5 * np.einsum("ij,ijk->k", by_op[a:b, a:b], gradient)
            for a, b, gradient in zip(ends[:-1], ends[1:], gradients, strict=True)
        ]
        away = (theta - start) / PRIOR_SPREAD
        value = 0.5 * float(residuals @ solved) + float(np.log(np.diag(factor[0])).sum())
        whole = np.concatenate([*parts, [0.5 * np.trace(slope) * np.exp(theta[-1])]])
        return value + 0.5 * float(away @ away), whole + away / PRIOR_SPREAD

    boxes = [box for inputs in problem.inputs for box in (SPREAD_BOUNDS, *[LENGTH_BOUNDS] * inputs.shape[1])]
    bounds = [(math.log(low), math.log(high)) for low, high in (*boxes, WHITE_BOUNDS)]
    found = minimize(
        loss,
        theta,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 60},
    )
    return np.asarray(found.x)


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


def _trend(shares: Array, inputs: Sequence[Array], residuals: Array) -> Array:
    """A parabola in each input of each kind, by least absolute deviations: too stiff to follow an outlier."""
    middles = [x - x.mean(axis=0) for x in inputs]
    blocks = [np.column_stack([np.ones(len(x)), x, x**2]) for x in middles]
    design = shares @ block_diag(*blocks)
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
