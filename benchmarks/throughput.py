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
from latency.predictor.design import model_design
from latency.predictor.fit import HeldOutModels, fit_predictor
from latency.predictor.op_latencies import TimedModel
from space import Architecture, Workload, load_space, variation
from space.cost import op_flops, op_params
from space.ops import count_ops

WORKLOADS = (Workload.parse("prefill@256"), Workload.parse("decode@256"))


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    space, rng = load_space(SPACE), np.random.default_rng(0)

    def seconds(architecture: Architecture, w: Workload) -> float:
        return sum(
            n * (1e-6 + 1e-10 * op_flops(op, w, space.config) + 1e-10 * op_params(op, space.config))
            for op, n in count_ops(architecture).items()
        )

    design = model_design(space, WORKLOADS, ProfileConfig().counts())
    timed = [TimedModel(a, w, seconds(a, w), 0.005) for a in design.random for w in WORKLOADS]
    held_out = HeldOutModels(
        architectures=design.held_out,
        seconds={w: np.array([seconds(a, w) for a in design.held_out]) for w in WORKLOADS},
        repeatability=dict.fromkeys(WORKLOADS),
    )
    roles = {a.key: "random" for a in design.random}
    predictor = fit_predictor(space, WORKLOADS, timed, roles, held_out)
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
