"""Claims: the search's driver takes at most 2 ms per architecture, and rejects infeasible limits within 2 s.

20,000 architectures of configs/spaces/small.yaml, 96 at a time, with an evaluator that returns immediately (a
loss computed from the architecture), in this process, evaluation record and Optuna study included, under a
limit on a measured device's latency: at most 2 ms and 8 KB of memory per architecture. Other strategies and
sizes are reported without a goal. The feasibility check rejects conflicting limits on latency and memory
within 2 seconds; so does the whole command, from start to exit, for infeasible limits.

It needs a card that was profiled for that space, and a trained run for the whole command:

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
from search.engine.config import SearchConfig, make_problem
from search.engine.search import Search
from search.problem.feasibility import check_feasible
from search.problem.limit import Constraint, Limit
from search.problem.milp import least
from space import Architecture, InfeasibleError, Workload, load_space
from space.cost import memory_cost
from supernet.evaluate import Quality

SPACE = Path(__file__).parents[1] / "configs" / "spaces" / "small.yaml"


def at_once(architectures: Sequence[Architecture], _data: str) -> Iterator[Quality]:
    """Yield losses that fall with size and depend slightly on every choice."""
    for one in architectures:
        size = sum(layer.ffn + 64 * layer.heads for layer in one.layers)
        loss = 3 - 1e-4 * size - 1e-3 * one.width + int(one.key[:6], 16) / 2**24 / 20
        yield Quality(loss_nats=loss, recall_loss_nats=loss)


def resident() -> int:
    """Return the resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def driven(predictor: Predictor, strategy: str, evaluations: int, population: int) -> dict[str, float]:
    """Run a search; return milliseconds and bytes per evaluation."""
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
    """Return the seconds until conflicting limits are rejected, and the error message."""
    space, workload = predictor.space, Workload.parse("decode@256")
    latency, memory = predictor.cost(workload, 0.975), memory_cost(space, Workload.parse("prefill@2048"))
    asked = []
    for text, cost, unit in (("decode@256", latency, "s"), ("memory@2048", memory, "B")):
        bound = 1.001 * least(space, cost)[0]
        asked.append(Constraint(Limit.parse(f"{text}<={bound!r}{unit}"), cost, bound))
    began = time.perf_counter()
    try:
        check_feasible(space, asked)
        message = "both can be met"
    except InfeasibleError as error:
        message = str(error)
    return {"seconds": time.perf_counter() - began, "message": message}


def command(run: Path, devices: Path, device: str) -> dict[str, Any]:
    """Return the seconds until the whole command rejects infeasible limits."""
    began = time.perf_counter()
    code = "from search.cli import main; main()"
    limits = ("--limit", "params<=1", "--limit", "prefill@256<=1us")
    words = ["--devices", devices, "search", "--run", run, "--device", device, *limits]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    return {"seconds": time.perf_counter() - began, "exit": done.returncode, "message": done.stderr.strip()}


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
    check = refused(predictor)
    command(arguments.run, arguments.devices, arguments.device)  # warm the file cache
    whole = command(arguments.run, arguments.devices, arguments.device)
    time_each = found["nsga2"]["ms_per_architecture"]
    memory_each = found["nsga2"]["bytes_per_evaluation"]
    checks = {
        f"{time_each:.2f} ms per architecture <= 2": time_each <= 2,
        f"{memory_each / 1e3:.2f} KB per evaluation <= 8": memory_each <= 8000,
        f"rejected by the feasibility check within {check['seconds']:.2f} s <= 2": check["seconds"] <= 2,
        f"rejected by the command within {whole['seconds']:.2f} s <= 2": whole["seconds"] <= 2,
    }
    body = {"strategies": found, "feasibility_check": check, "command": whole}
    return outcome.write("driver", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
