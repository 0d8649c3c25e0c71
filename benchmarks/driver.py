"""Claims about the search's driver: what it costs beside evaluating, and how fast it refuses.

20,000 architectures of configs/spaces/small.yaml, 96 at a time, with an evaluator that returns at once (a
loss from the genes), in this process, record and Optuna study included, under a limit on a measured device's
latency: at most 2 ms an architecture, and at most 8 KB of memory for each. Others are shown beside it.
Limits on latency and memory that are impossible only together are refused by the certificate within 2
seconds; so is an impossible limit by the whole command, from start to exit.

It takes a card that was profiled for that space, and a trained run for the whole command:

    formfit run configs/small.yaml --out RUN
    python benchmarks/driver.py --run RUN --devices devices --device here
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import outcome

from latency import Predictor, load_card, load_predictor
from search.engine.search import Search
from search.problem.feasibility import check_feasible
from search.problem.limit import Constraint, Limit
from search.problem.milp import least
from search.config import SearchConfig, make_problem
from space import Architecture, InfeasibleError, Workload, load_space
from space.cost import memory_cost
from supernet.evaluate import Quality

SPACE = Path(__file__).parents[1] / "configs" / "spaces" / "small.yaml"


def at_once(architectures: Sequence[Architecture], _data: str) -> Iterator[Quality]:
    """A loss that falls with size, and depends a little on everything."""
    for one in architectures:
        size = sum(layer.ffn + 64 * layer.heads for layer in one.layers)
        loss = 3 - 1e-4 * size - 1e-3 * one.width + int(one.key[:6], 16) / 2**24 / 20
        yield Quality(loss_nats=loss, recall_loss_nats=loss)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def driven(predictor: Predictor, strategy: str, evaluations: int, population: int) -> dict[str, float]:
    """Milliseconds and bytes for each of so many evaluations, so many at a time."""
    config = SearchConfig(
        strategy=strategy,
        generations=evaluations // population,
        population=population,
        workers=0,
        limits=("prefill@256<=60%",),
    )
    problem = make_problem(predictor.space, {"here": predictor}, config)
    with tempfile.TemporaryDirectory() as folder:
        search = Search(problem, config, Path(folder), {})
        before, began = resident(), time.perf_counter()
        table = search.evolve(at_once)
        seconds = time.perf_counter() - began
    return {
        "evaluations": len(table),
        "population": population,
        "ms_per_architecture": 1e3 * seconds / len(table),
        "bytes_per_evaluation": (resident() - before) / len(table),
    }


def refused(predictor: Predictor) -> dict[str, Any]:
    """Seconds until limits that are possible alone, but not together, are refused."""
    space, workload = predictor.space, Workload.parse("decode@256")
    latency, memory = predictor.cost(workload, 0.975), memory_cost(space, Workload.parse("prefill@2048"))
    asked = []
    for text, cost, unit in (("decode@256", latency, "s"), ("memory@2048", memory, "B")):
        bound = 1.001 * least(space, cost)[0]
        asked.append(Constraint(Limit.parse(f"{text}<={bound!r}{unit}"), cost, bound))
    began = time.perf_counter()
    try:
        check_feasible(space, asked)
        said = "both can be met"
    except InfeasibleError as error:
        said = str(error)
    return {"seconds": time.perf_counter() - began, "said": said}


def command(run: Path, devices: Path, device: str) -> dict[str, Any]:
    """Seconds until the whole command refuses an impossible limit."""
    began = time.perf_counter()
    code = "from search.cli import main; main()"
    limits = ("--limit", "params<=1", "--limit", "prefill@256<=1us")
    words = ["--devices", devices, "search", "--run", run, "--device", device, *limits]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    return {"seconds": time.perf_counter() - began, "exit": done.returncode, "said": done.stderr.strip()}


def main() -> int:
    parser = outcome.options(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a trained run")
    parser.add_argument("--devices", type=Path, default=Path("devices"))
    parser.add_argument("--device", default="here", help="a card profiled for the run's space")
    arguments = parser.parse_args()
    space = load_space(SPACE)
    path = load_card(arguments.devices, arguments.device).predictor_path(space.name, "onnxruntime", 1, "fp32")
    predictor = load_predictor(path, space, "formfit profile")
    count = 1200 if arguments.quick else 20_000
    driven(predictor, "nsga2", 48, 24)  # imports and caches
    sizes = {
        "nsga2": ("nsga2", count, 96),
        "nsga2, 24 at a time": ("nsga2", 1200, 24),
        "nsga2, a short search": ("nsga2", 288, 24),
        "random, 24 at a time": ("random", 1200, 24),
        "optuna-nsga2, 24 at a time": ("optuna-nsga2", 1200, 24),
    }
    found = {name: driven(predictor, *size) for name, size in sizes.items()}
    certificate = refused(predictor)
    command(arguments.run, arguments.devices, arguments.device)  # files come from the disk the first time
    whole = command(arguments.run, arguments.devices, arguments.device)
    time_each = found["nsga2"]["ms_per_architecture"]
    memory_each = found["nsga2"]["bytes_per_evaluation"]
    checks = {
        f"{time_each:.2f} ms an architecture <= 2": time_each <= 2,
        f"{memory_each / 1e3:.2f} KB an evaluation <= 8": memory_each <= 8000,
        f"refused by the certificate within {certificate['seconds']:.2f} s <= 2": certificate["seconds"] <= 2,
        f"refused by the command within {whole['seconds']:.2f} s <= 2": whole["seconds"] <= 2,
    }
    body = {"strategies": found, "certificate": certificate, "command": whole}
    return outcome.write("driver", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
