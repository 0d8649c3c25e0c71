"""The op model on known laws, and its algebra against scikit-learn and brute force."""

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.gaussian_process import GaussianProcessRegressor

from latency.predictor.design import expected_variance_reduction
from latency.predictor.op_model import Observations, OpModel, Process, fit_op_model, fit_rates, kernel

Array = NDArray[np.float64]


def law(count: int, seed: int, *, noise: float = 0.0, slow: float = 0.0) -> Observations:
    """A call, FLOPs at an efficiency that falls smoothly with width, bytes; perhaps some rows 30% slow."""
    rng = np.random.default_rng(seed)
    width, tokens = rng.integers(4, 64, count) * 16.0, 2.0 ** rng.integers(0, 11, count)
    work = np.column_stack([np.ones(count), tokens * width**2, width**2])
    efficiency = 0.6 + 0.3 * np.tanh(np.log2(width / 200))
    seconds = 2e-6 + work[:, 1] / (4e10 * efficiency) + work[:, 2] * 4 / 1e10
    seconds = seconds * np.exp(noise * rng.standard_normal(count))
    seconds[rng.random(count) < slow] *= 1.3
    features = np.log2(np.column_stack([width, tokens]))
    return Observations(features, work, seconds, np.full(count, max(noise, 1e-3)))


def mape(model: OpModel, wanted: Observations) -> float:
    mean, _ = model.predict(wanted.features, wanted.work, wanted.source)
    return float(np.abs(np.exp(mean) / wanted.seconds - 1).mean())


def test_smooth_law_is_learned_from_sixty_shapes() -> None:
    seen, wanted = law(60, 0, noise=0.003), law(400, 1)
    rates = fit_rates(seen.work, seen.seconds)
    assert (rates >= 0).all()
    roofline = float(np.abs(wanted.work @ rates / wanted.seconds - 1).mean())
    error = mape(fit_op_model(seen), wanted)
    assert error < 0.02
    assert error < roofline / 3


def test_slow_rows_do_not_change_the_fit() -> None:
    wanted = law(400, 1)
    clean = mape(fit_op_model(law(80, 0, noise=0.003)), wanted)
    spoilt = mape(fit_op_model(law(80, 0, noise=0.003, slow=0.2)), wanted)
    assert spoilt < 0.03
    assert spoilt < clean + 0.02


def test_intervals_cover_unseen_shapes() -> None:
    model, wanted = fit_op_model(law(25, 2, noise=0.01)), law(400, 3)
    mean, covariance = model.predict(wanted.features, wanted.work)
    off = np.abs(np.log(wanted.seconds) - mean) / np.sqrt(np.diag(covariance) + model.white)
    assert 0.7 < float((off < 1.645).mean()) <= 1.0


@pytest.fixture
def process() -> Process:
    return fit_op_model(law(20, 4, noise=0.01)).processes[0]


def test_posterior_equals_scikit_learn(process: Process) -> None:
    theirs = GaussianProcessRegressor(process.kernel, alpha=process.noise, optimizer=None)
    theirs.fit(process.inputs, process.residuals)
    wanted = law(30, 5).features
    mean, covariance = theirs.predict(wanted, return_cov=True)
    ours = process.posterior(wanted)
    np.testing.assert_allclose(ours[0], mean, atol=1e-9)
    np.testing.assert_allclose(ours[1], covariance, atol=1e-9)


def test_loo_densities_equal_refits(process: Process) -> None:
    for i, density in enumerate(process.loo_log_density()):
        keep = np.arange(len(process.residuals)) != i
        rest = replace(
            process,
            inputs=process.inputs[keep],
            residuals=process.residuals[keep],
            noise=process.noise[keep],
        )
        mean, covariance = rest.posterior(process.inputs[[i]])
        variance = covariance[0, 0] + process.noise[i]
        expected = -0.5 * np.log(variance) - 0.5 * (process.residuals[i] - mean[0]) ** 2 / variance
        assert density == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_process_round_trips_through_json(process: Process) -> None:
    again = Process.from_json(json.loads(json.dumps(process.to_json())))
    wanted = law(10, 6).features
    for ours, theirs in zip(process.posterior(wanted), again.posterior(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_known_device_helps_if_alike_and_is_ignored_if_not() -> None:
    seen, wanted = law(12, 7, noise=0.003), law(300, 8)

    def known(rows: Observations) -> Observations:
        factor = 0.5 + 0.05 * (rows.features[:, 0] - 8)  # another device, a little otherwise
        return replace(rows, source=rows.seconds * factor)

    alone, helped = fit_op_model(seen), fit_op_model(known(seen))
    assert mape(helped, known(wanted)) < mape(alone, wanted) / 2
    assert helped.weights[1] > 0.9

    rng = np.random.default_rng(9)
    seen, wanted = law(40, 7, noise=0.003), law(300, 8)
    noise = (
        replace(seen, source=rng.uniform(1e-6, 1e-2, 40)),
        replace(wanted, source=rng.uniform(1e-6, 1e-2, 300)),
    )
    model = fit_op_model(noise[0])
    assert model.weights[0] > 0.9
    assert mape(model, noise[1]) < 1.5 * mape(fit_op_model(seen), wanted)


def test_expected_variance_reduction_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 8, (12, 2))
    covariance = np.asarray(kernel(2)(points))
    wanted, noise = rng.random((5, 12)), rng.uniform(1e-5, 1e-3, 12)
    costs = rng.uniform(1, 3, 12)
    free = np.arange(12) != 3

    def left(observed: list[int]) -> float:
        """The mean variance of the sums once some points were observed, by conditioning on all of them."""
        if not observed:
            return float(np.einsum("mp,pq,mq->m", wanted, covariance, wanted).mean())
        across = covariance[:, observed]
        inverse = np.linalg.inv(covariance[np.ix_(observed, observed)] + np.diag(noise[observed]))
        after = covariance - across @ inverse @ across.T
        return float(np.einsum("mp,pq,mq->m", wanted, after, wanted).mean())

    expected: list[int] = []
    for _ in range(4):
        options = [i for i in range(12) if free[i] and i not in expected]
        before = (
            float(np.einsum("mp,pq,mq->m", wanted, covariance, wanted).mean())
            if not expected
            else left(expected)
        )
        expected.append(max(options, key=lambda i: (before - left([*expected, i])) / costs[i]))
    assert expected_variance_reduction(covariance, wanted, noise, costs, 4, free) == expected
