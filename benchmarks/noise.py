"""Claim: a second process that loads a core shifts the ratio of two ops by less than 5%.

Two ops that a second process slows down differently (a prefill bound by computation, a decode bound by
reading weights) are timed with formfit's timer, alternately undisturbed and while another process loads the
other core. The result is the ratio of the two ops, since a predictor compares ops; the ratio by the wall
clock's median is reported for comparison.
"""

import subprocess
import sys

import numpy as np
import outcome

from latency import OnnxRuntime
from latency.device_runner.timer import TimerConfig, measure, pinned
from latency.runtimes.reference import REFERENCE_CONFIG, REFERENCE_HEIGHTS, REFERENCE_OP

DISTURBANCES = {  # programs of the second process
    "computes": "import numpy as np\na = np.ones((500, 500), np.float32)\nwhile True: a @ a",
    "moves memory": "import numpy as np\na = np.ones(16_000_000, np.float32)\nwhile True: a[:] = a[::-1]",
}
TURNS = 4


def ratios(rounds: int) -> tuple[float, float]:
    """Return the ratio of the two ops by the timer, and by the wall clock's median."""
    runtime = OnnxRuntime(1)
    with pinned(1):
        items = {
            str(place): runtime.stack(REFERENCE_OP, height, [workload], REFERENCE_CONFIG)[workload]
            for place, (workload, height) in enumerate(REFERENCE_HEIGHTS.items())
        }
        config = TimerConfig(block_ms=3.0, min_rounds=rounds, max_rounds=rounds, anchor_every=2)
        timings = measure(items, runtime.anchors(), config).timings
    return timings["0"].seconds / timings["1"].seconds, timings["0"].clock_median / timings["1"].clock_median


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    rounds, turns = (20, 1) if arguments.quick else (120, TURNS)
    undisturbed, disturbed = [], {name: [] for name in DISTURBANCES}
    for _ in range(turns):
        undisturbed.append(ratios(rounds))
        for name, program in DISTURBANCES.items():
            process = subprocess.Popen([sys.executable, "-c", program])
            try:
                disturbed[name].append(ratios(rounds))
            finally:
                process.kill()
                process.wait()
    undisturbed.append(ratios(rounds))
    base = np.median(undisturbed, axis=0)
    shifts = {name: np.median(found, axis=0) / base - 1 for name, found in disturbed.items()}
    body = {
        "ratio_undisturbed": {
            "timer": [a for a, _ in undisturbed],
            "clock_median": [b for _, b in undisturbed],
        },
        "ratio_disturbed": {
            name: {"timer": [a for a, _ in found], "clock_median": [b for _, b in found]}
            for name, found in disturbed.items()
        },
        "shift_percent": {
            name: {"timer": 100 * float(m[0]), "clock_median": 100 * float(m[1])}
            for name, m in shifts.items()
        },
        "undisturbed_range_percent": 100 * float(np.ptp([a for a, _ in undisturbed]) / base[0]),
    }
    checks = {
        f"a second process that {name} shifts the ratio by {100 * m[0]:+.1f}%, less than 5%": abs(m[0]) < 0.05
        for name, m in shifts.items()
    }
    return outcome.write("noise", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
