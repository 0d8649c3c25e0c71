"""The report of a search: one self-contained page.

It shows the front, predicted against measured latencies, what the chosen architectures are
made of, and whether the limits were kept. Nothing in it is loaded from elsewhere.
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html

from latency import Card
from search.limits import format_quantity
from space import Architecture, Space
from space.files import write_text

# One colour a mixer: a colour-blind-safe palette (Wong, Nature Methods 2011), then Tol's muted one.
COLOURS = {
    "attention": "#D55E00",
    "sliding": "#E69F00",
    "short_conv": "#F0E442",
    "linear": "#56B4E9",
    "retnet": "#0072B2",
    "mamba2": "#332288",
    "gla": "#CC79A7",
    "hgrn2": "#882255",
    "deltanet": "#117733",
    "gated_deltanet": "#009E73",
    "kda": "#999933",
    "none": "#BBBBBB",
}
LAYOUT = {
    "template": "plotly_white",
    "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
    "font": {"family": "system-ui, sans-serif", "size": 14},
    "legend": {"orientation": "h", "y": -0.2},
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
.kept { color: #00714f; font-weight: 600; } .missed { color: #b00020; font-weight: 600; }
p.note { color: #666; }
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """An HTML table; cells are HTML already."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def front_figure(front: Mapping[str, Any], verified: Mapping[str, Any], device: str) -> go.Figure:
    """Loss against predicted latency for the front, with the measured ones marked."""
    members = front["members"]
    workload = next(iter(members[0]["predicted"]["latency"][device]))

    def latency(member: Mapping[str, Any]) -> float:
        return float(member["predicted"]["latency"][device][workload]["latency_ms"])

    names = [Architecture.from_json(m["architecture"]).describe() for m in members]
    figure = go.Figure()
    figure.add_scatter(
        x=[latency(m) for m in members],
        y=[m["loss_nats"] for m in members],
        mode="lines+markers",
        line={"shape": "hv", "color": "#888", "width": 1},
        marker={"size": 9, "color": "#0072B2"},
        text=names,
        hovertemplate="%{text}<br>%{x:.3f} ms, %{y:.4f} nats<extra></extra>",
        name="front, predicted",
    )
    by_key = {m["key"]: m for m in members}
    for pick, value in verified.items():
        member, timing = by_key[value["key"]], value["latency"][workload]
        low, high = timing["measured_interval_ms"]
        middle = timing["measured_latency_ms"]
        figure.add_scatter(
            x=[middle],
            y=[member["loss_nats"]],
            error_x={"array": [high - middle], "arrayminus": [middle - low]},
            mode="markers+text",
            text=[pick],
            textposition="top right",
            marker={"size": 13, "symbol": "diamond", "color": "#D55E00"},
            name=f"{pick}, measured",
        )
    figure.update_layout(
        title="The front", xaxis_title=f"{workload} latency, ms", yaxis_title="loss, nats per token", **LAYOUT
    )
    return figure


def prediction_figure(summary: Mapping[str, Any]) -> go.Figure:
    """Predicted against measured latency of the verified sub-models, relative to the prediction."""
    figure = go.Figure()
    for pick, value in summary["verified"].items():
        for workload, timing in value["latency"].items():
            predicted, measured = timing["predicted_latency_ms"], timing["measured_latency_ms"]
            low, high = timing["measured_interval_ms"]
            figure.add_scatter(
                x=[f"{pick}<br>{workload}"],
                y=[measured / predicted],
                error_y={
                    "array": [(high - measured) / predicted],
                    "arrayminus": [(measured - low) / predicted],
                },
                mode="markers",
                marker={"size": 11, "color": "#0072B2"},
                showlegend=False,
                hovertemplate=f"predicted {predicted:.3f} ms, measured {measured:.3f} ms<extra></extra>",
            )
            figure.add_scatter(
                x=[f"{pick}<br>{workload}"],
                y=[timing["predicted_upper_ms"] / predicted],
                mode="markers",
                marker={"size": 16, "symbol": "line-ew-open", "color": "#D55E00", "line": {"width": 2}},
                showlegend=False,
                hovertemplate="upper bound that limits are held against<extra></extra>",
            )
    figure.add_hline(y=1, line={"color": "#888", "dash": "dot"})
    figure.update_layout(
        title="Measured over predicted (orange: the bound that limits are held against)",
        yaxis_title="measured / predicted",
        **LAYOUT,
    )
    return figure


def strips_figure(front: Mapping[str, Any]) -> go.Figure:
    """What each member of the front is made of: a strip of its layers, in slot order."""
    members = front["members"]
    architectures = [Architecture.from_json(m["architecture"]) for m in members]
    names = [f"{m['key'][:6]} · w{a.width}" for m, a in zip(members, architectures, strict=True)]
    figure = go.Figure()
    shown: set[str] = set()
    for name, architecture in zip(names, architectures, strict=True):
        for slot, layer in enumerate(architecture.layers):
            if not layer.present:
                continue
            figure.add_bar(
                y=[name],
                x=[0.92],
                base=[slot + 0.04],
                orientation="h",
                marker={"color": COLOURS[layer.mixer]},
                text=[f"{layer.heads}·{layer.ffn}" if layer.heads else f"{layer.ffn}"],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                hovertemplate=f"slot {slot}: {layer.describe()}<extra></extra>",
                name="ffn only" if layer.mixer == "none" else layer.mixer,
                legendgroup=layer.mixer,
                showlegend=layer.mixer not in shown,
            )
            shown.add(layer.mixer)
    figure.update_layout(
        title="Layers of the front, best first (heads · FFN size)",
        barmode="overlay",
        xaxis={"title": "slot", "dtick": 1},
        yaxis={"autorange": "reversed"},
        height=160 + 34 * len(members),
        **LAYOUT,
    )
    return figure


def write_report(
    path: Path,
    space: Space,
    front: Mapping[str, Any],
    summary: Mapping[str, Any],
    card: Card,
    more: str = "",
) -> None:
    """Write the page; ``more`` is HTML that stands at its end."""
    device = card.name
    figures = [
        front_figure(front, summary["verified"], device),
        prediction_figure(summary),
        strips_figure(front),
    ]
    config = {"displayModeBar": False, "responsive": True}
    drawn = [
        to_html(f, full_html=False, include_plotlyjs=(i == 0), config=config, div_id=f"figure-{i}")
        for i, f in enumerate(figures)
    ]
    limits = []
    for item in summary["limits"]:
        metric = item["limit"].split("@")[0].split(":")[-1]
        metric = "params" if metric.startswith("params") else metric
        found = "-" if item["found"] is None else format_quantity(metric, item["found"])
        used = f"{100 * item['used']:.1f}%" if "used" in item else "-"
        status = f'<span class="{item["status"]}">{item["status"]}</span>'
        limits.append([escape(item["limit"]), format_quantity(metric, item["bound"]), found, used, status])
    errors = []
    for workload, error in summary["predictor"].items():
        held, proxy = error["held_out"], error["flops_and_params"]
        errors.append(
            [
                escape(workload),
                f"{held['mape_percent']:.2f}%",
                f"{100 * held['within_10_percent']:.0f}%",
                f"{held['spearman']:.4f}",
                f"{error['repeat_mape_percent']:.2f}%",
                f"{proxy['mape_percent']:.2f}%",
                f"{held['span']:.1f}x",
            ]
        )
    text, chosen = summary["text"], summary["chosen"]
    scored = "unknown" if text["held_out_bytes"] is None else f"{text['held_out_bytes']:,}"
    body = [
        f"<h1>{escape(space.name)} on {escape(device)}</h1>",
        f"<p>{escape(str(card.fingerprint.get('cpu')))}, {escape(str(card.fingerprint.get('runtime')))} "
        f"{escape(str(card.fingerprint.get('runtime_version')))}; measured {escape(str(card.measured))}. "
        f"{summary['space']['architectures']:.2e} architectures, {front['evaluations']} evaluated.</p>",
        "<h2>Limits</h2>",
        table(["limit", "bound", "measured", "used", "status"], limits)
        if limits
        else "<p>None were given.</p>",
        f"<p>Chosen: <code>{chosen['key']}</code>, "
        f"{escape(Architecture.from_json(chosen['architecture']).describe())}; "
        f"parity errors up to {max(chosen['parity']['errors'].values()):.1e}.</p>",
        *drawn,
        "<h2>The predictor on whole models it never saw</h2>",
        table(["workload", "MAPE", "within 10%", "Spearman", "repeat floor", "FLOPs+params", "span"], errors),
        "<h2>Bits per byte on the same held-out text</h2>",
        table(
            ["largest sub-network", "chosen", "order-2 model", "gzip -9"],
            [
                [
                    "-" if text[name] is None else f"{text[name]:.3f}"
                    for name in (
                        "largest_bits_per_byte",
                        "chosen_bits_per_byte",
                        "order2_bits_per_byte",
                        "gzip_bits_per_byte",
                    )
                ]
            ],
        ),
        f'<p class="note">{escape(str(text["source"]))}; {scored} bytes held out.</p>',
        more,
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>formfit: {escape(space.name)} on {escape(device)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>"
    )
    write_text(path, page)
