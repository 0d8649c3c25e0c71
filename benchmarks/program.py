"""The command line for benchmarks: each call runs in a new process and returns its JSON output."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latency import Predictor
from search.engine.config import SearchConfig
from search.problem.milp import least
from space import Space, Workload, genome
from space.io.artefact import write_text

LIMIT_MISSED = 3  # exit code of a search without a model that keeps its limits; its front is written


class Program:
    """The command line on one run and one device.

    Attributes:
        run: folder of the trained run.
        devices: folder of the device cards.
        device: name of the card.
        noise: largest A/A difference in percent, as ``--max-noise``.
    """

    def __init__(self, run: Path, devices: Path, device: str, noise: float) -> None:
        self.run, self.devices, self.device, self.noise = run, devices, device, str(noise)

    def __call__(self, *words: object, may_miss: bool = False) -> dict[str, Any]:
        """Run a command with --json and return its output.

        Args:
            words: the command and its options.
            may_miss: accept the exit code of a missed limit.

        Raises:
            SystemExit: with the command's error message, if it fails.
        """
        code = "from search.cli import main; main()"
        command = [sys.executable, "-c", code, "--devices", str(self.devices), *map(str, words), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.stdout or done.returncode not in ((0, LIMIT_MISSED) if may_miss else (0,)):
            raise SystemExit(done.stderr.strip())
        return dict(json.loads(done.stdout))

    def profile(self, space: Space, folder: Path, workloads: Sequence[object], *more: object) -> None:
        """Profile a space; its file is written to a folder."""
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
        """Options that make a search measure its finalists."""
        return "--verify", "--max-noise", self.noise


def bounds_between(
    space: Space, predictor: Predictor, workload: Workload, places: Sequence[float]
) -> list[float]:
    """Return limits in seconds at positions between the smallest latency (0) and the largest model's (1).

    Positions are on a logarithmic scale.
    """
    low = least(space, predictor.cost(workload, SearchConfig().confidence))[0]
    high = float(predictor.predict(genome.encode(space, [genome.largest(space)]), workload)[0])
    return [low * (high / low) ** place for place in places]
