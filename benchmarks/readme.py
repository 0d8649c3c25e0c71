"""Generate the tables of README.md and docs/headline.md from the result files in benchmarks/results.

    python benchmarks/readme.py

Tables are replaced between ``<!-- from results: NAME -->`` and ``<!-- end -->``; other text is not changed.
tests/test_readme.py compares the pages with the result files.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from families import FULL
from outcome import RESULTS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "headline.md")
SEARCHED = "searched"
COLUMNS = (
    "model",
    "parameters",
    "latency, ms",
    "memory, MiB",
    "rss, MiB",
    "loss",
    "recall loss",
    "MQAR",
    "layers",
)
Outcome = Mapping[str, Any]

# Claim, benchmark, its options, and patterns that the displayed goals start with.
CLAIMS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("Better than baselines", "headline", "--run RUN", ("lower in both",)),
    ("Limits kept, measured in a new process", "limits", "--run RUN", ("[0-9]+ of", "largest", "[0-9.]+%")),
    ("HAT's method in equal time", "peer_hat", "--run RUN", ("formfit keeps", "largest", "lower loss")),
    (
        "Latency prediction on held-out models",
        "latency_self",
        "",
        ("[a-z]+: MAPE in a later", "[a-z]+: within 10%", "small: MAPE at most"),
    ),
    ("Latency prediction on HAT's data, 50 training models", "latency_hat", "--data DIR", ("n 50",)),
    ("Ranking by the supernet", "ranking", "", ("tau over", "equal_latency")),
    ("Search in an enumerated space", "search_quality", "", ("99", "better")),
    ("Prediction throughput", "throughput", "", ("",)),
    ("Parity of exported graphs", "parity", "", ("[0-9]+ of [0-9]+ within", "largest")),
    ("Decoding speed, exported", "decode", "", ("large (full|all).* at 4096",)),
    ("int8", "shipping", "--run RUN", ("int8: ",)),
    ("Clone to verified model", "quickstart", "", ("[0-9]+ s from", "every limit")),
    ("Parallel evaluation", "scale", "", ("parallel",)),
)


def goals(found: Outcome, patterns: tuple[str, ...]) -> str:
    """Return the goals that match a pattern, with their numbers; missed goals are marked."""
    shown = [(g, ok) for g, ok in found["goals"].items() if any(re.match(p, g) for p in patterns)]
    if not shown:
        raise SystemExit(f"{found['benchmark']}: no goal begins with {' or '.join(patterns)}")
    return "; ".join(f"{goal}" if ok else f"**missed:** {goal}" for goal, ok in shown)


def claims(results: Callable[[str], Outcome]) -> list[str]:
    """Return the table of all claims with results and goals."""
    rows = ["| claim | result and goal | command | date, machine |", "|---|---|---|---|"]
    for what, benchmark, options, patterns in CLAIMS:
        found = results(benchmark)
        command = f"python benchmarks/{benchmark}.py {options}".strip()
        cpu = "EPYC" if "EPYC" in found["machine"]["cpu"] else "Xeon"
        when = f"{found['date'][:10]}, {cpu}"
        rows.append(f"| {what} | {goals(found, patterns)} | `{command}` | {when} |")
    return rows


def title(setting: Outcome) -> str:
    return f"{setting['workload']} in {setting['limit_ms']:.3g} ms"


def apart(row: Outcome, figure: str) -> str:
    """Return the difference from the searched model, with the standard error."""
    return f"{row['worse_by'][figure]['mean']:+.3f} ± {row['worse_by'][figure]['standard_error']:.3f}"


def headline(results: Callable[[str], Outcome]) -> list[str]:
    """Return the table of losses, relative to the searched model's, and measured latencies."""
    settings = results("headline")["settings"]
    rows = [f"| | {' | '.join(map(title, settings))} |", "|---|" + "---|" * len(settings)]
    for name in settings[0]["models"]:
        cells = []
        for setting in settings:
            row = setting["models"][name]
            losses = (
                f"**{row['loss_nats']:.3f}, {row['recall_loss_nats']:.3f}**"
                if name == SEARCHED
                else f"{apart(row, 'loss_nats')}, {apart(row, 'recall_loss_nats')}"
            )
            cells.append(f"{losses}; {row['latency_ms']:.3g} ms")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def details(results: Callable[[str], Outcome]) -> list[str]:
    """Return a table of all results for each setting."""
    rows = []
    for setting in results("headline")["settings"]:
        said = "lower in both losses than every baseline" if setting["won"] else "not lower in both losses"
        rows += [
            f"### {title(setting)}: {said}",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
        ]
        for name, row in setting["models"].items():
            baseline = " (baseline)" if name in FULL else ""
            rows.append(
                f"| {name}{baseline} | {row['params']:,} | {row['latency_ms']:.3g} "
                f"| {row['memory_bytes'] / 2**20:.1f} | {row['rss_bytes'] / 2**20:.1f} "
                f"| {row['loss_nats']:.3f} | {row['recall_loss_nats']:.3f} "
                f"| {row['mqar_accuracy']:.2f} | {row['described']} |"
            )
        rows.append("")
    return rows


TABLES = {"claims": claims, "headline": headline, "details": details}


def written(page: str, results: Callable[[str], Outcome]) -> str:
    """Return a page with regenerated tables."""

    def table(found: re.Match[str]) -> str:
        lines = "\n".join(TABLES[found[1]](results)).strip()
        return f"<!-- from results: {found[1]} -->\n{lines}\n<!-- end -->"

    return re.sub(r"<!-- from results: ([a-z]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    arguments = parser.parse_args()

    def results(name: str) -> Outcome:
        return dict(json.loads((arguments.results / f"{name}.json").read_text()))

    for page in PAGES:
        page.write_text(written(page.read_text(), results))
        sys.stdout.write(f"{page.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
