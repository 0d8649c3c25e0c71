"""Claim: private blocks come close to a trained parent's after 64,000 tokens of text.

Fits every choice of the layers to the parent's activations and reports held-out errors (squared error of the
residual contribution over the square of the parent's contribution) by choice: the distribution over layers,
before the first step and at the end, and over numbers of tokens. Goals, at the largest number of tokens:
gated_deltanet median <= 0.22, sliding(256) median <= 0.02, half of the FFN median <= 0.14.

--parent names the folder or the GGUF file of a trained model; its size gives the choices. Without it (or with
--quick) a small model is trained, which only shows that the benchmark works. Resumable: blocks are kept under
--runs.
"""

import argparse
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import outcome

from space import Architecture, Layer, ModelConfig, Space, genome
from space.io.config import parse
from supernet.blockwise.capture import capture_windows, remove_capture, write_parent
from supernet.blockwise.library import read_entry
from supernet.blockwise.parent import Parent, open_parent
from supernet.blockwise.train import Stages, make_plan, require_room
from supernet.data.corpus import Corpus, DataConfig, load_corpus
from supernet.extract import read_submodel, write_submodel
from supernet.parent import read_parent
from supernet.training.parallel import ray_session
from supernet.training.recipe import TrainConfig
from supernet.training.train import is_submodel, load_supernet, train

MIXERS = ("attention", "sliding", "gated_deltanet", "kda", "mamba2", "gla", "short_conv")
GOALS = {"gated_deltanet": 0.22, "sliding": 0.02, "half of the FFN": 0.14}
QUICK = Architecture(32, (Layer(mixer="attention", heads=4, kv_heads=2, ffn=64),) * 2)


def block_space(
    parent: Architecture, config: ModelConfig, mixers: list[str], ffn_quarters: list[int]
) -> Space:
    """Return the space of the choices that are fitted; the parent's own are among them."""
    layer, length = parent.layers[0], config.max_seq_len
    mixers = list(dict.fromkeys(["attention", *mixers]))
    ffn = {layer.ffn // 64 * 16 * share for share in ffn_quarters if share < 4}
    value = {
        "name": "blocks",
        "sharing": "block",
        **config.to_json(),
        "width": [parent.width],
        "depth": [len(parent.layers)],
        "layer": {
            "mixer": mixers,
            "heads": [layer.heads],
            "kv_heads": [layer.kv_heads],
            "ffn": sorted({*ffn, layer.ffn}),
            "window": [length // 2] if "sliding" in mixers else [],
        },
        "hybrid": {"ratios": ["full", 1, "linear"] if len(mixers) > 1 else ["full"]},
    }
    return parse(Space, value, "blocks")


def own_sizes(folder: Path) -> tuple[Architecture, ModelConfig]:
    """Return a parent's architecture and configuration."""
    parent = read_submodel(folder) if is_submodel(folder) else read_parent(folder)
    return parent.architecture, parent.model_config


def small_parent(folder: Path, corpus: Corpus, length: int) -> Path:
    """Train a small parent, and return its folder."""
    model_config = ModelConfig(vocab_size=256, max_seq_len=length, head_dim=16)
    space = block_space(QUICK, model_config, [], [])
    config = TrainConfig(steps=150, batch=8, length=length, rule="random", sampled=1, threads=1)
    checkpoint = train(space, config, folder / "training", corpus=corpus)
    write_submodel(folder / "model", load_supernet(space, checkpoint), genome.largest(space), {}, {})
    return folder / "model"


def distribution(values: list[float]) -> dict[str, Any]:
    """Return the quartiles, the range and the values themselves."""
    quartiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).round(4).tolist()
    names = ("least", "lower_quartile", "median", "upper_quartile", "greatest")
    return dict(zip(names, quartiles, strict=True)) | {"by_layer": [round(value, 4) for value in values]}


def fitted(
    space: Space, config: TrainConfig, parent: Parent, corpus: Corpus, folder: Path, layers: list[int]
) -> dict[str, Any]:
    """Fit the blocks of some layers, and return their errors by choice."""
    windows, held_out = capture_windows(corpus, config.blockwise.tokens, config.length or space.max_seq_len)
    plan = make_plan(space, config, folder, parent, windows, held_out)
    missing = [slot for slot in layers if plan.missing(slot)]
    boundaries = require_room(plan, parent, windows, config, len(missing))
    write_parent(plan.parent, parent.weights, parent.digest)
    shown = [0.0]

    def report(share: float, text: str) -> None:
        if time.monotonic() - shown[0] > 20:
            shown[0] = time.monotonic()
            sys.stderr.write(f"{windows.size} tokens: {share:.0%}, {text}\n")

    began = time.monotonic()
    with ray_session(config.workers) if config.workers else nullcontext():
        Stages(plan, windows, config, report).fit(missing, boundaries)
    remove_capture(plan.capture)
    seconds = time.monotonic() - began
    entries = [read_entry(plan.path(one)) for slot in layers for one in plan.slot_candidates(slot)]
    return {
        "seconds": round(seconds, 1) if len(missing) == len(layers) else None,  # unknown if resumed
        "held_out_windows": held_out,
        "choices": {
            name: {
                "error": distribution([e.error for e in entries if e.candidate == name]),
                "start_error": distribution([e.start_error for e in entries if e.candidate == name]),
                "steps": distribution([float(e.steps) for e in entries if e.candidate == name])["by_layer"],
            }
            for name in dict.fromkeys(e.candidate for e in entries)
        },
    }


def given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def main() -> int:
    parser = outcome.options(__doc__ or "")
    parser.add_argument(
        "--parent", type=Path, help="folder or GGUF file of a trained model; else one is trained"
    )
    parser.add_argument(
        "--text", type=Path, help="file or folder of text; the default is the standard library"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; the default is the parent's")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[16384, 65536], help="numbers of fitted tokens"
    )
    parser.add_argument("--layers", type=int, nargs="+", help="slots; the default is all")
    parser.add_argument(
        "--mixers", nargs="*", default=list(MIXERS), help="mixers beside the parent's attention"
    )
    parser.add_argument("--ffn-quarters", type=int, nargs="*", default=[1, 2, 3], choices=[1, 2, 3],
                        help="FFN sizes, in quarters of the parent's")  # fmt: skip
    parser.add_argument("--steps", type=int, help="Adam's steps of a block")
    parser.add_argument("--batch", type=int, help="windows of a step")
    parser.add_argument("--learning-rate", type=float, help="of weights that the parent does not have")
    parser.add_argument("--inherited-rate", type=float, help="of weights that are taken over")
    parser.add_argument("--storage", choices=("bf16", "fp32"), default="bf16", help="of activations on disk")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--limit-mb", type=float, default=20.0, help="text that is read")
    parser.add_argument("--workers", type=int, default=2, help="layers at a time; 0: in this process")
    parser.add_argument("--runs", type=Path, help="folder of the blocks, kept to go on from")
    arguments = parser.parse_args()
    quick = arguments.quick or arguments.parent is None
    with tempfile.TemporaryDirectory() as temporary:
        runs = arguments.runs or Path(temporary)
        length = 32 if quick else arguments.length
        tokenizer = None if quick else arguments.tokenizer or read_parent(arguments.parent).tokenizer
        data = DataConfig(
            path=arguments.text,
            limit_mb=1.0 if quick else arguments.limit_mb,
            tokenizer=tokenizer,
        )
        corpus = load_corpus(data)
        folder = small_parent(runs / "parent", corpus, length) if quick else arguments.parent
        architecture, model_config = own_sizes(folder)
        model_config = replace(model_config, max_seq_len=length)
        space = block_space(architecture, model_config, arguments.mixers, arguments.ffn_quarters)
        layers = arguments.layers or list(range(space.slots))
        results: dict[str, Any] = {}
        for tokens in [2048] if quick else sorted(arguments.tokens):
            value: dict[str, Any] = {"method": "blockwise", "init": folder, "length": length}
            value |= {"workers": 0 if quick else arguments.workers}
            value |= given(arguments, "steps", "batch", "learning_rate") | ({"steps": 12} if quick else {})
            value["blockwise"] = {"tokens": tokens} | given(arguments, "inherited_rate", "storage")
            config = TrainConfig.model_validate(value)
            settings = config.model_dump(mode="json", include={"steps", "batch", "length", "learning_rate"})
            settings |= config.blockwise.model_dump(mode="json", exclude={"tokens", "score_windows"})
            parent = open_parent(folder, space)
            results[str(tokens)] = fitted(space, config, parent, corpus, runs / "blocks", layers)
    most = next(reversed(results.values()))["choices"]
    half = f"ffn-{architecture.layers[0].ffn // 64 * 32}"
    checks = {}
    for goal, bound in GOALS.items():
        names = [name for name in most if name.startswith(goal if goal in MIXERS else half)]
        if names:
            median = most[names[0]]["error"]["median"]
            checks[f"{goal}: median error {median:.3f} <= {bound}"] = median <= bound
    body = {
        "parent": architecture.describe(),
        "layers": layers,
        "settings": settings,
        "corpus": arguments.text.name if arguments.text else corpus.source,
        "tokens": results,
    }
    medians = {name: (v["start_error"]["median"], v["error"]["median"]) for name, v in most.items()}
    reports = [
        f"{name}: median error {end:.3f}, {start:.3f} before the first step"
        for name, (start, end) in medians.items()
    ]
    return outcome.write("blockwise", arguments, body, {} if quick else checks, reports)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
