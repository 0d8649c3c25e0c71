"""A timing as data: every round of it, from which estimates, intervals and problems are derived.

Kept as pyperf keeps its values (V. Stinner, https://pyperf.readthedocs.io).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
QUANTILE = 0.05  # see docs/adr/0005


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


_KINDS = {  # of what is not a series of times
    "name": (str,),
    "loops": (int,),
    "samples": (int,),
    "steal_ms": (int, float, type(None)),
    "involuntary_switches": (int, type(None)),
    "settled": (bool,),
    "wanted_half_width": (int, float),
}


@dataclass(frozen=True)
class Timing:
    """All that was measured of one item.

    Attributes:
        loops: runs of the work in one timed sample.
        samples: in a block, of which the quickest counts.
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
    samples: int
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
    def from_json(value: Mapping[str, Any]) -> Timing:
        """Read a timing; the inverse of :meth:`to_json`.

        Raises:
            ValueError: a field is missing or unknown, or times are not positive numbers.
        """
        try:
            series = {name: tuple(map(float, value[name])) for name in ("values", "raw", "anchors")}
            timing = Timing(**{**value, **series})
            for name, kinds in _KINDS.items():
                given = getattr(timing, name)
                if type(given) not in kinds or (type(given) in (int, float) and not 0 <= given < math.inf):
                    raise ValueError(f"{name} is {given!r}"[:80])
            return timing
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"not a timing: {error}") from None


@dataclass(frozen=True)
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
