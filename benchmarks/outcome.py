"""Shared parts of the benchmarks: command-line options, and result files with date and machine."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from latency.device_runner.fingerprint import cpu_model
from space import InputError

RESULTS = Path(__file__).parent / "results"


def options(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--quick", action="store_true", help="run a small version, to check that the benchmark works"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return parser


def ended(main: Callable[[], int]) -> int:
    """Run a benchmark and return its exit code; bad input gives one line on stderr and exit code 2."""
    try:
        return main()
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def write(
    name: str,
    arguments: argparse.Namespace,
    body: dict[str, Any],
    checks: dict[str, bool],
    reports: Sequence[str] = (),
) -> int:
    """Write the result file and print the goals; return 0, or 3 if a goal was missed.

    Args:
        name: the benchmark's name, which is the file's name.
        arguments: the parsed options.
        body: the results.
        checks: for each goal, stated with its measured value, whether it was reached.
        reports: lines about results without a goal, which are printed only.
    """
    value = {
        "benchmark": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "python": platform.python_version()},
        "quick": arguments.quick,
        "goals": {goal: bool(reached) for goal, reached in checks.items()},
        **body,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / (f"{name}-quick.json" if arguments.quick else f"{name}.json")
    path.write_text(json.dumps(value, indent=1) + "\n")
    if arguments.json:
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
    else:
        for goal, reached in checks.items():
            sys.stdout.write(f"{'reached' if reached else 'MISSED '}  {goal}\n")
        for line in reports:
            sys.stdout.write(f"no goal  {line}\n")
        sys.stdout.write(f"written to {path}\n")
    return 0 if all(checks.values()) else 3
