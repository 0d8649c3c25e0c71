"""Claim: a second process that loads a core moves the ratio of two ops by less than 5%.

Two ops that a neighbour slows unlike (a prefill that computes, a decode that reads its weights) are timed
by the timer on this machine, alone and while another process keeps the other core busy, in turn. What counts
is their ratio, since a predictor compares ops; the same ratio by the clock's median stands beside it.
"""

import subprocess
import sys

import numpy as np
import outcome

from latency import OnnxRuntime
from latency.device_runner.timer import TimerConfig, measure, pinned
from latency.runtimes.reference import FRAME, OP, STACKS

NEIGHBOURS = {  # what the other process does
    "computes": "import numpy as np\na = np.ones((500, 500), np.float32)\nwhile True: a @ a",
    "moves memory": "import numpy as np\na = np.ones(16_000_000, np.float32)\nwhile True: a[:] = a[::-1]",
}
TURNS = 4


def ratios(rounds: int) -> tuple[float, float]:
    """The ratio of the two ops: by the timer, and by the clock's median."""
    runtime = OnnxRuntime(1)
    with pinned(1):
        items = {
            str(place): runtime.stack(OP, height, [workload], FRAME)[workload]
            for place, (workload, height) in enumerate(STACKS.items())
        }
        config = TimerConfig(block_ms=3.0, min_rounds=rounds, max_rounds=rounds, anchor_every=2)
        timings = measure(items, runtime.anchors(), config).timings
    return timings["0"].seconds / timings["1"].seconds, timings["0"].clock_median / timings["1"].clock_median


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    rounds, turns = (20, 1) if arguments.quick else (120, TURNS)
    alone, beside = [], {name: [] for name in NEIGHBOURS}
    for _ in range(turns):
        alone.append(ratios(rounds))
        for name, program in NEIGHBOURS.items():
            neighbour = subprocess.Popen([sys.executable, "-c", program])
            try:
                beside[name].append(ratios(rounds))
            finally:
                neighbour.kill()
                neighbour.wait()
    alone.append(ratios(rounds))
    still = np.median(alone, axis=0)
    moved = {name: np.median(found, axis=0) / still - 1 for name, found in beside.items()}
    body = {
        "ratio_alone": {"timer": [a for a, _ in alone], "clock_median": [b for _, b in alone]},
        "ratio_beside": {
            name: {"timer": [a for a, _ in found], "clock_median": [b for _, b in found]}
            for name, found in beside.items()
        },
        "moved_percent": {
            name: {"timer": 100 * float(m[0]), "clock_median": 100 * float(m[1])} for name, m in moved.items()
        },
        "alone_varies_percent": 100 * float(np.ptp([a for a, _ in alone]) / still[0]),
    }
    checks = {
        f"a neighbour that {name} moves the ratio by {100 * m[0]:+.1f}%, less than 5%": bool(abs(m[0]) < 0.05)
        for name, m in moved.items()
    }
    return outcome.write("noise", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
