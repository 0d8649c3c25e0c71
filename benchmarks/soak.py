"""Claim: long work takes no more memory than short work, and killed runs end as uninterrupted ones.

A run is trained for a few steps on configs/spaces/quickstart.yaml. Then

- a search of 20,000 evaluations with two workers: the resident memory of its process and of its workers,
  sampled every second, at a tenth of the evaluations and at the end;
- 2,000 tokens of text, generated again and again by one process: its resident memory after a tenth and at the
  end;
- `formfit run` on a fixed device card, killed ten times at random moments (SIGKILL of all its processes) and
  started again until it ends: the first front, the checkpoints and the weights and graphs of every sub-model
  that both runs have, compared byte by byte with those of an uninterrupted run.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import yaml

from search.submodel.generation import Sampling, generate
from search.submodel.loading import open_model
from space.io.artefact import file_digest

ROOT = Path(__file__).parents[1]
EVALUATIONS, TOKENS, KILLS = 20_000, 2_000, 10
PROFILE = {
    "block_ms": 1.0, "min_rounds": 2, "max_rounds": 2, "error": 1.0, "max_noise": None, "max_error": None,
    "optimal_models": 12, "random_models": 6, "held_out_models": 5, "repeated_models": 2, "rss": False,
}  # fmt: skip
GROWTH_MB = {"driver": 200.0, "worker": 50.0, "generation": 20.0}


def configuration(folder: Path, steps: int, generations: int) -> Path:
    """Write the configuration of the runs; return its path."""
    value = {
        "space": str(ROOT / "configs" / "spaces" / "quickstart.yaml"),
        "train": {
            "steps": steps, "batch": 2, "sampled": 1, "checkpoint_every": 10, "data": {"limit_mb": 2.0}
        },
        "profile": PROFILE,
        "search": {
            "limits": ["params<=70%"], "generations": generations, "population": 16, "windows": 4,
            "front_windows": 8, "surrogate": False,
        },
        "verify": {"tokens": 24, "copies": 1, "rounds": 4, "block_ms": 1.0, "max_noise": None, "searches": 1},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def start(folder: Path, *words: object) -> subprocess.Popen[bytes]:
    """Start the command line in a session of its own; its output goes to a file."""
    command = [sys.executable, "-m", "formfit", "--devices", folder / "devices", *words]
    with (folder / "output.log").open("ab") as log:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )


def ended(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for a command; raise if it failed. A missed limit is no failure here."""
    if process.wait() not in (0, 3):
        raise SystemExit((folder / "output.log").read_text()[-2000:])


def family(root: int) -> Iterator[tuple[int, str]]:
    """Yield (id, name) of a process and of all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    todo = [root]
    while todo:
        process = todo.pop()
        with suppress(OSError):
            yield process, (Path("/proc") / str(process) / "cmdline").read_text().split("\0")[0]
        todo += children.get(process, [])


def resident_mb(process: int | str) -> float:
    """Return the resident memory of a process in MB, without pages that it shares."""
    fields = (Path("/proc") / str(process) / "statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") / 1e6


def search_memory(folder: Path, run: Path, evaluations: int) -> dict[str, Any]:
    """Search with two workers; return memory of the driver and of the largest worker over the evaluations."""
    population = 200 if evaluations >= EVALUATIONS else 20
    generations = evaluations // population
    process = start(
        folder, "search", "--run", run, "--device", "here", "--name", "soak", "--generations", generations,
        "--population", population, "--no-surrogate", "--workers", 2, "--limit", "params<=95%",
        "--objective", "loss", "--objective", "params",
    )  # fmt: skip
    parts, samples = run / "searches" / "soak" / "evaluations", []
    began = time.monotonic()
    while process.poll() is None:
        done = len(list(parts.glob("part-[0-9]*.parquet")))
        with suppress(OSError):
            workers = [resident_mb(p) for p, name in family(process.pid) if name.startswith("ray::")]
            samples.append((done / generations, resident_mb(process.pid), max(workers, default=0.0)))
        time.sleep(1.0)
    ended(process, folder)
    early = [sample for sample in samples if 0 < sample[0] <= 0.1]
    late = [sample for sample in samples if sample[0] >= 0.9]
    if not early or not late:
        raise SystemExit("the search was too short to be sampled")
    peaks = {
        name: {"first_tenth_mb": max(s[i] for s in early), "last_tenth_mb": max(s[i] for s in late)}
        for i, name in enumerate(("driver", "worker"), start=1)
    }
    return {"evaluations": generations * population, "seconds": time.monotonic() - began, **peaks}


def generation_memory(model: Path, tokens: int) -> dict[str, Any]:
    """Generate texts to the model's context again and again in this process; return its memory."""
    decoder = open_model(model, "fp32", threads=1).decoder
    made, first, rng = 0, 0.0, np.random.default_rng(0)
    while made < tokens:
        prompt = rng.integers(1, 256, 8).tolist()
        space = min(decoder.model_config.max_seq_len - len(prompt), tokens - made)
        made += sum(1 for _ in generate(decoder, prompt, space, Sampling(temperature=1.0, seed=made), None))
        first = first or (resident_mb("self") if made >= tokens / 10 else 0.0)
    return {"tokens": made, "first_tenth_mb": first, "end_mb": resident_mb("self")}


def results(run: Path) -> dict[str, str]:
    """Return the sha256 of a run's results that depend on no measurement, by path."""
    found = [*run.glob("searches/*/front.json"), *run.glob("supernet/step-*/model.safetensors")]
    found += [p for p in run.glob("submodels/*/*") if p.name in ("model.safetensors", "model.onnx")]
    return {str(path.relative_to(run)): file_digest(path) for path in found}


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and everything that it started."""
    for one, _ in list(family(process.pid)):
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    process.wait()


def killed_runs(folder: Path, config: Path, kills: int) -> dict[str, Any]:
    """Compare runs that are killed at random moments with an uninterrupted one."""
    rng = np.random.default_rng(0)
    began = time.monotonic()
    ended(start(folder, "run", config, "--out", folder / "whole"), folder)
    seconds = time.monotonic() - began
    expected, moments, runs, differing, compared = results(folder / "whole"), [], 0, [], 0
    while len(moments) < kills:
        run = folder / f"killed-{runs}"
        runs += 1
        while len(moments) < kills:
            process = start(folder, "run", config, "--out", run)
            moment = float(rng.uniform(1.0, 0.8 * seconds))
            with suppress(subprocess.TimeoutExpired):
                process.wait(moment)
                break  # it ended before
            kill(process)
            moments.append(round(moment, 1))
            sys.stderr.write(f"killed after {moment:.1f} s, {len(moments)} of {kills}\n")
        ended(start(folder, "run", config, "--out", run), folder)
        found = results(run)
        common = expected.keys() & found.keys()
        compared += len(common)
        differing += [f"{run.name}: {path}" for path in common if found[path] != expected[path]]
        missing = [p for p in expected if p not in found and not p.startswith("submodels")]
        differing += [f"{run.name}: {path} is missing" for path in missing]
        shutil.rmtree(run)
    return {
        "seconds_of_a_run": seconds, "killed_after_seconds": moments, "runs": runs,
        "files_compared": compared, "differing": differing,
    }  # fmt: skip


def main() -> int:
    arguments = outcome.options(__doc__ or "").parse_args()
    evaluations, tokens, kills = (200, 200, 1) if arguments.quick else (EVALUATIONS, TOKENS, KILLS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = configuration(folder, steps=20, generations=4)
        killed = killed_runs(folder, config, kills)
        run = folder / "whole"
        search = search_memory(folder, run, evaluations)
        model = next(path.parent for path in run.glob("submodels/*/model.onnx"))
        generation = generation_memory(model, tokens)
    body = {"search": search, "generation": generation, "killed_runs": killed}
    growth = {
        "driver": search["driver"]["last_tenth_mb"] - search["driver"]["first_tenth_mb"],
        "worker": search["worker"]["last_tenth_mb"] - search["worker"]["first_tenth_mb"],
        "generation": generation["end_mb"] - generation["first_tenth_mb"],
    }
    checks = {
        f"{name}: memory grows by {value:.0f} MB <= {GROWTH_MB[name]:.0f}": value <= GROWTH_MB[name]
        for name, value in growth.items()
    }
    checks[
        f"{len(killed['killed_after_seconds'])} kills: {len(killed['differing'])} of "
        f"{killed['files_compared']} files differ"
    ] = not killed["differing"]
    reports = [f"{search['evaluations']:,} evaluations in {search['seconds']:.0f} s"]
    return outcome.write("soak", arguments, body, {} if arguments.quick else checks, reports)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
