"""The predictor on latencies that follow a known law."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latency.predictor import composition
from latency.predictor.accuracy import accuracy
from latency.predictor.composition import (
    OpTimes,
    Saving,
    design_matrix,
    fit_composition,
    held_bytes,
    hinge_bytes,
    leave_one_out,
)
from latency.predictor.fit import MeasuredModels, fit_predictor
from latency.predictor.initial_design import d_optimal
from latency.predictor.op_latencies import OpLatencies
from latency.predictor.predictor import Predictor, load_predictor
from space import InputError, Space, Workload, genome, variation
from space.onnx.graph import VERSION
from space.ops import count_ops, op_kinds, space_ops
from tests.contracts import tiny_space

W = Workload(phase="prefill", length=64)
D = Workload(phase="decode", length=64)
Law = Callable[[Any], NDArray[np.float64]]
EXACT = np.zeros(20)  # timings without error, as many as are fitted
UNMEASURED = OpLatencies(tiny_space().config, {}, {})


def space() -> Space:
    return tiny_space(
        mixer=["attention", "linear", "retnet", "none"], depth=[1, 2, 3], heads=[1, 2], ffn=[0, 16, 32]
    )


def op_seconds(seed: int = 0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {op.key: float(s) for op, s in zip(space_ops(space()), rng.uniform(1e-4, 3e-3, 100), strict=False)}


def truth(genomes: Any, ops: dict[str, float], noise: float, seed: int) -> NDArray[np.float64]:
    """Latencies by a loop over ops: kind factors, a constant, a cost per layer, relative noise."""
    factors = {kind: 0.9 + 0.05 * i for i, kind in enumerate(op_kinds(space()))}
    rng = np.random.default_rng(seed)
    seconds = []
    for architecture in genome.decode(space(), genomes):
        total = 1e-4 + 5e-5 * architecture.depth
        total += sum(n * factors[op.kind] * ops[op.key] for op, n in count_ops(architecture).items())
        seconds.append(total * (1 + noise * rng.standard_normal()))
    return np.array(seconds)


def fitted(noise: float = 0.01, seed: int = 0) -> tuple[Predictor, Any, dict[str, float]]:
    ops = op_seconds()
    rng = np.random.default_rng(seed)
    train, held = variation.sample(space(), rng, 20), variation.sample(space(), rng, 200)
    predictor = fit_predictor(
        space(),
        UNMEASURED,
        {W: OpTimes(W, ops), D: OpTimes(D, ops)},
        MeasuredModels(
            genomes=train,
            seconds={W: truth(train, ops, noise, 1), D: truth(train, ops, 2 * noise, 2)},
            spread={W: EXACT, D: EXACT},
            drawn=20,
        ),
        MeasuredModels(
            genomes=held, seconds={W: truth(held, ops, noise, 3), D: truth(held, ops, 2 * noise, 4)}
        ),
        {W: 1.0, D: 1.0},
    )
    return predictor, held, ops


def fitted_to(law: Law, times: dict[Workload, OpTimes], train: Any, held: Any) -> Predictor:
    """A predictor of one workload, fitted to a law without noise and tested on it."""
    models = MeasuredModels(genomes=train, seconds={W: law(train)}, spread={W: EXACT}, drawn=20)
    tested = MeasuredModels(genomes=held, seconds={W: law(held)})
    return fit_predictor(space(), UNMEASURED, times, models, tested, {W: 1.0})


def test_known_law_is_recovered() -> None:
    predictor, held, ops = fitted(noise=0.0)
    predicted = predictor.cost(W)(held)
    assert np.abs(predicted / truth(held, ops, 0.0, 0) - 1).max() < 0.02
    noisy, held, ops = fitted(noise=0.01)
    errors = noisy.models[W].errors
    assert errors.test.held_out.mape_percent < 1.5
    assert errors.test.held_out.mape_percent < errors.test.plain_sum.mape_percent
    assert errors.test.held_out.mape_percent < errors.test.flops_and_params.mape_percent / 2


def test_coefficients_are_not_negative_and_near_the_prior() -> None:
    rng = np.random.default_rng(0)
    ops = op_seconds()
    design = design_matrix(space(), OpTimes(W, ops), variation.sample(space(), rng, 8))
    for _ in range(20):
        seconds = design[:, 2:-5].sum(axis=1) * rng.uniform(0.3, 3.0, len(design))
        assert (fit_composition(design, seconds, EXACT[:8]).coefficients >= 0).all()
    exact = design[:, 2:-5].sum(axis=1)
    coefficients = fit_composition(design, exact, EXACT[:8]).coefficients
    assert np.abs(coefficients[2:-5] - 1).max() < 0.05


def test_noisy_timing_counts_less() -> None:
    ops, rng = op_seconds(), np.random.default_rng(0)
    design = design_matrix(space(), OpTimes(W, ops), variation.sample(space(), rng, 20))
    exact = design[:, 2:-5].sum(axis=1)
    seconds, timing = exact.copy(), EXACT.copy()
    seconds[:5] *= 1.3
    timing[:5] = 0.3
    found = [np.abs(fit_composition(design, seconds, t)(design) / exact - 1).mean() for t in (EXACT, timing)]
    assert found[1] < found[0] / 3


def test_leave_one_out_equals_a_fit_to_the_others() -> None:
    ops = op_seconds()
    genomes = variation.sample(space(), np.random.default_rng(0), 20)
    design, seconds = design_matrix(space(), OpTimes(W, ops), genomes), truth(genomes, ops, 0.01, 0)
    seconds[3] *= 2
    residuals = leave_one_out(design, seconds, EXACT)
    assert residuals[3] > 0.8  # a fit that saw it would have bent towards it
    keep = np.arange(20) != 7
    alone = fit_composition(design[keep], seconds[keep], EXACT[keep])(design[7:8])[0]
    assert residuals[7] == pytest.approx(seconds[7] / alone - 1)


def test_upper_is_the_mean_times_one_factor_and_has_its_coverage() -> None:
    covered = []
    for seed in range(6):
        predictor, held, ops = fitted(noise=0.02, seed=seed)
        for workload, noise in ((W, 0.02), (D, 0.04)):
            mean, upper = predictor.cost(workload)(held), predictor.cost(workload, 0.9)(held)
            assert np.ptp(upper / mean) < 1e-12
            assert upper[0] / mean[0] == pytest.approx(predictor.factor(workload, 0.9))
            covered.append((truth(held, ops, noise, 100 + seed) <= upper).mean())
    assert 0.85 < np.mean(covered) < 0.99
    factors = [predictor.factor(W, c) for c in (0.6, 0.75, 0.9, 0.975)]
    assert factors == sorted(factors)
    assert predictor.factor(D, 0.9) > predictor.factor(W, 0.9)
    sharp = replace(predictor.models[W], scale=1e-9)  # runs of different hours still lie apart
    certain = replace(predictor, models={W: sharp})
    assert certain.factor(W, 0.9) - 1 == pytest.approx(0.02 * np.sort(predictor.residuals)[-4], rel=0.5)


def test_predictor_round_trips_and_refuses_other_spaces(tmp_path: Path) -> None:
    predictor, held, _ = fitted()
    path = tmp_path / "p.json"
    predictor.save(path, {})
    again = load_predictor(path, space(), "formfit profile")
    assert np.array_equal(again.cost(D, 0.975)(held), predictor.cost(D, 0.975)(held))
    assert again.identity() == predictor.identity()
    other = tiny_space()
    with pytest.raises(InputError, match=other.hash[:12]):
        load_predictor(path, other, "formfit profile")
    with pytest.raises(InputError, match=r"decode@32.*measured: prefill@64, decode@64.*formfit profile"):
        predictor.cost(Workload.parse("decode@32"))
    text = path.read_text()
    for cut in (0, 10, len(text) // 2):
        path.write_text(text[:cut])
        with pytest.raises(InputError, match="formfit profile"):
            load_predictor(path, space(), "formfit profile")


def test_accuracy_equals_hand_computation() -> None:
    found = accuracy(np.array([1.0, 2.1, 3.0]), np.array([1.0, 2.0, 4.0]))
    assert found.mape_percent == pytest.approx(100 * (0 + 0.05 + 0.25) / 3)
    assert found.within_10_percent == pytest.approx(2 / 3)
    assert found.span == 4
    assert found.spearman == pytest.approx(1.0)


def test_d_optimal_has_more_information_than_random_choices() -> None:
    rng = np.random.default_rng(0)
    pool = np.exp(rng.standard_normal((200, 5)))
    chosen = d_optimal([pool], 10)
    assert len(set(chosen)) == 10

    def information(rows: Any) -> float:
        return float(np.linalg.slogdet(np.eye(5) / 100 + pool[rows].T @ pool[rows])[1])

    best = information(chosen)
    assert all(information(rng.choice(200, 10, replace=False)) < best for _ in range(200))


def test_attention_constant_counts_once_per_model() -> None:
    ops = op_seconds()
    rng = np.random.default_rng(0)
    train, held = variation.sample(space(), rng, 20), variation.sample(space(), rng, 100)

    def law(genomes: Any) -> NDArray[np.float64]:
        full = ["attention" in a.pattern for a in genome.decode(space(), genomes)]
        return truth(genomes, ops, 0.0, 0) + 2e-3 * np.array(full)

    latencies = {W: OpTimes(W, ops, attention_constant=1.5e-3)}
    predictor = fitted_to(law, latencies, train, held)
    assert predictor.models[W].attention_constant == pytest.approx(2e-3, rel=0.25)
    assert predictor.models[W].errors.test.held_out.mape_percent < 1.5


def test_hinges_are_fitted_and_the_cost_is_their_maximum() -> None:
    """A law with a hinge: beyond some bytes, each more costs; the cost is the greatest of sums."""
    ops, rng = op_seconds(), np.random.default_rng(0)
    train, held = variation.sample(space(), rng, 20), variation.sample(space(), rng, 200)
    typical, starts = hinge_bytes(space(), W)

    def law(genomes: Any) -> NDArray[np.float64]:
        over = np.maximum(0.0, held_bytes(space(), W, genomes) - starts[1]) / typical
        return truth(genomes, ops, 0.0, 0) + 6e-3 * over

    times = {W: OpTimes(W, ops)}
    predictor = fitted_to(law, times, train, held)
    assert predictor.models[W].errors.test.held_out.mape_percent < 2.0
    cost = predictor.cost(W)
    assert 1 <= len(cost.max_with) <= 4
    parts = np.array([part(held) for part in (replace(cost, max_with=()), *cost.max_with)])
    assert np.array_equal(cost(held), parts.max(axis=0))
    model = predictor.models[W]
    over = np.maximum(0.0, held_bytes(space(), W, held)[:, None] - np.array(starts)) / typical
    assert cost(held) == pytest.approx(parts[0] + over @ model.hinges)


def test_saving_is_fitted_and_caps_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A law of a cache: up to some bytes nothing is fetched, from twice as many on everything is."""
    monkeypatch.setattr(composition, "CACHE_SIZES", tuple(2**10 * 2 ** (i / 2) for i in range(20)))
    ops, rng = op_seconds(), np.random.default_rng(0)
    train, held = variation.sample(space(), rng, 20), variation.sample(space(), rng, 200)
    sizes = held_bytes(space(), W, held)
    full = float(np.quantile(sizes, 0.4))
    rate = 0.8 * float((truth(held, ops, 0.0, 0) / sizes).min())  # nothing takes less than no time

    def law(genomes: Any) -> NDArray[np.float64]:
        bytes_, plain = held_bytes(space(), W, genomes), truth(genomes, ops, 0.0, 0)
        saved = np.where(bytes_ <= full, bytes_, np.clip(2 * full - bytes_, 0, None))
        return plain - rate * saved

    def of(law: Law) -> Predictor:
        return fitted_to(law, {W: OpTimes(W, ops)}, train, held)

    predictor = of(law)
    error = predictor.models[W].errors.test.held_out.mape_percent
    saving = predictor.models[W].saving
    assert error < 3.0
    assert saving.rate == pytest.approx(rate, rel=0.3)
    assert saving.full == pytest.approx(full, rel=0.5)
    cost = predictor.cost(W)
    assert cost.min_with is not None
    ends = np.array([replace(cost, min_with=None)(held), cost.min_with(held)])
    assert np.array_equal(cost(held), ends.min(axis=0))
    assert 0 < (ends[1] < ends[0]).mean() < 1
    plain = ends[0]
    expected = np.maximum(plain - saving.rate * saving.saved(sizes), 0.2 * plain)
    assert cost(held) == pytest.approx(expected)
    assert predictor.models[W].times(2.0).saving.rate == 2 * saving.rate
    without = of(lambda genomes: truth(genomes, ops, 0.01, 0))
    assert without.models[W].saving.rate == 0
    assert without.cost(W).min_with is None


def test_saving_round_trips_through_its_file(tmp_path: Path) -> None:
    predictor, _, _ = fitted()
    saving = Saving(1e6, 3e6, 2e-11)
    changed = replace(predictor, models={W: replace(predictor.models[W], saving=saving)})
    changed.save(tmp_path / "p.json", {"graphs": str(VERSION)})
    assert load_predictor(tmp_path / "p.json", space(), "formfit profile").models[W].saving == saving
