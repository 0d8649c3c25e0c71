"""Claim: the command line answers within 0.5 s of bare Python where it needs no torch.

    python benchmarks/cli_startup.py

Every case is a process of its own. The cases and ``python -c pass`` take turns, round by round; the medians
over the rounds are compared. Files come from the disk cache: one round is run before the first that counts.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import outcome

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "configs" / "spaces" / "small.yaml"
CONFIG = ROOT / "configs" / "quickstart.yaml"
LIMIT_S = 0.5  # beyond bare Python
ROUNDS, QUICK_ROUNDS = 9, 2
BARE = "bare python"


def commands(folder: Path) -> dict[str, tuple[list[str], int]]:
    """Arguments and expected exit codes of the cases, by name."""
    text = CONFIG.read_text().replace("spaces/", f"{ROOT}/configs/spaces/")
    run, typo = folder / "run", folder / "typo.yaml"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(text)
    typo.write_text(f"{text}\ntrian: {{}}\n")
    search = ["search", "--run", str(run), "--device", "here"]
    return {
        "formfit --help": (["--help"], 0),
        "formfit --version": (["--version"], 0),
        "formfit run --help": (["run", "--help"], 0),
        "formfit space": (["space", str(SPACE)], 0),
        "formfit devices": (["--devices", str(folder / "devices"), "devices"], 0),
        "formfit run --dry-run": (["run", str(CONFIG), "--dry-run"], 0),
        "unknown key in a configuration": (["run", str(typo)], 2),
        "missing configuration": (["run", str(folder / "none.yaml")], 2),
        "missing run": (["audit", "--run", str(folder / "none")], 2),
        "missing sub-model": (["export", str(folder / "none"), "--format", "onnx"], 2),
        "malformed limit": ([*search, "--limit", "decode<=2ms"], 2),
        "unknown objective": ([*search, "--objective", "lossy"], 2),
        "unknown strategy": ([*search, "--strategy", "annealing"], 2),
        "unknown device": ([*search, "--limit", "decode@256<=2ms"], 2),
    }


def seconds(command: list[str], code: int) -> float:
    """Wall time of a command.

    Raises:
        SystemExit: its exit code is another.
    """
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    elapsed = time.perf_counter() - began
    if done.returncode != code:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return elapsed


def main() -> int:
    arguments = outcome.options(__doc__).parse_args()
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    with tempfile.TemporaryDirectory() as folder:
        cases = {BARE: ([sys.executable, "-c", "pass"], 0)}
        for name, (words, code) in commands(Path(folder)).items():
            cases[name] = [sys.executable, "-m", "formfit", *words], code
        times: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(rounds + 1):
            for name, case in cases.items():
                elapsed = seconds(*case)
                if turn:
                    times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    beyond = {name: value - medians[BARE] for name, value in medians.items() if name != BARE}
    checks = {f"{name}: {value:.2f} s beyond bare Python <= {LIMIT_S}": value <= LIMIT_S
              for name, value in beyond.items()}  # fmt: skip
    body = {"rounds": rounds, "median_seconds": medians, "seconds_beyond_bare_python": beyond}
    return outcome.write("cli_startup", arguments, body, checks)


if __name__ == "__main__":
    sys.exit(outcome.ended(main))
