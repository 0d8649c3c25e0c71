"""Claims: evaluation scales to 4 workers at 90% efficiency; evolution scales with its architectures.

Evaluators that sleep for a known time (four of them need at most two cores) reach a parallel efficiency of
90% with 1, 2 and 4 Ray workers; a simulation of the pool predicts their time within 10%. The operations of
evolution scale with an exponent of at most 1.2 up to a million architectures per call, except for sorting a
population that grows as well. A simulated profile of a 7B-like space needs no more timings than one of
configs/spaces/small.yaml. PLAN estimates the cost of a 7B supernet on 64 GPUs from these numbers and from
assumptions: see docs/scale.md.
"""

import os
import tempfile
import time
import timeit
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from math import log, prod
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import ray
from driver import refused
from threadpoolctl import threadpool_limits

from latency.config import ProfileConfig
from latency.predictor.bounds import Spread
from latency.predictor.design import MODEL_RUNS, MODEL_SECONDS, model_design
from latency.predictor.op_latencies import OpLatencies, TimedModel, fit_op_latencies
from latency.predictor.predictor import Predictor
from latency.predictor.workload_model import WorkloadModel
from latency.profiling import CHOSEN_PER_FIT
from latency.runtimes.protocol import random_weights
from search.engine.config import SearchConfig, make_problem
from search.engine.search import Search
from search.engine.supernet_evaluator import SupernetEvaluator
from search.engine.workers import pool
from search.problem.feasibility import check_feasible
from search.problem.limit import Constraint, Limit
from search.problem.milp import least
from search.strategies.pareto import non_dominated, survivors
from search.strategies.strategy import Task, unseen
from search.strategies.surrogate import Surrogate
from space import Architecture, InfeasibleError, Space, Workload, genome, load_space, variation
from space.cost import flops_table, op_activation_bytes, op_flops, op_held_bytes, params_cost
from space.ops import Cost, Footprint, OpTables, count_ops, space_ops
from supernet.evaluate import EvaluationSet, Quality
from supernet.supernet import Supernet, supernet_shapes
from supernet.training.parallel import ray_session
from supernet.training.recipe import TrainConfig, step_subnets

SMALL = load_space(Path(__file__).parents[1] / "configs" / "spaces" / "small.yaml")
PHASES = ("prefill@64", "prefill@256", "prefill@2048", "decode@64", "decode@256", "decode@2048")
DEVICES = {"small": (5e10, 1e10), "seven-b": (0.6 * 67e12, 0.7 * 3.35e12)}  # FLOP/s, bytes/s: core, H100
LARGE: dict[str, Any] = {
    "name": "seven-b", "vocab_size": 32000, "max_seq_len": 4096,
    "head_dim": 128, "kv_group": 4, "window": [1024],
    "width": [2048, 2560, 3072, 3584, 4096], "depth": [16, 20, 24, 28, 32],
    "heads": [16, 20, 24, 28, 32], "ffn": [4096, 5632, 8192, 11008, 14336],
}  # fmt: skip
MIDDLE = {"width": [256, 512], "heads": [4, 8], "ffn": [1024, 2048], "depth": [4, 8], "vocab_size": 256}
PLAN = """
gpus              = 64                  # the question
node              = 8                   # GPUs: DGX H100
speed             = 0.4 * 989e12        # FLOP/s: H100 datasheet, dense bf16; 40% assumed (Llama 3: 38 to 43%)
between           = 50e9                # bytes/s per GPU between nodes: DGX H100, 400 Gb/s
within            = 450e9               # bytes/s per GPU each way in a node: H100 datasheet, NVLink
rows              = 8192                # tokens of a sub-network's batch per GPU: assumed
tokens            = 9 * 20 * params_largest  # 9 sub-networks; 20 per parameter: Hoffmann et al. 2022
short             = 94e9                # tokens: Minitron from 15B to 8B (Muralidharan et al. 2024)
flop              = 3 * forward_recipe  # per token: forward, and twice that backward
days              = flop * tokens / (gpus * speed) / 86400
short_hours       = flop * short / (gpus * speed) / 3600
state             = (4 + 4 + 8 + 2) * supernet         # bytes: weights, gradient, two moments, bf16 cast
state_shared      = (4 + 4 + 8 + 2) * supernet_shared  # with sharing: qkvo
activations       = rows * (32 * 2 * 4 * 4096 + 2 * widest + 3 * 4 * 32000)  # blocks' inputs, a block, logits
compute           = flop * rows / speed  # s, of one sub-network's update
within_node       = (2 + 2 + 4) * (1 - 1 / node) * params_recipe / within  # gather twice in bf16, reduce fp32
between_nodes     = 2 * 4 * (1 - node / gpus) * params_recipe / node / between
all_sharded       = (2 + 2 + 4) * (1 - node / gpus) * params_recipe / between  # s, instead of the two above
step              = 9 * (compute + within_node + between_nodes)
checkpoint        = (4 + 8) * supernet   # bytes
checkpoint_s      = 2 * checkpoint / 2e9  # written by one process, read for its hash; 2 GB/s assumed
checkpoint_share  = checkpoint_s / (checkpoint_s + 100 * step)  # of the time, one in 100 steps
evaluation        = forward_sampled * 24 * 4096 / speed         # s on a GPU, 24 windows
evaluation_core_h = forward_sampled * 24 * 4096 / core / 3600   # on this machine
search_minutes    = evaluation * (288 + 64 * 48 / 24 + 32 * 96 / 24) / (gpus * busy_24) / 60
large_minutes     = evaluation * 40 * 256 / (gpus * busy_256) / 60  # 40 generations of 256
large_driver      = driver * 40 * 256 / 60  # additional minutes
fed               = evaluation / dispatch   # GPUs that one driver can supply
evaluators_node   = 4 * supernet * (1 + node * copies)  # bytes of a node's memory
put               = 4 * supernet * put_rate             # s, into one object store
start             = 4 * supernet * start_rate           # s, to create an evaluator
tokenizing_days   = 4 * short / 1e6 / 86400  # per command: 4 bytes per token; 1 MB/s, docs/limitations.md
audit_days        = 24 * 2 * 6 * params_median * 20 * params_median / (gpus * speed) / 86400
export            = 4 * params_smallest / 2**31  # relative to the largest protobuf
profile_hours     = (timing_seconds + (values + 58 * params_sampled) * draw) / 3600  # timing and weights
profile_group     = 4 * values_in_a_group   # bytes held while 48 ops are timed, at least
profile_models    = 4 * 30 * params_sampled  # bytes held while a group of whole models is
"""


def sleep(architecture: Architecture, data: str) -> Quality:
    """Sleep for the seconds that the data's name gives; return a deterministic loss."""
    time.sleep(float(data))
    loss = 2 + int(architecture.key, 16) % 1000 / 1000
    return Quality(loss_nats=loss, recall_loss_nats=loss)


def status(name: str, file: str = "/proc/self/status") -> int:
    """Return a value of a /proc file in bytes, by default of this process."""
    rows = Path(file).read_text().splitlines()
    return 1024 * next(int(row.split()[1]) for row in rows if row.startswith(name + ":"))


def measured(run: Callable[[], Any], times: int = 1) -> tuple[float, int]:
    """Return the quickest seconds of a call, and the bytes that it adds to the peak memory."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the recorded peak
    before, seconds = status("VmRSS"), timeit.repeat(run, number=1, repeat=times)
    return min(seconds), max(0, status("VmHWM") - before)


def scaling(make: Callable[[int], Callable[[], Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """Measure seconds and bytes by size; sizes that need over 33 s or the free memory are extrapolated."""
    rows, power = [], 1.0
    for n in sizes:
        last = rows[-1] if rows else {"n": n, "seconds": 0.0, "bytes": 0}
        ratio = n / last["n"]
        seconds, added = last["seconds"] * ratio ** max(1.0, power), last["bytes"] * ratio
        extrapolated = seconds > 33 or added > 0.7 * status("MemAvailable", "/proc/meminfo")
        if not extrapolated:
            seconds, added = measured(make(n), 3 if n <= 10_000 else 1)
            power = log(seconds / last["seconds"]) / log(ratio) if rows else power
        rows.append({"n": n, "seconds": seconds, "bytes": added, "extrapolated": extrapolated})
    return {"exponent": power, "rows": rows}


def large_space(**changes: Any) -> Space:
    """Return a space with Mistral 7B's sizes as the largest, and the small space's mixers and ratios."""
    value, sizes = SMALL.model_dump(mode="json"), LARGE | changes
    layer = value["layer"] | {name: sizes.pop(name) for name in ("heads", "ffn", "window")}
    return Space.model_validate(value | sizes | {"layer": layer})


def synthetic(space: Space) -> tuple[Predictor, dict[Any, float]]:
    """Return a predictor and op latencies from FLOPs and bytes at a device's rates, 5% of them random."""
    rng, (rate, bandwidth) = np.random.default_rng(0), DEVICES[space.name]
    ops, model_config, workloads = space_ops(space), space.config, [Workload.parse(text) for text in PHASES]
    table = {(op, w): (1e-6 + op_flops(op, w, model_config) / rate
                       + op_held_bytes(op, w, model_config) / bandwidth)
             * float(rng.lognormal(0, 0.05)) for op in ops for w in workloads}  # fmt: skip
    models = {w: WorkloadModel(op_seconds={op.key: table[op, w] for op in ops}, run=1e-6, shared=(1e-6,) * 3,
                               caches={2**20: 1e-6, 2**23: 1e-6} if w.phase == "decode" else {},
                               spread=Spread(0.0, 0.02), run_spread=0.01)
              for w in workloads}  # fmt: skip
    return Predictor(space=space, ops=OpLatencies(space, {}, {}), models=models, residuals=[-1, 1, 2]), table


def on_architectures(predictor: Predictor, sizes: Sequence[int]) -> dict[str, Any]:
    """Time each operation of evolution by the number of architectures per call."""
    space, rng = predictor.space, np.random.default_rng(0)
    some = variation.sample(space, rng, min(max(sizes), 100_000))
    workloads = [Workload.parse(PHASES[1]), Workload.parse(PHASES[4])]
    cost = predictor.cost(workloads[0])
    surrogate = Surrogate(Task(space, (None, cost), lambda g: np.zeros(len(g)), some[:2], 96, 0))
    surrogate.tell(some[:300], np.stack([2 + rng.random(300), cost(some[:300])], axis=1))

    def goals(g: Any) -> Any:
        latency = rng.lognormal(size=len(g))
        return np.stack([3 - 0.2 * np.log(latency) + 0.05 * rng.standard_normal(len(g)), latency], axis=1)

    steps: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
        "predict": (
            np.asarray,
            lambda g: [predictor.cost(w, c)(g) for w in workloads for c in (None, 0.975)],
        ),
        "sample": (len, lambda n: variation.sample(space, rng, n)),
        "repair": (rng.permuted, lambda g: variation.repair(space, g, rng)),
        "mutate": (np.asarray, lambda g: variation.mutate(space, g, rng)),
        "deduplicate": (lambda g: rng.integers(0, 9, g.shape), lambda g: unseen(g, set(), len(g))),
        "keys": (np.asarray, lambda g: [a.key for a in genome.decode(space, g)]),
        "surrogate": (np.asarray, surrogate),
        "first front": (goals, non_dominated),
        "select 96": (goals, lambda v: survivors(v, np.zeros(len(v)), 96)),
        "select third": (goals, lambda v: survivors(v, np.zeros(len(v)), len(v) // 3)),
    }
    repeated = np.tile(some, (-(-max(sizes) // len(some)), 1))
    return {name: scaling(lambda n, of=of, run=run: partial(run, of(repeated[:n])), sizes)
            for name, (of, run) in steps.items()}  # fmt: skip


def searched(predictor: Predictor, evaluations: int, all_of: Any, cost: str) -> tuple[float, float]:
    """Return the seconds of a search with evaluations of a known cost, and of its feasibility check."""
    limits = ("prefill@256<=60%", "decode@256<=60%", "memory@2048<=60%")
    config = SearchConfig(generations=evaluations // 24, population=24, limits=limits)
    with tempfile.TemporaryDirectory() as folder:
        search = Search(make_problem(predictor.space, {"here": predictor}, config), config, Path(folder), {})
        checked, began = measured(search.check)[0], time.perf_counter()
        search.evolve(lambda some, _data: all_of(some, cost))
        return time.perf_counter() - began, checked


def conflicting(space: Space) -> dict[str, Any]:
    """Time limits on random costs, each with a footprint of five pieces; the seconds are the longest of 9."""
    found: dict[str, list[float]] = {}
    some = variation.sample(space, np.random.default_rng(0), 2000)
    for seed, slopes in product(range(3), [(0.1, 1, 0.2, 2, 1), (0, 10, 0, 10, 0), (3, 0.1, 3, 0.1, 3)]):
        rng, costs = np.random.default_rng(seed), []
        for _ in range(3):
            table, sums = (OpTables(space, lambda _, rng=rng: float(rng.lognormal())) for _ in range(2))
            held = sums.totals(some)
            rate = float(np.median(table.totals(some)) / np.median(held))
            starts = (0.0, *map(float, np.quantile(held, (0.02, 0.1, 0.3, 0.6))))
            footprint = Footprint(sums, starts, tuple(rate * slope for slope in slopes))
            costs.append(Cost(table, 1.0, 0.1, (0.1, 0.2, 0.1), footprint=footprint))
        lows = [least(space, cost)[0] for cost in costs]
        values = np.stack([cost(some) for cost in costs], axis=1)
        best = values[(values / lows).max(axis=1).argmin()]
        asked = {}
        for factor, name in ((1.0, "feasible"), (0.5, "infeasible")):
            bounds = [float(max(1.0001 * low, factor * value)) for low, value in zip(lows, best, strict=True)]
            texts = (f"decode@{n}<={bound!r}s" for n, bound in zip((64, 256, 2048), bounds, strict=True))
            asked[f"three_{name}_seconds"] = list(map(Constraint, map(Limit.parse, texts), costs, bounds))
        text = f"decode@64<={0.9 * lows[0]!r}s"
        asked["one_infeasible_seconds"] = [Constraint(Limit.parse(text), costs[0], 0.9 * lows[0])]
        asked["one_feasible_seconds"] = asked["three_feasible_seconds"][:1]
        for name, limits in asked.items():
            began = time.perf_counter()
            with suppress(InfeasibleError):
                check_feasible(space, limits)
            found.setdefault(name, []).append(time.perf_counter() - began)
        began = time.perf_counter()
        least(space, costs[0])
        found.setdefault("least_seconds", []).append(time.perf_counter() - began)
    return {name: max(seconds) for name, seconds in found.items()}


def simulated(costs: Iterable[float], workers: int, latency: float, dispatch: float) -> float:
    """Simulate idle workers that request one evaluation at a time from one driver; return the seconds."""
    free, driver = [0.0] * workers, 0.0
    for cost in costs:
        first = free.index(min(free))
        driver = max(driver, free[first]) + dispatch
        free[first] = driver + max(0.0, latency - dispatch) + cost
    return max(free)


def busy(space: Space, population: int, latency: float, dispatch: float, longest_first: bool) -> float:
    """Simulate the utilisation of 64 GPUs in 20 generations with a barrier after each."""
    rng, flops = np.random.default_rng(0), flops_table(space, Workload(phase="prefill", length=4096))
    costs = [flops.totals(variation.sample(space, rng, population)) * 24 / (0.4 * 989e12) for _ in range(20)]
    costs = [np.sort(some)[::-1] for some in costs] if longest_first else costs
    return float(np.sum(costs) / (64 * sum(simulated(some, 64, latency, dispatch) for some in costs)))


def on_workers(predictor: Predictor, quick: bool) -> dict[str, Any]:
    """Time the pool of Ray actors with evaluators that sleep, its simulation, and a search on four actors."""
    rows, counts = [], {"0": 100, "0.02": 32, "0.2": 3} if quick else {"0": 400, "0.02": 192, "0.2": 40}
    some = genome.decode(predictor.space, variation.sample(predictor.space, np.random.default_rng(1), 1000))
    began, megabytes = time.perf_counter(), np.ones(25_000_000)
    with ray_session(4):
        found: dict[str, Any] = {"rows": rows, "session_seconds": time.perf_counter() - began}
        found["put_rate"] = measured(lambda: ray.put(megabytes), 2)[0] / megabytes.nbytes
        for workers in (1, 2, 4):
            began = time.perf_counter()
            with pool(lambda: sleep, (), workers) as all_of:
                while len(all_of.idle) < workers:
                    list(all_of(some[:1], "0.02"))
                started = time.perf_counter() - began
                for cost, each in counts.items():
                    count = each * (workers if float(cost) else 1)
                    began, cpu = time.perf_counter(), time.process_time()
                    list(all_of(some[:count], cost))
                    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
                    rows.append({"workers": workers, "cost": float(cost), "evaluations": count,
                                 "seconds": wall, "efficiency": float(cost) * each / wall,
                                 "driver_cpu": cpu / count, "start_seconds": started})  # fmt: skip
                for cost in ("0.02", "0.2") if workers == 4 else ():
                    wall = searched(predictor, 48 if quick else 288, all_of, cost)[0]
                    found[f"efficiency_of_a_search_at_{cost}"] = (12 if quick else 72) * float(cost) / wall
    free = {row["workers"]: row["seconds"] / row["evaluations"] for row in rows if not row["cost"]}
    for row in rows:
        row["simulated"] = simulated([row["cost"]] * row["evaluations"], row["workers"], free[1], free[4])
    return found | {"latency": free[1], "dispatch": free[4]}


def profiled(space: Space, table: dict[Any, float], texts: Sequence[str]) -> dict[str, float]:
    """Choose models to measure by synthetic timings; return their number, and the duration of a profile."""
    config, began, workloads = ProfileConfig(), time.perf_counter(), list(map(Workload.parse, texts))
    design = model_design(space, workloads, config.counts())

    def seconds(architecture: Architecture, workload: Workload) -> float:
        return 1e-6 + sum(n * table[op, workload] for op, n in count_ops(architecture).items())

    chosen: list[Architecture] = []
    fit, error = design.expected(), float("inf")
    while error > config.error and len(chosen) < config.optimal_models:
        chosen += design.choose(fit, CHOSEN_PER_FIT, chosen)
        fit = fit_op_latencies(
            space, [TimedModel(a, w, seconds(a, w), 0.005) for a in chosen for w in workloads]
        )
        error = design.expected_error(fit)
    others = [*design.random, *design.held_out, *design.repeat]
    timing = sum(
        MODEL_SECONDS + MODEL_RUNS * sum(seconds(a, w) for w in workloads) for a in (*chosen, *others)
    )
    values = params_cost(space)(genome.encode(space, chosen))
    return {"ops": len(space_ops(space)), "models": len(chosen) + len(others), "chosen": len(chosen),
            "error": error, "design_seconds": time.perf_counter() - began, "timing_seconds": timing,
            "values": float(values.sum()),
            "values_in_a_group": float(values.mean()) * config.group}  # fmt: skip


def on_models(space: Space, steps: int) -> dict[str, float]:
    """Return parameters and forward FLOPs per token of a space's samples and of its training recipe."""
    config, workload = TrainConfig(steps=steps), Workload(phase="prefill", length=space.max_seq_len)
    count, flops = params_cost(space), flops_table(space, workload)
    sampled = variation.sample(space, np.random.default_rng(0), 2001)
    groups = {
        "largest": genome.encode(space, [genome.largest(space)]),
        "smallest": genome.encode(space, [genome.smallest(space)]),
        "median": sampled[np.argsort(count(sampled))[1000:1001]],
        "sampled": sampled,
        "recipe": genome.encode(
            space, [a for step in range(steps) for a in step_subnets(space, config, step)]
        ),
    }
    found = {}
    for name, rows in groups.items():
        found[f"params_{name}"] = float(count(rows).mean())
        found[f"forward_{name}"] = float(flops.totals(rows).mean()) / space.max_seq_len
    blocks = [op for op in space_ops(space) if op.kind not in ("embedding", "head")]
    found["widest"] = (
        max(op_activation_bytes(op, workload, space.config) for op in blocks) / space.max_seq_len
    )
    shared = space.model_copy(update={"sharing": "qkvo"})
    whole = [float(sum(map(prod, supernet_shapes(one).values()))) for one in (space, shared)]
    return found | {"supernet": whole[0], "supernet_shared": whole[1]}


def on_supernet() -> dict[str, float]:
    """Return the cost of creating an evaluator per byte of its supernet, and one core's FLOP/s in it."""
    space = large_space(**MIDDLE)
    weights = {name: value.numpy() for name, value in Supernet(space).state_dict().items()}
    size, largest = sum(w.nbytes for w in weights.values()), genome.largest(space)
    tokens = np.ones((4, 256), np.int64)
    sets = {"": EvaluationSet(tokens=tokens, targets=tokens, recallable=tokens > 1)}
    made, added = measured(lambda: SupernetEvaluator(space.model_dump(mode="json"), weights, sets))
    one = SupernetEvaluator(space.model_dump(mode="json"), weights, sets)
    flops = flops_table(space, Workload(phase="prefill", length=256)).totals(genome.encode(space, [largest]))
    core = 4 * float(flops[0]) / measured(lambda: one(largest, ""), 3)[0]
    draw = measured(lambda: random_weights({"one": (4096, 4096)}, 0))[0] / 4096**2
    return {"bytes": size, "start_rate": made / size, "copies": added / size, "draw": draw, "core": core}


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    quick, load, began, large = arguments.quick, os.getloadavg(), time.perf_counter(), large_space()
    count, sizes = 96 if quick else 480, [10**k for k in (range(2, 4) if quick else range(3, 7))]
    given = [(space, *synthetic(space)) for space in (SMALL, large)]
    workers, found, texts = on_workers(given[0][1], quick), {}, PHASES[:: 5 if quick else 1]
    with threadpool_limits(1):
        facts = on_models(large, 5 if quick else 100) | on_supernet()
        for space, predictor, table in given:
            with pool(lambda: sleep, (), 0) as here:
                seconds, checked = searched(predictor, count, here, "0")
            found[space.name] = {
                "layer_counts": len(space.all_patterns), "driver": seconds / count,
                "feasible_seconds": checked, "infeasible_seconds": refused(predictor)["seconds"],
                "limits_with_footprints": conflicting(space),
                "profiling": profiled(space, table, texts),
                "architectures": on_architectures(predictor, sizes if space is SMALL else sizes[:3]),
            }  # fmt: skip
        counting = scaling(
            lambda n: partial(genome.size, large_space(depth=[n])), [4, 8, 16, 32][: len(sizes)]
        )
    choices = {f"{n} of {some}": len(space_ops(large_space(**{a: LARGE[a][-n:] for a in some.split()})))
               for some in ("width", "heads", "ffn", "width heads ffn") for n in (1, 2, 3, 5)}  # fmt: skip
    facts |= {f"busy_{n}{how}": busy(large, n, workers["latency"], workers["dispatch"], bool(how))
              for n in (24, 64, 256, 1024) for how in ("", "_longest_first")}  # fmt: skip
    known, plan = facts | workers | found["seven-b"] | found["seven-b"]["profiling"], {}
    for line in PLAN.strip().splitlines():
        name, how = map(str.strip, line.split("=", 1))
        known[name] = eval(how, {"__builtins__": {}}, known)  # noqa: S307 (lines of this file)
        plan[name] = {"value": known[name], "is": how}
    rows, steps = [row for row in workers["rows"] if row["cost"]], found["small"]["architectures"]
    lowest, off = (
        min(r["efficiency"] for r in rows),
        max(abs(r["simulated"] / r["seconds"] - 1) for r in rows),
    )
    steep = max((step["exponent"], name) for name, step in steps.items() if name != "select third")
    timed = [one["profiling"]["models"] for one in found.values()]
    checks = {
        f"parallel efficiency of at least {lowest:.1%} with 1, 2 and 4 workers >= 90%": lowest >= 0.9,
        f"simulated within {off:.1%} <= 10%": off <= 0.1,
        f"largest exponent {steep[0]:.2f} ({steep[1]}) <= 1.2": steep[0] <= 1.2,
        f"{timed[1]} timings of ops of seven-b, {timed[0]} of small": timed[1] <= timed[0],
    }
    body = {"loads": [load, os.getloadavg()], "minutes": (time.perf_counter() - began) / 60, "plan": plan,
            "facts": facts, "workers": workers, "spaces": found, "counting": counting,
            "choices": choices}  # fmt: skip
    return outcome.write("scale", arguments, body, checks)


if __name__ == "__main__":
    raise SystemExit(main())
