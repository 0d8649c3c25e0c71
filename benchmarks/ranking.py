"""Claim: after 40 minutes on two cores, the small supernet ranks architectures as stand-alone training does.

Runs three commands: ``formfit train configs/small.yaml``, ``formfit profile`` for its space, ``formfit
audit``. The largest sub-network's bits per byte are compared with those of gzip -9 on the same held-out
windows. Resumable, as the commands are: their results are stored under --runs.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import outcome

from search.config import load_run_config
from space import Architecture, genome, load_space
from supernet.data.baselines import gzip_bits_per_byte, order2_bits_per_byte
from supernet.data.corpus import load_corpus
from supernet.evaluate import evaluate, evaluation_set
from supernet.training.checkpoint import latest_checkpoint
from supernet.training.train import load_supernet, training_inputs

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "small.yaml"
SPACE = ROOT / "configs" / "spaces" / "small.yaml"
WORKLOAD = "prefill@256"
MINUTES, BITS_PER_BYTE, TAU = 40, 2.1, 0.75


def formfit(devices: Path, *options: str) -> None:
    """Run a command; its output goes to stderr, since stdout is for the benchmark's result."""
    program = Path(sys.executable).with_name("formfit")
    subprocess.run([program, "--devices", devices, *options], stdout=sys.stderr, check=True)


def training_seconds(log: Path) -> float:
    """Return the duration of the training steps from the metrics; repeated steps are counted once."""
    seconds, before = 0.0, 0
    for line in log.read_text().splitlines():
        row = json.loads(line)
        seconds += (row["tokens"] - before) / row["tokens_per_second"]
        before = row["tokens"]
    return seconds


def text_quality(run: Path, config_file: Path) -> dict[str, Any]:
    """Return bits per byte of the largest sub-network and of two classical models, on the same windows."""
    config = load_run_config(config_file)
    space, corpus = config.space, load_corpus(config.train.data)
    checkpoint = latest_checkpoint(run / "supernet", training_inputs(space, config.train, corpus))
    if checkpoint is None:
        raise SystemExit(f"{run}: no supernet of {config_file}")
    data = evaluation_set(corpus, config.search.front_windows, config.train.length or space.max_seq_len)
    supernet = load_supernet(space, checkpoint)

    def bits(architecture: Architecture) -> float | None:
        weights = supernet.weights(architecture)
        return evaluate(weights, architecture, space.config, data).bits_per_byte

    return {
        "held_out_bytes": data.text_bytes,
        "largest": bits(genome.largest(space)),
        "smallest": bits(genome.smallest(space)),
        "gzip": gzip_bits_per_byte(corpus.train, data.windows),
        "order2": order2_bits_per_byte(corpus.train, data.windows),
    }


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/ranking"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=600, help="of each stand-alone training")
    parser.add_argument("--batch", type=int, default=4, help="rows per step of each stand-alone training")
    arguments = parser.parse_args()
    run, devices, config = arguments.runs / "run", arguments.runs / "devices", CONFIG
    size = 12
    if arguments.quick:
        arguments.steps, size = 2, 3
        run, config = arguments.runs / "quick", arguments.runs / "quick.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(
            f"space: {SPACE}\ntrain: {{steps: 2, batch: 2, length: 64}}\nsearch: {{front_windows: 4}}\n"
        )
    formfit(devices, "train", str(config), "--out", str(run))
    if not (
        devices / "here" / "predictors"
    ).exists():  # a new profile would select a different set of equal latency
        formfit(devices, "profile", "--space", str(SPACE), "--device", "here", "--workload", WORKLOAD)
    options = ["--workload", WORKLOAD, "--size", str(size)]
    options += ["--steps", str(arguments.steps), "--batch", str(arguments.batch)]
    formfit(devices, "audit", "--run", str(run), "--device", "here", *options)

    audit = json.loads((run / "audit" / "audit.json").read_text())
    minutes = training_seconds(run / "supernet" / "metrics.jsonl") / 60
    text = text_quality(run, config)
    space = load_space(SPACE)
    mixers = [m for m in space.layer.mixer if m != "none"]
    sizes = max(len(space.width), len(space.layer.ffn))
    count, depths = genome.size(space), (min(space.depth), max(space.depth))
    taus = {name: judged["loss"]["kendall_tau"] for name, judged in audit["sets"].items()}
    checks = {
        f"{len(mixers)} mixers >= 7": len(mixers) >= 7,
        f"{sizes} widths or FFN sizes >= 4": sizes >= 4,
        f"depths {depths[0]} to {depths[1]} (required: 2 to 8)": depths == (2, 8),
        f"{count:.1e} architectures > 1e15": count > 1e15,
        f"training steps took {minutes:.1f} minutes <= {MINUTES}": minutes <= MINUTES,
        f"largest {text['largest']:.3f} bits per byte <= {BITS_PER_BYTE} (gzip -9: {text['gzip']:.3f})": text[
            "largest"
        ]
        <= BITS_PER_BYTE,
    }
    axes = taus["axes"]["supernet"]["value"]
    checks[f"tau over the axes {axes:.2f} >= {TAU}"] = axes >= TAU
    for name, tau in taus.items():
        ours, params = tau["supernet"]["value"], tau["params"]["value"]
        checks[f"{name}: the supernet's tau {ours:.2f} > parameter count's {params:.2f}"] = ours > params
    if not arguments.json:
        sys.stdout.write(audit["verdict"] + "\n")
    body = {
        "training_minutes": minutes,
        "bits_per_byte": text,
        "audit": {key: audit[key] for key in ("verdict", "settings", "equal_latency_ms", "sets")},
        "architectures": audit["architectures"],
    }
    return outcome.write("ranking", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
