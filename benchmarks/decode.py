"""Claim: exported sub-models decode at least three times as fast as torch; linear ones at any context.

A full-attention, a 3:1 hybrid and an all-linear model of equal size, once as large as the largest of
configs/spaces/small.yaml and once a third of that, decode at contexts of 128, 1024 and 4096 tokens: with
onnxruntime as `formfit generate` runs them, with torch eager on the plain blocks (inference mode, softmax
caches allocated once and written in place), and with transformers' generate() on the Hugging Face folder.
One thread each, timed alternately.
"""

import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import torch
import torch.nn.functional as F

from search.submodel.decoder import Decoder
from search.submodel.export import export_onnx
from space import Architecture, Layer, ModelConfig
from space.attention.projection import heads_of, project, rms_norm
from space.attention.rotary import rotate
from space.blocks import Model, ffn, mixer_block, part
from space.cost import params
from space.shapes import ffn_shapes, mixer_shapes
from supernet.extract import SUBMODEL, SubModel, read_submodel
from supernet.hf.export import write_hf

CONTEXTS = (128, 1024, 4096)
MODEL_CONFIG = ModelConfig(vocab_size=256, max_seq_len=4608, head_dim=32, tie_embeddings=False)
SIZES = {"large": (192, 6, 512), "small": (128, 4, 256)}  # width, heads, FFN of all eight layers
LINEAR = ("gated_deltanet",)
PATTERNS = {
    "full attention": ("attention",) * 8,
    "3:1 hybrid": (*LINEAR * 3, "attention") * 2,
    "all linear": LINEAR * 8,
}
MIN_SPEED_UP, MAX_SLOWDOWN = 3.0, 1.10  # goals
STEPS = 32  # tokens per timing


def equal_sizes() -> dict[str, Architecture]:
    """Return the models by name; within a size, FFNs grow until parameter counts agree within 1%."""
    found = {}
    for size, (width, heads, hidden) in SIZES.items():
        models = {}
        for name, mixers in PATTERNS.items():
            layers = [Layer(mixer=m, heads=heads, kv_heads=heads // 2, ffn=hidden) for m in mixers]
            models[f"{size} {name}"] = Architecture(width, tuple(layers))
        wanted = max(params(a, MODEL_CONFIG) for a in models.values())
        for name, model in models.items():
            for grown in count(1):
                if params(model, MODEL_CONFIG) >= 0.99 * wanted:
                    break
                layers = list(model.layers)
                slot = grown % len(layers)
                layers[slot] = replace(layers[slot], ffn=layers[slot].ffn + 16)
                model = Architecture(width, tuple(layers))
            found[name] = model
    return found


def submodel_of(folder: Path, architecture: Architecture) -> SubModel:
    """Write a sub-model's folder with random weights, which do not affect the timing."""
    from safetensors.torch import save_file

    folder.mkdir()
    model = Model(architecture, MODEL_CONFIG, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    save_file(model.state_dict(), folder / "model.safetensors")
    body = {
        "key": architecture.key,
        "architecture": architecture.to_json(),
        "model_config": vars(MODEL_CONFIG),
        "chosen": {},
    }
    SUBMODEL.write(folder / "architecture.json", {}, body)
    return read_submodel(folder)


class Eager:
    """The plain blocks in torch, token by token, with softmax caches written in place."""

    def __init__(self, model: Model, room: int) -> None:
        self.weights = {name: p.detach() for name, p in model.named_parameters()}
        self.architecture, self.parts = model.architecture, []
        width = self.architecture.width
        for slot, layer in enumerate(self.architecture.layers):
            shapes = mixer_shapes(layer.mixer, width, layer.heads, layer.kv_heads, MODEL_CONFIG)
            block = part(self.weights, f"layers.{slot}.mixer", shapes)
            self.parts.append((block, part(self.weights, f"layers.{slot}.ffn", ffn_shapes(width, layer.ffn))))
        self.caches = {
            slot: [torch.zeros(1, layer.kv_heads, room, MODEL_CONFIG.head_dim) for _ in range(2)]
            for slot, layer in enumerate(self.architecture.layers)
            if layer.mixer == "attention"
        }

    def fill(self, states: dict[int, Any]) -> dict[int, Any]:
        """Copy the softmax caches of a prefill's states; return the other states."""
        for slot, caches in self.caches.items():
            for cache, name in zip(caches, ("key", "value"), strict=True):
                cache[:, :, : states[slot][name].shape[2]] = states[slot][name]
        return {slot: state for slot, state in states.items() if slot not in self.caches}

    def step(
        self, token: torch.Tensor, position: int, states: dict[int, Any]
    ) -> tuple[torch.Tensor, dict[int, Any]]:
        """Read one token [1, 1]; return logits [1, 1, vocabulary] and the new states."""
        x, after = F.embedding(token, self.weights["embedding"]), {}
        for slot, layer in enumerate(self.architecture.layers):
            block, forward = self.parts[slot]
            if slot in self.caches:
                hidden = rms_norm(x, block["pre_norm"])
                q, k, v = (
                    heads_of(project(hidden, block[name]), MODEL_CONFIG.head_dim) for name in ("q", "k", "v")
                )
                q, k = (rotate(side, position, MODEL_CONFIG.rope) for side in (q, k))
                keys, values = self.caches[slot]
                keys[:, :, position], values[:, :, position] = k[:, 0], v[:, 0]
                seen = slice(0, position + 1)
                out = F.scaled_dot_product_attention(
                    q.transpose(1, 2), keys[:, :, seen], values[:, :, seen], enable_gqa=True
                )
                x = x + project(out.transpose(1, 2).flatten(2), block["o"])
            else:
                x, after[slot] = mixer_block(block, x, layer, MODEL_CONFIG, position, states[slot])
            x = ffn(forward, x, MODEL_CONFIG)
        return project(rms_norm(x, self.weights["norm"]), self.weights["head"]), after


def timings(submodel: SubModel, hf: Any, context: int) -> dict[str, Callable[[], float]]:
    """Return functions that time one token at a context, in seconds, by runtime; all use the same prompt."""
    prompt = np.random.default_rng(0).integers(1, MODEL_CONFIG.vocab_size, context - 1)
    decoder = Decoder(submodel.folder / "model.onnx")
    model = submodel.model()
    eager = Eager(model, MODEL_CONFIG.max_seq_len)
    with torch.inference_mode():
        states = model(torch.from_numpy(prompt[None]))[1]
        first = eager.fill(states)
        expected = eager.step(torch.tensor([[7]]), context - 1, first)[0].numpy()
    state = decoder.read(prompt.tolist(), decoder.start())[1]
    found = decoder(np.array([[7]]), state)[0]
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if error > 1e-4:
        raise RuntimeError(f"outputs of onnxruntime and torch differ by {error}")
    state = decoder.read(prompt.tolist(), decoder.start())[1]

    def onnx() -> float:
        now, token = state, np.array([[7]])
        began = time.perf_counter()
        for _ in range(STEPS):
            logits, now = decoder(token, now)
            token[0, 0] = logits[0, -1].argmax()
        return (time.perf_counter() - began) / STEPS

    def torch_eager() -> float:
        with torch.inference_mode():
            now, token, position = first, torch.tensor([[7]]), context - 1
            began = time.perf_counter()
            for _ in range(STEPS):
                logits, now = eager.step(token, position, now)
                token, position = logits.argmax(-1), position + 1
            return (time.perf_counter() - began) / STEPS

    def transformers() -> float:
        ids, took = torch.from_numpy(prompt[None]), []
        for new in (1, 1 + STEPS):
            began = time.perf_counter()
            hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )
            took.append(time.perf_counter() - began)
        return (took[1] - took[0]) / STEPS

    return {"onnxruntime": onnx, "torch eager": torch_eager, "transformers": transformers}


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    contexts, rounds = ((128, 256), 2) if arguments.quick else (CONTEXTS, 9)
    torch.set_num_threads(1)
    table: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_MODULES_CACHE"] = str(Path(temporary) / "modules")
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        items: dict[tuple[str, int], dict[str, Callable[[], float]]] = {}
        for name, architecture in equal_sizes().items():
            submodel = submodel_of(Path(temporary) / name.replace(" ", "-").replace(":", ""), architecture)
            export_onnx(submodel)
            folder = submodel.folder / "hf"
            write_hf(folder, submodel.model().state_dict(), architecture, MODEL_CONFIG, None)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                hf = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
            table[name] = {
                "params": params(architecture, MODEL_CONFIG),
                "architecture": architecture.describe(),
            }
            for context in contexts:
                items[name, context] = timings(submodel, hf, context)
        seconds: dict[tuple[str, int, str], list[float]] = {}
        for _ in range(rounds):
            for (name, context), runs in items.items():
                for who, run in runs.items():
                    seconds.setdefault((name, context, who), []).append(run())
    checks = {}
    for name, context in items:
        row = {who: statistics.median(seconds[name, context, who]) for who in items[name, context]}
        spread = {
            who: (max(seconds[name, context, who]) - min(seconds[name, context, who])) / row[who]
            for who in row
        }
        table[name][str(context)] = {
            "tokens_per_second": {who: round(1 / value, 1) for who, value in row.items()},
            "times_torch_eager": row["torch eager"] / row["onnxruntime"],
            "times_transformers": row["transformers"] / row["onnxruntime"],
            "spread": spread,
        }
        times = row["torch eager"] / row["onnxruntime"]
        checks[f"{name} at {context}: {times:.1f} times torch eager >= {MIN_SPEED_UP}"] = (
            times >= MIN_SPEED_UP
        )
    for size in SIZES:
        name, ends = f"{size} all linear", (contexts[0], contexts[-1])
        times = [statistics.median(seconds[name, context, "onnxruntime"]) for context in ends]
        text = f"{name}: {times[1] / times[0]:.2f} of the time from {ends[0]} to {ends[1]} <= {MAX_SLOWDOWN}"
        checks[text] = times[1] / times[0] <= MAX_SLOWDOWN
    return outcome.write("decode", arguments, {"threads": 1, "models": table}, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
