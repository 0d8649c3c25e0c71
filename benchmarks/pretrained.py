"""Claim: a supernet that starts from a trained Llama needs fewer tokens than one from random weights.

Trains a small Llama with transformers, of the largest shape of configs/spaces/quickstart.yaml, and loads it
twice: with heads, channels and residual ordered by importance, and unordered. Two goals: small sub-networks
(fixed ones with attention only, so that only the order differs) have a lower loss if ordered; and the
supernet reaches the final mean loss of training from random weights, over fixed sub-networks, after fewer
tokens (the Llama's tokens are not counted; they are reported, as are the losses of the largest). All on one
thread.

Resumable: the Llama and the results of each phase are stored under --runs.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import torch
import torch.nn.functional as F

from space import Architecture, Space, genome, load_space, variation
from space.io.artefact import write_text
from supernet.data.corpus import Corpus, DataConfig, load_corpus, train_batch
from supernet.evaluate import EvaluationSet, evaluate, evaluation_set
from supernet.hf.pretrained import load_pretrained
from supernet.supernet import Supernet
from supernet.training.recipe import TrainConfig
from supernet.training.trainer import Trainer

SPACE = Path(__file__).parents[1] / "configs" / "spaces" / "quickstart.yaml"
LENGTH, BATCH = 128, 8


def train_llama(folder: Path, space: Space, corpus: Corpus, steps: int) -> dict[str, float]:
    """Train a Llama of the space's largest shape; return its tokens and seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    largest = genome.largest(space)
    layer = largest.layers[0]
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=space.vocab_size,
            hidden_size=largest.width,
            intermediate_size=layer.ffn,
            num_hidden_layers=space.slots,
            num_attention_heads=layer.heads,
            num_key_value_heads=layer.kv_heads,
            head_dim=space.head_dim,
            rms_norm_eps=1e-5,
            tie_word_embeddings=space.tie_embeddings,
            max_position_embeddings=space.max_seq_len,
        )
    )
    optimiser = torch.optim.AdamW(llama.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    began = time.process_time()
    for step in range(steps):
        rate = min((step + 1) / 20, 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
        optimiser.param_groups[0]["lr"] = 3e-3 * rate
        drawn = train_batch(corpus, np.random.default_rng([1, step]), BATCH, LENGTH)
        tokens, targets = map(torch.from_numpy, drawn)
        loss = F.cross_entropy(llama(tokens, use_cache=False).logits.flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimiser.step()
    llama.save_pretrained(folder)
    return {"tokens": steps * BATCH * LENGTH, "seconds": round(time.process_time() - began, 1)}


def mean_loss(supernet: Supernet, architectures: list[Architecture], data: EvaluationSet) -> float:
    with torch.no_grad():
        losses = [evaluate(supernet.weights(a), a, supernet.space.config, data) for a in architectures]
    return float(np.mean([quality.loss_nats for quality in losses]))


def small_members(space: Space, count: int) -> list[Architecture]:
    """Return fixed architectures smaller than the largest, with attention only."""
    value = space.model_dump(mode="json")
    value["layer"] |= {"mixer": ["attention"], "window": []}
    value["hybrid"] |= {"ratios": ["full"], "max_linear_kinds": None}
    value["depth"] = value["depth"][-2:]  # fewer layers would hide the effect of the order
    only = Space.model_validate(value)
    return genome.decode(only, variation.sample(only, np.random.default_rng(24), count))


def starts(space: Space, folder: Path, corpus: Corpus, data: EvaluationSet, count: int) -> dict[str, Any]:
    """Return losses before training, ordered and unordered."""
    drawn, _ = train_batch(corpus, np.random.default_rng(5), 16, LENGTH)
    small, mixed = small_members(space, count), fixed_members(space, count)
    value: dict[str, Any] = {}
    for name, order in (("ordered", True), ("unordered", False)):
        supernet = Supernet(space)
        began = time.process_time()
        errors = load_pretrained(supernet, folder, torch.from_numpy(drawn), order=order)
        value[name] = {
            "seconds": round(time.process_time() - began, 1),
            "largest_loss_nats": mean_loss(supernet, [genome.largest(space)], data),
            "small_loss_nats": mean_loss(supernet, small, data),
            "mixed_loss_nats": mean_loss(supernet, mixed, data),
            "alignment": {
                mixer: {
                    "before": float(np.mean([e.before for e in errors if e.mixer == mixer])),
                    "after": float(np.mean([e.after for e in errors if e.mixer == mixer])),
                }
                for mixer in dict.fromkeys(e.mixer for e in errors)
            },
        }
    return value


def fixed_members(space: Space, count: int) -> list[Architecture]:
    return genome.decode(space, variation.sample(space, np.random.default_rng(8), count))


def curve(
    space: Space, config: TrainConfig, corpus: Corpus, data: EvaluationSet, count: int, goal: float
) -> list[dict[str, float]]:
    """Train, and return the mean loss over fixed architectures by tokens, until it reaches the goal."""
    trainer = Trainer(space, config, corpus)
    trainer.prepare()
    if not isinstance(trainer.module, Supernet):
        raise TypeError("the trainer's module is not a supernet")
    rows: list[dict[str, float]] = []
    every = max(1, config.steps // 16)
    for step in range(config.steps + 1):
        if step % every == 0:
            loss = mean_loss(trainer.module, fixed_members(space, count), data)
            largest = mean_loss(trainer.module, [genome.largest(space)], data)
            tokens = sum(map(trainer.tokens, range(step)))
            rows.append({"tokens": tokens, "loss_nats": loss, "largest_loss_nats": largest})
            if loss <= goal:
                break
        if step < config.steps:
            trainer.step(step)
    return rows


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return a phase's stored result; compute and write it if the file does not exist."""
    if not path.exists():
        write_text(path, json.dumps(make()))
        sys.stderr.write(f"done: {path.stem}\n")
    return json.loads(path.read_text())


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/pretrained"), help="where phases are kept")
    parser.add_argument("--steps", type=int, default=160, help="of the supernet, from random weights")
    parser.add_argument("--llama-steps", type=int, default=1500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        arguments.steps, arguments.llama_steps = 16, 40
    count, windows = (4, 8) if arguments.quick else (12, 24)
    runs = arguments.runs / f"{arguments.llama_steps}-{arguments.steps}"
    space = load_space(SPACE)
    corpus = load_corpus(DataConfig(limit_mb=10.0))
    data = evaluation_set(corpus, windows, LENGTH)
    folder = runs / "llama"
    llama = kept(runs / "llama.json", lambda: train_llama(folder, space, corpus, arguments.llama_steps))
    start = kept(runs / "start.json", lambda: starts(space, folder, corpus, data, count))
    config = TrainConfig(steps=arguments.steps, batch=BATCH, length=LENGTH, threads=1)
    scratch = kept(runs / "scratch.json", lambda: curve(space, config, corpus, data, count, 0.0))
    goal = min(row["loss_nats"] for row in scratch)
    config = config.model_copy(update={"init": folder})
    ours = kept(runs / "pretrained.json", lambda: curve(space, config, corpus, data, count, goal))
    needed = next(row["tokens"] for row in scratch if row["loss_nats"] <= goal)
    spent, reached = ours[-1]["tokens"], ours[-1]["loss_nats"]
    ordered, unordered = (start[name]["small_loss_nats"] for name in ("ordered", "unordered"))
    checks = {
        f"small sub-networks start at {ordered:.3f} nats, unordered at {unordered:.3f}": ordered < unordered,
        f"{goal:.3f} nats reached in {spent} tokens (at {reached:.3f}), from random weights in {needed}": (
            reached <= goal and spent < needed
        ),
    }
    body = {
        "llama": llama,
        "start": start,
        "goal_loss_nats": goal,
        "scratch": scratch,
        "pretrained": ours,
        "tokens_ratio": spent / needed,
    }
    return outcome.write("pretrained", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
