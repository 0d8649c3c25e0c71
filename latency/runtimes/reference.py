"""Fixed reference work, the same on every device: it ties runs together, and says how noisy a machine is.

The anchors cancel a machine's drift within a run. From one run to the next a machine may be disturbed more
or less, which moves what is timed otherwise than the anchors. So every run times the same stacks too, like
anything else, and the latencies of a card are in units of these: one computes, one reads its weights.
Copies of one stack in sessions of their own are the same work timed as if it were different (A/A): what they
differ by is what a machine makes of no difference at all, and a claim below that would be a guess.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from latency.device_runner.io_binding import Run
from latency.device_runner.timer import TimerConfig, measure
from latency.device_runner.timing import Timing
from latency.runtimes.protocol import Runtime
from space import InputError, ModelConfig, Workload
from space.cost import op_flops
from space.ops import Op

COPIES = 4
OP = Op(kind="ffn", width=128, ffn=256)
STACKS = {Workload(phase="prefill", length=64): 6, Workload(phase="decode", length=64): 12}  # with heights
FRAME = ModelConfig(vocab_size=256, max_seq_len=64, head_dim=32)
TIMER = TimerConfig(block_ms=2.0, min_rounds=40, max_rounds=40, anchor_every=3)


def reference_name(copy: int, workload: Workload) -> str:
    """What the timing of a reference stack is called."""
    return f"reference|{copy}|{workload}"


def reference_items(runtime: Runtime) -> dict[str, Run]:
    """The reference stacks on a runtime, by name."""
    return {
        reference_name(copy, workload): runtime.stack(OP, height, [workload], FRAME)[workload]
        for workload, height in STACKS.items()
        for copy in range(COPIES)
    }


def reference_work() -> dict[str, int]:
    """The FLOPs of each reference stack, by name."""
    return {
        reference_name(copy, workload): height * op_flops(OP, workload, FRAME)
        for workload, height in STACKS.items()
        for copy in range(COPIES)
    }


def reference_seconds(timings: Mapping[str, Timing]) -> dict[str, float]:
    """What the reference work took in a run, by phase: the geometric mean over the copies."""
    return {workload.phase: float(np.exp(np.log(row).mean())) for workload, row in _copies(timings).items()}


def _copies(timings: Mapping[str, Timing]) -> dict[Workload, NDArray[np.float64]]:
    return {
        workload: np.array([timings[reference_name(copy, workload)].seconds for copy in range(COPIES)])
        for workload in STACKS
    }


def noise_of(timings: Mapping[str, Timing]) -> float:
    """By how much two timings of the same work differ on average, relative."""
    pairs = [
        max(row[i], row[j]) / min(row[i], row[j]) - 1
        for row in _copies(timings).values()
        for i, j in combinations(range(COPIES), 2)
    ]
    return float(np.mean(pairs))


def require_stable(timings: Mapping[str, Timing], most: float) -> float:
    """The noise of the machine in a run with the reference work, where it is at most ``most``.

    Raises:
        InputError: it is more; says what to do.
    """
    noise = noise_of(timings)
    if noise > most:
        raise InputError(
            f"this machine is too noisy for claims: the same work, timed twice, differs by {noise:.1%} "
            f"(at most {most:.0%}); stop other programs, plug the device in, wait, or raise --max-noise"
        )
    return noise


def time_references(runtime: Runtime) -> dict[str, Timing]:
    """The timings of the reference work alone; takes a few seconds."""
    return measure(reference_items(runtime), runtime.anchors(), TIMER).timings
