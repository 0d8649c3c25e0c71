"""Claim: mixers with recall reach an accuracy of 0.97 on MQAR; sliding attention (window 16) stays below 0.2.

Multi-query associative recall (Zoology, Arora et al. 2023) with a vocabulary of 256, 64 tokens and 8 pairs:
stand-alone models of two layers without FFN, width 64, two heads, built from the supernet's blocks. Recall is
learned abruptly, so a short training shows when learning starts, not the capacity of a model. Training
therefore follows a curriculum: 2 pairs in 16 tokens, then 4 in 32 and 8 in 64, each once the accuracy of
recent batches is high enough (the number of tokens per batch is constant). A model that misses its goal is
trained again at a second learning rate. Results are valid only if softmax attention reaches 0.99. Every batch
has new sequences. The sliding window is trained with attention's learning rate and number of steps, on 8
pairs in 64 tokens only. This is a control, not the best that it can do: two layers with a window of 16 see 31
tokens, and with the curriculum they learn the queries within that distance (``--all`` shows it, and trains
the other mixers too).
"""

import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import outcome
import torch
import torch.nn.functional as F

from space.architecture import Architecture, Layer, ModelConfig, is_windowed
from space.blocks import Model
from space.mixers import MIXERS
from supernet.data.corpus import DataConfig, load_corpus, train_batch
from supernet.data.mqar import IGNORED
from supernet.evaluate import mqar_accuracy

VOCABULARY, LENGTH, PAIRS, WIDTH, HEADS, WINDOW = 256, 64, 8, 64, 2, 16
BATCH, WARMUP, RATES, SEED, INITIAL_PAIRS = 64, 50, (8e-3, 3e-3), 0, 2
# Mean accuracy over the last batches at which the number of pairs is doubled, and at which training ends.
LAST_BATCHES, NEXT_ACCURACY, FINAL_ACCURACY = 10, 0.9, 0.995
AT_LEAST = {"attention": 0.99, "kda": 0.97, "gated_deltanet": 0.97, "deltanet": 0.97}  # slow trainings first
AT_MOST = {"sliding": 0.2}
# With a tied head, attention starts to learn much later.
MODEL_CONFIG = ModelConfig(
    vocab_size=VOCABULARY, max_seq_len=LENGTH, head_dim=WIDTH // HEADS, tie_embeddings=False
)


def two_layers(mixer: str) -> Architecture:
    """Return an architecture of two layers of one mixer, without FFN."""
    heads = {} if mixer == "short_conv" else {"heads": HEADS, "kv_heads": HEADS}
    layer = Layer(mixer=mixer, window=WINDOW if is_windowed(mixer) else 0, **heads)
    return Architecture(WIDTH, (layer, layer))


def trained(architecture: Architecture, rate: float, steps: int, pairs: int) -> tuple[Model, int]:
    """Train with AdamW at a constant rate after a warm-up; return the model and the number of steps.

    Args:
        architecture: the model to train.
        rate: learning rate.
        steps: at most.
        pairs: at the start of the curriculum.
    """
    corpus = load_corpus(DataConfig(recall=1.0, pairs=pairs))
    model = Model(architecture, MODEL_CONFIG, torch.Generator().manual_seed(SEED))
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), fused=True)
    recent: deque[float] = deque(maxlen=LAST_BATCHES)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min((step + 1) / WARMUP, 1)
        shorter = PAIRS // pairs
        rng = np.random.default_rng([SEED, step])
        drawn = train_batch(corpus, rng, BATCH * shorter, LENGTH // shorter)
        tokens, targets = (torch.from_numpy(side) for side in drawn)
        logits, _ = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        asked = targets != IGNORED
        recent.append(float((logits.argmax(-1) == targets)[asked].double().mean()))
        wanted = FINAL_ACCURACY if pairs == PAIRS else NEXT_ACCURACY
        if len(recent) == LAST_BATCHES and sum(recent) / LAST_BATCHES >= wanted:
            if pairs == PAIRS:
                return model, step + 1
            pairs *= 2
            corpus = load_corpus(DataConfig(recall=1.0, pairs=pairs))
            recent.clear()
    return model, steps


def measure(
    mixer: str, steps: int, rates: Sequence[float] = RATES, pairs: int = INITIAL_PAIRS
) -> dict[str, Any]:
    """Return the accuracy at each learning rate; a rate is tried only if the previous one missed the goal."""
    torch.set_num_threads(1)
    began = time.monotonic()
    accuracy: dict[str, float] = {}
    taken: dict[str, int] = {}
    for rate in rates:
        architecture = two_layers(mixer)
        model, taken[str(rate)] = trained(architecture, rate, steps, pairs)
        weights = dict(model.named_parameters())
        accuracy[str(rate)] = mqar_accuracy(
            weights, architecture, MODEL_CONFIG, length=LENGTH, pairs=PAIRS, sequences=512
        )
        if accuracy[str(rate)] >= AT_LEAST.get(mixer, 0.97):
            break
    best = max(accuracy.values())
    seconds = round(time.monotonic() - began, 1)
    sys.stderr.write(f"{mixer:15} {best:.3f}  {seconds:5.1f} s  {accuracy}  steps {taken}\n")
    return {"accuracy": best, "by_learning_rate": accuracy, "steps": taken, "seconds": seconds}


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument("--all", action="store_true", help="train the mixers without a goal too")
    parser.add_argument(
        "--steps", type=int, default=800, help="largest number of training steps per model and rate"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="models trained at a time")
    arguments = parser.parse_args()
    steps = 20 if arguments.quick else arguments.steps
    began = time.monotonic()
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        started = {mixer: pool.submit(measure, mixer, steps) for mixer in AT_LEAST}
        rate, taken = list(started["attention"].result()["steps"].items())[-1]
        started |= {mixer: pool.submit(measure, mixer, taken, [float(rate)], PAIRS) for mixer in AT_MOST}
        named = {mixer: future.result() for mixer, future in started.items()}
        seconds = round(time.monotonic() - began, 1)
        remaining = [mixer for mixer in MIXERS if mixer not in AT_LEAST] if arguments.all else []
        found = pool.map(measure, remaining, [steps] * len(remaining))
        others = dict(zip(remaining, found, strict=True))
    checks = {f"all five in {seconds:.0f} s < 300 s": seconds < 300}
    for mixer, goal in AT_LEAST.items():
        found = named[mixer]["accuracy"]
        checks[f"{mixer} {found:.3f} >= {goal}"] = found >= goal
    for mixer, goal in AT_MOST.items():
        found = named[mixer]["accuracy"]
        checks[f"{mixer}({WINDOW}) {found:.3f} <= {goal}"] = found <= goal
    body = {
        "sizes": {"vocab_size": VOCABULARY, "length": LENGTH, "pairs": PAIRS, "width": WIDTH, "heads": HEADS,
                  "batch": BATCH, "steps": steps, "workers": arguments.workers},
        "seconds": seconds,
        "mixers": named,
        "other_mixers": others,
    }  # fmt: skip
    return outcome.write("mqar", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
