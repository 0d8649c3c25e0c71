"""Claim: whole models that no fit saw are predicted within 2.5% (MAPE) in the run of the fit.

Profiles the quickstart space from nothing on this machine: ops by slope, 20 whole models for the
fit, 30 held out, some of those measured twice (the repeat floor).
"""

import sys
import tempfile
import time
from pathlib import Path

import outcome

from latency import ProfileConfig, load_card, profile
from space import load_space

SPACE = Path(__file__).parents[1] / "configs" / "spaces" / "quickstart.yaml"


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    quick = {"block_ms": 1.0, "min_rounds": 2, "max_rounds": 3, "held_out_models": 8, "repeated_models": 3}
    config = ProfileConfig(**quick) if arguments.quick else ProfileConfig()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        predictor = profile(load_space(SPACE), Path(folder), "here", config)
        seconds = time.monotonic() - began
        problems = load_card(Path(folder), "here").problems
    workloads = {}
    checks = {"profiling takes at most 180 s": seconds <= 180}
    for workload, model in predictor.models.items():
        errors = model.errors
        held, proxy = errors["held_out"], errors["flops_and_params"]
        workloads[str(workload)] = {**errors, "factor_at_0.975": predictor.factor(workload, 0.975)}
        checks |= {
            f"{workload}: MAPE {held['mape_percent']:.2f}% <= 2.5%": held["mape_percent"] <= 2.5,
            f"{workload}: Spearman {held['spearman']:.4f} >= 0.99": held["spearman"] >= 0.99,
            f"{workload}: at most half of FLOPs and parameters' {proxy['mape_percent']:.2f}%": held[
                "mape_percent"
            ]
            <= proxy["mape_percent"] / 2,
            f"{workload}: the 30 span {held['span']:.1f}x >= 5x": held["span"] >= 5,
        }
    body = {"seconds": round(seconds, 1), "workloads": workloads, "problems": problems}
    return outcome.write("predictor", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(main())
