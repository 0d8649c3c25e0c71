"""The timer under simulated time: items advance a fake clock, so results are exactly reproducible."""

import gc
import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from latency.device_runner import timer
from latency.device_runner.timer import Run, TimerConfig, measure, pinned
from latency.device_runner.timing import QUANTILE, Measurements, Timing, bootstrap_interval

ANCHOR = 1e-3  # seconds that the simulated anchor takes while the machine is at full speed
LONG = 0.05  # seconds, more than a block: such an item runs once a block


def always_one() -> float:
    return 1.0


def noise(sigma: float, seed: int = 0) -> Callable[[], float]:
    rng = np.random.default_rng(seed)
    return lambda: float(np.exp(sigma * rng.standard_normal()))


@dataclass
class Machine:
    """A clock that its items move; ``slowness`` (of the time in seconds) stretches what they take."""

    slowness: Callable[[float], float] = lambda _: 1.0
    seconds: float = 0.0
    log: list[tuple[str, int]] = field(default_factory=list)

    def clock(self) -> int:
        return round(self.seconds * 1e9)

    def item(
        self, cost: float, name: str = "", *, factor: Callable[[], float] = always_one, drifts: bool = True
    ) -> Run:
        def run(loops: int) -> None:
            self.log.append((name, loops))
            self.seconds += cost * loops * factor() * (self.slowness(self.seconds) if drifts else 1.0)

        return run

    def measure(self, items: Mapping[str, Run], config: TimerConfig, **options: Any) -> Measurements:
        anchors = options.pop("anchors", [self.item(ANCHOR, "anchor")])
        return measure(items, anchors, config, clock=self.clock, **options)

    def measure_one(self, run: Run, config: TimerConfig | None = None) -> Timing:
        return self.measure({"op": run}, config or TimerConfig()).timings["op"]


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what happens on the real machine out of simulated time."""
    monkeypatch.setattr(timer, "_steal_ms", lambda: None)
    monkeypatch.setattr(timer, "_switches", lambda: 0)


def timing(**changes: Any) -> Timing:
    flawless = Timing(
        name="op",
        loops=4,
        samples=2,
        values=(0.1,) * 9,
        raw=(0.1,) * 9,
        anchors=(0.01,) * 9,
        steal_ms=None,
        involuntary_switches=0,
        settled=True,
        wanted_half_width=0.015,
    )
    return replace(flawless, **changes)


# Drift


@pytest.mark.parametrize("felt", [True, False], ids=["anchor feels it", "anchor does not"])
def test_drift_cancels_if_the_anchors_have_it_too(felt: bool) -> None:
    machine = Machine(slowness=lambda seconds: 1 + min(seconds / 3.5, 1))
    config = TimerConfig(anchor_every=1)  # few items: else the anchors would be few for such a drift
    costs = {"short": 0.3e-3, "long": 33e-3}
    items = {name: machine.item(cost) for name, cost in costs.items()}
    items["noisy"] = machine.item(9e-3, factor=noise(0.3))  # goes on long after the others stopped
    run = machine.measure(items, config, anchors=[machine.item(ANCHOR, drifts=felt)])
    assert machine.slowness(machine.seconds) > 1.8
    for name, cost in costs.items():
        estimate = run.timings[name].seconds / run.anchor_reference
        uncorrected = low_quantile(run.timings[name].raw) / run.anchor_reference
        assert abs(uncorrected / (cost / ANCHOR) - 1) > 0.1
        if felt:
            assert estimate == pytest.approx(cost / ANCHOR, rel=0.02)
        else:
            raw = low_quantile(run.timings[name].raw) / run.anchor_reference
            assert estimate == pytest.approx(raw, rel=1e-6)
    assert (run.anchor_spread > 0.1) is felt


def test_reference_is_the_geometric_mean_of_the_anchors() -> None:
    machine = Machine()
    run = machine.measure(
        {"op": machine.item(LONG)}, TimerConfig(), anchors=[machine.item(1e-3), machine.item(4e-3)]
    )
    assert run.anchor_reference == pytest.approx(2e-3, rel=1e-6)
    assert run.timings["op"].seconds == pytest.approx(LONG, rel=1e-6)


# Calibration and warm-up


@pytest.mark.parametrize("cost", [3e-7, 1e-4, 2.9e-3, 19.9e-3])
def test_loops_fill_the_sample_and_samples_the_block(cost: float) -> None:
    machine = Machine()
    op = machine.measure_one(machine.item(cost))
    sample = op.loops * cost
    assert sample > 0.2e-3 * (1 - 1e-6)
    assert (op.loops - 1) * cost < 0.2e-3 * 1.01
    assert op.samples * sample > 20e-3 * (1 - 1e-6)
    assert (op.samples - 1) * sample < 20e-3 * 1.01
    assert op.seconds == pytest.approx(cost, rel=1e-3)


def test_fastest_sample_of_a_block_counts() -> None:
    machine = Machine()
    disturbed = itertools.cycle([1.5, 1.4, 1.0, 1.3, 1.2])
    op = machine.measure_one(machine.item(2e-3, factor=lambda: next(disturbed)))
    assert op.samples >= 5
    assert op.raw == pytest.approx([2e-3] * len(op.raw))


def test_item_longer_than_the_block_runs_once() -> None:
    machine = Machine()
    op = machine.measure_one(machine.item(LONG, "op"))
    assert op.loops == 1
    assert op.seconds == pytest.approx(LONG)
    assert {loops for name, loops in machine.log if name == "op"} == {1}


def test_slow_first_run_does_not_shorten_the_blocks() -> None:
    machine = Machine()
    first = itertools.chain([500.0], itertools.repeat(1.0))
    op = machine.measure_one(machine.item(1e-4, factor=lambda: next(first)))
    assert op.loops * op.samples == pytest.approx(200, abs=2)
    assert op.seconds == pytest.approx(1e-4, rel=1e-3)


def test_warm_up_is_discarded() -> None:
    machine = Machine()
    cooling = (1 + 3 * 0.5**n for n in itertools.count())
    op = machine.measure_one(machine.item(LONG, factor=lambda: next(cooling)))
    assert op.settled
    assert max(op.raw) < LONG * 1.02


def test_item_that_never_settles_is_measured_and_reported() -> None:
    machine = Machine()
    swinging = itertools.cycle([1.0, 1.0, 1.5, 1.5])  # an untimed and a timed run in each block
    item = machine.item(LONG, factor=lambda: next(swinging))
    op = machine.measure_one(item, TimerConfig(settle_blocks=3, max_rounds=9))
    assert not op.settled
    assert "did not settle" in op.problems()
    assert len(op.values) == 9


def test_caches_are_refilled_before_a_block() -> None:
    machine = Machine()
    last: list[str] = []

    def visit(name: str, cost: float) -> Run:
        def run(loops: int) -> None:
            cold = cost if last[-1:] != [name] else 0.0
            last.append(name)
            machine.seconds += cost * loops + cold

        return run

    items = {"a": visit("a", 5e-3), "b": visit("b", 7e-3)}
    run = machine.measure(items, TimerConfig(), anchors=[visit("anchor", ANCHOR)])
    assert run.timings["a"].seconds == pytest.approx(5e-3)
    assert run.timings["b"].seconds == pytest.approx(7e-3)


def test_work_that_ignores_loops_is_refused() -> None:
    machine = Machine()

    def run(loops: int) -> None:
        machine.seconds += 1e-6

    with pytest.raises(ValueError, match=r"op: takes no time.*`loops`"):
        machine.measure_one(run)


# Rounds


def test_item_stops_when_its_interval_is_narrow_enough() -> None:
    machine = Machine()
    items = {
        "exact": machine.item(2e-3),
        "mild": machine.item(2e-3, factor=noise(0.06)),
        "wild": machine.item(2e-3, factor=noise(0.3)),
    }
    seen: list[tuple[int, int]] = []
    run = machine.measure(items, TimerConfig(), progress=lambda *rounds: seen.append(rounds))
    exact, mild, wild = run.timings.values()
    assert len(exact.values) == 8
    assert exact.half_width < 1e-6
    assert not exact.problems()
    assert 8 < len(mild.values) <= 30
    assert len(wild.values) == 30 == run.rounds
    assert any("after 30 rounds" in problem for problem in wild.problems())
    assert seen == [(done, 30) for done in range(1, 31)]


def rounds_of(seed: int) -> list[list[str]]:
    """The visited items in each of six rounds of eight items."""
    machine = Machine()
    items = {name: machine.item(LONG, name) for name in "abcdefgh"}
    ends: list[int] = []
    machine.measure(
        items,
        TimerConfig(seed=seed, min_rounds=6, max_rounds=6, anchor_every=3),
        progress=lambda *_: ends.append(len(machine.log)),
    )
    blocks = [[name for name, _ in machine.log[a:b]] for a, b in itertools.pairwise([0, *ends])]
    # The anchor is short: each of its blocks starts with one untimed loop. Warm-up stands before round one.
    visits = [[name for name, _ in itertools.groupby(block)] for block in blocks]
    return [visits[0][-len(visits[1]) :], *visits[1:]]


def test_order_of_a_round_depends_on_the_seed() -> None:
    rounds = rounds_of(seed=0)
    orders = [tuple(name for name in visits if name != "anchor") for visits in rounds]
    assert all(sorted(order) == list("abcdefgh") for order in orders)
    assert len(set(orders)) == 6
    assert rounds_of(seed=0) == rounds
    assert rounds_of(seed=1) != rounds


def test_anchors_are_visited_between_the_items() -> None:
    for visits in rounds_of(seed=0):
        assert [place for place, name in enumerate(visits) if name == "anchor"] == [3, 7, 10]


def test_garbage_collector_is_off_in_timed_blocks_only() -> None:
    machine = Machine()
    enabled: list[bool] = []

    def run(loops: int) -> None:
        enabled.append(gc.isenabled())
        machine.seconds += LONG
        if len(enabled) == 20:
            raise KeyboardInterrupt

    assert gc.isenabled()
    with pytest.raises(KeyboardInterrupt):
        machine.measure_one(run, TimerConfig(half_width=1e-9, min_rounds=30))
    # The first run allocates; then every block of one run starts with an untimed one.
    assert enabled == [True, *[True, False] * 9, True]
    assert gc.isenabled()


def test_disturbances_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    switches = itertools.count()
    steal = iter([100.0, 350.0])
    monkeypatch.setattr(timer, "_switches", lambda: next(switches))
    monkeypatch.setattr(timer, "_steal_ms", lambda: next(steal))
    run = machine.measure({"op": machine.item(LONG)}, TimerConfig())
    assert run.timings["op"].involuntary_switches == 8  # one in each block; those of the warm-up do not count
    assert run.steal_ms == run.timings["op"].steal_ms == 250.0
    assert any(problem.startswith("hypervisor took 250 ms") for problem in run.problems())


# The interval


def low_quantile(values: Any, axis: int = -1) -> Any:
    return np.quantile(values, QUANTILE, axis=axis)


@pytest.mark.parametrize("count", [8, 15, 30])
@pytest.mark.parametrize("seed", range(3))
def test_interval_equals_scipy(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).lognormal(sigma=0.1, size=count)

    def expected(level: float) -> tuple[float, float]:
        rng = np.random.default_rng(seed)
        result = scipy.stats.bootstrap(
            (values,), low_quantile, method="percentile", n_resamples=20_000, confidence_level=level, rng=rng
        )
        return result.confidence_interval.low, result.confidence_interval.high

    # 1000 resamples know the level roughly, a resampled quantile of few values jumps: bounds are compared.
    low, high = bootstrap_interval(values.tolist())
    (outer_low, outer_high), (inner_low, inner_high) = expected(0.98), expected(0.91)
    assert outer_low <= low <= inner_low
    assert inner_high <= high <= outer_high


@pytest.mark.parametrize("count", [50, 120])
def test_interval_has_its_nominal_coverage(count: int) -> None:
    """The nominal 95% is less with so few values beyond the quantile; timer.py says so."""
    samples = np.random.default_rng(1).lognormal(sigma=0.1, size=(1000, count))
    intervals = np.array([bootstrap_interval(sample.tolist()) for sample in samples])
    true = np.exp(0.1 * scipy.stats.norm.ppf(QUANTILE))
    covered = np.mean((intervals[:, 0] <= true) & (intervals[:, 1] >= true))
    assert 0.84 < covered < 0.98


# Data


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"settled": False}, ["did not settle"]),
        ({"involuntary_switches": 9}, []),
        ({"involuntary_switches": 10}, ["preempted 10 times in 9 rounds"]),
        ({"involuntary_switches": None}, []),
        ({"values": (0.1, 0.2, 0.3) * 3}, ["interval +-50.0% after 9 rounds"]),
        ({"anchors": (0.01,) * 8 + (0.03,)}, []),  # one spike is no drift
        ({"anchors": (0.01,) * 8 + (0.005,)}, []),
        ({"anchors": (0.01,) * 5 + (0.014,) * 4}, ["anchors drifted by 40%"]),
    ],
)
def test_problems_of_a_timing(changes: dict[str, Any], expected: list[str]) -> None:
    assert timing(**changes).problems() == expected


def test_problems_of_a_run() -> None:
    run = Measurements(
        timings={"op": timing()},
        anchor_reference=0.01,
        anchor_spread=0.02,
        anchors_settled=True,
        rounds=9,
        seconds=2.0,
        steal_ms=20.0,
    )
    assert run.problems() == []
    assert replace(run, steal_ms=None).problems() == []
    bad = replace(
        run,
        timings={"op": timing(settled=False)},
        anchor_spread=0.12,
        anchors_settled=False,
        steal_ms=30.0,
    )
    assert bad.problems() == [
        "anchors did not settle",
        "machine speed varies: anchor quartiles 12% apart",
        "hypervisor took 30 ms of 2.0 s",
        "op: did not settle",
    ]


def test_timing_round_trips_through_json() -> None:
    machine = Machine()
    op = machine.measure_one(machine.item(2e-3, factor=noise(0.05)))
    back = Timing.from_json(json.loads(json.dumps(op.to_json(), allow_nan=False)))
    assert back == op
    assert back.interval == op.interval
    assert back.problems() == op.problems()


@pytest.mark.parametrize(
    "changes",
    [
        {"raw": [0.1]},
        {"values": [], "raw": [], "anchors": []},
        {"values": [0.1] * 8 + [0.0]},
        {"raw": [0.1] * 8 + [float("nan")]},
        {"anchors": ["x"] * 9},
        {"anchors": None},
        {"surprise": 1},
    ],
)
def test_malformed_timing_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a timing"):
        Timing.from_json({**timing().to_json(), **changes})


def test_missing_field_is_named() -> None:
    value = timing().to_json()
    del value["loops"]
    with pytest.raises(ValueError, match=r"not a timing.*loops"):
        Timing.from_json(value)


@pytest.mark.parametrize(
    "settings",
    [{"min_rounds": 1}, {"min_rounds": 9, "max_rounds": 8}, {"block_ms": 0}, {"half_width": float("nan")}],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        TimerConfig(**settings)


def test_measuring_no_item_is_refused() -> None:
    machine = Machine()
    with pytest.raises(ValueError, match="given 0 and 1"):
        machine.measure({}, TimerConfig())
    with pytest.raises(ValueError, match="given 1 and 0"):
        machine.measure({"op": machine.item(LONG)}, TimerConfig(), anchors=[])


# The real machine


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this platform cannot pin")
def test_pinning_is_undone() -> None:
    before = os.sched_getaffinity(0)
    with pinned(1) as cpus:
        assert cpus == [max(before)]
        assert os.sched_getaffinity(0) == set(cpus)
    assert os.sched_getaffinity(0) == before
    with pinned(len(before) + 1) as cpus:
        assert cpus == sorted(before)
    with pytest.raises(ValueError, match="threads: 0"), pinned(0):
        pass


def test_impossible_pinning_yields_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse, raising=False)
    with pinned(1) as cpus:
        assert cpus == []
    monkeypatch.delattr(os, "sched_setaffinity")
    with pinned(1) as cpus:
        assert cpus == []


def test_real_work_on_the_real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    matrix = np.ones((16, 16))

    def multiply(loops: int) -> None:
        for _ in range(loops):
            matrix @ matrix

    config = TimerConfig(block_ms=0.5, min_rounds=2, max_rounds=3)
    run = measure({"one": multiply, "two": lambda loops: multiply(2 * loops)}, [multiply], config)
    assert list(run.timings) == ["one", "two"]
    assert 2 <= run.rounds <= 3
    assert run.steal_ms is None or run.steal_ms >= 0
    for name, op in run.timings.items():
        assert op.name == name
        assert op.loops > 1
        assert len(op.values) == len(op.raw) == len(op.anchors) >= 2
        assert op.interval[0] <= op.seconds <= op.interval[1]
        assert op.involuntary_switches is None or op.involuntary_switches >= 0
        assert Timing.from_json(op.to_json()) == op
    assert all(isinstance(problem, str) for problem in run.problems())
