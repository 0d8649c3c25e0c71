"""Write the tables of the README and of docs/headline.md from the outcomes in benchmarks/results.

    python benchmarks/readme.py

A table stands between ``<!-- from results: NAME -->`` and ``<!-- end -->``; everything else is left as it is.
A test holds the pages against the outcomes.
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

# What is claimed, the benchmark and its options, and how the goals that are shown begin.
CLAIMS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("Better than hand-made models", "headline", "--run RUN", ("lower in both",)),
    ("Limits kept, measured in a new process", "limits", "--run RUN", ("[0-9]+ of", "worst", "[0-9.]+%")),
    ("Against HAT's method in equal time", "peer_hat", "--run RUN", ("formfit keeps", "worst", "lower loss")),
    (
        "Latency of models that no fit saw",
        "latency_self",
        "",
        ("MAPE in a later", "within 10%", "at most half"),
    ),
    ("HAT's own measurements, 50 to train", "latency_hat", "--data DIR", ("n 50",)),
    ("The supernet's ranking", "ranking", "", ("tau over", "equal_latency")),
    ("Search in an enumerated space", "search_quality", "", ("99", "ahead")),
    ("Predictions", "throughput", "", ("",)),
    ("Exported graphs equal the plain model", "parity", "", ("[0-9]+ of [0-9]+ within", "worst")),
    ("Decoding, exported", "decode", "", ("large (full|all).* at 4096",)),
    ("int8", "shipping", "--run RUN", ("int8: ",)),
    ("From a clone to a verified model", "quickstart", "", ("[0-9]+ s from", "every limit")),
    ("Workers", "scale", "", ("at least",)),
)


def goals(found: Outcome, patterns: tuple[str, ...]) -> str:
    """The goals that begin as a pattern says, with their numbers; those that were missed say so."""
    shown = [(g, ok) for g, ok in found["goals"].items() if any(re.match(p, g) for p in patterns)]
    if not shown:
        raise SystemExit(f"{found['benchmark']}: no goal begins with {' or '.join(patterns)}")
    return "; ".join(f"{goal}" if ok else f"**missed:** {goal}" for goal, ok in shown)


def claims(results: Callable[[str], Outcome]) -> list[str]:
    """The table of all claims: what was found against what was wanted."""
    rows = ["| claim | found, and the goal | command | when, on |", "|---|---|---|---|"]
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
    """By how much a model is worse than the searched one, with the standard error."""
    return f"{row['worse_by'][figure]['mean']:+.3f} ± {row['worse_by'][figure]['standard_error']:.3f}"


def headline(results: Callable[[str], Outcome]) -> list[str]:
    """The searched model, and by how much each other is worse: loss, recall loss, measured latency."""
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
    """All that was found of each model of each setting."""
    rows = []
    for setting in results("headline")["settings"]:
        said = (
            "lower in both losses than every hand-made one" if setting["won"] else "not lower in both losses"
        )
        rows += [
            f"### {title(setting)}: {said}",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
        ]
        for name, row in setting["models"].items():
            hand = " (hand-made)" if name in FULL else ""
            rows.append(
                f"| {name}{hand} | {row['params']:,} | {row['latency_ms']:.3g} "
                f"| {row['memory_bytes'] / 2**20:.1f} | {row['rss_bytes'] / 2**20:.1f} "
                f"| {row['loss_nats']:.3f} | {row['recall_loss_nats']:.3f} "
                f"| {row['mqar_accuracy']:.2f} | {row['described']} |"
            )
        rows.append("")
    return rows


TABLES = {"claims": claims, "headline": headline, "details": details}


def written(page: str, results: Callable[[str], Outcome]) -> str:
    """A page with its tables made anew."""

    def table(found: re.Match[str]) -> str:
        lines = "\n".join(TABLES[found[1]](results)).strip()
        return f"<!-- from results: {found[1]} -->\n{lines}\n<!-- end -->"

    return re.sub(r"<!-- from results: ([a-z]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the outcomes")
    arguments = parser.parse_args()

    def results(name: str) -> Outcome:
        return dict(json.loads((arguments.results / f"{name}.json").read_text()))

    for page in PAGES:
        page.write_text(written(page.read_text(), results))
        sys.stdout.write(f"{page.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
