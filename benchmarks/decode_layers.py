"""Claim: in a small model, a layer of any linear mixer decodes a token in at most 2.2 times `linear`'s time.

The models are those that are exported: four attention layers of width 128 with FFNs of 256, and the same with
one more layer of each mixer (4 heads of 32, no FFN) in the middle, at a context of 256 tokens on onnxruntime,
one thread. The time of a layer is the difference of the lower deciles of both models' times; all models are
timed alternately, in rounds of random order. The times of one more layer in a prefill of 256 tokens, by the
same models, show what a formulation for one token costs elsewhere.
"""

import random
import sys
import time
from typing import Any

import numpy as np
import onnxruntime
import outcome

from latency.device_runner.timer import Run, pinned
from latency.runtimes.onnxruntime import OnnxRuntime
from space import Architecture, Layer, ModelConfig, Workload
from space.mixers import MIXERS

WIDTH, HEADS, FFN, WINDOW, LAYERS = 128, 4, 256, 64, 4
MODEL_CONFIG = ModelConfig(vocab_size=256, max_seq_len=1024, head_dim=32)
WORKLOADS = {
    "decode@256": Workload(phase="decode", length=256),
    "prefill@256": Workload(phase="prefill", length=256),
}
LOOPS, ROUNDS = {"decode@256": 20, "prefill@256": 1}, {"decode@256": 600, "prefill@256": 40}
QUANTILE = 0.1
MAX_TIMES_LINEAR = 2.2  # goal


def models() -> dict[str, Architecture]:
    """Return the model of four layers, by the name of no mixer, and by mixer the model with one more."""
    base = [layer_of("attention", FFN)] * LAYERS
    more = {name: [*base[:2], layer_of(name), *base[2:]] for name in MIXERS}
    return {name: Architecture(WIDTH, tuple(layers)) for name, layers in {"": base, **more}.items()}


def layer_of(mixer: str, ffn: int = 0) -> Layer:
    """Return a layer of the benchmark's sizes."""
    entry = MIXERS.get(mixer)
    heads = HEADS if entry.has_heads else 0
    return Layer(mixer=mixer, heads=heads, kv_heads=heads, window=WINDOW if entry.windowed else 0, ffn=ffn)


def seconds(runs: dict[str, Run], loops: int, rounds: int) -> dict[str, float]:
    """Time runs in rounds of random order; return the lower decile of each, per loop."""
    shuffled = random.Random(0)  # noqa: S311 - not for security
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(loops)
    for _ in range(rounds):
        for name in shuffled.sample(list(runs), len(runs)):
            runs[name](1)  # refills caches
            began = time.perf_counter()
            runs[name](loops)
            times[name].append((time.perf_counter() - began) / loops)
    return {name: float(np.quantile(values, QUANTILE)) for name, values in times.items()}


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    body: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "threads": 1, "width": WIDTH}
    layers: dict[str, dict[str, float]] = {}
    with pinned(1):
        runtime = OnnxRuntime(1)
        built = {
            name: runtime.model(architecture, list(WORKLOADS.values()), MODEL_CONFIG, 0)
            for name, architecture in models().items()
        }
        for key, workload in WORKLOADS.items():
            runs = {name: by_workload[workload] for name, by_workload in built.items()}
            found = seconds(runs, LOOPS[key], 5 if arguments.quick else ROUNDS[key])
            base = found.pop("")
            body[f"{key}: four layers, us"] = round(1e6 * base, 1)
            layers[key] = {name: round(1e6 * (value - base), 2) for name, value in found.items()}
    body |= {f"{key}: one more layer, us": values for key, values in layers.items()}
    decode = layers["decode@256"]
    checks = {}
    for name in MIXERS:
        if MIXERS.get(name).mixer_class == "linear" and name != "linear":
            times = decode[name] / decode["linear"]
            text = f"{name}: {decode[name]:.1f} us, {times:.2f} times a linear layer <= {MAX_TIMES_LINEAR}"
            checks[text] = times <= MAX_TIMES_LINEAR
    return outcome.write("decode_layers", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
