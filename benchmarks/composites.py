"""Claim: the sum of single replacements' KLs ranks composites of equal cost, and pair terms improve it.

A composite is an architecture of a trained run's space, its parent the largest one. Every single replacement
of the parent is evaluated (KL of the parent to it, on the run's evaluation windows), then random composites
whose cost is within 3% of a share of the parent's: the predicted latency of `--workload` on `--device`, or
without one the FLOPs of reading the evaluation's sequences. The result is Kendall's tau of the sum with the
composites' KL, alone and with terms of neighbouring blocks, which are fitted to other composites of the same
cost. Intervals are 95%, from a bootstrap over the composites, that of the difference is paired.

It also times the integer programme over 30 layers with 11 options (7 for the mixer, 4 for the FFN) under
three limits, on random scores, with and without pair terms. Without `--run`, only that.

    formfit train configs/small.yaml --out RUN
    python benchmarks/composites.py --run RUN
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import outcome
from numpy.typing import NDArray
from scipy.stats import kendalltau

from latency import load_predictor
from search.config import open_run, open_trained
from search.engine.supernet_evaluator import SupernetEvaluator
from search.problem.solution_pool import best_architectures
from search.strategies.additive_score import Features, Measured, fit, replacements
from space import InputError, Space, Workload, genome, variation
from space.cost import flops_table, memory_cost, params_cost
from space.genome import Genomes
from space.ops import Cost
from space.slot_scores import SlotScores
from supernet.evaluate import evaluation_set
from supernet.training.train import Trained, load_supernet

Array = NDArray[np.float64]
TAU, TAU_WITH_PAIRS, SECONDS = 0.75, 0.85, 5.0
TOLERANCE = 0.03
POOL = 400_000
RESAMPLES = 2000


def equal_cost(space: Space, cost: Cost, share: float, count: int, seed: int) -> Genomes:
    """Return random genomes [at most count, G] whose cost is a share of the parent's."""
    rng = np.random.default_rng(seed)
    target = share * float(cost(genome.encode(space, [genome.largest(space)]))[0])
    rows = np.unique(variation.sample(space, rng, POOL), axis=0)
    rows = rows[np.abs(cost(rows) / target - 1) <= TOLERANCE]
    return rows[rng.permutation(len(rows))[:count]]


def taus(predictions: dict[str, Array], values: Array) -> dict[str, Any]:
    """Return tau of each prediction and of their difference, with intervals."""
    rng = np.random.default_rng(0)
    samples = rng.integers(0, len(values), (RESAMPLES, len(values)))
    found = {}
    drawn = {
        name: np.array([kendalltau(one[rows], values[rows]).statistic for rows in samples])
        for name, one in predictions.items()
    }
    first, second = drawn
    drawn["difference"] = drawn[second] - drawn[first]
    points = {name: float(kendalltau(one, values).statistic) for name, one in predictions.items()}
    points["difference"] = points[second] - points[first]
    for name, point in points.items():
        found[name] = {"value": point, "interval_95": np.nanquantile(drawn[name], [0.025, 0.975]).tolist()}
    return found


def composites(trained: Trained, cost: Cost, arguments: Any) -> dict[str, Any]:
    """Return the rank correlations of the scores with composites of one cost."""
    space = trained.space
    data = evaluation_set(trained.corpus, arguments.windows, trained.length)
    weights = {
        name: value.numpy() for name, value in load_supernet(space, trained.checkpoint).state_dict().items()
    }
    evaluate = SupernetEvaluator(space.model_dump(mode="json"), weights, {"search": data}, ["kl"])
    began = time.monotonic()

    def kls(genomes: Genomes, title: str) -> Array:
        values = []
        for i, architecture in enumerate(genome.decode(space, genomes)):
            values.append(evaluate(architecture, "search").extra["kl"])
            if i % 50 == 49 or i == len(genomes) - 1:
                sys.stderr.write(f"{title}: {i + 1} of {len(genomes)}, {time.monotonic() - began:.0f} s\n")
        return np.array(values)

    measured = Measured(space)
    single = replacements(space)
    measured.tell(single, kls(single, "single replacements"))
    while len(rows := measured.removals()[1]):
        measured.tell(rows, kls(rows, "removals"))
    scores = measured.scores()
    if scores is None:
        raise InputError("the parent could not be evaluated")
    rows = equal_cost(space, cost, arguments.share, arguments.count + arguments.fitted, seed=0)
    if len(rows) < arguments.count + 20:
        raise InputError(
            f"only {len(rows)} of {POOL} random architectures have {arguments.share:.0%} of the cost"
        )
    values = kls(rows, "composites")
    tested, others = slice(0, arguments.count), slice(arguments.count, None)
    fitted = fit(scores, rows[others], values[others])
    predictions = {
        "additive": scores.additive(rows[tested]),
        "with_pairs": fitted.scores(rows[tested]),
    }
    return {
        "replacements": len(measured.values),
        "composites": len(values[tested]),
        "fitted": len(values[others]),
        "pairs_lower_the_error": fitted.scores.pairs is not None,
        "kl": {
            "least": float(values.min()),
            "median": float(np.median(values)),
            "greatest": float(values.max()),
        },
        "taus": taus(predictions, values[tested]),
        "seconds": time.monotonic() - began,
    }


def programme_space() -> Space:
    """Return a space of 30 slots with 7 mixer options (one of them none) and 4 FFN sizes (one of them 0)."""
    value = {
        "name": "thirty", "vocab_size": 49152, "max_seq_len": 4096, "head_dim": 64, "width": [576],
        "depth": list(range(20, 31)), "sharing": "none",
        "layer": {
            "mixer": ["attention", "sliding", "gated_deltanet", "kda", "mamba2", "gla", "none"],
            "heads": [9], "kv_heads": [3], "ffn": [0, 384, 768, 1536], "window": [256],
        },
        "hybrid": {"ratios": ["full", 1, 2, 3, 4, 5, "linear"]},
    }  # fmt: skip
    return Space.model_validate(value)


def random_scores(space: Space, rng: np.random.Generator, *, pairs: bool) -> SlotScores:
    """Return scores like those of a real parent: log-normal, higher for what is cheaper."""
    enc = genome.encoding(space)
    mixers, heads, ffns = len(space.mixer_options), len(space.head_options), len(space.ffn_options)
    depth = np.exp(rng.normal(0, 0.8, (enc.slots, 1)))
    kinds = rng.uniform(0.01, 0.05, (1, mixers, heads))
    mixer = kinds * depth[:, :, None] * np.exp(rng.normal(0, 0.3, (enc.slots, mixers, heads)))
    mixer[:, 0] *= 2.0
    mixer[:, 1, -1] = 0.0
    sizes = 0.1 * (1 - np.array(space.ffn_options) / max(space.ffn_options)) ** 2
    ffn = sizes[None] * depth * np.exp(rng.normal(0, 0.3, (enc.slots, ffns)))
    empty = mixer[:, 0, 0] + ffn[:, 0] + 0.02
    order = tuple(int(slot) for slot in np.argsort(empty)[: enc.slots - min(space.depth)])
    scores = SlotScores(
        space=space,
        constant=0.0,
        width=np.zeros(1),
        mixer=mixer,
        ffn=ffn,
        empty=empty,
        removal_order=order,
    )
    if not pairs:
        return scores
    coefficients = rng.normal(0.3, 0.3, 3 + 2 * (enc.slots - 1) + enc.slots)
    terms = Features.of(scores).terms(coefficients)
    return SlotScores(**{**vars(scores), "pairs": terms})


def programme_seconds(instances: int) -> dict[str, Any]:
    """Return seconds of the programme for each instance, with and without pair terms."""
    space = programme_space()
    decode, prefill = Workload.parse("decode@4096"), Workload.parse("prefill@512")
    costs = [Cost(flops_table(space, decode)), memory_cost(space, prefill), params_cost(space)]
    top = [float(cost(genome.encode(space, [genome.largest(space)]))[0]) for cost in costs]
    found: dict[str, Any] = {"layers": 30, "mixer_options": 7, "ffn_sizes": 4, "limits": 3}
    for pairs in (False, True):
        seconds = []
        for seed in range(instances):
            scores = random_scores(space, np.random.default_rng(seed), pairs=pairs)
            share = (0.7, 0.6, 0.8)[seed % 3]
            began = time.monotonic()
            best_architectures(scores, costs, [share * value for value in top], 1)
            seconds.append(time.monotonic() - began)
            sys.stderr.write(f"programme {'with pairs' if pairs else ''}: {seconds[-1]:.2f} s\n")
        found["seconds_with_pairs" if pairs else "seconds"] = seconds
    return found


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument("--run", type=Path, help="a trained run")
    parser.add_argument("--devices", type=Path, default=Path("devices"), help="folder of device cards")
    parser.add_argument("--predictor", type=Path, help="predictor of a device card; default: FLOPs")
    parser.add_argument("--workload", default="decode@256", help="whose predicted latency is equal")
    parser.add_argument("--share", type=float, default=0.6, help="of the parent's cost")
    parser.add_argument("--count", type=int, default=60, help="composites that are ranked")
    parser.add_argument("--fitted", type=int, default=120, help="composites that pair terms are fitted to")
    parser.add_argument("--windows", type=int, default=24, help="held-out sequences of an evaluation")
    parser.add_argument("--instances", type=int, default=6, help="of the programme")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.count, arguments.fitted, arguments.windows, arguments.instances = 20, 30, 4, 1
    body: dict[str, Any] = {"programme": programme_seconds(arguments.instances)}
    slowest = max(body["programme"]["seconds"])
    checks = {f"the programme takes {slowest:.1f} s <= {SECONDS:.0f} s": slowest <= SECONDS}
    reports = [f"with pair terms {max(body['programme']['seconds_with_pairs']):.1f} s"]
    if arguments.run:
        trained = open_trained(open_run(arguments.run, arguments.devices))
        workload = Workload.parse(arguments.workload)
        cost = Cost(flops_table(trained.space, Workload(phase="prefill", length=trained.length)))
        if arguments.predictor:
            cost = load_predictor(arguments.predictor, trained.space, "formfit profile").cost(workload)
        body |= {
            "space": trained.space.name,
            "windows": arguments.windows,
            "share": arguments.share,
            "cost": arguments.workload if arguments.predictor else "FLOPs",
        }
        body["composites"] = composites(trained, cost, arguments)
        for name, goal in (("additive", TAU), ("with_pairs", TAU_WITH_PAIRS)):
            tau = body["composites"]["taus"][name]
            low, high = tau["interval_95"]
            text = f"tau {name.replace('_', ' ')} {tau['value']:.2f} ({low:.2f} to {high:.2f}) >= {goal}"
            checks[text] = tau["value"] >= goal
    return outcome.write("composites", arguments, body, checks, reports)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
