"""The command line as benchmarks use it: each call in a process of its own, each answer its JSON object."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latency import Predictor
from search.problem.milp import least
from search.problem.problem import SearchConfig
from space import Space, Workload, genome
from space.io.artefact import write_text

MISSED = 3  # the exit code of a search that found nothing that keeps its limits; its front is there


class Program:
    """The command line on one run and one device."""

    def __init__(self, run: Path, devices: Path, device: str, noise: float) -> None:
        self.run, self.devices, self.device, self.noise = run, devices, device, str(noise)

    def __call__(self, *words: object, may_miss: bool = False) -> dict[str, Any]:
        """What a command prints with --json.

        Raises:
            SystemExit: with what it said, where it failed.
        """
        code = "from search.cli import main; main()"
        command = [sys.executable, "-c", code, "--devices", str(self.devices), *map(str, words), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.stdout or done.returncode not in ((0, MISSED) if may_miss else (0,)):
            raise SystemExit(done.stderr.strip())
        return dict(json.loads(done.stdout))

    def profile(self, space: Space, folder: Path, workloads: Sequence[object], *more: object) -> None:
        """Profile a space, whose file is written to a folder."""
        file = folder / "space.yaml"
        write_text(file, json.dumps(space.model_dump(mode="json")))  # JSON is YAML
        wanted = [word for w in workloads for word in ("--workload", w)]
        self("profile", "--space", file, "--device", self.device, *wanted, "--max-noise", self.noise, *more)

    def search(self, name: str, workload: object, limit: str, *more: object) -> dict[str, Any]:
        """Search for low loss and low latency in a workload, under a limit."""
        return self(
            "search", "--run", self.run, "--device", self.device, "--name", name, "--limit", limit,
            "--objective", "loss", "--objective", f"latency:{workload}", *more, may_miss=True,
        )  # fmt: skip

    @property
    def proof(self) -> tuple[str, ...]:
        """What makes a search measure what it hands over."""
        return "--verify", "--max-noise", self.noise


def bounds_between(
    space: Space, predictor: Predictor, workload: Workload, places: Sequence[float]
) -> list[float]:
    """Limits in seconds, each so far in the logarithm from the least latency to the largest model's."""
    low = least(space, predictor.cost(workload, SearchConfig().confidence))[0]
    high = float(predictor.predict(genome.encode(space, [genome.largest(space)]), workload)[0])
    return [low * (high / low) ** place for place in places]
