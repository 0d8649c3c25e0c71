"""Claim: latencies of held-out whole models are predicted within 2.5%, compared with a later process.

Profiles configs/spaces/small.yaml (six workloads, at most 15 minutes) and configs/spaces/quickstart.yaml
(two workloads, at most 2 minutes) on this machine, then starts a new process that builds 100 random models
of each space, measures each from end to end, and compares. Some of them are measured again in a second
session; the difference is the repeatability.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import outcome
from scipy.stats import kendalltau, spearmanr

from latency import OnnxRuntime, ProfileConfig, load_card, load_predictor
from latency.device_runner.timer import TimerConfig, measure, pinned
from latency.predictor.fit import proxy_predictions
from latency.profiling import profile
from latency.runtimes.reference import aa_difference, card_scale, reference_items
from space import Architecture, Workload, genome, load_space, variation

SPACES = Path(__file__).parents[1] / "configs" / "spaces"
SPACE = SPACES / "small.yaml"
WORKLOADS = {
    "small": ("prefill@64", "prefill@256", "prefill@512", "decode@64", "decode@512", "decode@2048"),
    "quickstart": ("prefill@256", "decode@256"),
}
BETWEEN = {"small": ("prefill@128", "decode@1024"), "quickstart": ()}  # lengths between the profiled ones
MINUTES = {"small": 15, "quickstart": 2}
NAME, COVERAGE, CONFIDENCE = "here", 0.9, 0.975
REPEATED = 20  # models measured again in a second session


def fit(name: str, devices: Path, quick: bool) -> dict[str, Any]:
    """Profile this machine; return the duration and the errors in the profiling run."""
    small = {
        "block_ms": 1.0, "min_rounds": 4, "max_rounds": 4, "error": 1.0, "held_out_models": 6,
        "repeated_models": 2, "max_noise": None, "max_error": None,
    }  # fmt: skip
    workloads = WORKLOADS[name][::3] if quick and name == "small" else WORKLOADS[name]
    config = ProfileConfig(
        workloads=workloads,
        **(small if quick else {"budget_minutes": float(MINUTES[name]), "max_noise": 0.1}),
    )
    began, last = time.monotonic(), [0.0]

    def report(what: str, share: float) -> None:
        if time.monotonic() - last[0] > 15:
            last[0] = time.monotonic()
            sys.stderr.write(f"{last[0] - began:5.0f} s  {what} ({share:.0%})\n")

    predictor = profile(load_space(SPACES / f"{name}.yaml"), devices, NAME, config, report)
    minutes = (time.monotonic() - began) / 60
    spent = devices / "minutes.json"  # total over interruptions
    minutes += json.loads(spent.read_text()) if spent.exists() else 0.0
    spent.write_text(json.dumps(minutes))
    card = load_card(devices, NAME)
    roles = card.table("models").groupby("role")["key"].nunique()
    return {
        "minutes": round(minutes, 2),
        "models": {str(role): int(count) for role, count in roles.items()},
        "profiling_run": {str(w): m.errors.to_json() for w, m in predictor.models.items() if m.errors},
        "seconds_per_mib_beyond_a_cache": {str(w): m.to_json()["cache_seconds_per_mib"]
                                           for w, m in predictor.models.items()},
        "memory": {str(w): vars(m.errors) for w, m in predictor.memory.items() if m.errors},
        "aa_difference_percent": 100 * (card.aa_difference or 0.0),
        "problems": card.problems,
    }  # fmt: skip


def measure_later(name: str, devices: Path, count: int, quick: bool) -> dict[str, Any]:
    """Measure random models end to end; return card seconds by workload and model."""
    space, card = load_space(SPACES / f"{name}.yaml"), load_card(devices, NAME)
    predictor = load_predictor(next((card.folder / "predictors").glob("*.json")), space, "profile")
    seen = set(card.table("models")["key"])
    drawn = genome.decode(space, variation.sample(space, np.random.default_rng(2026), 4 * count))
    models = [a for a in {a.key: a for a in drawn}.values() if a.key not in seen][:count]
    runtime = OnnxRuntime(1)
    rounds = 4 if quick else 60
    with pinned(1):
        items = {}
        for turn, some in enumerate((models, models[: REPEATED if not quick else 4])):
            for i, architecture in enumerate(some):
                workloads = list(predictor.models)
                if not turn and not quick and i < REPEATED:
                    workloads += map(Workload.parse, BETWEEN[name])
                made = runtime.model(architecture, workloads, space.config, 1000 * turn + i)
                items |= {f"{turn}|{architecture.key}|{w}": run for w, run in made.items()}
        timer = TimerConfig(block_ms=3.0, min_rounds=min(50, rounds), max_rounds=rounds)
        measured = measure({**items, **reference_items(runtime)}, runtime.anchors(), timer)
    scales = card_scale(card, 1, measured.timings)
    return {
        "models": [a.to_json() for a in models],
        "seconds": {
            item: scales[item.split("|")[2].split("@")[0]] * measured.timings[item].seconds for item in items
        },
        "half_width": float(np.median([t.half_width for t in measured.timings.values()])),
        "scale": scales,
        "aa_difference_percent": 100 * aa_difference(measured.timings),
        "problems": measured.machine_problems(),
    }


def compare(name: str, devices: Path, later: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compare predictions with the later measurements, by workload and pooled."""
    space, card = load_space(SPACES / f"{name}.yaml"), load_card(devices, NAME)
    predictor = load_predictor(next((card.folder / "predictors").glob("*.json")), space, "profile")
    rows = card.table("models")
    fitted = rows[rows["role"].isin(["optimal", "random"])]
    models = [Architecture.from_json(value) for value in later["models"]]
    genomes = genome.encode(space, models)
    table, thirds = {}, [{"inside": [], "below": [], "width": []} for _ in range(3)]
    for w in predictor.models:
        seconds = np.array([later["seconds"][f"0|{a.key}|{w}"] for a in models])
        again = np.array([later["seconds"].get(f"1|{a.key}|{w}", np.nan) for a in models])
        predicted = predictor.predict(genomes, w)
        low, high = predictor.interval(genomes, w, COVERAGE)
        upper = predictor.upper(genomes, w, CONFIDENCE)
        inside = (low <= seconds) & (seconds <= high)
        for third, places in zip(thirds, np.array_split(np.argsort(seconds), 3), strict=True):
            third["inside"] += inside[places].tolist()
            third["below"] += (seconds <= upper)[places].tolist()
            third["width"] += (100 * (upper / predicted - 1))[places].tolist()
        some = fitted[fitted["workload"] == str(w)]
        fit_models = [Architecture.from_json(json.loads(a)) for a in some["architecture"]]
        fit_seconds = some["seconds"].to_numpy()
        plain = proxy_predictions(space, w, genome.encode(space, fit_models), fit_seconds, genomes)
        off = np.abs(predicted / seconds - 1)
        table[str(w)] = {
            "mape_percent": 100 * float(off.mean()),
            "bias_percent": 100 * float(np.mean(predicted / seconds - 1)),
            "worst_percent": 100 * float(off.max()),
            "within_5_percent": float((off <= 0.05).mean()),
            "within_10_percent": float((off <= 0.10).mean()),
            "spearman": float(spearmanr(predicted, seconds).statistic),
            "kendall": float(kendalltau(predicted, seconds).statistic),
            "coverage_of_90_percent": float(inside.mean()),
            "mean_interval_width_percent": 100 * float(((high - low) / predicted).mean()),
            "flops_and_params_mape_percent": 100 * float(np.abs(plain / seconds - 1).mean()),
            "repeatability_mape_percent": 100 * float(np.nanmean(np.abs(again / seconds - 1))),
            "span": float(seconds.max() / seconds.min()),
        }
    pooled: dict[str, Any] = {
        column: float(np.mean([row[column] for row in table.values()]))
        for column in (
            "mape_percent", "within_5_percent", "within_10_percent", "flops_and_params_mape_percent",
            "repeatability_mape_percent", "coverage_of_90_percent", "mean_interval_width_percent",
        )
    }  # fmt: skip
    pooled["least_spearman"] = min(row["spearman"] for row in table.values())
    pooled["thirds_by_latency"] = [
        {
            "n": len(third["below"]),
            "coverage_of_90_percent": float(np.mean(third["inside"])),
            "upper_bounds_of_97.5_percent_that_hold": float(np.mean(third["below"])),
            "mean_width_of_upper_bounds_percent": float(np.mean(third["width"])),
        }
        for third in thirds
    ]
    between = {}
    for w in map(Workload.parse, BETWEEN[name]):
        some = [a for a in models if f"0|{a.key}|{w}" in later["seconds"]]
        if some:
            seconds = np.array([later["seconds"][f"0|{a.key}|{w}"] for a in some])
            off = predictor.predict(genome.encode(space, some), w) / seconds - 1
            between[str(w)] = {
                "models": len(some),
                "mape_percent": 100 * float(np.abs(off).mean()),
                "bias_percent": 100 * float(off.mean()),
            }
    return table, pooled | {"lengths_between": between}


def checked(name: str, minutes: float, pooled: dict[str, Any]) -> dict[str, bool]:
    """The goals of a space."""
    error, noise = pooled["mape_percent"], pooled["repeatability_mape_percent"]
    allowed = max(2.5, 1.2 * min(noise, 3.0))
    proxy, coverage = pooled["flops_and_params_mape_percent"], pooled["coverage_of_90_percent"]
    thirds = pooled["thirds_by_latency"]
    bounds = [third["upper_bounds_of_97.5_percent_that_hold"] for third in thirds]
    smallest = thirds[0]["coverage_of_90_percent"]
    return {
        f"{name}: profiling took {minutes} min <= {MINUTES[name]}": minutes <= MINUTES[name],
        f"{name}: MAPE in a later run {error:.2f}% <= {allowed:.1f}% (repeatability {noise:.2f}%)": error
        <= allowed,
        f"{name}: within 10% {pooled['within_10_percent']:.1%} >= 99%": pooled["within_10_percent"] >= 0.99,
        f"{name}: least Spearman {pooled['least_spearman']:.4f} >= 0.99": pooled["least_spearman"] >= 0.99,
        f"{name}: MAPE at most half of the {proxy:.1f}% from FLOPs and parameters": error <= proxy / 2,
        f"{name}: 90% intervals cover {coverage:.1%}, 85 to 95%": 0.85 <= coverage <= 0.95,
        f"{name}: and {smallest:.1%} of the smallest third, >= 80%": smallest >= 0.8,
        f"{name}: of the 97.5% bounds {', '.join(f'{b:.1%}' for b in bounds)} hold, 95 to 99.5%": all(
            0.95 <= b <= 0.995 for b in bounds
        ),
    }


def of_space(name: str, devices: Path, quick: bool) -> tuple[dict[str, Any], dict[str, bool]]:
    """Profile, measure in a later process, compare; return the results and the goals."""
    devices.mkdir(parents=True, exist_ok=True)
    fitted = fit(name, devices, quick)
    command = [sys.executable, __file__, "--later", "--space", name, "--devices", str(devices)]
    done = subprocess.run(command + ["--quick"] * quick, stdout=subprocess.PIPE, check=True, text=True)
    (devices / "later.json").write_text(done.stdout)
    later = json.loads(done.stdout)
    table, pooled = compare(name, devices, later)
    same_run = [errors["held_out"]["mape_percent"] for errors in fitted["profiling_run"].values()]
    pooled["profiling_run_mape_percent"] = float(np.mean(same_run))
    machine = {key: later[key] for key in ("half_width", "scale", "aa_difference_percent", "problems")}
    body = {"pooled": pooled, "later": table, "later_run": machine, "fit": fitted}
    return body, checked(name, fitted["minutes"], pooled)


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument("--devices", type=Path, help="folder of the cards [default: a temporary one]")
    parser.add_argument("--space", choices=[*WORKLOADS], help="one space only [default: both]")
    parser.add_argument("--later", action="store_true", help="measure only; used for the second process")
    arguments = parser.parse_args()
    count = 10 if arguments.quick else 100
    if arguments.later:
        found = measure_later(arguments.space, arguments.devices, count, arguments.quick)
        sys.stdout.write(json.dumps(found))
        return 0
    body, checks = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in [arguments.space] if arguments.space else WORKLOADS:
            devices = (arguments.devices or Path(temporary)) / name
            body[name], goals = of_space(name, devices, arguments.quick)
            checks |= goals
    return outcome.write("latency_self", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
