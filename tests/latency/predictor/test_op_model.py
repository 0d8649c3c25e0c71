"""The op model on known laws, and its algebra against brute force."""

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from latency.predictor.design import expected_variance_reduction
from latency.predictor.op_model import Observations, OpModel, Ops, fit_op_model, fit_rates, kernel

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
    return Observations.of_ops(Ops(features, work), seconds, np.full(count, max(noise, 1e-3)))


def mape(model: OpModel, wanted: Observations) -> float:
    mean, _ = model.predict(wanted.ops)
    return float(np.abs(np.exp(mean) / wanted.seconds - 1).mean())


def test_smooth_law_is_learned_from_sixty_shapes() -> None:
    seen, wanted = law(60, 0, noise=0.003), law(400, 1)
    rates = fit_rates(seen.ops["op"].work, seen.seconds)
    assert (rates >= 0).all()
    roofline = float(np.abs(wanted.ops["op"].work @ rates / wanted.seconds - 1).mean())
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
    mean, covariance = model.predict(wanted.ops)
    off = np.abs(np.log(wanted.seconds) - mean) / np.sqrt(np.diag(covariance) + model.white)
    assert 0.7 < float((off < 1.645).mean()) <= 1.0


def summed(seed: int, *, noise: float = 0.0, runs: int = 80) -> tuple[Observations, Array, dict[str, Ops]]:
    """Runs of random sums of the ops of two kinds; with the seconds of each op, and the ops."""
    rng = np.random.default_rng(seed)
    first, second = law(9, 20), law(7, 21)
    ops = {"a": first.ops["op"], "b": second.ops["op"]}
    seconds = np.concatenate([first.seconds, 3 * second.seconds])
    counts = rng.integers(0, 3, (runs, 16)).astype(float)
    counts[:, 0] = 1
    total = counts @ seconds * np.exp(noise * rng.standard_normal(runs))
    return Observations(ops, counts, total, np.full(runs, max(noise, 1e-3))), seconds, ops


def test_latencies_of_ops_are_inferred_from_sums_within_their_intervals() -> None:
    seen, seconds, ops = summed(0, noise=0.005)
    model = fit_op_model(seen)
    mean, covariance = model.predict(ops)
    totals = seen.counts @ np.exp(mean)
    assert np.abs(totals / (seen.counts @ seconds) - 1).mean() < 0.005
    weight = seen.counts.mean(axis=0) * seconds  # an op that hardly matters is hardly known
    known = weight > 0.02 * weight.sum()
    off = (np.log(seconds) - mean) / np.sqrt(np.diag(covariance))
    assert np.abs(off[known]).max() < 3.5
    assert np.abs(mean - np.log(seconds))[known].max() < 0.1


def test_left_out_residuals_equal_refits_of_the_linearised_model() -> None:
    """Against Gaussian conditioning written out, with runs of one group left out together."""
    seen, _, ops = summed(1, noise=0.01, runs=28)  # too few to look for outliers
    groups = [str(i // 2) for i in range(28)]
    model = fit_op_model(replace(seen, groups=groups))
    residuals, deviations = model.left_out()
    process = model.processes[0]
    assert process.fit is not None
    mean, seconds = process.log_seconds(ops), seen.seconds
    shares = seen.counts * np.exp(mean)
    total = shares.sum(axis=1)
    shares /= total[:, None]
    prior = np.zeros((16, 16))
    for place, (kind, some) in zip((slice(0, 9), slice(9, 16)), ops.items(), strict=True):
        prior[place, place] = process.kinds[kind].prior_covariance(
            some.features, some.work, some.features, some.work
        )
    noise = np.maximum(seen.noise, 0.003) ** 2 + process.white
    covariance = shares @ prior @ shares.T + np.diag(noise)
    # The residuals around the posterior mean are those of the observations less what the fit explains.
    explained = np.log(seconds / total)
    target = covariance @ np.linalg.solve(np.diag(noise), explained)
    for group in (0, 7, 13):
        rows = [2 * group, 2 * group + 1]
        rest = [i for i in range(28) if i not in rows]
        weights = np.linalg.solve(covariance[np.ix_(rest, rest)], covariance[np.ix_(rest, rows)])
        expected = target[rows] - weights.T @ target[rest]
        variance = covariance[np.ix_(rows, rows)] - covariance[np.ix_(rows, rest)] @ weights
        np.testing.assert_allclose(residuals[rows], expected, atol=2e-3)
        np.testing.assert_allclose(deviations[rows], np.sqrt(np.diag(variance)), rtol=0.02)


def test_model_round_trips_through_json_without_its_covariance() -> None:
    seen, _, ops = summed(2)
    model = fit_op_model(seen)
    again = OpModel.from_json(json.loads(json.dumps(model.to_json())))
    np.testing.assert_array_equal(again.log_seconds(ops), model.log_seconds(ops))
    with pytest.raises(ValueError, match="has no covariance"):
        again.predict(ops)


def test_known_device_helps_if_alike_and_is_ignored_if_not() -> None:
    seen, wanted = law(12, 7, noise=0.003), law(300, 8)

    def with_source(rows: Observations, source: Array) -> Observations:
        return replace(rows, ops={"op": replace(rows.ops["op"], source=source)})

    def known(rows: Observations) -> Observations:
        factor = 0.5 + 0.05 * (rows.ops["op"].features[:, 0] - 8)  # another device, a little otherwise
        return with_source(rows, rows.seconds * factor)

    alone, helped = fit_op_model(seen), fit_op_model(known(seen))
    assert mape(helped, known(wanted)) < mape(alone, wanted) / 2
    assert helped.weights[1] > 0.9

    rng = np.random.default_rng(9)
    seen, wanted = law(40, 7, noise=0.003), law(300, 8)
    noise = [with_source(rows, rng.uniform(1e-6, 1e-2, len(rows.seconds))) for rows in (seen, wanted)]
    model = fit_op_model(noise[0])
    assert model.weights[0] > 0.9
    assert mape(model, noise[1]) < 1.5 * mape(fit_op_model(seen), wanted)


def test_expected_variance_reduction_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    covariances = [np.asarray(kernel(2)(rng.uniform(0, 8, (12, 2)))) for _ in range(2)]
    noises = [rng.uniform(1e-5, 1e-3, 12) for _ in range(2)]
    costs = rng.uniform(1, 3, 12)
    free = np.arange(12) != 3

    def left(observed: list[int]) -> float:
        """The mean variances once some points were observed, by conditioning on all of them."""
        total = 0.0
        for covariance, noise in zip(covariances, noises, strict=True):
            across = covariance[:, observed]
            inverse = np.linalg.inv(covariance[np.ix_(observed, observed)] + np.diag(noise[observed]))
            total += float(np.diag(covariance - across @ inverse @ across.T).mean())
        return total

    expected: list[int] = []
    for _ in range(4):
        options = [i for i in range(12) if free[i] and i not in expected]
        expected.append(max(options, key=lambda i: (left(expected) - left([*expected, i])) / costs[i]))
    assert expected_variance_reduction(covariances, noises, costs, 4, free) == expected
