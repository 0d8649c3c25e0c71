"""Timing many items on one machine whose speed drifts.

A machine's speed changes with heat, clock frequency and other processes, by more than the differences that
matter here. Every round therefore visits each item once, in random order, with fixed reference work (the
anchors) in between. An item's value is its time divided by the anchors' time around it. Drift that slows both
alike cancels, and an item that stops early stays comparable with one that continues.

Other processes disturb a timing in one direction: they slow it down for moments and never speed it up. So a
block is timed in short samples of which the fastest counts, and a low quantile over rounds estimates the
undisturbed time. A median would follow the disturbances. Anchors are smoothed in the same way over many
visits, so that they follow slow drift and ignore moments.

Footguns:

- An item runs its work ``loops`` times itself. One that ignores ``loops`` is refused.
- Anchors cancel only disturbances that they feel themselves, and add those that only they feel:
  see docs/adr/0005.
- Intervals cover the noise between rounds. They do not cover the scale ``anchor_reference`` that all items
  share, the machine's median speed in this run, which differs between runs.
- Few values lie below a low quantile: in simulation the nominal 95% intervals cover 82 to 92% at 40 to 120
  rounds, and 62% at 20. Measure at least 40 rounds.
- A thread pool created before :func:`pinned` keeps its CPUs: create sessions inside. numpy's BLAS has such a
  pool, which made a matmul anchor 8 times slower and erratic: limit it to one thread.

Part of every kit: Python 3.8, the standard library and numpy.
"""

from __future__ import annotations

import gc
import math
import os
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from latency.device_runner.timing import QUANTILE, Measurements, Timing

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Run = Callable[[int], None]
Clock = Callable[[], int]
Progress = Callable[[int, int], None]

ANCHOR_WINDOW_VISITS = 25  # before and after a visit, over which anchor times are smoothed
MAX_LOOPS = 10**8


@dataclass(frozen=True)
class TimerConfig:
    """Settings of a measurement.

    Attributes:
        block_ms: minimum length of an item's timed block, ms; an anchor's block takes a quarter of it.
        sample_ms: minimum length of the samples that a block is timed in, ms.
        min_rounds: rounds that every item gets.
        max_rounds: rounds after which an item always stops.
        half_width: relative half-width of the interval at which an item stops.
        anchor_every: items between two visits to the anchors.
        settle: relative difference up to which two successive warm-up blocks agree.
        settle_blocks: maximum number of pairs of warm-up blocks.
        seed: seed of the order within rounds.
    """

    block_ms: float = 20.0
    sample_ms: float = 0.2
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
        for name in ("block_ms", "sample_ms", "half_width", "anchor_every", "settle", "settle_blocks"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0")


def smoothed(anchors: Sequence[float]) -> NDArray[np.float64]:
    """Anchor times without short disturbances.

    The running median follows drift without lag. The running low quantile of the ratio to that median lowers
    the level to that of undisturbed visits.

    Args:
        anchors: time of each visit, s: [visits].

    Returns:
        The smoothed times, s: [visits].
    """
    times = np.asarray(anchors)
    trend = _running(times, 0.5)
    return trend * _running(times / trend, QUANTILE)


def _running(values: NDArray[np.float64], quantile: float) -> NDArray[np.float64]:
    """A running quantile; the window is shorter at both ends."""
    edge = np.full(ANCHOR_WINDOW_VISITS, np.nan)
    padded = np.concatenate([edge, values, edge])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * ANCHOR_WINDOW_VISITS + 1)
    return np.asarray(np.nanquantile(windows, quantile, axis=1))


@contextmanager
def pinned(threads: int) -> Iterator[list[int]]:
    """Pin this thread, and threads that it starts inside, to the highest-numbered allowed CPUs.

    In virtual machines CPUs with neighbouring numbers may share a core.

    Args:
        threads: number of CPUs.

    Yields:
        The CPUs: fewer if fewer are allowed, none if the platform cannot pin (macOS, Windows, containers).

    Raises:
        ValueError: ``threads`` is below 1.
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
    """Steal time so far of the CPUs allowed to this thread, ms, in steps of 10; None if unknown."""
    try:
        names = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
        lines = map(str.split, Path("/proc/stat").read_text(encoding="ascii").splitlines())
        return 1000 * sum(int(line[8]) for line in lines if line[0] in names) / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, IndexError):
        return None


def _steal_since(before: float | None) -> float | None:
    """Steal time since an earlier :func:`_steal_ms`, ms; None if unknown."""
    now = _steal_ms()
    return None if before is None or now is None else now - before


def _switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


class _Work:
    """One item: its work, the loops and samples of a block, and the values of its rounds."""

    def __init__(self, name: str, run: Run, clock: Clock) -> None:
        self.name, self.run, self.clock = name, run, clock
        self.loops, self.samples, self.settled, self.switches = 1, 1, False, 0
        self.raw: list[float] = []
        self.middles: list[float] = []
        self.anchors: list[float] = []

    def block(self) -> tuple[float, float]:
        """Time one block; returns seconds per loop of its fastest sample, and the clock at its middle, ns."""
        # Untimed, refills the caches that other items used. Without it a block of a single run is 2 to 4%
        # slower than the fastest of several.
        self.run(1)
        collecting = gc.isenabled()
        gc.disable()
        try:
            switches, start = _switches(), self.clock()
            fastest, end = math.inf, start
            for _ in range(self.samples):
                before = end
                self.run(self.loops)
                end = self.clock()
                fastest = min(fastest, end - before)
            self.switches += _switches() - switches
        finally:
            if collecting:
                gc.enable()
        return fastest * 1e-9 / self.loops, (start + end) / 2

    def prepare(self, block_ms: float, config: TimerConfig) -> None:
        """Choose loops per sample and samples per block; warm up until two successive blocks agree."""
        self.run(1)  # the first run allocates
        wanted = min(config.sample_ms, block_ms) * 1e-3
        while (seconds := self.block()[0] * self.loops) < wanted:
            growth = min(10.0, 1.1 * wanted / seconds) if seconds > 0 else 10.0
            self.loops = max(self.loops + 1, int(self.loops * growth))
            if self.loops > MAX_LOOPS:
                raise ValueError(f"{self.name}: takes no time; does it run its work `loops` times?")
        for _ in range(config.settle_blocks):
            first, second = self.block()[0], self.block()[0]
            self.loops = max(1, math.ceil(wanted / min(first, second)))
            self.samples = max(1, math.ceil(block_ms * 1e-3 / (self.loops * min(first, second))))
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
            samples=self.samples,
            values=tuple((np.divide(self.raw, self.anchors) * reference).tolist()),
            raw=tuple(self.raw),
            anchors=tuple(self.anchors),
            steal_ms=steal_ms,
            involuntary_switches=self.switches if resource else None,
            settled=self.settled,
            wanted_half_width=config.half_width,
        )


class _Anchors:
    """The anchors of a run, and the moment and time of every visit to them."""

    def __init__(self, runs: Sequence[Run], clock: Clock) -> None:
        self.works = [_Work(f"anchor {i}", run, clock) for i, run in enumerate(runs)]
        self.moments: list[float] = []  # clock at the middle of each visit, ns
        self.seconds: list[float] = []  # geometric mean over the anchors, s

    def prepare(self, config: TimerConfig) -> None:
        for work in self.works:
            work.prepare(config.block_ms / 4, config)

    def visit(self) -> None:
        seconds, middles = np.transpose([work.block() for work in self.works])
        self.moments.append(float(middles.mean()))
        self.seconds.append(float(np.exp(np.log(seconds).mean())))

    def correct(self, works: Sequence[_Work]) -> NDArray[np.float64]:
        """Set the anchor time of every round of the works; returns the smoothed times of all visits."""
        smooth = smoothed(self.seconds)
        for work in works:
            work.anchors = np.interp(work.middles, self.moments, smooth).tolist()
        return smooth


def _round(works: Sequence[_Work], anchors: _Anchors, every: int) -> None:
    """Time one block of each item, in the given order, with visits to the anchors in between."""
    for place, work in enumerate(works, 1):
        seconds, middle = work.block()
        work.raw.append(seconds)
        work.middles.append(middle)
        if place % every == 0 or place == len(works):
            anchors.visit()  # the last visit of a round is the first of the next


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
        items: functions that run their work the given number of times, by name.
        anchors: fixed reference work of the same form; the geometric mean of their times counts.
        config: settings of the measurement.
        progress: called after every round with (rounds done, maximum rounds).
        clock: monotonic clock, ns.

    Returns:
        The timings of all items, and the state of the machine.

    Raises:
        ValueError: there is no item or no anchor, or one of them takes no time.
    """
    if not items or not anchors:
        raise ValueError(f"expected items and anchors, given {len(items)} and {len(anchors)}")
    references = _Anchors(anchors, clock)
    works = [_Work(name, run, clock) for name, run in items.items()]
    references.prepare(config)
    for work in works:
        work.prepare(config.block_ms, config)

    rng = np.random.default_rng(config.seed)
    active, rounds, stolen, began = works, 0, _steal_ms(), clock()
    references.visit()
    while active and rounds < config.max_rounds:
        order = [active[i] for i in rng.permutation(len(active))]
        _round(order, references, config.anchor_every)
        references.correct(order)
        active = [work for work in active if not work.finished(config)]
        rounds += 1
        if progress:
            progress(rounds, config.max_rounds)
    seconds, steal = (clock() - began) * 1e-9, _steal_since(stolen)

    # Once more with all visits: an item that stopped early is smoothed over later visits too.
    smooth = references.correct(works)
    low, high = (float(quartile) for quartile in np.percentile(references.seconds, [25, 75]))
    middle = float(np.median(smooth))
    return Measurements(
        timings={work.name: work.timing(middle, steal, config) for work in works},
        anchor_reference=middle,
        anchor_spread=(high - low) / middle,
        anchors_settled=all(work.settled for work in references.works),
        rounds=rounds,
        seconds=seconds,
        steal_ms=steal,
    )
