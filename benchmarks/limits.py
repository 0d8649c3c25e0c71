"""Claim: delivered models keep their limits when a new process measures them.

20 limits, evenly spaced on a logarithmic scale over the range of configs/spaces/small.yaml on this machine,
ten on prefill@256 and ten on decode@256. For each limit: `formfit search --verify`; then `formfit verify` in
new processes for the best member of the first front (the result of a search without measurement) and for the
delivered model. `used` is the measured latency divided by the limit.

It needs a trained run and a card profiled for its space, and resumes after an interruption:

    formfit run configs/small.yaml --out RUN
    python benchmarks/limits.py --run RUN --devices devices --device here --runs runs/limits
"""

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import outcome
from program import Program

from latency import load_predictor
from search.config import load_run_config
from search.engine.config import SearchConfig
from search.problem.milp import least
from space import Workload, variation

WORKLOADS = ("prefill@256", "decode@256")
FEW_GENERATIONS = ("--generations", "8")  # the benchmark is about limits, not losses


def measured(program: Program, key: str, workload: str, folder: Path) -> dict[str, Any]:
    """Measure a search's sub-model in a new process."""
    shutil.copytree(program.run / "submodels" / key, folder, dirs_exist_ok=True)
    found = program("verify", folder, "--device", program.device, "--max-noise", program.noise, may_miss=True)
    shutil.rmtree(folder)
    limit = found["limits"][0]
    timing = found["latency"][workload]
    return {
        "key": key,
        "predicted_ms": timing["predicted_latency_ms"],
        "measured_ms": timing["measured_latency_ms"],
        "used": limit["used"],
        "kept": limit["status"] == "kept",
    }


def chosen_limits(program: Program, count: int) -> list[tuple[str, float]]:
    """Return (workload, milliseconds) from 1.1 times the smallest to 0.9 of the largest sampled latency."""
    space = load_run_config(program.run / "config.yaml").space
    path = program.devices / program.device / "predictors" / f"{space.name}-onnxruntime-t1-fp32.json"
    predictor = load_predictor(path, space, "formfit profile")
    rows = variation.sample(space, np.random.default_rng(0), 20_000)
    found: list[list[tuple[str, float]]] = []
    for text in WORKLOADS:
        workload = Workload.parse(text)
        low = least(space, predictor.cost(workload, SearchConfig().confidence))[0]
        high = predictor.predict(rows, workload).max()
        ends = np.geomspace(1.1 * low, 0.9 * high, count // len(WORKLOADS))
        found.append([(text, 1e3 * float(value)) for value in ends])
    return [limit for both in zip(*found, strict=True) for limit in both]  # alternating workloads


def one(program: Program, workload: str, bound: float) -> dict[str, Any]:
    """Search under one limit and measure afterwards."""
    limit = f"{workload}<={bound:.5g}ms"
    name = re.sub("[^A-Za-z0-9.]+", "-", limit)
    began = time.monotonic()
    program.search(name, workload, limit, "--workers", 0, *FEW_GENERATIONS, *program.proof)
    seconds = time.monotonic() - began
    folder = program.run / "searches" / name
    first = json.loads((folder / "front.json").read_text())
    measured_search = json.loads((folder / "measured_search.json").read_text())
    best = min(first["members"], key=lambda m: m["loss_nats"])["key"]
    temporary = folder / "measured"
    return {
        "limit": limit,
        "search_seconds": round(seconds, 1),
        "rounds": len(measured_search["rounds"]),
        "kept_in_search": measured_search["kept"],
        "used_in_search": measured_search["chosen"]["used"],
        "first_front": measured(program, best, workload, temporary),
        "delivered": measured(program, measured_search["chosen"]["key"], workload, temporary),
    }


def summary(rows: list[dict[str, Any]], which: str) -> dict[str, Any]:
    """Return how many limits were kept, and the used share of the limits."""
    used = np.array([row[which]["used"] for row in rows])
    spent = np.minimum(used, 1)  # exceeding a limit does not count as using more of it
    return {
        "kept": int((used <= 1).sum()),
        "worst_over_percent": 100 * max(0.0, float(used.max()) - 1),
        "mean_used_percent": 100 * float(spent.mean()),
        "least_used_percent": 100 * float(spent.min()),
        "used_93_percent": int((spent >= 0.93).sum()),
    }


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a trained run")
    parser.add_argument("--devices", type=Path, default=Path("devices"))
    parser.add_argument("--device", default="here")
    parser.add_argument("--max-noise", type=float, default=10.0, help="as for formfit search")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/limits"), help="folder of intermediate results"
    )
    parser.add_argument("--done", action="store_true", help="only limits that are already measured")
    arguments = parser.parse_args()
    program = Program(arguments.run, arguments.devices, arguments.device, arguments.max_noise)
    count = 4 if arguments.quick else 20
    rows = []
    arguments.runs.mkdir(parents=True, exist_ok=True)
    for workload, bound in chosen_limits(program, count):
        path = arguments.runs / f"{workload}-{bound:.5g}.json"
        if not path.exists():
            if arguments.done:
                continue
            path.write_text(json.dumps(one(program, workload, bound), indent=1))
        rows.append(json.loads(path.read_text()))
        row = rows[-1]
        sys.stderr.write(
            f"{row['limit']}: first front {100 * row['first_front']['used']:.1f}%, in the search "
            f"{100 * row['used_in_search']:.1f}%, delivered {100 * row['delivered']['used']:.1f}%, "
            f"{row['rounds']} rounds, {row['search_seconds']:.0f} s\n"
        )
    asked, count = count, len(rows)
    first, delivered = summary(rows, "first_front"), summary(rows, "delivered")
    kept, over, used = (delivered[name] for name in ("kept", "worst_over_percent", "mean_used_percent"))
    checks = {
        f"measured {count} of {asked} limits": count == asked,
        f"{kept} of {count} kept (first front: {first['kept']}), at least 19 of 20": kept >= 0.95 * count,
        f"largest excess {over:.1f}% <= 3%": over <= 3,
        f"{used:.1f}% of the limit used on average >= 93": used >= 93,
    }
    body = {"first_front": first, "delivered": delivered, "limits": rows}
    return outcome.write("limits", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
