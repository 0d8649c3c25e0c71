"""Timing many pieces of work on one machine whose speed drifts.

A machine's speed changes with heat, clock frequency and neighbours, by more than the
differences that matter here. So every round visits each item once, in random order, with
fixed reference work (the anchors) between; an item's value is its time over the anchors'
time around it. Drift that slows both alike cancels, and an item that stops early stays
comparable with one that goes on.

What other work on the machine does to a timing is one-sided: it is slowed for moments, never
sped up. So a block is timed in short samples, of which the quickest counts, and a low quantile over
rounds estimates the time of the work itself, where the median follows the neighbours; and the
anchors are smoothed the same way over many visits, so that they follow the machine's slow drift
and not its moments.

Footguns:

- An item runs its work ``loops`` times itself; one that ignores ``loops`` is refused.
- Anchors cancel only what they feel, and add what disturbs them alone: see docs/adr/0005.
- Intervals cover the noise between rounds, not the scale ``anchor_reference`` that all items
  share: the machine's median speed in this run. Another run has another scale.
- Few values lie beyond a low quantile: the nominal 95% intervals cover 82 to 92% at 40 to 120 rounds
  in simulation, and 62% at 20, so measure at least 40.
- A thread pool made before :func:`pinned` stays where it was: build sessions inside. numpy's
  BLAS has such a pool, which made a matmul anchor 8 times slower and erratic: hold it to one thread.
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

ANCHOR_REACH = 25  # visits before and after that the anchors are smoothed over
MOST_LOOPS = 10**8


@dataclass(frozen=True)
class TimerConfig:
    """How long to measure.

    Attributes:
        block_ms: least length of an item's timed block, ms; each anchor takes a quarter of it.
        sample_ms: least length of the samples that a block is timed in, ms.
        min_rounds: rounds that every item gets.
        max_rounds: rounds after which an item stops in any case.
        half_width: relative half-width of the interval at which an item stops.
        anchor_every: items between two visits to the anchors.
        settle: relative difference at which two successive warm-up blocks agree.
        settle_blocks: most pairs of warm-up blocks.
        seed: of the order within rounds.
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
        self.loops, self.samples, self.settled, self.switches = 1, 1, False, 0
        self.raw: list[float] = []
        self.middles: list[float] = []
        self.anchors: list[float] = []

    def block(self) -> tuple[float, float]:
        """Time one block: seconds per loop of its quickest sample, and the clock at its middle, ns."""
        if self.loops * self.samples > 1:
            self.run(1)  # untimed, refills the caches: without it 16 MiB of decode weights read 2-3% slow
        collecting = gc.isenabled()
        gc.disable()
        try:
            switches, start = _switches(), self.clock()
            quickest, end = math.inf, start
            for _ in range(self.samples):
                before = end
                self.run(self.loops)
                end = self.clock()
                quickest = min(quickest, end - before)
            self.switches += _switches() - switches
        finally:
            if collecting:
                gc.enable()
        return quickest * 1e-9 / self.loops, (start + end) / 2

    def prepare(self, block_ms: float, config: TimerConfig) -> None:
        """Find the loops that fill a sample and the samples of a block; warm up until two blocks agree."""
        self.run(1)  # the first run allocates
        wanted = min(config.sample_ms, block_ms) * 1e-3
        while (seconds := self.block()[0] * self.loops) < wanted:
            growth = min(10.0, 1.1 * wanted / seconds) if seconds > 0 else 10.0
            self.loops = max(self.loops + 1, int(self.loops * growth))
            if self.loops > MOST_LOOPS:
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
