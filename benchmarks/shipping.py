"""Claim: sub-models are exported within seconds, run without torch, and keep their loss in int8.

From a trained run (`formfit train configs/small.yaml --out RUN`): the time to extract and export its largest
sub-network, of eight layers; the exported file in a new environment that has only numpy and onnxruntime;
size, loss and latency in every precision; and speculative decoding of the largest with small members of the
same supernet as drafts, on prompts of held-out text.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import torch
from kit import bare

from latency.runtimes.onnxruntime import OnnxRuntime
from search.config import open_run, open_supernet
from search.submodel.decoder import Decoder
from search.submodel.export import export
from search.submodel.generation import DraftStatistics, Sampling, generate, speculate
from search.submodel.verify import graph_loss
from space import Architecture, Workload, genome, variation
from space.cost import flops_table, params
from space.precision import PRECISIONS, model_file
from supernet.data.corpus import load_corpus
from supernet.evaluate import EvaluationSet, evaluate, evaluation_set
from supernet.extract import SubModel, write_submodel
from supernet.supernet import Supernet
from supernet.training.train import load_supernet

SECONDS, SMALLER, NATS = 20.0, 0.35, 0.02  # goals
RUN_BARE = """
import sys, time, numpy as np
began = time.perf_counter()
import onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
feeds = {"tokens": np.array([[1, 2, 3]]), "position": np.array([0])}
for item in session.get_inputs():
    if item.name.startswith("state."):
        shape = [1 if d == "batch" else 0 if isinstance(d, str) else d for d in item.shape]
        feeds[item.name] = np.zeros(shape, np.float32)
logits = session.run(["logits"], feeds)[0]
assert np.isfinite(logits).all() and "torch" not in sys.modules
print(time.perf_counter() - began)
"""


def interleaved(items: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Return the median of each item's measurements, taken alternately."""
    found: dict[str, list[float]] = {name: [] for name in items}
    for _ in range(rounds):
        for name, run in items.items():
            found[name].append(run())
    return {name: statistics.median(values) for name, values in found.items()}


def precisions(submodel: SubModel, data: EvaluationSet, rounds: int) -> dict[str, Any]:
    """Return bytes, loss and latencies of a sub-model's graphs by precision."""
    workloads = [Workload.parse(text) for text in ("prefill@256", "decode@256")]
    items: dict[str, Callable[[], float]] = {}
    for p in PRECISIONS:
        for w in workloads:
            path = model_file(submodel.folder, p)
            run = OnnxRuntime().load(
                path, submodel.architecture, replace(w, precision=p), submodel.model_config
            )
            run(3)
            loops = 1 if w.phase == "prefill" else 30

            def timed(run: Any = run, loops: int = loops) -> float:
                began = time.perf_counter()
                run(loops)
                return (time.perf_counter() - began) / loops

            items[f"{p}|{w}"] = timed
    seconds = interleaved(items, rounds)
    plain = model_file(submodel.folder).stat().st_size
    found: dict[str, Any] = {}
    for p in PRECISIONS:
        size = model_file(submodel.folder, p).stat().st_size
        found[p] = {
            "bytes": size,
            "size_of_fp32": size / plain,
            "loss_nats": graph_loss(model_file(submodel.folder, p), data),
            "latency_ms": {str(w): 1e3 * seconds[f"{p}|{w}"] for w in workloads},
            "time_of_fp32": {str(w): seconds[f"{p}|{w}"] / seconds[f"fp32|{w}"] for w in workloads},
        }
    return found


def small_members(
    supernet: Supernet, data: EvaluationSet, shares: tuple[float, ...], tried: int
) -> list[Architecture]:
    """Return the best of some random architectures at each share of the largest's FLOPs per decode step."""
    space = supernet.space
    table = flops_table(space, Workload.parse("decode@256"))
    pool = variation.sample(space, np.random.default_rng(0), 20_000)
    cost = table.totals(pool) / table.totals(genome.encode(space, [genome.largest(space)]))
    found = []
    few = replace(data, tokens=data.tokens[:8], targets=data.targets[:8], recallable=data.recallable[:8])
    for share in shares:
        some = np.flatnonzero((cost <= share) & (cost > 0.7 * share))[:tried]
        members = genome.decode(space, pool[some])
        losses = [evaluate(supernet.weights(a), a, space.config, few).loss_nats for a in members]
        found.append(members[int(np.argmin(losses))])
    return found


def drafted(
    target: SubModel, drafts: list[SubModel], prompts: list[list[int]], lengths: tuple[int, ...], tokens: int
) -> list[dict[str, Any]]:
    """Return acceptance rate and speed-up of each draft against decoding without a draft."""
    rows = []
    for draft in drafts:
        for num_draft_tokens in lengths:
            plain_seconds, draft_seconds, same = 0.0, 0.0, 0
            counts = DraftStatistics()
            for prompt in prompts:
                decoder = Decoder(target.folder / "model.onnx")
                small = Decoder(draft.folder / "model.onnx", num_kept_states=num_draft_tokens + 1)
                began = time.perf_counter()
                plain = list(generate(decoder, prompt, tokens, Sampling(), None))
                middle = time.perf_counter()
                found = list(speculate(decoder, small, prompt, tokens, None, num_draft_tokens, counts))
                draft_seconds += time.perf_counter() - middle
                plain_seconds += middle - began
                same += found == plain
            rows.append(
                {
                    "draft": draft.architecture.describe(),
                    "draft_params": params(draft.architecture, draft.model_config),
                    "num_draft_tokens": num_draft_tokens,
                    "acceptance": counts.accepted / counts.proposed,
                    "tokens_per_round": tokens * len(prompts) / max(1, counts.rounds),
                    "speed_up": plain_seconds / draft_seconds,
                    "same": same,
                    "near_ties": counts.near_ties,
                }
            )
    return rows


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a trained run's folder")
    arguments = parser.parse_args()
    quick = arguments.quick
    torch.set_num_threads(1)
    run = open_run(arguments.run, Path("devices"))
    corpus = load_corpus(run.config.train.data)
    checkpoint = open_supernet(run, corpus)
    supernet = load_supernet(run.space, checkpoint)
    data = evaluation_set(corpus, 4 if quick else run.text.windows, run.text.length)
    largest = genome.largest(run.space)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "largest.json").write_text(json.dumps(largest.to_json()))
        command = [
            sys.executable, "-c", "from search.cli import main; main()", "extract",
            "--run", str(arguments.run), "--architecture", str(folder / "largest.json"),
            "--format", "onnx", "--out", str(folder / "command"),
        ]  # fmt: skip
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        whole = time.perf_counter() - began
        began = time.perf_counter()
        target = write_submodel(folder / "largest", supernet, largest, {}, {}, run.text)
        export(target, ["onnx"])
        export_seconds = time.perf_counter() - began
        python = bare(folder / "environment")
        done = subprocess.run(
            [python, "-I", "-c", RUN_BARE, target.folder / "model.onnx"],
            check=True,
            capture_output=True,
            text=True,
        )
        shares = (0.1,) if quick else (0.06, 0.12, 0.25)
        small = small_members(supernet, data, shares, 4 if quick else 60)
        drafts = [write_submodel(folder / a.key, supernet, a, {}, {}, run.text) for a in small]
        models = {}
        for submodel in [target, *drafts]:
            export(submodel, ["onnx"], PRECISIONS)
            models[submodel.architecture.describe()] = {
                "params": params(submodel.architecture, submodel.model_config),
                **precisions(submodel, data, 3 if quick else 15),
            }
        rows = data.tokens[:: max(1, len(data.tokens) // (2 if quick else 12))]
        prompts = [row[:128].tolist() for row in rows]
        lengths = (4,) if quick else (2, 4, 6)
        speculative = drafted(target, drafts, prompts, lengths, 32 if quick else 128)
    checks = {
        f"extract and export of {largest.depth} layers in {whole:.1f} s <= {SECONDS:.0f}": whole <= SECONDS,
        "runs in an environment with numpy and onnxruntime only": True,
    }
    for p in PRECISIONS[1:]:
        size = max(of[p]["size_of_fp32"] for of in models.values())
        loss = max(of[p]["loss_nats"] - of["fp32"]["loss_nats"] for of in models.values())
        checks[f"{p}: {size:.3f} of fp32's size <= {SMALLER}"] = size <= SMALLER
        checks[f"{p}: loss {loss:+.4f} nats <= {NATS}"] = loss <= NATS
    same = all(row["same"] == len(prompts) for row in speculative)
    best = max(speculative, key=lambda row: row["speed_up"])
    checks["speculative decoding: outputs identical"] = same
    checks[f"speculative decoding: {best['speed_up']:.2f} times as fast > 1"] = best["speed_up"] > 1
    body = {
        "extract_seconds": whole,
        "export_seconds": export_seconds,
        "load_and_run_bare_seconds": float(done.stdout),
        "windows": len(data.tokens),
        "models": models,
        "prompts": len(prompts),
        "speculative": speculative,
    }
    return outcome.write("shipping", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
