"""Fixed reference work, the same on every device, that relates runs to each other and measures noise.

Anchors cancel the drift of a machine within a run. Between runs a machine may be disturbed more or less,
which shifts items relative to the anchors. Every run therefore also times the same two kinds of stacks, one
limited by computation and one by reading weights, and the latencies of a card are in units of these.

Several sessions of one stack are the same work timed as if it were different (an A/A test). Their mean
relative difference is what the machine reports for no difference at all, and smaller claims would be guesses.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from latency.card import Card
from latency.device_runner.plan import REFERENCE_PREFIX
from latency.device_runner.timer import Run, TimerConfig, measure
from latency.device_runner.timing import Timing
from latency.runtimes.protocol import Runtime
from latency.runtimes.registry import graph_version
from space import InputError, ModelConfig, Workload
from space.cost import op_flops
from space.ops import Op

REFERENCE_COPIES = 4
REFERENCE_OP = Op(kind="ffn", width=128, ffn=256)
REFERENCE_HEIGHTS = {Workload(phase="prefill", length=64): 6, Workload(phase="decode", length=64): 12}
REFERENCE_CONFIG = ModelConfig(vocab_size=256, max_seq_len=64, head_dim=32)
REFERENCE_TIMER = TimerConfig(block_ms=2.0, min_rounds=40, max_rounds=40, anchor_every=3)


def reference_item(copy: int) -> str:
    """Name of a copy of the reference work in a kit.

    Args:
        copy: number of the copy, from 0.
    """
    return f"{REFERENCE_PREFIX}{copy}"


def reference_name(copy: int, workload: Workload) -> str:
    """Name of the timing of a reference stack.

    Args:
        copy: number of the copy, from 0.
        workload: one of :data:`REFERENCE_HEIGHTS`.
    """
    return f"{reference_item(copy)}|{workload}"


def reference_items(runtime: Runtime) -> dict[str, Run]:
    """Runners of the reference stacks, by name.

    Args:
        runtime: a runtime opened for fp32.
    """
    return {
        reference_name(copy, workload): runtime.stack(REFERENCE_OP, height, [workload], REFERENCE_CONFIG)[
            workload
        ]
        for workload, height in REFERENCE_HEIGHTS.items()
        for copy in range(REFERENCE_COPIES)
    }


def reference_work() -> dict[str, int]:
    """FLOPs of each reference stack, by name."""
    return {
        reference_name(copy, workload): height * op_flops(REFERENCE_OP, workload, REFERENCE_CONFIG)
        for workload, height in REFERENCE_HEIGHTS.items()
        for copy in range(REFERENCE_COPIES)
    }


def reference_seconds(timings: Mapping[str, Timing]) -> dict[str, float]:
    """Seconds of the reference work in a run, by phase: the geometric mean over the copies.

    Args:
        timings: timings of a run, by name; others are ignored.
    """
    return {workload.phase: float(np.exp(np.log(row).mean())) for workload, row in _copies(timings).items()}


def card_scale(card: Card, threads: int, timings: Mapping[str, Timing]) -> dict[str, float]:
    """Factor that converts a run's seconds to the card's reference units, by phase.

    The first run of a card defines its units.

    Args:
        card: the card; receives the units if it has none.
        threads: number of threads of the run.
        timings: timings of the run, with those of the reference work.
    """
    version = graph_version(card.fingerprint.runtime)
    return card.scale(threads, version, reference_seconds(timings))


def _copies(timings: Mapping[str, Timing]) -> dict[Workload, NDArray[np.float64]]:
    """Seconds of the copies of each reference stack: [copies] by workload."""
    return {
        workload: np.array(
            [timings[reference_name(copy, workload)].seconds for copy in range(REFERENCE_COPIES)]
        )
        for workload in REFERENCE_HEIGHTS
    }


def aa_difference(timings: Mapping[str, Timing]) -> float:
    """Mean relative difference between two timings of the same work.

    Args:
        timings: timings of a run, with those of the reference work.
    """
    pairs = [
        max(row[i], row[j]) / min(row[i], row[j]) - 1
        for row in _copies(timings).values()
        for i, j in combinations(range(REFERENCE_COPIES), 2)
    ]
    return float(np.mean(pairs))


def require_stable(timings: Mapping[str, Timing], max_noise: float) -> float:
    """Refuse a run on a machine that is too noisy.

    Args:
        timings: timings of the run, with those of the reference work.
        max_noise: maximum relative difference between two timings of the same work.

    Returns:
        The relative difference, see :func:`aa_difference`.

    Raises:
        InputError: the difference is larger.
    """
    difference = aa_difference(timings)
    if difference > max_noise:
        raise InputError(
            f"this machine is too noisy for claims: the same work, timed twice, differs by {difference:.1%} "
            f"(at most {max_noise:.0%}); stop other programs, plug the device in, wait, or raise --max-noise"
        )
    return difference


def time_references(runtime: Runtime) -> dict[str, Timing]:
    """Time the reference work alone, which takes a few seconds.

    Args:
        runtime: a runtime opened for fp32.

    Returns:
        The timings by name.
    """
    return measure(reference_items(runtime), runtime.anchors(), REFERENCE_TIMER).timings
