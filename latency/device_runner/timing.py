"""Timings as data: the value of every round, from which estimates, intervals and problems are derived.

Values are kept as pyperf keeps them (V. Stinner, https://pyperf.readthedocs.io).
Part of every kit: Python 3.8, the standard library and numpy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, Dict, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

JsonObject = Dict[str, Any]  # evaluated at import: Python 3.8 has no dict[str, Any]

BOOTSTRAP_RESAMPLES = 1000
QUANTILE = 0.05  # over rounds, see docs/adr/0005
MAX_ANCHOR_DRIFT = 0.2  # relative, between the deciles of an item's anchor times
MAX_ANCHOR_SPREAD = 0.1  # relative, between the quartiles of a run's anchor times
MAX_STEAL_MS_PER_SECOND = 10


@lru_cache(maxsize=64)
def _resamples(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(count).integers(count, size=(BOOTSTRAP_RESAMPLES, count))


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of the low quantile.

    The resamples depend only on the number of values, so equal values give equal intervals.
    Source: B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).

    Args:
        values: one per round, s.
    """
    estimates = np.quantile(np.asarray(values)[_resamples(len(values))], QUANTILE, axis=1)
    low, high = np.percentile(estimates, [2.5, 97.5])
    return float(low), float(high)


_FIELD_TYPES = {  # of all fields but the series of times
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
    """The measurement of one item.

    Attributes:
        name: the item.
        loops: runs of the work in one timed sample.
        samples: samples in a block; the fastest counts.
        values: one per round, drift-corrected s per loop: ``raw / anchors`` times the run's reference.
        raw: one per round, s per loop as read from the clock.
        anchors: one per round, smoothed anchor time in s at the middle of the block.
        steal_ms: time that the hypervisor took from the allowed CPUs during the rounds of all items;
            None if unknown.
        involuntary_switches: context switches of all threads of the process during this item's blocks;
            None if unknown.
        settled: True if two successive warm-up blocks agreed.
        wanted_half_width: requested :attr:`half_width`.
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
        """Median over rounds of the uncorrected seconds per loop; includes drift and disturbances."""
        return float(np.median(self.raw))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95% bootstrap interval of :attr:`seconds`."""
        return bootstrap_interval(self.values)

    @property
    def half_width(self) -> float:
        """Half the interval's width, relative to the estimate."""
        low, high = self.interval
        return (high - low) / 2 / self.seconds

    def problems(self) -> list[str]:
        """Reasons to distrust this timing; empty if none were found."""
        found = [] if self.settled else ["did not settle"]
        rounds, switches = len(self.values), self.involuntary_switches or 0
        if self.half_width > self.wanted_half_width:
            found.append(f"interval +-{self.half_width:.1%} after {rounds} rounds")
        if switches > rounds:  # a low quantile tolerates some disturbed blocks, not one in every round
            found.append(f"preempted {switches} times in {rounds} rounds")
        # Deciles are rounded inwards: a single spike is not drift.
        low = np.percentile(self.anchors, 10, method="higher")
        drift = np.percentile(self.anchors, 90, method="lower") / low - 1
        if drift > MAX_ANCHOR_DRIFT:
            found.append(f"anchors drifted by {drift:.0%}")
        return found

    def to_json(self) -> JsonObject:
        """The fields as a JSON object."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Timing:
        """Read a timing; the inverse of :meth:`to_json`.

        Args:
            value: a JSON object, possibly from an untrusted file.

        Raises:
            ValueError: a field is missing or unknown, or times are not positive numbers.
        """
        try:
            series = {name: tuple(map(float, value[name])) for name in ("values", "raw", "anchors")}
            timing = Timing(**{**value, **series})
            for name, types in _FIELD_TYPES.items():
                given = getattr(timing, name)
                if type(given) not in types or (type(given) in (int, float) and not 0 <= given < math.inf):
                    raise ValueError(f"{name} is {given!r}"[:80])
            return timing
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"not a timing: {error}") from None


@dataclass(frozen=True)
class Measurements:
    """The timings of one run, and the machine's state during it.

    Attributes:
        timings: by item name.
        anchor_reference: median of the smoothed anchor times, s.
        anchor_spread: interquartile range of the anchor times, relative to the reference.
        anchors_settled: True if the warm-up blocks of every anchor agreed.
        rounds: rounds until the last item stopped.
        seconds: duration of the rounds, s.
        steal_ms: as in :class:`Timing`.
    """

    timings: dict[str, Timing]
    anchor_reference: float
    anchor_spread: float
    anchors_settled: bool
    rounds: int
    seconds: float
    steal_ms: float | None

    def machine_problems(self) -> list[str]:
        """Reasons to distrust the run as a whole; empty if none were found."""
        found = [] if self.anchors_settled else ["anchors did not settle"]
        if self.anchor_spread > MAX_ANCHOR_SPREAD:
            found.append(f"machine speed varies: anchor quartiles {self.anchor_spread:.0%} apart")
        if self.steal_ms is not None and self.steal_ms > MAX_STEAL_MS_PER_SECOND * self.seconds:
            found.append(f"hypervisor took {self.steal_ms:.0f} ms of {self.seconds:.1f} s")
        return found

    def problems(self) -> list[str]:
        """Reasons to distrust the run: those of the machine first, then those of each item."""
        items = self.timings.items()
        return self.machine_problems() + [
            f"{name}: {text}" for name, item in items for text in item.problems()
        ]
