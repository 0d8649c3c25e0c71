"""The predictor on a made device: known op latencies, two caches, noise, drift between groups."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from latency.predictor.accuracy import accuracy
from latency.predictor.bounds import MIN_BETWEEN, Spread, between_groups, conformal, fit_spread
from latency.predictor.design import ModelCounts, model_design
from latency.predictor.fit import HeldOutModels, fit_predictor
from latency.predictor.op_latencies import TimedModel
from latency.predictor.predictor import Predictor, load_predictor
from latency.predictor.terms import beyond, cache_term, held_bytes, terms
from latency.predictor.workload_model import pieces
from latency.profiling import require_accurate
from space import Architecture, InputError, Space, Workload, genome, load_space, variation
from space.cost import op_flops, op_held_bytes
from space.ops import Op, count_ops, space_ops
from tests.contracts import tiny_space

SPACE = load_space(Path(__file__).parents[3] / "configs" / "spaces" / "small.yaml")
PREFILL, DECODE = Workload.parse("prefill@256"), Workload.parse("decode@512")
WORKLOADS = (PREFILL, DECODE)
CACHES = {2**20: 8e-6, 2**22: 12e-6}  # seconds per MiB read from beyond them
RUN, FULL, LOCAL, LINEAR = 2e-6, 4e-6, 3e-6, 1e-6
GROUP, DRIFT = 16, 0.005  # models that share a deviation, and its relative size
Array = NDArray[np.float64]


def op_seconds(op: Op, workload: Workload) -> float:
    """A call, work at an efficiency that depends on the width, and a factor of the kind."""
    kind = 1 + 0.1 * (sum(map(ord, op.kind)) % 7)
    efficiency = 0.7 + 0.3 * np.tanh(np.log2(op.width / 128))
    flops, held = op_flops(op, workload, SPACE.config), op_held_bytes(op, workload, SPACE.config)
    return float(kind * (1e-6 + flops / (5e10 * efficiency) + held / 4e10))


def truth(architecture: Architecture, workload: Workload) -> float:
    """Latency on the made device."""
    total = RUN + sum(n * op_seconds(op, workload) for op, n in count_ops(architecture).items())
    shared = {"full": FULL, "local": LOCAL, "linear": LINEAR}
    used = {SPACE.mixer_class(x.mixer) for x in architecture.layers if x.mixer != "none"}
    total += sum(shared[name] for name in used)
    if workload == DECODE:
        held = np.array([held_bytes(architecture, workload, SPACE.config)], float)
        total += sum(rate * float(beyond(held, size)[0]) / 2**20 for size, rate in CACHES.items())
    return total


def measured(
    architectures: list[Architecture], workload: Workload, rng: np.random.Generator, noise: float
) -> Array:
    """Measurements with noise, and a deviation that the models of a group share."""
    seconds = np.array([truth(a, workload) for a in architectures])
    groups = rng.standard_normal(len(seconds) // GROUP + 1).repeat(GROUP)[: len(seconds)]
    return np.asarray(
        seconds * np.exp(noise * rng.standard_normal(len(seconds)) + DRIFT * groups * (noise > 0))
    )


def made(seed: int = 0, noise: float = 0.01) -> Predictor:
    """A predictor of the made device, from 60 chosen and 30 random models."""
    rng = np.random.default_rng(seed)
    design = model_design(SPACE, WORKLOADS, ModelCounts(60, 30, 40, 0, seed))
    chosen = design.choose(design.expected(), 60)
    fit = [*chosen, *design.random]
    timed = [
        TimedModel(a, w, seconds, max(noise, 1e-3), str(i // GROUP))
        for w in WORKLOADS
        for i, (a, seconds) in enumerate(zip(fit, measured(fit, w, rng, noise), strict=True))
    ]
    held = HeldOutModels(
        architectures=design.held_out,
        seconds={w: measured(list(design.held_out), w, rng, noise) for w in WORKLOADS},
        repeatability=dict.fromkeys(WORKLOADS, 1.0),
    )
    roles = {a.key: "optimal" for a in chosen} | {a.key: "random" for a in design.random}
    return fit_predictor(SPACE, WORKLOADS, timed, roles, held)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return made()


def unseen(count: int = 300) -> tuple[list[Architecture], Array]:
    rows = variation.sample(SPACE, np.random.default_rng(99), count)
    return genome.decode(SPACE, rows), rows


def test_latencies_of_unseen_models_are_within_one_percent(predictor: Predictor) -> None:
    architectures, rows = unseen()
    for workload in WORKLOADS:
        true = np.array([truth(a, workload) for a in architectures])
        off = np.abs(predictor.predict(rows, workload) / true - 1)
        assert off.mean() < 0.01
        assert np.quantile(off, 0.99) < 0.04
        errors = predictor.models[workload].errors
        assert errors is not None
        assert errors.test is not None
        assert errors.test.held_out.mape_percent < errors.test.flops_and_params.mape_percent / 2


def test_latencies_of_ops_are_within_their_intervals(predictor: Predictor) -> None:
    inside, off = [], []
    for workload in WORKLOADS:
        model = predictor.models[workload]
        for op in space_ops(SPACE):
            if op.kind not in ("embedding", "head"):  # always together: only their sum is known
                off.append(float(np.log(model.op_seconds[op.key] / op_seconds(op, workload))))
                inside.append(abs(off[-1]) < 1.96 * model.op_spreads[op.key])
    assert np.mean(inside) > 0.85
    assert np.abs(off).mean() < 0.06


def test_caches_are_found_where_they_are() -> None:
    exact = made(noise=0.0)
    found = exact.models[DECODE].caches
    assert exact.models[PREFILL].caches == {}
    assert found[2**20] == pytest.approx(CACHES[2**20], rel=0.4)
    assert found[2**22] == pytest.approx(CACHES[2**22], rel=0.4)
    others = sum(rate for size, rate in found.items() if size not in CACHES)
    assert others < 0.3 * sum(CACHES.values())


def test_cost_equals_the_sum_of_terms(predictor: Predictor) -> None:
    architectures, rows = unseen(20)
    for workload in WORKLOADS:
        model = predictor.models[workload]
        kinds = {"run": model.run} | {
            f"shared.{name}": seconds
            for name, seconds in zip(("full", "linear", "local"), model.shared, strict=True)
        }
        kinds |= {cache_term(size).kind: rate for size, rate in model.caches.items()}
        by_hand = [
            sum(n * model.op_seconds.get(op.key, kinds.get(op.kind, 0.0)) for op, n in found.items())
            for found in (terms(a, workload, SPACE) for a in architectures)
        ]
        np.testing.assert_allclose(predictor.predict(rows, workload), by_hand, rtol=1e-9)


def test_pieces_of_caches_are_their_bytes() -> None:
    starts, slopes = pieces(CACHES)
    held = np.geomspace(2**18, 2**25, 200)
    expected = sum(rate * beyond(held, size) / 2**20 for size, rate in CACHES.items())
    rises = np.concatenate([[0.0], np.cumsum(np.array(slopes[:-1]) * np.diff(starts))])
    place = np.searchsorted(starts, held, side="right") - 1
    np.testing.assert_allclose(
        rises[place] + np.array(slopes)[place] * (held - np.array(starts)[place]), expected
    )
    assert pieces({}) == ((0.0,), (0,))


def test_upper_bounds_hold_at_their_rate_in_each_third(predictor: Predictor) -> None:
    architectures, rows = unseen(600)
    rng = np.random.default_rng(5)
    inside: list[list[float]] = [[], [], []]
    for workload in WORKLOADS:
        seconds = measured(architectures, workload, rng, 0.01)
        upper, mean = predictor.upper(rows, workload, 0.975), predictor.predict(rows, workload)
        assert (upper > mean).all()
        low, high = predictor.interval(rows, workload, 0.9)
        assert 0.8 < ((low <= seconds) & (seconds <= high)).mean() <= 1.0
        for third, places in zip(inside, np.array_split(np.argsort(mean), 3), strict=True):
            third.extend(seconds[places] <= upper[places])
    assert all(0.95 <= np.mean(third) <= 1.0 for third in inside)


def test_spread_has_a_part_in_seconds_and_one_in_proportion() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.uniform(1e-5, 1e-3, 5000)
    truth = Spread(1e-6, 0.02)
    found = fit_spread(predicted, predicted + truth.at(predicted) * rng.standard_normal(5000))
    assert found.seconds == pytest.approx(truth.seconds, rel=0.15)
    assert found.relative == pytest.approx(truth.relative, rel=0.1)
    assert truth.beside(0.02).relative == pytest.approx(0.02 * 2**0.5)


def test_deviation_between_groups_is_that_of_their_means_beyond_the_noise() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), 10)
    off = 0.04 * rng.standard_normal(200)[groups] + 0.03 * rng.standard_normal(2000)
    assert between_groups(off, list(map(str, groups))) == pytest.approx(0.04, rel=0.15)
    assert between_groups(0.03 * rng.standard_normal(2000), list(map(str, groups))) == MIN_BETWEEN
    assert between_groups(off[:20], ["a"] * 10 + ["b"] * 10) == MIN_BETWEEN  # too few to tell


def test_conformal_bound_is_the_order_statistic() -> None:
    values = list(range(-50, 49))
    assert conformal(values, 0.9) == values[89]
    assert conformal([1.0, 2.0], 0.975) > 2.0  # too few for the confidence
    assert conformal([-1.0, -2.0, -3.0], 0.5) == 0.0


def test_inaccurate_predictor_is_refused(predictor: Predictor) -> None:
    require_accurate(predictor, 0.05, "here")
    errors = predictor.models[DECODE].errors
    assert errors is not None
    assert errors.test is not None
    worse = replace(errors.test.held_out, mape_percent=max(6.0, errors.test.flops_and_params.mape_percent))
    spoilt = replace(errors, test=replace(errors.test, held_out=worse))
    models = {**predictor.models, DECODE: replace(predictor.models[DECODE], errors=spoilt)}
    with pytest.raises(
        InputError, match=r"device here, decode@512: predictions are .* not written"
    ) as caught:
        require_accurate(replace(predictor, models=models), 0.05, "here")
    assert "\n" not in str(caught.value)


def test_predictor_round_trips_and_refuses_other_spaces(tmp_path: Path, predictor: Predictor) -> None:
    _, rows = unseen(20)
    path = tmp_path / "p.json"
    predictor.save(path, {})
    again = load_predictor(path, SPACE, "formfit profile")
    assert np.array_equal(again.cost(DECODE, 0.975)(rows), predictor.cost(DECODE, 0.975)(rows))
    assert again.identity() == predictor.identity()
    other: Space = tiny_space()
    with pytest.raises(InputError, match=other.hash[:12]):
        load_predictor(path, other, "formfit profile")
    with pytest.raises(InputError, match=r"decode@32.*measured: prefill@256, decode@512.*formfit profile"):
        predictor.cost(Workload.parse("decode@32"))
    text = path.read_text()
    for cut in (0, 10, len(text) // 2):
        path.write_text(text[:cut])
        with pytest.raises(InputError, match="formfit profile"):
            load_predictor(path, SPACE, "formfit profile")


def test_accuracy_equals_hand_computation() -> None:
    found = accuracy(np.array([1.0, 2.1, 3.0]), np.array([1.0, 2.0, 4.0]))
    assert found.mape_percent == pytest.approx(100 * (0 + 0.05 + 0.25) / 3)
    assert found.within_10_percent == pytest.approx(2 / 3)
    assert found.span == 4
    assert found.spearman == pytest.approx(1.0)
