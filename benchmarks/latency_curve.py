"""Claim: whole models tell more about latency in a minute than stacks of copies of single ops.

On configs/spaces/quickstart.yaml and this machine: models as a profile chooses them, and stacks of every op
(two heights each), are timed in random order. The error on 40 other models is given against the minutes
that the timings took: from models alone, from stacks alone, and from both, where a stack's deviation from
what the models say is taken as its own error.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import outcome
from latency_self import SPACES
from numpy.typing import NDArray

from latency import OnnxRuntime, ProfileConfig
from latency.device_runner.timer import measure, pinned
from latency.predictor.design import ModelDesign, model_design
from latency.predictor.op_model import Observations, fit_op_model
from latency.predictor.terms import RUN, Point, as_ops, cache_size, caches, held_bytes, terms
from space import Architecture, Workload, load_space
from space.cost import op_held_bytes
from space.ops import Op, space_ops

Array = NDArray[np.float64]
WORKLOADS = (Workload.parse("prefill@256"), Workload.parse("decode@256"))
STACK_BYTES = 12 * 2**20  # that the taller stack of an op holds in decoding: more than a core's caches
HEIGHTS, MOST = (2, 5), 48
SIZES = (10, 20, 40, 60)
SHARES = (0.25, 0.5, 1.0)  # of the stacks
Row = tuple[dict[Point, float], float]  # counts of a run's terms, and its seconds


def heights(op: Op, workload: Workload, held: int) -> tuple[int, int]:
    """Two heights of an op's stack."""
    high = HEIGHTS[1] if workload.phase == "prefill" else int(np.clip(STACK_BYTES // max(held, 1), 5, MOST))
    return max(HEIGHTS[0], high // 3), high


def timed(design: ModelDesign, models: Sequence[Architecture], quick: bool) -> dict[str, Any]:
    """Time models and stacks of all ops; return rows by workload and source, and the minutes of each."""
    space, config = design.space, ProfileConfig(**({"min_rounds": 3, "max_rounds": 3} if quick else {}))
    runtime, found = OnnxRuntime(1), {}
    jobs: dict[str, list[tuple[str, Any]]] = {"models": [("model", a) for a in models], "stacks": []}
    for op in space_ops(space)[:: 6 if quick else 1]:
        jobs["stacks"].append(("stack", op))
    for source, items in jobs.items():
        rows: dict[Workload, list[Row]] = {w: [] for w in WORKLOADS}
        began = time.monotonic()
        for start in range(0, len(items), config.group):
            with pinned(1):
                runs, counts = {}, {}
                for i, (kind, item) in enumerate(items[start : start + config.group]):
                    if kind == "model":
                        for w, run in runtime.model(item, WORKLOADS, space.config, i).items():
                            runs[f"{i}|{w}"] = run
                            counts[f"{i}|{w}"] = w, {(t, w): n for t, n in terms(item, w, space).items()}
                        continue
                    for w in WORKLOADS:
                        for height in heights(item, w, op_held_bytes(item, w, space.config)):
                            name = f"{i}|{height}|{w}"
                            runs[name] = runtime.stack(item, height, [w], space.config)[w]
                            counts[name] = w, {(item, w): float(height), (RUN, w): 1.0}
                timings = measure(runs, runtime.anchors(), config.timer()).timings
            for name, (w, row) in counts.items():
                rows[w].append((row, timings[name].seconds))
        found[source] = rows, (time.monotonic() - began) / 60
    return found


def error(
    design: ModelDesign, workload: Workload, rows: Sequence[Row], noise: Array, test: Sequence[Row]
) -> float:
    """Mean relative error on models, in percent, after a fit to runs."""
    held = [held_bytes(a, workload, design.space.config) for a in design.population]
    sizes = caches(np.array(held, float)) if workload.phase == "decode" else ()
    kept = [{p: n for p, n in row.items() if cache_size(p[0]) in (None, *sizes)} for row, _ in (*rows, *test)]
    points = sorted({point for row in kept for point in row})
    ops, order = as_ops(points, design.space.config)
    matrix = np.array([[row.get(points[i], 0.0) for i in order] for row in kept])
    seconds = np.array([value for _, value in (*rows, *test)])
    count = len(rows)
    model = fit_op_model(Observations(ops, matrix[:count], seconds[:count], noise))
    predicted = matrix[count:] @ np.exp(model.log_seconds(ops))
    return 100 * float(np.abs(predicted / seconds[count:] - 1).mean())


def deviation(design: ModelDesign, workload: Workload, models: Sequence[Row], stacks: Sequence[Row]) -> Array:
    """Relative deviation of each stack's time from what the models say."""
    noise = np.full(len(models), 0.01)
    return np.array([error(design, workload, models, noise, [row]) / 100 for row in stacks])


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    space, rng = load_space(SPACES / "quickstart.yaml"), np.random.default_rng(0)
    config = ProfileConfig(held_out_models=6 if arguments.quick else 40)
    design = model_design(space, WORKLOADS, config.counts())
    sizes = SIZES[:1] if arguments.quick else SIZES
    chosen = design.choose(design.expected(), max(sizes))
    found = timed(design, [*chosen, *design.held_out], arguments.quick)
    fit, minutes = found["models"]
    stacks, stack_minutes = found["stacks"]
    per_model = minutes / (len(chosen) + len(design.held_out))
    curves: dict[str, Any] = {}
    for w in WORKLOADS:
        models, test = fit[w][: len(chosen)], fit[w][len(chosen) :]
        order = rng.permutation(len(stacks[w]) // 2)
        curve: dict[str, list[list[float]]] = {"models": [], "stacks": [], "both": []}
        for size in sizes:
            noise = np.full(size, 0.01)
            curve["models"].append([size * per_model, error(design, w, models[:size], noise, test)])
        for share in SHARES:
            some = [stacks[w][2 * i + j] for i in order[: max(1, int(share * len(order)))] for j in (0, 1)]
            noise = np.full(len(some), 0.01)
            curve["stacks"].append([share * stack_minutes, error(design, w, some, noise, test)])
        half = len(models) // 2
        off = deviation(design, w, models[:half], stacks[w])
        noise = np.concatenate([np.full(half, 0.01), np.maximum(off, 0.01)])
        both = error(design, w, [*models[:half], *stacks[w]], noise, test)
        curve["both"].append([half * per_model + stack_minutes, both])
        curves[str(w)] = {"minutes_and_mape_percent": curve, "deviation_of_stacks": float(np.median(off))}
        sys.stderr.write(f"{w}: {curve}\n")
    checks = {}
    for w, found_of in curves.items():
        curve = found_of["minutes_and_mape_percent"]
        best = min(value for _, value in curve["stacks"])
        ours = curve["models"][-1][1]
        checks[f"{w}: models alone {ours:.1f}%, stacks alone {best:.1f}%"] = ours < best
    return outcome.write("latency_curve", arguments, {"curves": curves}, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
