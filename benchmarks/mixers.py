"""Claim: on a CPU, linear mixers take a fraction of the time of softmax attention.

One thread, float32, batch 1, 4 heads of 64, width 256, at 256, 1024 and 4096 tokens. Every mixer block (norm,
projections, mixing, residual) is timed forward, forward and backward, and for one decode step after that many
tokens. The recurrences without their blocks are compared with flash-linear-attention's naive code (the
chunked form if there is one; no decode step; not at 4096 tokens, which would take half of the run) and with
onnxruntime's LinearAttention (no gradient). All items are timed in one run, in rounds of random order. A
result is the ratio to causal scaled_dot_product_attention in the same round (for a block: to the attention
block), the median over the rounds, together with the ratio of the lower deciles.
"""

import importlib.util
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import outcome
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor

from space.architecture import Layer, ModelConfig
from space.attention.linear import linear_attention
from space.attention.softmax import softmax_attention
from space.blocks import initial, mixer_block
from space.mixers import MIXERS
from space.shapes import mixer_shapes

HEADS, DIM, WIDTH, WINDOW = 4, 64, 256, 128
# rule, per-channel decay, goal at 1024 tokens, naive implementation in flash-linear-attention
RECURRENCES: dict[str, tuple[str, bool, float, str]] = {
    "linear": ("linear", False, 0.28, "linear_attn.naive_chunk_linear_attn"),
    "gated": ("gated", False, 0.28, "simple_gla.naive_chunk_simple_gla"),
    "gated per channel": ("gated", True, 0.45, "gla.naive_recurrent_gla"),
    "delta": ("delta", False, 0.50, "delta_rule.delta_rule_chunkwise"),
    "gated_delta": ("gated_delta", False, 0.50, "gated_delta_rule.naive_chunk_gated_delta_rule"),
    "gated_delta per channel": ("gated_delta", True, 0.50, "kda.naive_chunk_kda"),
}
SLIDING_GOAL = 0.58
ROUNDS = {256: 60, 1024: 60, 4096: 12}

Job = Callable[[], Any]
Jobs = dict[str, Job]


def timed(jobs: Jobs, rounds: int) -> dict[str, dict[str, float]]:
    """Time jobs in rounds of random order; return milliseconds and ratios to the first job."""
    base = next(iter(jobs))
    loops, times = {}, {name: np.empty(rounds) for name in jobs}
    for name, job in jobs.items():  # warm up, then choose a loop count of at least half a millisecond
        job()
        began = time.perf_counter()
        job()
        loops[name] = max(1, round(5e-4 / (time.perf_counter() - began)))
    shuffled = random.Random(0)  # noqa: S311 - not for security
    for i in range(rounds):
        for name in shuffled.sample(list(jobs), len(jobs)):
            began = time.perf_counter()
            for _ in range(loops[name]):
                jobs[name]()
            times[name][i] = 1e3 * (time.perf_counter() - began) / loops[name]
    low = {name: float(np.quantile(t, 0.1)) for name, t in times.items()}
    return {
        name: {
            "median_ms": round(float(np.median(t)), 4),
            "lower_decile_ms": round(low[name], 4),
            "ratio": round(float(np.median(t / times[base])), 4),
            "ratio_of_lower_deciles": round(low[name] / low[base], 4),
        }
        for name, t in times.items()
    }


def forward(function: Callable[..., Any], *inputs: Any, **named: Any) -> Job:
    """Return a job that calls a function without autograd."""

    def run() -> None:
        with torch.no_grad():
            function(*inputs, **named)

    return run


def backward(function: Callable[..., Tensor], leaves: Iterable[Tensor]) -> Job:
    """Return a job that calls a function and computes the gradient of some leaves."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with torch.no_grad():
        weights = torch.randn_like(function())

    def run() -> None:
        torch.autograd.grad(function(), leaves, weights)

    return run


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over [B, T, H, D], causal if there is more than one query."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


def inputs(rule: str, per_channel: bool, tokens: int) -> dict[str, Tensor]:
    """Return random inputs of a recurrence by name, with normalised keys."""
    heads = (1, tokens, HEADS)
    found = {name: torch.randn(*heads, DIM) for name in "qkv"}
    found["k"] = F.normalize(found["k"], dim=-1)
    if "gated" in rule:
        found["decay"] = -torch.rand(*heads, DIM) if per_channel else -torch.rand(heads)
    if "delta" in rule:
        found["beta"] = torch.rand(heads)
    return found


def naive(name: str) -> Callable[[dict[str, Tensor]], Tensor] | None:
    """Return flash-linear-attention's reference, loaded by path: importing the package needs triton."""
    package = importlib.util.find_spec("fla")
    if package is None or package.submodule_search_locations is None:
        return None
    family, function = name.split(".")
    path = Path(package.submodule_search_locations[0]) / "ops" / family / "naive.py"
    spec = importlib.util.spec_from_file_location(f"naive_{family}", path)
    if spec is None or spec.loader is None:
        return None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    call = getattr(module, function)

    def run(given: dict[str, Tensor]) -> Tensor:
        ordered = [given[key] for key in ("q", "k", "v", "decay", "beta") if key in given]
        if family == "delta_rule":
            ordered = [x.transpose(1, 2) for x in ordered]
        found = call(*ordered)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    return run


def fused(rule: str, given: dict[str, Tensor]) -> Job:
    """Return a job that runs a graph of one LinearAttention node in onnxruntime."""
    packed = {name: x.flatten(2).numpy() for name, x in given.items()}
    packed["state"] = np.zeros((1, HEADS, DIM, DIM), np.float32)
    order = ("q", "k", "v", "state", "decay", "beta")
    names = [name if name in packed else "" for name in order]
    while not names[-1]:
        names.pop()
    node = helper.make_node(
        "LinearAttention",
        names,
        ["out", "after"],
        domain="com.microsoft",
        q_num_heads=HEADS,
        kv_num_heads=HEADS,
        update_rule=rule,
        scale=DIM**-0.5,
    )
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in packed.items()]
    results = [
        helper.make_tensor_value_info("out", TensorProto.FLOAT, packed["q"].shape),
        helper.make_tensor_value_info("after", TensorProto.FLOAT, packed["state"].shape),
    ]
    model = helper.make_model(
        helper.make_graph([node], "recurrence", values, results),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, packed)


def recurrences(tokens: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Time recurrences, sliding attention without projections, and SDPA."""
    q, k, v = (torch.randn(1, tokens, HEADS, DIM) for _ in range(3))
    prefill: Jobs = {"sdpa": forward(sdpa, q, k, v), "sliding": forward(softmax_attention, q, k, v, WINDOW)}
    decode: Jobs = {"sdpa": forward(sdpa, q[:, :1], k, v)}
    learnt = [x.clone() for x in (q, k, v)]
    back: Jobs = {
        "sdpa": backward(lambda: sdpa(*learnt), learnt),
        "sliding": backward(lambda: softmax_attention(*learnt, WINDOW), learnt),
    }
    for name, (rule, per_channel, _, reference) in RECURRENCES.items():
        given, step = (inputs(rule, per_channel, count) for count in (tokens, 1))
        leaves = {key: x.clone() for key, x in given.items()}
        prefill[name] = forward(linear_attention, rule=rule, **given)
        back[name] = backward(
            lambda rule=rule, leaves=leaves: linear_attention(rule=rule, **leaves)[0], leaves.values()
        )
        decode[name] = forward(linear_attention, rule=rule, state=torch.zeros(1, HEADS, DIM, DIM), **step)
        prefill[f"{name}, onnxruntime"] = fused(rule, given)
        decode[f"{name}, onnxruntime"] = fused(rule, step)
        if tokens <= 1024 and (found := naive(reference)):
            prefill[f"{name}, naive"] = forward(found, given)
            back[f"{name}, naive"] = backward(
                lambda found=found, leaves=leaves: found(leaves), leaves.values()
            )
    return {
        "forward": timed(prefill, rounds),
        "forward_backward": timed(back, max(3, rounds // 2)),
        "decode": timed(decode, rounds),
    }


def blocks(tokens: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Time mixer blocks and the attention block: forward, forward and backward, one decode step."""
    model_config = ModelConfig(vocab_size=256, max_seq_len=2 * tokens, head_dim=DIM)
    generator = torch.Generator().manual_seed(0)
    x, step = torch.randn(1, tokens, WIDTH), torch.randn(1, 1, WIDTH)
    prefill: Jobs = {}
    back: Jobs = {}
    decode: Jobs = {}
    for name in sorted(MIXERS, key=lambda name: name != "attention"):
        layer = Layer(mixer=name, heads=HEADS, kv_heads=HEADS, window=WINDOW if name == "sliding" else 0)
        shapes = mixer_shapes(name, WIDTH, HEADS, HEADS, model_config)
        weights = {part: initial(part, shape, generator, mixer=name) for part, shape in shapes.items()}
        learnt = {part: weight.clone() for part, weight in weights.items()}
        source = x.clone()
        prefill[name] = forward(mixer_block, weights, x, layer, model_config)
        back[name] = backward(
            lambda layer=layer, learnt=learnt, source=source: mixer_block(
                learnt, source, layer, model_config
            )[0],
            (source, *learnt.values()),
        )
        with torch.no_grad():
            _, state = mixer_block(weights, x, layer, model_config)
        decode[name] = forward(mixer_block, weights, step, layer, model_config, tokens, state)
    return {
        "forward": timed(prefill, rounds),
        "forward_backward": timed(back, max(3, rounds // 2)),
        "decode": timed(decode, rounds),
    }


def table(title: str, found: dict[int, dict[str, dict[str, dict[str, float]]]]) -> str:
    """Return a text table of ratios by name, length and pass; the first row is in milliseconds."""
    columns = [(tokens, kind) for tokens, kinds in found.items() for kind in kinds]
    short = {"forward": "fwd", "forward_backward": "f+b", "decode": "dec"}
    names = dict.fromkeys(name for kinds in found.values() for jobs in kinds.values() for name in jobs)
    lines = [f"{title:36}" + "".join(f"{f'{tokens} {short[kind]}':>10}" for tokens, kind in columns)]
    base = next(iter(names))
    for name in names:
        key = "median_ms" if name == base else "ratio"
        cells = (found[tokens][kind].get(name, {}).get(key) for tokens, kind in columns)
        label = f"{name} (ms)" if name == base else name
        lines.append(f"{label:36}" + "".join(f"{'-' if c is None else f'{c:.3f}':>10}" for c in cells))
    return "\n".join(lines) + "\n\n"


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.empty(7_000_000).fill_(0)  # 28 MB allocated and freed: the allocator keeps these pages
    lengths = {256: 3, 1024: 3} if arguments.quick else ROUNDS
    began = time.monotonic()
    bare = {tokens: recurrences(tokens, rounds) for tokens, rounds in lengths.items()}
    whole = {tokens: blocks(tokens, rounds) for tokens, rounds in lengths.items()}
    shares = bare[1024]["forward"]
    checks = {
        f"{name}: {shares[name]['ratio']:.3f} of SDPA's time <= {goal}": shares[name]["ratio"] <= goal
        for name, (_, _, goal, _) in RECURRENCES.items()
    }
    sliding = shares["sliding"]["ratio"]
    checks[f"sliding({WINDOW}): {sliding:.3f} of full attention's time <= {SLIDING_GOAL}"] = (
        sliding <= SLIDING_GOAL
    )
    if not arguments.json:
        sys.stdout.write(table("recurrence, ratio to SDPA", bare))
        sys.stdout.write(table("mixer block, ratio to attention", whole))
    body = {
        "seconds": round(time.monotonic() - began, 1),
        "setting": {"threads": 1, "batch": 1, "heads": HEADS, "head_dim": DIM, "width": WIDTH},
        "recurrences": bare,
        "blocks": whole,
    }
    return outcome.write("mixers", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
