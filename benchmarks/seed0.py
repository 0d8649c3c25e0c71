"""Check that a change leaves all numbers as they are: a tiny run with seed 0, compared byte for byte.

    git switch main && python benchmarks/seed0.py --out /tmp/before
    git switch my-change && python benchmarks/seed0.py --out /tmp/after --against /tmp/before

Trains a tiny supernet on generated text, fits a predictor to synthetic timings (nothing is timed), searches,
and exports one sub-model. The results do not depend on the machine's speed, but on its CPU model and on the
versions of torch, numpy and onnxruntime, which table.json records. It writes:

    supernet.safetensors   the trained weights
    predictions.json       predicted mean and upper bound of 200 architectures, as hexadecimal floats
    front.json             the front of a search with the surrogate
    model.onnx             the exported graph of the front's best member
    table.json             sha256 of each file

The exit code is 3 if a file differs from ``--against``. A change that claims no numeric change leaves all
files identical. A change that renames keys may change only these keys and the digests that follow from them.
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import outcome

from latency import Predictor
from latency.device_runner.fingerprint import cpu_model
from latency.predictor.fit import HeldOutModels, fit_predictor
from latency.predictor.op_latencies import TimedModel
from search.engine.config import SearchConfig
from search.engine.entry import search_supernet
from search.submodel.export import export
from space import Architecture, InputError, Space, Workload, genome, variation
from space.cost import op_flops, op_params
from space.io.artefact import file_digest
from space.io.config import parse
from space.ops import count_ops, space_ops
from supernet.data.corpus import DataConfig, load_corpus
from supernet.extract import Text, write_submodel
from supernet.training.recipe import TrainConfig
from supernet.training.train import Trained, load_supernet, train

SPACE = {
    "name": "seed0", "vocab_size": 256, "max_seq_len": 64, "head_dim": 16,
    "width": [16, 32], "depth": [1, 2, 3],
    "layer": {
        "mixer": ["attention", "sliding", "linear", "gated_deltanet", "none"], "heads": [1, 2],
        "ffn": [0, 32, 64], "window": [16],
    },
    "hybrid": {"ratios": ["full", 1, "linear"]},
}  # fmt: skip
WORKLOADS = tuple(Workload.parse(text) for text in ("prefill@16", "prefill@64", "decode@16", "decode@64"))
SEARCH = SearchConfig(
    limits=("prefill@64<=90%", "params<=95%"),
    objectives=("loss", "latency:prefill@64"),
    generations=4,
    population=8,
    windows=8,
    front_windows=12,
    workers=0,
)
FITTED, RANDOM, HELD_OUT = 14, 6, 6  # whole models of the predictor: chosen, drawn at random, held out
DIFFERENT = 3  # exit code
SHOWN = 12  # differences printed per file
TABLE = "table.json"


class Quiet:
    """A reporter that prints nothing."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Any]:
        """Return a stage that ignores its progress."""
        yield lambda share, text: None

    def skipped(self, title: str) -> None:
        """Ignore a skipped stage."""

    def warn(self, text: str) -> None:
        """Ignore a warning."""


def write_texts(folder: Path) -> None:
    """Write 60 documents of random words; every fourth word can only be recalled from the context."""
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    folder.mkdir()
    for i in range(60):
        name = "".join(chr(97 + j) for j in rng.integers(0, 26, 10))
        drawn = [words[j] for j in rng.integers(0, len(words), 300)]
        text = " ".join(name if j % 4 == 3 else word for j, word in enumerate(drawn))
        (folder / f"{i}.txt").write_text(text)


def synthetic_predictor(space: Space) -> Predictor:
    """Fit a predictor to synthetic timings: FLOPs and parameters at fixed rates, 5% random variation."""
    rng = np.random.default_rng(0)
    config = space.config
    seconds = {
        (op, w): (1e-6 + 1e-10 * op_flops(op, w, config) + 1e-10 * op_params(op, config))
        * float(rng.lognormal(0, 0.05))
        for op in space_ops(space)
        for w in WORKLOADS
    }
    models = genome.decode(space, variation.sample(space, rng, FITTED + RANDOM + HELD_OUT))

    def timed(architecture: Architecture, workload: Workload) -> float:
        total = sum(n * seconds[op, workload] for op, n in count_ops(architecture).items())
        return total * float(rng.lognormal(0, 0.02))

    fitted, held_out = models[: FITTED + RANDOM], models[FITTED + RANDOM :]
    return fit_predictor(
        space,
        WORKLOADS,
        [TimedModel(a, w, timed(a, w), 0.02) for w in WORKLOADS for a in fitted],
        {a.key: "optimal" if i < FITTED else "random" for i, a in enumerate(fitted)},
        HeldOutModels(
            architectures=held_out,
            seconds={w: np.array([timed(a, w) for a in held_out]) for w in WORKLOADS},
            repeatability=dict.fromkeys(WORKLOADS, 1.0),
        ),
    )


def predictions(predictor: Predictor) -> dict[str, Any]:
    """Return predicted seconds of random architectures, exact as hexadecimal floats."""
    genomes = variation.sample(predictor.space, np.random.default_rng(1), 200)
    value = {}
    for w in WORKLOADS:
        rows = {"mean": predictor.predict(genomes, w), "upper": predictor.upper(genomes, w, 0.975)}
        value[str(w)] = {name: [float(x).hex() for x in row] for name, row in rows.items()}
    return value


def make(out: Path) -> dict[str, Any]:
    """Write all files to a new folder and return the table."""
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: exists and is not empty; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    space = parse(Space, SPACE, "seed0")
    predictor = synthetic_predictor(space)
    (out / "predictions.json").write_text(json.dumps(predictions(predictor), indent=1) + "\n")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_texts(work / "text")
        data = DataConfig(path=work / "text", held_out=0.2)
        config = TrainConfig(steps=20, batch=4, checkpoint_every=10, threads=1, precision="fp32", data=data)
        corpus = load_corpus(data)
        checkpoint = train(space, config, work / "supernet", corpus=corpus)
        shutil.copy(checkpoint.folder / "model.safetensors", out / "supernet.safetensors")
        text = Text(data=data, length=space.max_seq_len, windows=SEARCH.front_windows)
        trained = Trained(space, checkpoint, corpus, text)
        front = search_supernet(work / "search", trained, {"desk": predictor}, SEARCH, Quiet())
        shutil.copy(work / "search" / "front.json", out / "front.json")
        best = front.member("best").architecture
        submodel = write_submodel(work / "submodel", load_supernet(space, checkpoint), best, {}, {})
        export(submodel, ["onnx"])
        shutil.copy(submodel.folder / "model.onnx", out / "model.onnx")
    libraries = ("torch", "numpy", "scipy", "scikit-learn", "onnx", "onnxruntime")
    table = {
        "machine": {"cpu": cpu_model(), "python": platform.python_version()},
        "versions": {name: version(name) for name in libraries},
        "sha256": {p.name: file_digest(p) for p in sorted(out.iterdir()) if p.name != TABLE},
    }
    (out / TABLE).write_text(json.dumps(table, indent=1) + "\n")
    return table


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of every number, text and null of a JSON value."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if items is None:
        yield path, value
        return
    for key, item in items:
        yield from leaves(item, f"{path}.{key}" if path else str(key))


def differences(before: Path, after: Path) -> list[str]:
    """Return the differences between two files in words."""
    if before.suffix != ".json":
        left, right = before.read_bytes(), after.read_bytes()
        first = next(
            (i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y),
            min(len(left), len(right)),
        )
        return [f"{len(left)} and {len(right)} bytes; the first difference is at byte {first}"]
    old, new = (dict(leaves(json.loads(path.read_text()))) for path in (before, after))
    paths = [path for path in {**old, **new} if old.get(path, KeyError) != new.get(path, KeyError)]
    shown = [f"{path}: {old.get(path, 'missing')} -> {new.get(path, 'missing')}" for path in paths[:SHOWN]]
    more = [f"and {len(paths) - SHOWN} more"] if len(paths) > SHOWN else []
    return shown + more or ["equal values, written differently"]


def compare(before: Path, after: Path, table: Mapping[str, Any]) -> int:
    """Print the differences between two folders; return the exit code."""
    try:
        old = json.loads((before / TABLE).read_text())
    except OSError as error:
        raise InputError(f"--against {before}: {error}") from None
    for name in ("machine", "versions"):
        if old[name] != table[name]:
            sys.stdout.write(f"note: {name} differ: {old[name]} and {table[name]}\n")
    code = 0
    for name in dict.fromkeys([*old["sha256"], *table["sha256"]]):
        if name not in old["sha256"] or name not in table["sha256"]:
            lines = ["in one folder only"]
        elif old["sha256"][name] == table["sha256"][name]:
            sys.stdout.write(f"identical  {name}\n")
            continue
        else:
            lines = differences(before / name, after / name)
        code = DIFFERENT
        sys.stdout.write(f"DIFFERENT  {name}\n" + "".join(f"           {line}\n" for line in lines))
    return code


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the files")
    parser.add_argument("--against", type=Path, help="a folder of an earlier call to compare with")
    arguments = parser.parse_args()
    table = make(arguments.out)
    for name, sha256 in table["sha256"].items():
        sys.stdout.write(f"{sha256}  {name}\n")
    return compare(arguments.against, arguments.out, table) if arguments.against else 0


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
