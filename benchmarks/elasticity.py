"""Claim: forward and backward inside the supernet take at most 1.10 times as long as in the sub-model.

On the same 2048 tokens, with training's data types: inside the supernet on prefix views, including the
addition of gradients into the supernet's buffers; stand-alone on contiguous weights. Work that a training
step does once for all sub-networks (casting the weights) and the optimiser's update are excluded. Both are
timed alternately. A ratio is the ratio of medians over the rounds, and the claim is about the geometric mean
over 24 architectures spread over configs/spaces/small.yaml.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import outcome
import torch

from search.audit.stratified import choose_diverse, sample_pool
from space import Architecture, genome, load_space
from space.blocks import forward
from supernet.supernet import Supernet, add_gradients, leaves, sources
from supernet.training.precision import cast_matrices, matrix_type
from supernet.training.recipe import TrainConfig
from supernet.training.trainer import distillation_loss

SPACE = Path(__file__).parents[1] / "configs" / "spaces" / "small.yaml"
BATCH, LENGTH = 8, 256


def seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    rounds, count = (2, 3) if arguments.quick else (7, 24)
    torch.set_num_threads(1)
    space = load_space(SPACE)
    supernet = Supernet(space)
    rng = np.random.default_rng(0)
    text = torch.from_numpy(rng.integers(0, 256, (BATCH, LENGTH + 1)))
    tokens, targets = text[:, :-1], text[:, 1:]
    dtype = matrix_type(TrainConfig())
    parameters = dict(supernet.named_parameters())
    weights = cast_matrices(parameters, dtype)
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def inside(architecture: Architecture) -> None:
        table = sources(space, architecture)
        slices = leaves(weights, table)
        logits = forward(slices, architecture, space.config, tokens)[0]
        distillation_loss(logits, targets, None, 0.0).backward()
        add_gradients(slices, table, totals)

    def stand_alone(architecture: Architecture) -> Callable[[], None]:
        contiguous = {
            name: view.detach().clone() for name, view in supernet.weights(architecture, weights).items()
        }

        def call() -> None:
            leaf_tensors = {name: tensor.detach().requires_grad_() for name, tensor in contiguous.items()}
            logits = forward(leaf_tensors, architecture, space.config, tokens)[0]
            distillation_loss(logits, targets, None, 0.0).backward()

        return call

    def ratio(architecture: Architecture) -> float:
        times: dict[str, list[float]] = {"inside": [], "stand-alone": []}
        calls = {"inside": lambda: inside(architecture), "stand-alone": stand_alone(architecture)}
        for call in calls.values():
            call()
        for turn in range(rounds):
            for name in sorted(calls, reverse=bool(turn % 2)):
                times[name].append(seconds(calls[name]))
        return statistics.median(times["inside"]) / statistics.median(times["stand-alone"])

    chosen = genome.decode(space, choose_diverse(space, sample_pool(space, 24), count))
    ratios = []
    for architecture in chosen:
        ratios.append(ratio(architecture))
        sys.stderr.write(f"{ratios[-1]:.3f}  {architecture.describe()}\n")
    mean = statistics.geometric_mean(ratios)
    smallest = ratio(genome.smallest(space))
    checks = {f"geometric mean {mean:.3f} over {count} architectures <= 1.10": mean <= 1.10}
    body = {
        "tokens": BATCH * LENGTH,
        "matrices": str(dtype),
        "geometric_mean": mean,
        "smallest": smallest,
        "largest": ratio(genome.largest(space)),
        "ratios": ratios,
    }
    return outcome.write("elasticity", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
