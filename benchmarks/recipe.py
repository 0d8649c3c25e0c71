"""Claim: the training recipe is better than random sampling at equal time; the effect of each of its parts.

Each variant trains the supernet of configs/spaces/small.yaml for the same number of seconds of one core,
several variants in parallel if there are more cores. The number of steps is derived from timing some of the
variant's steps, spread over its schedule; the actual duration is reported. The score is the mean loss of 24
fixed architectures spread over the space, on the same held-out text, and, with an audit of the same space
(--audit), the rank correlation with its stand-alone losses.

Resumable: trained variants are stored under --runs.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import torch
from scipy.stats import kendalltau

from search.audit.stratified import choose_diverse, sample_pool
from space import Architecture, Space, genome, load_space
from space.io.artefact import write_text
from supernet.data.corpus import load_corpus
from supernet.evaluate import evaluate, evaluation_set
from supernet.training.checkpoint import latest_checkpoint
from supernet.training.recipe import TrainConfig, subnet_count
from supernet.training.train import load_supernet, train, training_inputs
from supernet.training.trainer import Trainer

SPACE = Path(__file__).parents[1] / "configs" / "spaces" / "small.yaml"
# The sandwich as published accumulates the gradients of a step's sub-networks; the default takes one
# optimiser step per sub-network. Each variant below "per-subnet" changes one thing of it.
ACCUMULATED = {"update": "accumulated", "sampled": 3, "balanced_sampling": False, "depth_warmup": 0.0}
PER_SUBNET = {"update": "per_subnet", "sampled": 7, "balanced_sampling": False, "depth_warmup": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "random": {"rule": "random", "sampled": 1, "balanced_sampling": False, "depth_warmup": 0.0},
    "sandwich": ACCUMULATED,
    "sandwich + distillation": ACCUMULATED | {"distillation": 0.5},
    "per-subnet": PER_SUBNET,
    "per-subnet + distillation": PER_SUBNET | {"distillation": 0.5},
    "per-subnet + teacher largest": PER_SUBNET | {"distillation": 0.5, "teacher": "largest"},
    "per-subnet + largest warm-up": PER_SUBNET | {"largest_warmup": 0.1},
    "per-subnet + progressive shrinking": PER_SUBNET | {"progressive_shrinking": 0.3},
    "per-subnet, shared q, k, v, o": PER_SUBNET,
    "per-subnet, balanced": PER_SUBNET | {"balanced_sampling": True},
    "per-subnet, balanced, depth warm-up": PER_SUBNET | {"balanced_sampling": True, "depth_warmup": 0.4},
}
OFF = {
    "distillation": 0.0,
    "largest_warmup": 0.0,
    "progressive_shrinking": 0.0,
}  # defaults of every variant
TIMED_SUBNETS = 108  # sub-networks timed, in steps spread over the schedule


def variant_space(name: str) -> Space:
    space = load_space(SPACE)
    return space.model_copy(update={"sharing": "qkvo"}) if "shared" in name else space


def settings(name: str, arguments: argparse.Namespace, steps: int) -> TrainConfig:
    quick = {"batch": 2, "length": 64} if arguments.quick else {"batch": 4, "length": 256}
    fixed = {"steps": steps, "threads": 1, "checkpoint_every": 200, "learning_rate": 3e-3}
    return TrainConfig.model_validate(fixed | quick | OFF | VARIANTS[name])


def plan(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the number of steps of a variant that fit in its time; stored after the first call.

    Steps in the middle of equal parts of the schedule are timed, about a hundred sub-networks in total:
    architectures differ in cost by a factor of ten.
    """
    path = runs(arguments) / name / "plan.json"
    if not path.exists():
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)  # as in training
        config = settings(name, arguments, 1000)
        trainer = Trainer(variant_space(name), config, load_corpus(config.data))
        trainer.step(0)
        count = 3 if arguments.quick else max(12, TIMED_SUBNETS // subnet_count(config, config.steps - 1))
        began = time.process_time()
        for i in range(count):
            trainer.step(int((i + 0.5) / count * config.steps))
        each = (time.process_time() - began) / count
        value = {"steps": max(2, round(arguments.seconds / each)), "seconds_per_step": each}
        write_text(path, json.dumps(value))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def runs(arguments: argparse.Namespace) -> Path:
    """Return the folder of variants of this duration."""
    folder: Path = arguments.runs / (
        f"{arguments.seconds:g}-quick" if arguments.quick else f"{arguments.seconds:g}"
    )
    return folder


def run_variant(name: str, arguments: argparse.Namespace) -> None:
    """Train one variant in this process, on one thread; the CPU seconds of all attempts are stored."""
    torch.set_num_threads(1)
    folder = runs(arguments) / name
    if (folder / "spent.json").exists():
        return
    tries = sorted(folder.glob("try-*.json"))
    spent = sum(json.loads(path.read_text()) for path in tries)
    steps = plan(name, arguments)["steps"]

    def keep(_: Any = None) -> None:
        write_text(folder / f"try-{len(tries)}.json", json.dumps(time.process_time() - began))

    began = time.process_time()
    train(variant_space(name), settings(name, arguments, steps), folder, keep)
    write_text(folder / "spent.json", json.dumps({"cpu_s": spent + time.process_time() - began}))


def fixed_architectures(space: Space, count: int) -> list[Architecture]:
    """Return architectures spread over the space's axes."""
    return genome.decode(space, choose_diverse(space, sample_pool(space, 24), count))


def shipped() -> str:
    """Return the variant that is the configuration's default."""
    default = TrainConfig().model_dump()
    found = [
        name
        for name, changed in VARIANTS.items()
        if "shared" not in name and all(default[key] == value for key, value in (OFF | changed).items())
    ]
    if len(found) != 1:
        raise SystemExit(f"the defaults of TrainConfig are {len(found)} of the variants, not one")
    return found[0]


def audited_rows(path: Path | None) -> dict[str, list[tuple[dict[str, Any], float]]]:
    """Return the architectures of each set of an audit and their mean stand-alone losses."""
    rows = json.loads(path.read_text())["architectures"] if path else []
    found: dict[str, list[tuple[dict[str, Any], float]]] = {}
    for row in rows:
        loss = float(np.mean([item["loss_nats"] for item in row["stand_alone"]]))
        for part in row["sets"]:
            found.setdefault(part, []).append((row["architecture"], loss))
    return found


def score(
    name: str, arguments: argparse.Namespace, audited: dict[str, list[tuple[dict[str, Any], float]]]
) -> dict[str, Any]:
    """Return the mean loss of the fixed architectures, and the rank correlation of the audited ones."""
    folder = runs(arguments) / name
    space = variant_space(name)
    config = settings(name, arguments, plan(name, arguments)["steps"])
    corpus = load_corpus(config.data)
    checkpoint = latest_checkpoint(folder, training_inputs(space, config, corpus))
    if checkpoint is None:
        raise FileNotFoundError(folder)
    supernet = load_supernet(space, checkpoint)
    data = evaluation_set(corpus, 8 if arguments.quick else 48, config.length or space.max_seq_len)

    def losses(architectures: list[Architecture]) -> list[float]:
        return [evaluate(supernet.weights(a), a, space.config, data).loss_nats for a in architectures]

    found = losses(fixed_architectures(space, 4 if arguments.quick else 24))
    value: dict[str, Any] = {
        **VARIANTS[name],
        **plan(name, arguments),
        **json.loads((folder / "spent.json").read_text()),
        "mean_loss_nats": float(np.mean(found)),
        "worst_loss_nats": max(found),
        "largest_loss_nats": losses([genome.largest(space)])[0],
        "smallest_loss_nats": losses([genome.smallest(space)])[0],
        "subnets": sum(subnet_count(config, s) for s in range(config.steps)),
    }
    for part, rows in audited.items():
        inside = losses([Architecture.from_json(architecture) for architecture, _ in rows])
        value[f"tau_{part}"] = float(kendalltau(inside, [loss for _, loss in rows]).statistic)
    return value


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/recipe"), help="folder of the trained variants"
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="of one core, per variant")
    parser.add_argument("--jobs", type=int, default=2, help="variants trained in parallel, one core each")
    parser.add_argument(
        "--audit", type=Path, help="audit.json of the same space, or the result file of ranking.py"
    )
    parser.add_argument("--variant", choices=list(VARIANTS), help="train this variant only, without scoring")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds = min(arguments.seconds, 5.0)
    if arguments.variant:
        run_variant(arguments.variant, arguments)
        return 0

    def start(name: str) -> None:
        options = [f"--{k}={getattr(arguments, k)}" for k in ("runs", "seconds")]
        quick = ["--quick"] if arguments.quick else []
        subprocess.run([sys.executable, __file__, "--variant", name, *options, *quick], check=True)
        sys.stderr.write(f"trained: {name}\n")

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(start, VARIANTS))
    audited = audited_rows(arguments.audit)
    rows = {name: score(name, arguments, audited) for name in VARIANTS}
    ours, random = rows[shipped()]["mean_loss_nats"], rows["random"]["mean_loss_nats"]
    ours_s, random_s = rows[shipped()]["cpu_s"], rows["random"]["cpu_s"]
    checks = {
        f"the default took {ours_s:.0f} s <= 1.03 times random sampling's {random_s:.0f} s": ours_s
        <= 1.03 * random_s,
        f"mean loss of the default, {shipped()}, {ours:.4f} < random sampling's {random:.4f}": ours < random,
    }
    if not arguments.json:
        for name, row in rows.items():
            taus = "".join(f"  {k} {v:.3f}" for k, v in row.items() if k.startswith("tau_"))
            sys.stdout.write(
                f"{name:36s} mean {row['mean_loss_nats']:.4f}  largest {row['largest_loss_nats']:.4f}  "
                f"smallest {row['smallest_loss_nats']:.4f}  {row['steps']} steps{taus}\n"
            )
    body = {"seconds_of_one_core": arguments.seconds, "parallel_jobs": arguments.jobs, "variants": rows}
    return outcome.write("recipe", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
