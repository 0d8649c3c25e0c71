"""Claim: searched models are better than baselines at equal latency and training.

On configs/spaces/small.yaml, for two limits each on prefill@1024 and decode@2048, the architecture that
`formfit search --verify` delivers is compared with: the Transformer, the 3:1 and 6:1 GatedDeltaNet hybrids
and the all-linear model (each the best by supernet loss of the uniform models whose latency is from the
searched one's up to a tenth more), the best model of random search at the same number of evaluations, and
HAT's single-objective search in the subspace of attention. All are trained from scratch on the same tokens,
MQAR sequences included, for each seed, in Ray Tune trials; differences are paired by seed. Every model is
then measured on the device.

In addition, without training: the front of a search without a limit, and the front of each baseline family,
in supernet loss and predicted latency.

It needs a trained run, and resumes after an interruption (an hour and a half on two cores; --quick a quarter
of an hour):

    formfit train configs/small.yaml --out RUN
    python benchmarks/headline.py --run RUN --devices devices --device here --runs runs/headline
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import outcome
from families import FULL, attention_space, hat, scalings, uniform
from onnx import load_model
from program import Program, bounds_between

from latency import Predictor, load_card, load_predictor
from latency.runtimes.onnx_graphs import graph_io_binding
from latency.runtimes.rss import session_rss
from search.cli.output import Bars
from search.config import Run, open_run, open_supernet
from search.engine.config import VerifyConfig
from search.strategies.pareto import non_dominated
from search.submodel.export import export
from search.submodel.verify import measure_submodel
from space import Architecture, Space, Workload, genome
from space.cost import memory_bytes, params
from space.io.artefact import write_text
from space.io.progress import Reporter
from space.precision import model_file
from supernet.data.corpus import Corpus, load_corpus
from supernet.evaluate import EvaluationSet, evaluate, evaluation_set, losses, mqar_accuracy
from supernet.extract import write_submodel
from supernet.supernet import Supernet
from supernet.training.recipe import TrainConfig
from supernet.training.train import load_stand_alone, load_supernet, train
from supernet.training.trials import Share, one_thread, remove_checkpoints, run_trials

WORKLOADS = ("prefill@1024", "decode@2048")
LIMIT_POSITIONS = (0.35, 0.65)  # between the smallest latency and the largest model's, on a log scale
# (population, generations) of a search under a limit, of the search for the front, and of the quick version.
SIZE, FRONT_SIZE, QUICK_SIZE = (32, 12), (48, 20), (8, 2)
RECALL = 0.1  # the share of MQAR rows in the trainings from scratch
BEST, RANDOM = "searched", "random search"
LOSSES = ("loss_nats", "recall_loss_nats")


@dataclass(frozen=True)
class Job:
    """One training from scratch."""

    architecture: Architecture
    config: TrainConfig
    folder: Path


def train_job(job: Job, shared: tuple[Space, Corpus, EvaluationSet], tell: Share) -> None:
    """Train, and write the losses on held-out text and the MQAR accuracy to result.json."""
    space, corpus, data = shared
    with one_thread():
        report: Callable[[Mapping[str, Any]], None] = lambda row: tell(row["step"] / row["steps"])  # noqa: E731
        checkpoint = train(space, job.config, job.folder, report, corpus, job.architecture)
        weights = dict(load_stand_alone(space, checkpoint, job.architecture).named_parameters())
        found = losses(evaluate(weights, job.architecture, space.config, data))
        accuracy = mqar_accuracy(weights, job.architecture, space.config, length=64, vocab_size=256)
    write_text(job.folder / "result.json", json.dumps({**found, "mqar_accuracy": accuracy}))
    remove_checkpoints(job.folder)


class Headline:
    """The benchmark on one run and device, with intermediate results in a folder."""

    def __init__(self, run: Run, program: Program, runs: Path, noise: float, quick: bool) -> None:
        self.run, self.program, self.runs, self.noise, self.quick = run, program, runs, noise, quick
        self.card = load_card(run.devices, program.device)
        path = self.card.predictor_path(run.space.name, "onnxruntime", run.config.profile.threads, "fp32")
        self.predictor: Predictor = load_predictor(path, run.space, "formfit profile")
        self.corpus = load_corpus(run.config.train.data)
        self.supernet: Supernet = load_supernet(run.space, open_supernet(run, self.corpus))
        self.data = evaluation_set(self.corpus, run.config.search.windows, run.text.length)
        self.known: dict[str, float] = {}  # losses by key

    def loss(self, architecture: Architecture) -> float:
        """Return an architecture's loss inside the supernet."""
        if architecture.key not in self.known:
            weights = self.supernet.weights(architecture)
            with one_thread():
                found = evaluate(weights, architecture, self.run.space.config, self.data)
            self.known[architecture.key] = found.loss_nats
        return self.known[architecture.key]

    def losses(self, members: list[Architecture]) -> np.ndarray:
        """Return losses inside the supernet."""
        return np.array([self.loss(a) for a in members])

    def seconds(self, workload: Workload) -> Callable[[list[Architecture]], np.ndarray]:
        """Return a function that predicts latencies in seconds."""
        cost = self.predictor.cost(workload)
        return lambda members: cost(genome.encode(self.run.space, members))

    def bounds(self, workload: Workload) -> list[float]:
        """Return the limits in seconds; stored after the first call."""
        path = self.runs / f"limits-{workload}.json".replace("@", "-")
        if not path.exists():
            places = LIMIT_POSITIONS[:1] if self.quick else LIMIT_POSITIONS
            write_text(path, json.dumps(bounds_between(self.run.space, self.predictor, workload, places)))
        return [float(bound) for bound in json.loads(path.read_text())]

    def search(self, workload: Workload, limit: str, strategy: str, size: tuple[int, int]) -> dict[str, Any]:
        """Search with a population and generations; formfit's own strategy measures its finalists."""
        name = re.sub("[^A-Za-z0-9.]+", "-", f"{strategy}-{limit}")
        proof = self.program.proof if strategy == BEST else ()
        how = ("--strategy", "random" if strategy == RANDOM else "nsga2", "--workers", 2)
        sized = ("--population", size[0], "--generations", size[1])
        return self.program.search(name, workload, limit, *how, *sized, *proof)

    def fronts(self, workload: Workload) -> dict[str, list[list[float]]]:
        """Return the front of each origin as pairs of predicted milliseconds and supernet loss."""
        path = self.runs / f"fronts-{str(workload).replace('@', '-')}.json"
        if not path.exists():
            size = QUICK_SIZE if self.quick else FRONT_SIZE
            front = self.search(workload, f"{workload}<=100%", "front", size)
            members = [Architecture.from_json(m["architecture"]) for m in front["members"]]
            found = {BEST: self.front(members, workload)}
            for family in FULL:
                found[family] = self.front(uniform(self.run.space, family), workload)
            write_text(path, json.dumps(found))
        return dict(json.loads(path.read_text()))

    def front(self, members: list[Architecture], workload: Workload) -> list[list[float]]:
        """Return the non-dominated points of some models."""
        some = members[:: 40 if self.quick else 1]
        points = np.column_stack([1e3 * self.seconds(workload)(some), self.losses(some)])
        kept = points[non_dominated(points)]
        return [[round(float(value), 5) for value in row] for row in kept[np.argsort(kept[:, 0])]]

    def contestants(self, workload: Workload, bound: float) -> dict[str, Architecture]:
        """Return the models of a setting by origin; stored after the first call."""
        limit = f"{workload}<={1e3 * bound:.5g}ms"
        path = self.runs / f"{limit.replace('<=', '-')}.json"
        if path.exists():
            return {k: Architecture.from_json(v) for k, v in json.loads(path.read_text()).items()}
        population, generations = QUICK_SIZE if self.quick else SIZE
        measured_search = self.search(workload, limit, BEST, (population, generations))["measured_search"]
        chosen = measured_search["chosen"]
        found = {BEST: Architecture.from_json(chosen["architecture"])}
        predicted = float(self.seconds(workload)([found[BEST]])[0])
        least = max(predicted, 1e-3 * chosen["latency_ms"][str(workload)])
        for family in FULL:
            members = uniform(self.run.space, family)
            found[family] = min(scalings(members, self.seconds(workload)(members), least), key=self.loss)
        spent = sum(one["evaluations"] for one in measured_search["rounds"])
        best = self.search(workload, limit, RANDOM, (population, -(-spent // population)))
        rows = {m["key"]: m for m in best["members"]}
        found[RANDOM] = Architecture.from_json(rows[best["picks"]["best"]]["architecture"])
        part = attention_space(self.run.space)
        found["HAT"] = hat(
            part, self.seconds(workload), self.losses, bound, population, lambda done: done < generations
        )
        write_text(path, json.dumps({name: a.to_json() for name, a in found.items()}))
        return found

    def trained(
        self, members: list[Architecture], seeds: int, steps: int, reporter: Reporter
    ) -> dict[str, Any]:
        """Train stand-alone; return a list of one result per seed, by key."""
        base = self.run.config.train
        data = base.data.model_copy(update={"recall": RECALL})
        config = base.model_copy(
            update={
                "data": data,
                "steps": steps,
                "threads": 1,
                "workers": 0,
                "init": None,
                "checkpoint_every": 100,
            }
        )
        corpus = load_corpus(data)
        judged = evaluation_set(corpus, self.run.text.windows, self.run.text.length)
        jobs = [
            Job(
                architecture=a,
                config=config.model_copy(update={"seed": base.seed + 1 + i}),
                folder=(self.runs / "trained" / f"{a.key}-s{i}-{steps}").resolve(),
            )
            for a in members
            for i in range(seeds)
        ]
        left = [job for job in jobs if not (job.folder / "result.json").exists()]
        if left:
            left.sort(key=lambda job: -params(job.architecture, self.run.space.config))
            with reporter.stage(f"train {len(left)} of {len(jobs)} from scratch") as stage:
                shared = (self.run.space, corpus, judged)
                failures = run_trials(train_job, left, shared, 2, self.runs / "tune", stage)
            failed = [f.reason for f in failures if f]
            if failed:
                raise SystemExit(f"{len(failed)} trainings failed: {failed[0]}")
        found: dict[str, Any] = {}
        for job in jobs:
            found.setdefault(job.architecture.key, []).append(
                json.loads((job.folder / "result.json").read_text())
            )
        return found

    def measured(self, architecture: Architecture, workloads: list[Workload]) -> dict[str, Any]:
        """Return measured latencies in ms and peak bytes by workload; stored after the first call."""
        path = self.runs / "measured" / f"{architecture.key}.json"
        if not path.exists():
            submodel = write_submodel(
                self.runs / "submodels" / architecture.key, self.supernet, architecture, {}, {}
            )
            export(submodel, ["onnx"])
            config = VerifyConfig(max_noise=self.noise / 100, copies=1 if self.quick else 3)
            timed = measure_submodel(submodel, self.card, workloads, config)
            file, ends = model_file(submodel.folder), (architecture.width, architecture.layers)
            graph = load_model(file)
            found = {
                str(w): {
                    "latency_ms": timed[str(w)].latency_ms,
                    "interval_ms": list(timed[str(w)].interval_ms),
                    "rss_bytes": session_rss(
                        file, graph_io_binding(graph, w, submodel.model_config, *ends), w.threads
                    ),
                }
                for w in workloads
            }
            write_text(path, json.dumps(found))
        return dict(json.loads(path.read_text()))


def compared(rows: Mapping[str, Any], name: str, figure: str) -> dict[str, float]:
    """Return mean and standard error of the difference from the searched model, paired by seed."""
    pairs = zip(rows[name]["seeds"], rows[BEST]["seeds"], strict=True)
    differences = np.array([other[figure] - searched[figure] for other, searched in pairs])
    count = len(differences)
    error = float(differences.std(ddof=1) / np.sqrt(count)) if count > 1 else float("inf")
    return {"mean": float(differences.mean()), "standard_error": error}


def beaten(row: Mapping[str, Any]) -> bool:
    """Return True if a model is worse in both losses by more than the standard error."""
    return all(apart["mean"] > apart["standard_error"] for apart in row["worse_by"].values())


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a trained run of configs/small.yaml")
    parser.add_argument("--devices", type=Path, default=Path("devices"))
    parser.add_argument("--device", default="here")
    parser.add_argument("--max-noise", type=float, default=10.0, help="as for formfit search")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/headline"), help="folder of intermediate results"
    )
    parser.add_argument("--steps", type=int, help="of each training [default: 400, quick 20]")
    parser.add_argument("--seeds", type=int, help="[default: 2, quick 1]")
    arguments = parser.parse_args()
    quick = arguments.quick
    steps, seeds = arguments.steps or (20 if quick else 400), arguments.seeds or (1 if quick else 2)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    run = open_run(arguments.run, arguments.devices)
    program = Program(run.folder, run.devices, arguments.device, arguments.max_noise)
    few = ("--budget", "2m") if quick else ()
    program.profile(run.space, arguments.runs, WORKLOADS[: 1 if quick else None], *few)
    headline = Headline(run, program, arguments.runs, arguments.max_noise, quick)
    settings, fronts = [], {}
    for text in WORKLOADS[: 1 if quick else None]:
        workload = Workload.parse(text)
        fronts[text] = headline.fronts(workload)
        for bound in headline.bounds(workload):
            settings.append((workload, bound, headline.contestants(workload, bound)))
    sys.stderr.write("".join(
        f"{w}<={1e3 * bound:.4g}ms {name}: {1e3 * headline.seconds(w)([a])[0]:.4g} ms, "
        f"{headline.loss(a):.4f} in the supernet, {a.describe()}\n"
        for w, bound, found in settings for name, a in found.items()
    ))  # fmt: skip
    everyone = list(dict.fromkeys(a for _, _, found in settings for a in found.values()))
    reached = headline.trained(everyone, seeds, steps, Bars())
    workloads = list(dict.fromkeys(workload for workload, _, _ in settings))
    latencies = {a.key: headline.measured(a, workloads) for a in everyone}
    table = []
    for workload, bound, found in settings:
        rows = {
            name: {
                "key": a.key, "architecture": a.to_json(), "described": a.describe(),
                "params": params(a, run.space.config),
                **latencies[a.key][str(workload)],
                "memory_bytes": memory_bytes(a, workload, run.space.config),
                "seeds": reached[a.key],
                **{f: float(np.mean([r[f] for r in reached[a.key]])) for f in reached[a.key][0]},
            }
            for name, a in found.items()
        }  # fmt: skip
        for name in rows:
            if name != BEST:
                rows[name]["worse_by"] = {f: compared(rows, name, f) for f in LOSSES}
        won = all(beaten(rows[name]) for name in FULL)
        table.append({"workload": str(workload), "limit_ms": 1e3 * bound, "models": rows, "won": won})
    needed = 0 if quick else 3  # one seed of twenty steps is not significant
    wins = sum(setting["won"] for setting in table)
    text = f"lower in both losses than every baseline, by more than the standard error, in {wins} of "
    checks = {f"{text}{len(table)} settings >= {needed}": wins >= needed}
    body = {
        "training": {"steps": steps, "seeds": seeds, "length": run.text.length, "recall_share": RECALL,
                     "batch": run.config.train.batch},
        "settings": table,
        "fronts": fronts,
    }  # fmt: skip
    return outcome.write("headline", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
