"""What an audit found, for people: a page, tables, and a section of a run's report."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.subplots import make_subplots

from search.audit.rank_correlation import Estimate
from search.report.figures import LAYOUT
from search.report.page import STYLE, table
from space import Architecture, InputError
from space.io.artefact import Artefact, write_text

AUDIT = Artefact("audit", "formfit audit")
SETS = {"axes": "over the axes", "equal_latency": "at equal latency"}
NAMES = {
    "supernet": "supernet",
    "params": "parameters",
    "flops": "FLOPs",
    "two_seeds": "another seed",
}
AGREEMENT_COLUMNS = ["set", "loss", "ranked by", "Kendall's tau-b", "Spearman's rho"]
COLOURS = ("#0072B2", "#D55E00")


def agreement_rows(audit: Mapping[str, Any]) -> list[list[str]]:
    """Set, loss, ranked by, tau and rho with their intervals: the rows of a table."""
    rows = []
    for name, where in SETS.items():
        for loss in ("loss", "recall_loss"):
            figures = audit["sets"][name][loss]
            for by in figures["kendall_tau"] if figures else ():
                estimates = (figures[column][by] for column in ("kendall_tau", "spearman_rho"))
                shown = [str(Estimate.from_json(e)) for e in estimates]
                rows.append([where, loss.replace("_", " "), NAMES[by], *shown])
            if figures:
                difference = Estimate.from_json(figures["supernet_minus_params_kendall_tau"])
                title = "supernet - parameters"
                rows.append([where, loss.replace("_", " "), title, str(difference), ""])
    return rows


def audit_section(run: Path, supernet: str) -> str:
    """The audit of a run's supernet as a part of its report; nothing where there is none.

    Args:
        run: the run's folder.
        supernet: the sha256 of the supernet's weights; an audit of others is passed over.
    """
    try:
        audit = AUDIT.read(run / "audit" / "audit.json")
    except InputError:
        return ""
    return findings(audit) if audit["header"]["inputs"].get("supernet") == supernet else ""


def findings(audit: Mapping[str, Any]) -> str:
    """The verdict, the figures and how they were found, as HTML."""
    settings = audit["settings"]
    counts = " and ".join(str(len(audit["sets"][name]["architectures"])) for name in SETS)
    return (
        "<h2>Does the supernet rank as training from scratch does?</h2>"
        + "".join(f"<p>{escape(audit['sets'][name]['text'])}</p>" for name in SETS)
        + table(AGREEMENT_COLUMNS, [[escape(cell) for cell in row] for row in agreement_rows(audit)])
        + f'<p class="note">{counts} architectures, each trained alone for '
        f"{settings['steps']:,} steps of {settings['batch']} x {settings['length']} tokens, "
        f"{len(settings['seeds'])} seeds; equal latency: within {settings['within_percent']:.0f}% of "
        f"{audit['equal_latency_ms']:.3f} ms at {escape(settings['workload'])} on "
        f"{escape(settings['device'])}. In brackets: 95% bootstrap intervals over architectures.</p>"
    )


def losses_figure(audit: Mapping[str, Any]) -> go.Figure:
    """The loss inside the supernet against the mean loss alone, a panel a set; bars span the seeds."""
    figure = make_subplots(cols=2, subplot_titles=list(SETS.values()))
    for column, (name, colour) in enumerate(zip(SETS, COLOURS, strict=True), 1):
        rows = [row for row in audit["architectures"] if name in row["sets"]]
        losses = [[item["loss_nats"] for item in row["alone"]] for row in rows]
        means = [sum(some) / len(some) for some in losses]
        texts = [
            f"{row['key']} {Architecture.from_json(row['architecture']).describe()}<br>"
            f"{row['params']:,} parameters, {row['predicted_latency_ms']:.3f} ms"
            for row in rows
        ]
        figure.add_scatter(
            x=means,
            y=[row["supernet"]["loss_nats"] for row in rows],
            error_x={
                "array": [max(some) - mean for some, mean in zip(losses, means, strict=True)],
                "arrayminus": [mean - min(some) for some, mean in zip(losses, means, strict=True)],
                "thickness": 1,
            },
            mode="markers",
            marker={"size": 10, "color": colour},
            text=texts,
            hovertemplate="%{text}<br>alone %{x:.4f}, supernet %{y:.4f} nats<extra></extra>",
            showlegend=False,
            row=1,
            col=column,
        )
    figure.update_xaxes(title="trained alone, nats per token")
    figure.update_yaxes(title="inside the supernet, nats per token", col=1)
    figure.update_layout(**LAYOUT)
    return figure


def taus_figure(audit: Mapping[str, Any]) -> go.Figure:
    """What ranks the stand-alone losses how well, with intervals, both sets."""
    figure = go.Figure()
    for (name, where), colour in zip(SETS.items(), COLOURS, strict=True):
        taus = {
            NAMES[by]: Estimate.from_json(e) for by, e in audit["sets"][name]["loss"]["kendall_tau"].items()
        }
        figure.add_scatter(
            x=[e.value for e in taus.values()],
            y=list(taus),
            error_x={
                "array": [e.high - e.value for e in taus.values()],
                "arrayminus": [e.value - e.low for e in taus.values()],
            },
            mode="markers",
            marker={"size": 11, "color": colour},
            name=where,
            orientation="h",  # the two sets side by side on a line
        )
    figure.add_vline(x=0, line={"color": "#888", "dash": "dot"})
    figure.update_layout(
        title="Agreement with the ranking by training alone",
        xaxis={"title": "Kendall's tau", "range": [-1.05, 1.05]},
        yaxis={"autorange": "reversed"},
        scattermode="group",
        **LAYOUT,
    )
    return figure


def write_audit_page(path: Path, audit: Mapping[str, Any]) -> None:
    """Write ``audit.html``, which loads nothing from elsewhere."""
    config = {"displayModeBar": False, "responsive": True}
    drawn = [
        to_html(f, full_html=False, include_plotlyjs=(i == 0), config=config, div_id=f"figure-{i}")
        for i, f in enumerate((losses_figure(audit), taus_figure(audit)))
    ]
    members = []
    for row in audit["architectures"]:
        alone = ", ".join(f"{item['loss_nats']:.4f}" for item in row["alone"])
        members.append(
            [
                f"<code>{escape(row['key'])}</code>",
                escape(", ".join(SETS[name] for name in row["sets"])),
                f"{row['supernet']['loss_nats']:.4f}",
                alone,
                f"{row['params']:,}",
                f"{row['predicted_latency_ms']:.3f}",
                escape(Architecture.from_json(row["architecture"]).describe()),
            ]
        )
    columns = ["key", "set", "supernet, nats", "alone, nats", "parameters", "predicted ms", "architecture"]
    title = f"Audit of the supernet of {escape(audit['space'])}"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>formfit: {title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
        f"{findings(audit)}{''.join(drawn)}<h2>The architectures</h2>{table(columns, members)}"
        "</body></html>"
    )
    write_text(path, page)
