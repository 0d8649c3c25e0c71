"""Claim: `predict` and `upper` process 200,000 architectures per second for two workloads.

On configs/spaces/small.yaml, in one process, with synthetic op latencies, which do not affect the duration of
a prediction. Median of repeated runs over the same genomes.
"""

import sys
import time

import numpy as np
import outcome
from latency_self import SPACE

from latency.config import ProfileConfig
from latency.predictor.composition import OpTimes
from latency.predictor.design import choose_models
from latency.predictor.fit import MeasuredModels, fit_predictor
from latency.predictor.op_latencies import fit_op_latencies
from space import Workload, genome, load_space, variation
from space.cost import op_flops, op_params
from space.ops import count_ops, space_ops

WORKLOADS = (Workload.parse("prefill@256"), Workload.parse("decode@256"))


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    space, rng = load_space(SPACE), np.random.default_rng(0)
    seconds = {
        (op, w): (1e-6 + 1e-10 * op_flops(op, w, space.config) + 1e-10 * op_params(op, space.config), 0.01)
        for op in space_ops(space)
        for w in WORKLOADS
    }
    ops = fit_op_latencies(space.config, seconds)
    times = {w: OpTimes(w, {op.key: seconds[op, w][0] for op in space_ops(space)}) for w in WORKLOADS}
    chosen = choose_models(space, ProfileConfig().counts(), times)
    rows = {role: genome.encode(space, chosen[role]) for role in ("optimal", "held_out")}
    made = {
        role: {
            w: np.array([sum(n * seconds[op, w][0] for op, n in count_ops(a).items()) for a in chosen[role]])
            for w in WORKLOADS
        }
        for role in rows
    }
    predictor = fit_predictor(
        space,
        ops,
        times,
        MeasuredModels(
            genomes=rows["optimal"],
            seconds=made["optimal"],
            spread={w: np.zeros(len(rows["optimal"])) for w in WORKLOADS},
            drawn=8,
        ),
        MeasuredModels(genomes=rows["held_out"], seconds=made["held_out"]),
        dict.fromkeys(WORKLOADS, 0.0),
    )
    genomes = variation.sample(space, rng, 20_000 if arguments.quick else 400_000)
    found = []
    for _ in range(3 if arguments.quick else 11):
        began = time.perf_counter()
        for w in WORKLOADS:
            predictor.predict(genomes, w)
            predictor.upper(genomes, w, 0.975)
        found.append(time.perf_counter() - began)
    rate = len(genomes) / float(np.median(found))
    body = {"architectures": len(genomes), "seconds": found, "architectures_per_second": round(rate)}
    return outcome.write(
        "throughput", arguments, body, {f"{rate:,.0f} per second >= 200,000": rate >= 200_000}
    )


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
