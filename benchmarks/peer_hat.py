"""Claim: in equal wall-clock time, formfit keeps more limits than HAT's method and delivers better models.

HAT (Wang et al. 2020) on formfit's space, supernet and device: as many random whole models are measured as
time allows, 10 runs each and the mean of the middle 80%; an MLP of three hidden layers of 400 learns their
latencies; for each limit HAT's evolution (125, of which 25 parents, 50 mutations, 50 crossovers) minimises
the loss among models that the MLP predicts to keep the limit. Two changes favour HAT: every gene is a
separate input instead of averages over layers, and the search runs for as long as time allows.

formfit: `formfit profile`, then `formfit search --verify` for each limit. HAT's measurements take as long as
the profile, and each of its searches as long as formfit's for that limit, with the same number of workers.
Both models are measured afterwards in the same way. `used` is the measured latency divided by the limit.

It needs a trained run, and resumes after an interruption (an hour on two cores):

    formfit train configs/small.yaml --out RUN
    python benchmarks/peer_hat.py --run RUN --runs runs/peer_hat
"""

import json
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import torch
from families import hat
from program import Program, bounds_between
from scipy.stats import trim_mean

from latency import load_card, load_predictor
from latency.runtimes.onnxruntime import OnnxRuntime
from search.config import open_run, open_supernet
from search.engine.config import VerifyConfig
from search.engine.supernet_evaluator import evaluator
from search.submodel.export import export
from search.submodel.verify import measure_submodel
from space import Architecture, Space, Workload, genome, variation
from space.io.artefact import write_text
from supernet.data.corpus import load_corpus
from supernet.evaluate import evaluation_set
from supernet.extract import write_submodel
from supernet.training.train import load_supernet
from supernet.training.trials import one_thread

WORKLOADS = tuple(Workload.parse(text) for text in ("prefill@1024", "decode@2048"))
LIMIT_POSITIONS = (0.35, 0.65)  # between the smallest latency and the largest model's, on a log scale
RUNS, TRIMMED_SHARE = 10, 0.1  # runs of a model, and the share discarded at either end
HELD_OUT = 0.1  # share of the measured models, for the MLP's error
POPULATION, POOL = 125, 50_000  # POOL: samples from which the initial population is selected
WINDOWS = {"search": 24, "front": 96}  # as in formfit search
WORKERS = 2

Array = np.ndarray


def measure_models(space: Space, seconds: float, path: Path) -> list[dict[str, Any]]:
    """Measure random models for a total time; return their latencies in seconds by workload."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    spent = rows[-1]["spent"] if rows else 0.0
    runtime = OnnxRuntime()
    wanted = genome.decode(space, variation.sample(space, np.random.default_rng(1), 20_000))[len(rows) :]
    began = time.monotonic()
    with path.open("a") as file:
        for i, architecture in enumerate(wanted):
            if rows and rows[-1]["spent"] >= seconds:
                break
            runs = runtime.model(architecture, WORKLOADS, space.config, seed=i)
            timed = {str(w): mean_latency(run) for w, run in runs.items()}
            row = {"architecture": architecture.to_json(), "seconds": timed}
            rows.append({**row, "spent": spent + time.monotonic() - began})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    return rows


def mean_latency(run: Callable[[int], None]) -> float:
    """Return the seconds of one call, as HAT measures it: the mean of the middle 80%."""
    run(3)
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        run(1)
        times.append(time.perf_counter() - began)
    return float(trim_mean(times, TRIMMED_SHARE))


def one_hot(space: Space, rows: Array) -> torch.Tensor:
    """Return genomes [N, G] in one-hot encoding [N, choices of all genes]."""
    values = np.arange(int(variation.sample(space, np.random.default_rng(2), 5000).max()) + 2)
    wide = (rows[:, :, None] == values).reshape(len(rows), -1)
    return torch.tensor(wide, dtype=torch.float32)


def fit_mlp(x: torch.Tensor, y: Array) -> tuple[Callable[[torch.Tensor], Array], float]:
    """Fit HAT's predictor; return it and its error on held-out models in percent."""
    torch.manual_seed(0)
    scale = float(y.mean())
    target = torch.tensor(y / scale, dtype=torch.float32)
    held = max(1, int(HELD_OUT * len(y)))
    sizes = [x.shape[1], 400, 400, 400]
    hidden = [m for a, b in pairwise(sizes) for m in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    net = torch.nn.Sequential(*hidden, torch.nn.Linear(400, 1))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4)
    steps = 1500
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        some = torch.randint(held, len(y), (128,))
        loss = ((net(x[some])[:, 0] - target[some]) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()

    def predict(rows: torch.Tensor) -> Array:
        with torch.no_grad():
            return scale * net(rows)[:, 0].double().numpy()

    error = 100 * float(np.abs(predict(x[:held]) / y[:held] - 1).mean())
    return predict, error


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return a file's JSON value; compute and write it if the file does not exist."""
    if not path.exists():
        write_text(path, json.dumps(make(), indent=1))
    return json.loads(path.read_text())


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a trained run of configs/small.yaml")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/peer_hat"), help="folder of intermediate results"
    )
    parser.add_argument(
        "--devices", type=Path, help="folder with a card of this device [default: a new profile]"
    )
    parser.add_argument("--device", default="here")
    parser.add_argument("--minutes", type=float, help="duration of the profile of the card in --devices")
    parser.add_argument("--max-noise", type=float, default=10.0, help="as for formfit search")
    parser.add_argument("--done", action="store_true", help="only limits that are already measured")
    arguments = parser.parse_args()
    if (arguments.devices is None) != (arguments.minutes is None):
        raise SystemExit("--devices and --minutes: give both or none")
    runs, quick = arguments.runs, arguments.quick
    runs.mkdir(parents=True, exist_ok=True)
    devices = arguments.devices or runs / "devices"
    run = open_run(arguments.run, devices)
    space = run.space
    program = Program(run.folder, devices, arguments.device, arguments.max_noise)

    def profile() -> float:
        """Profile, and return the seconds that it took."""
        began = time.monotonic()
        program.profile(space, runs, WORKLOADS, *(("--budget", "1m") if quick else ()))
        return time.monotonic() - began

    given = arguments.minutes and 60 * arguments.minutes
    seconds = given or kept(runs / "profile.json", profile)
    card = load_card(devices, arguments.device)
    predictor = load_predictor(
        card.predictor_path(space.name, "onnxruntime", 1, "fp32"), space, "formfit profile"
    )
    corpus = load_corpus(run.config.train.data)
    supernet = load_supernet(space, open_supernet(run, corpus))
    sets = {name: evaluation_set(corpus, n, run.text.length) for name, n in WINDOWS.items()}

    models = measure_models(space, seconds, runs / "measured.jsonl")
    rows = genome.encode(space, [Architecture.from_json(m["architecture"]) for m in models])

    @cache
    def fitted(workload: Workload) -> tuple[Callable[[torch.Tensor], Array], float]:
        """Return HAT's predictor of a workload and its error; the error is stored."""
        with one_thread():
            latencies = np.array([m["seconds"][str(workload)] for m in models])
            predict, error = fit_mlp(one_hot(space, rows), latencies)
        write_text(runs / f"mlp-{workload.phase}.json", json.dumps(error))
        return predict, error

    def ours(workload: Workload, bound: float) -> dict[str, Any]:
        """Return formfit's delivered model and the duration of its search."""
        limit = f"{workload}<={1e3 * bound:.5g}ms"
        few = ("--generations", 2, "--population", 8) if quick else ()
        began = time.monotonic()
        name = f"peer-{workload.phase}-{1e3 * bound:.5g}"
        found = program.search(name, workload, limit, "--workers", WORKERS, *few, *program.proof)
        chosen = found["measured_search"]["chosen"]
        return {"architecture": chosen["architecture"], "search_seconds": time.monotonic() - began}

    def theirs(workload: Workload, bound: float, seconds: float) -> dict[str, Any]:
        """Return the best model of HAT's evolution within that time."""
        predict, _ = fitted(workload)  # the minutes of training are not counted
        drawn = variation.sample(space, np.random.default_rng(3), POOL)
        pool = drawn[np.argsort(predict(one_hot(space, drawn)))[:POPULATION]]
        began, evaluations = time.monotonic(), 0
        with evaluator(supernet, sets, WORKERS, None, sys.stderr.write) as evaluate_many:

            def losses(members: list[Architecture]) -> Array:
                nonlocal evaluations
                evaluations += len(members)
                return np.array([getattr(q, "loss_nats", np.inf) for q in evaluate_many(members, "search")])

            def more(done: int) -> bool:
                each = (time.monotonic() - began) / max(done, 1)
                return done == 0 or time.monotonic() - began + each <= seconds

            def latency(members: list[Architecture]) -> Array:
                return predict(one_hot(space, genome.encode(space, members)))

            best = hat(space, latency, losses, bound, 8 if quick else POPULATION, more, pool)
        return {
            "architecture": best.to_json(),
            "search_seconds": time.monotonic() - began,
            "evaluations": evaluations,
            "predicted_ms": 1e3 * float(latency([best])[0]),
        }

    def judged(found: dict[str, Any], workload: Workload, bound: float) -> dict[str, Any]:
        """Return a model's measured latency and its loss in the supernet."""
        architecture = Architecture.from_json(found["architecture"])
        submodel = write_submodel(runs / "submodels" / architecture.key, supernet, architecture, {}, {})
        export(submodel, ["onnx"])
        config = VerifyConfig(max_noise=arguments.max_noise / 100)
        timed = measure_submodel(submodel, card, [workload], config)[str(workload)].latency_ms
        with evaluator(supernet, sets, 0, None, sys.stderr.write) as evaluate_many:
            quality = next(iter(evaluate_many([architecture], "front")))
        return {"measured_ms": timed, "used": timed / 1e3 / bound, "loss_nats": quality.loss_nats}

    asked = [
        (w, place)
        for place in LIMIT_POSITIONS[: 1 if quick else None]
        for w in WORKLOADS[: 1 if quick else None]
    ]
    table = []
    for workload, place in asked:
        name = f"{workload}-{place}".replace("@", "-")
        if arguments.done and not (runs / f"{name}-HAT-measured.json").exists():
            continue
        (bound,) = bounds_between(space, predictor, workload, [place])
        found = {"formfit": kept(runs / f"{name}-formfit.json", partial(ours, workload, bound))}
        spent = found["formfit"]["search_seconds"]
        found["HAT"] = kept(runs / f"{name}-HAT.json", partial(theirs, workload, bound, spent))
        for who, one in found.items():
            path = runs / f"{name}-{who}-measured.json"
            one |= kept(path, partial(judged, dict(one), workload, bound))
        table.append({"limit": f"{workload}<={1e3 * bound:.5g}ms", **found})
        said = [f"{who} {100 * x['used']:.1f}% used, {x['loss_nats']:.4f} nats" for who, x in found.items()]
        sys.stderr.write(f"{table[-1]['limit']}: {'; '.join(said)}\n")
    errors = {str(w): json.loads((runs / f"mlp-{w.phase}.json").read_text()) for w in {w for w, _ in asked}}
    count = {who: sum(row[who]["used"] <= 1 for row in table) for who in ("formfit", "HAT")}
    used = {who: float(np.mean([100 * min(row[who]["used"], 1) for row in table])) for who in count}
    worst = {who: 100 * (max(row[who]["used"] for row in table) - 1) for who in count}
    both = [row for row in table if max(row[who]["used"] for who in count) <= 1]
    checks = {
        f"measured {len(table)} of {len(asked)} limits": len(table) == len(asked),
        f"formfit keeps {count['formfit']} of {len(table)} limits, HAT {count['HAT']}":
            count["formfit"] >= count["HAT"],
        f"largest excess over a limit {max(worst['formfit'], 0):.1f}% <= 3%, HAT {worst['HAT']:.1f}%":
            worst["formfit"] <= 3,
    }  # fmt: skip
    if both:  # losses are comparable only if both models keep the limit
        lower = sum(row["formfit"]["loss_nats"] < row["HAT"]["loss_nats"] for row in both)
        text = f"lower loss than HAT in {lower} of the {len(both)} limits that both keep"
        checks[text] = 2 * lower >= len(both)
    body = {
        "measuring_minutes": seconds / 60,
        "models_measured": len(models),
        "mlp_error_percent": errors,
        "kept": count,
        "used_percent": used,
        "worst_over_percent": worst,
        "limits": table,
    }
    return outcome.write("peer_hat", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
