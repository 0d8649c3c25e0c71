"""What the command line prints: tables and JSON on stdout, progress on stderr."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

out = Console()
err = Console(stderr=True)


class Bars:
    """Shows stages as progress bars on stderr."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[float, str], None]]:
        """A bar for a stage; where stderr is no terminal, a line at its start and its end."""
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
        )
        if not err.is_terminal:
            err.print(f"{title} ...", highlight=False)
            last = ""

            def note(_share: float, text: str) -> None:
                nonlocal last
                last = text

            yield note
            err.print(f"{title} done: {last}", highlight=False)
            return
        with Progress(*columns, console=err) as progress:
            task = progress.add_task(title, total=1.0, text="")
            yield lambda share, text: progress.update(task, completed=share, text=text)
            progress.update(task, completed=1.0)

    def skipped(self, title: str) -> None:
        """A stage that is done already."""
        err.print(f"{title}: done already", highlight=False)

    def warn(self, text: str) -> None:
        """Something to know that stops nothing."""
        err.print(text, highlight=False, soft_wrap=True)


def show(value: dict[str, Any], as_json: bool, tables: Callable[[], list[Table]]) -> None:
    """Print a result: one JSON object, or tables."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
        return
    for item in tables():
        out.print(item)


def make_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table for people."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table


def limit_table(limits: list[dict[str, Any]]) -> Table:
    """The limits and whether each was kept."""
    from search.problem.limit import Limit, format_quantity

    rows = []
    for item in limits:
        metric = Limit.parse(item["limit"]).metric
        found = "-" if item["found"] is None else format_quantity(metric, item["found"])
        used = f"{100 * item['used']:.1f}%" if "used" in item else "-"
        rows.append([item["limit"], format_quantity(metric, item["bound"]), found, used, item["status"]])
    return make_table("Limits", ["limit", "bound", "found", "used", "status"], rows)


def latency_table(latency: dict[str, Any]) -> Table:
    """Predicted beside measured latencies."""
    rows = [
        [
            workload,
            f"{t['predicted_latency_ms']:.3f}",
            f"{t['predicted_upper_ms']:.3f}",
            f"{t['measured_latency_ms']:.3f}",
            f"{t['error_percent']:+.1f}%",
        ]
        for workload, t in latency.items()
    ]
    return make_table("Latency, ms", ["workload", "predicted", "upper bound", "measured", "error"], rows)


def precision_table(precisions: dict[str, Any]) -> Table:
    """Size, loss and latencies of a sub-model's graphs."""
    rows = []
    for name, of in precisions.items():
        loss = of["loss_nats"]
        shown = loss if isinstance(loss, str) else f"{loss:.4f}"
        # The workload without its precision, which the row says.
        times = "\n".join(f"{w.split(',')[0]} {ms:.3f}" for w, ms in of["latency_ms"].items())
        rows.append([name, f"{of['bytes'] / 2**20:.2f} MiB", shown, times])
    return make_table("Precisions", ["precision", "file", "loss, nats", "latency, ms"], rows)


def front_table(front: dict[str, Any]) -> Table:
    """The members of a front."""
    from space import Architecture

    device = next(iter(front["members"][0]["predicted"]["latency"]))
    workloads = list(front["members"][0]["predicted"]["latency"][device])
    names = {key: pick for pick, key in front["picks"].items()}
    rows = []
    for member in front["members"]:
        latency = member["predicted"]["latency"][device]
        rows.append(
            [
                member["key"],
                names.get(member["key"], ""),
                f"{member['loss_nats']:.4f}",
                *(f"{latency[w]['latency_ms']:.3f}" for w in workloads),
                f"{member['predicted']['params']:,}",
                Architecture.from_json(member["architecture"]).describe(),
            ]
        )
    columns = ["key", "pick", "loss nats", *(f"{w} ms" for w in workloads), "params", "architecture"]
    return make_table("Front", columns, rows)


def search_tables(found: dict[str, Any]) -> list[Table]:
    """What a search found, and what its finalists were measured to do."""
    tables = [front_table(found)]
    if "measured_search" in found:
        rows = [
            [
                str(turn),
                row["key"] + (" chosen" if row["key"] == found["measured_search"]["chosen"]["key"] else ""),
                f"{row['loss_nats']:.4f}",
                *(f"{value:.3f}" for value in row["latency_ms"].values()),
                f"{100 * row['used']:.1f}%",
                "kept" if row["kept"] else "missed",
            ]
            for turn, one in enumerate(found["measured_search"]["rounds"], start=1)
            for row in one["finalists"]
        ]
        workloads = found["measured_search"]["chosen"]["latency_ms"]
        columns = ["round", "key", "loss nats", *(f"{w} ms" for w in workloads), "of the limit", "limits"]
        tables.append(make_table("Finalists, measured", columns, rows))
    if found.get("finalists"):
        rows = [
            [
                row["key"],
                f"{row['rank_before']} -> {row['rank_after']}",
                f"{row['before']['loss_nats']:.4f}",
                f"{row['after']['loss_nats']:.4f}" if row["after"] else row["failed"],
                str(row["steps"]),
            ]
            for row in found["finalists"]
        ]
        columns = ["key", "rank", "loss nats inherited", "after distillation", "steps"]
        tables.append(make_table("Finalists, distilled", columns, rows))
    return tables


def error_table(workloads: Any) -> Table:
    """How well a predictor does on whole models that it never saw."""
    rows = []
    for workload, errors in workloads.items():
        held = errors["held_out"]
        rows.append(
            [
                workload,
                f"{held['mape_percent']:.2f}%",
                f"{100 * held['within_10_percent']:.0f}%",
                "-" if held["spearman"] is None else f"{held['spearman']:.4f}",
                "-"
                if errors["repeatability_mape_percent"] is None
                else f"{errors['repeatability_mape_percent']:.2f}%",
                f"{errors['flops_and_params']['mape_percent']:.2f}%",
            ]
        )
    columns = ["workload", "MAPE", "within 10%", "Spearman", "repeat floor", "FLOPs+params MAPE"]
    return make_table("Whole models never seen by the fit", columns, rows)


def summary_tables(summary: dict[str, Any]) -> list[Table]:
    """What a run found."""
    text = summary["text"]
    names = ("largest_bits_per_byte", "chosen_bits_per_byte", "order2_bits_per_byte", "gzip_bits_per_byte")
    bits = make_table(
        "Bits per byte, same held-out text",
        ["largest", "chosen", "order-2", "gzip -9"],
        [["-" if text[name] is None else f"{text[name]:.3f}" for name in names]],
    )
    front = {"members": summary["front"], "picks": {p: v["key"] for p, v in summary["verified"].items()}}
    return [
        front_table(front),
        latency_table(summary["chosen"]["latency"]),
        limit_table(summary["limits"]),
        bits,
    ]


def describe_space(space: Any) -> dict[str, Any]:
    """What ``formfit space`` says of a space."""
    from latency.predictor.design import seeds
    from space import Workload, genome
    from space.cost import params
    from space.ops import space_ops
    from space.workload import PHASES

    ends = {"smallest": genome.smallest(space), "largest": genome.largest(space)}
    ops = len(space_ops(space))
    kinds = sorted({m for m, _ in space.mixer_options[1:]})
    # A second for each op and workload that is measured (fifty rounds of two stacks), and 58 models.
    workloads = [Workload(phase=phase, length=space.max_seq_len) for phase in PHASES]
    points = [(op, w) for op in space_ops(space) for w in workloads]
    seconds = 1.0 * min(len(points), 2 * len(seeds(points))) + 58 * len(workloads) * 0.6
    return {
        "name": space.name,
        "architectures": genome.size(space),
        "mixers": kinds,
        "ops_to_measure": ops,
        "expected_profiling_seconds": round(seconds),
        **{
            name: {"key": a.key, "params": params(a, space.config), "architecture": a.describe()}
            for name, a in ends.items()
        },
    }


def space_table(value: dict[str, Any]) -> Table:
    """What ``formfit space`` shows."""
    rows = [
        ["architectures", f"{value['architectures']:.3e}"],
        ["mixers", ", ".join(value["mixers"])],
        ["smallest", f"{value['smallest']['params']:,} parameters: {value['smallest']['architecture']}"],
        ["largest", f"{value['largest']['params']:,} parameters: {value['largest']['architecture']}"],
        ["ops to measure", str(value["ops_to_measure"])],
        ["expected profiling", f"{value['expected_profiling_seconds']} s for two workloads"],
    ]
    return make_table(f"Space {value['name']}", ["", ""], rows)


def audit_table(audit: Mapping[str, Any]) -> Table:
    """The figures for a terminal."""
    from search.audit.page import AGREEMENT_COLUMNS, agreement_rows

    return make_table("What ranks as training alone does", AGREEMENT_COLUMNS, agreement_rows(audit))
