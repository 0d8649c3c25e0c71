"""Timing many pieces of work on one machine whose speed drifts.

A machine's speed changes with heat, clock frequency and neighbours, by more than the
differences that matter here. So every round visits each item once, in random order, with
fixed reference work (the anchors) between; an item's value is its time over the anchors'
time around it. Drift that slows both alike cancels, and an item that stops early stays
comparable with one that goes on. A timing is kept as data, all rounds of it, as pyperf
keeps its values (V. Stinner, https://pyperf.readthedocs.io); figures are derived from them.

What other work on the machine does to a timing is one-sided: blocks are slowed for moments,
never sped up. So a low quantile over rounds estimates the time of the work itself, where the
median follows the neighbours; and the anchors are smoothed the same way over many visits,
so that they follow the machine's slow drift and not its moments.

Footguns:

- An item runs its work ``loops`` times itself; one that ignores ``loops`` is refused.
- Anchors cancel only what they feel: use one bound by arithmetic and one by memory.
- Intervals cover the noise between rounds, not the scale ``anchor_reference`` that all items
  share: the machine's median speed in this run. Another run has another scale.
- Few values lie beyond a low quantile: the nominal 95% intervals cover 83 to 91% at 20 to 40 rounds
  in simulation, and a little over half at 8, so measure at least 20.
- A thread pool made before :func:`pinned` stays where it was: build sessions inside. numpy's
  BLAS has such a pool, which made a matmul anchor 8 times slower and erratic: hold it to one thread.
"""

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Run = Callable[[int], None]
Clock = Callable[[], int]
Progress = Callable[[int, int], None]

RESAMPLES = 1000
QUANTILE = 0.1  # see docs/adr/0005
ANCHOR_REACH = 10  # visits before and after that the anchors are smoothed over
MOST_LOOPS = 10**8


@dataclass(frozen=True, kw_only=True)
class TimerConfig:
    """How long to measure.

    Attributes:
        block_ms: least length of an item's timed block, ms; each anchor takes a quarter of it.
        min_rounds: rounds that every item gets.
        max_rounds: rounds after which an item stops in any case.
        half_width: relative half-width of the interval at which an item stops.
        anchor_every: items between two visits to the anchors.
        settle: relative difference at which two successive warm-up blocks agree.
        settle_blocks: most pairs of warm-up blocks.
        seed: of the order within rounds.
    """

    block_ms: float = 20.0
    min_rounds: int = 8
    max_rounds: int = 30
    half_width: float = 0.015
    anchor_every: int = 6
    settle: float = 0.02
    settle_blocks: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.min_rounds <= self.max_rounds:
            raise ValueError(f"expected 2 <= min_rounds {self.min_rounds} <= max_rounds {self.max_rounds}")
        for name in ("block_ms", "half_width", "anchor_every", "settle", "settle_blocks"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """All that was measured of one item.

    Attributes:
        loops: runs of the work in one timed block.
        values: one a round, drift-corrected s per loop: ``raw / anchors`` times the run's reference.
        raw: one a round, s per loop as the clock gave them.
        anchors: one a round, smoothed anchor time in s at the middle of the block.
        steal_ms: taken by the hypervisor from the allowed CPUs during the rounds of all items.
        involuntary_switches: of all threads of the process, during this item's blocks.
        settled: whether the warm-up came to agree.
        wanted_half_width: what was asked of :attr:`half_width`.
    """

    name: str
    loops: int
    values: tuple[float, ...]
    raw: tuple[float, ...]
    anchors: tuple[float, ...]
    steal_ms: float | None
    involuntary_switches: int | None
    settled: bool
    wanted_half_width: float

    def __post_init__(self) -> None:
        if not 0 < len(self.values) == len(self.raw) == len(self.anchors):
            raise ValueError(f"timing {self.name!r}: needs as many values as raw and anchors, at least one")
        if not all(0 < seconds < math.inf for seconds in self.values + self.raw + self.anchors):
            raise ValueError(f"timing {self.name!r}: a time is not positive and finite")

    @property
    def seconds(self) -> float:
        """The estimate: drift-corrected seconds per loop, the low quantile over rounds."""
        return float(np.quantile(self.values, QUANTILE))

    @property
    def clock_median(self) -> float:
        """Seconds per loop as the clock gave them, median over rounds: drift and neighbours included."""
        return float(np.median(self.raw))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95% bootstrap interval of :attr:`seconds`."""
        return bootstrap_interval(self.values)

    @property
    def half_width(self) -> float:
        """Half of the interval's width, relative to the estimate."""
        low, high = self.interval
        return (high - low) / 2 / self.seconds

    def problems(self) -> list[str]:
        """Why not to trust this timing; empty where nothing was found."""
        found = [] if self.settled else ["did not settle"]
        rounds, switches = len(self.values), self.involuntary_switches or 0
        if self.half_width > self.wanted_half_width:
            found.append(f"interval +-{self.half_width:.1%} after {rounds} rounds")
        if switches > rounds:  # the median bears some disturbed blocks, not every one
            found.append(f"preempted {switches} times in {rounds} rounds")
        low = np.percentile(self.anchors, 10, method="higher")  # inwards: one spike is no drift
        drift = np.percentile(self.anchors, 90, method="lower") / low - 1
        if drift > 0.2:
            found.append(f"anchors drifted by {drift:.0%}")
        return found

    def to_json(self) -> dict[str, Any]:
        """The fields as a plain JSON value."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Timing":
        """Read a timing; the inverse of :meth:`to_json`.

        Raises:
            ValueError: a field is missing or unknown, or times are not positive numbers.
        """
        try:
            series = {name: tuple(map(float, value[name])) for name in ("values", "raw", "anchors")}
            return Timing(**{**value, **series})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a timing: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """The timings of one run by item name, and what is known of the machine during it.

    Attributes:
        anchor_reference: median of the smoothed anchor times, s.
        anchor_spread: interquartile range of the anchor times, relative to the reference.
        anchors_settled: whether the warm-up of every anchor came to agree.
        rounds: how many there were until the last item stopped.
        seconds: duration of the rounds, s.
        steal_ms: as in :class:`Timing`; None where the platform does not tell.
    """

    timings: dict[str, Timing]
    anchor_reference: float
    anchor_spread: float
    anchors_settled: bool
    rounds: int
    seconds: float
    steal_ms: float | None

    def machine_problems(self) -> list[str]:
        """Why not to trust this run as a whole."""
        found = [] if self.anchors_settled else ["anchors did not settle"]
        if self.anchor_spread > 0.1:
            found.append(f"machine speed varies: anchor quartiles {self.anchor_spread:.0%} apart")
        if self.steal_ms is not None and self.steal_ms > 10 * self.seconds:
            found.append(f"hypervisor took {self.steal_ms:.0f} ms of {self.seconds:.1f} s")
        return found

    def problems(self) -> list[str]:
        """Why not to trust this run: the machine first, then each item by name."""
        items = self.timings.items()
        return self.machine_problems() + [
            f"{name}: {text}" for name, item in items for text in item.problems()
        ]


@lru_cache(maxsize=64)
def _resamples(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(count).integers(count, size=(RESAMPLES, count))


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of the low quantile.

    B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    The resamples depend on the number of values alone: equal values, equal interval.
    """
    estimates = np.quantile(np.asarray(values)[_resamples(len(values))], QUANTILE, axis=1)
    low, high = np.percentile(estimates, [2.5, 97.5])
    return float(low), float(high)


def smoothed(anchors: Sequence[float]) -> NDArray[np.float64]:
    """Anchor times without the moments of disturbance: [visits].

    The running median follows the drift without lag; the running low quantile of what is left
    over it takes the level down to that of undisturbed visits.
    """
    times = np.asarray(anchors)
    trend = _running(times, 0.5)
    return trend * _running(times / trend, QUANTILE)


def _running(values: NDArray[np.float64], quantile: float) -> NDArray[np.float64]:
    """A quantile over the visits around each; fewer at the ends."""
    edge = np.full(ANCHOR_REACH, np.nan)
    padded = np.concatenate([edge, values, edge])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * ANCHOR_REACH + 1)
    return np.asarray(np.nanquantile(windows, quantile, axis=1))


@contextmanager
def pinned(threads: int) -> Iterator[list[int]]:
    """Keep this thread, and those it starts inside, on the ``threads`` highest-numbered allowed CPUs.

    Yields these CPUs: fewer where fewer are allowed, none where the platform cannot pin (macOS,
    Windows, some containers). In virtual machines neighbouring numbers may share a core.
    """
    if threads < 1:
        raise ValueError(f"threads: {threads} is not above 0")
    cpus: list[int] = []
    with suppress(AttributeError, OSError):
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, sorted(before)[-threads:])
        cpus = sorted(before)[-threads:]
    try:
        yield cpus
    finally:
        if cpus:
            os.sched_setaffinity(0, before)


def _steal_ms() -> float | None:
    """Time stolen so far from the CPUs allowed to this thread, ms, in steps of 10."""
    try:
        names = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
        lines = map(str.split, Path("/proc/stat").read_text(encoding="ascii").splitlines())
        return 1000 * sum(int(line[8]) for line in lines if line[0] in names) / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, IndexError):
        return None


def _switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


class _Work:
    """Something to time, how often a block repeats it, and what was seen in the rounds."""

    def __init__(self, name: str, run: Run, clock: Clock) -> None:
        self.name, self.run, self.clock = name, run, clock
        self.loops, self.settled, self.switches = 1, False, 0
        self.raw: list[float] = []
        self.middles: list[float] = []
        self.anchors: list[float] = []

    def block(self) -> tuple[float, float]:
        """Time one block: seconds per loop, and the clock at its middle, ns."""
        if self.loops > 1:
            self.run(1)  # untimed, refills the caches: without it 16 MiB of decode weights read 2-3% slow
        collecting = gc.isenabled()
        gc.disable()
        try:
            switches, start = _switches(), self.clock()
            self.run(self.loops)
            end, self.switches = self.clock(), self.switches + _switches() - switches
        finally:
            if collecting:
                gc.enable()
        return (end - start) * 1e-9 / self.loops, (start + end) / 2

    def prepare(self, block_ms: float, config: TimerConfig) -> None:
        """Find the loops that fill a block; warm up until a pair of blocks agrees."""
        self.run(1)  # the first run allocates
        wanted = block_ms * 1e-3
        while (seconds := self.block()[0] * self.loops) < wanted:
            growth = min(10.0, 1.1 * wanted / seconds) if seconds > 0 else 10.0
            self.loops = max(self.loops + 1, int(self.loops * growth))
            if self.loops > MOST_LOOPS:
                raise ValueError(f"{self.name}: takes no time; does it run its work `loops` times?")
        for _ in range(config.settle_blocks):
            first, second = self.block()[0], self.block()[0]
            self.loops = max(1, math.ceil(wanted / min(first, second)))
            self.settled = abs(first - second) <= config.settle * second
            if self.settled:
                break
        self.switches = 0

    def finished(self, config: TimerConfig) -> bool:
        enough = len(self.raw) >= config.min_rounds
        return enough and self.timing(1.0, None, config).half_width <= config.half_width

    def timing(self, reference: float, steal_ms: float | None, config: TimerConfig) -> Timing:
        return Timing(
            name=self.name,
            loops=self.loops,
            values=tuple((np.divide(self.raw, self.anchors) * reference).tolist()),
            raw=tuple(self.raw),
            anchors=tuple(self.anchors),
            steal_ms=steal_ms,
            involuntary_switches=self.switches if resource else None,
            settled=self.settled,
            wanted_half_width=config.half_width,
        )


def measure(
    items: Mapping[str, Run],
    anchors: Sequence[Run],
    config: TimerConfig,
    *,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter_ns,
) -> Measurements:
    """Time every item, as seconds per loop corrected for drift.

    Args:
        items: by name, functions that run their work the given number of times.
        anchors: fixed reference work of the same form; the geometric mean of their times counts.
        config: how long to measure.
        progress: called after every round with (rounds done, most rounds).
        clock: in ns.

    Raises:
        ValueError: there is no item or no anchor, or one of them takes no time.
    """
    if not items or not anchors:
        raise ValueError(f"expected items and anchors, given {len(items)} and {len(anchors)}")
    references = [_Work(f"anchor {i}", run, clock) for i, run in enumerate(anchors)]
    works = [_Work(name, run, clock) for name, run in items.items()]
    for reference in references:
        reference.prepare(config.block_ms / 4, config)
    for work in works:
        work.prepare(config.block_ms, config)

    rng = np.random.default_rng(config.seed)
    moments: list[float] = []
    anchor_times: list[float] = []

    def visit_anchors() -> None:
        seconds, middles = np.transpose([reference.block() for reference in references])
        moments.append(float(middles.mean()))
        anchor_times.append(float(np.exp(np.log(seconds).mean())))

    active, rounds, stolen, began = works, 0, _steal_ms(), clock()
    visit_anchors()
    while active and rounds < config.max_rounds:
        order = [active[i] for i in rng.permutation(len(active))]
        for place, work in enumerate(order, 1):
            seconds, middle = work.block()
            work.raw.append(seconds)
            work.middles.append(middle)
            if place % config.anchor_every == 0 or place == len(order):
                visit_anchors()  # the last of a round is the first of the next
        smooth = smoothed(anchor_times)
        for work in order:
            work.anchors = np.interp(work.middles, moments, smooth).tolist()
        active = [work for work in active if not work.finished(config)]
        rounds += 1
        if progress:
            progress(rounds, config.max_rounds)

    lasted, stolen_after = (clock() - began) * 1e-9, _steal_ms()
    steal = None if stolen is None or stolen_after is None else stolen_after - stolen
    smooth = smoothed(anchor_times)
    for work in works:
        work.anchors = np.interp(work.middles, moments, smooth).tolist()
    low, high = (float(quartile) for quartile in np.percentile(anchor_times, [25, 75]))
    middle = float(np.median(smooth))
    return Measurements(
        timings={work.name: work.timing(middle, steal, config) for work in works},
        anchor_reference=middle,
        anchor_spread=(high - low) / middle,
        anchors_settled=all(reference.settled for reference in references),
        rounds=rounds,
        seconds=lasted,
        steal_ms=steal,
    )
