"""The figures of a search's report, but for the front's.

Each is a :class:`Drawn`: the page shows its title, legend and note as text around it, an image carries
title and legend itself. Colours are of a palette that the colour-blind can tell apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from search.report.history import Progress
from space import Architecture, Layer, Space

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
LIGHT = ("sliding", "short_conv", "linear", "gla", "kda", "none")  # text on these is dark
INK = "#3C4250"
SEARCHED, RANDOM, MEASURED = "#0072B2", "#E69F00", "#D55E00"
LAYOUT = {
    "template": "plotly_white",
    "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
    "font": {"family": "system-ui, sans-serif", "size": 14},
    "legend": {"orientation": "h", "y": -0.2},
}
# On a page title and legend are text around the figure, and a finger that scrolls must not zoom.
ON_PAGE = LAYOUT | {
    "margin": {"l": 10, "r": 20, "t": 12, "b": 10},
    "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
    "showlegend": False,
    "dragmode": False,
    "hoverlabel": {"align": "left", "font": {"family": "system-ui, sans-serif"}},
}
ROWS = 24  # members of a front whose layers are drawn
ROOMY = 8  # with so many slots a phone has room for two numbers in each


class Drawn(NamedTuple):
    """A figure with what is said of it."""

    name: str  # of its file
    title: str
    note: str  # plain text
    figure: go.Figure


def finish(figure: go.Figure, height: int, x: Mapping[str, Any], y: Mapping[str, Any], **layout: Any) -> None:
    """Give a figure the looks of the page, its height in pixels and its axes."""
    figure.update_layout(**ON_PAGE, height=height, **layout)
    for update, axis in ((figure.update_xaxes, x), (figure.update_yaxes, y)):
        update(fixedrange=True, automargin=True, title_standoff=8, **axis)
        update(title_font_size=13)  # after the title, which would replace it


def prediction_figure(picks: Mapping[str, Mapping[str, Any]]) -> Drawn:
    """Measured latencies of the picks relative to those predicted, with intervals."""
    rows = [
        (f"{name}<br>{workload}", timing)
        for name, value in picks.items()
        for workload, timing in value["latency"].items()
    ]
    names = [name for name, _ in rows]
    predicted = np.array([t["predicted_latency_ms"] for _, t in rows])
    upper = np.array([t["predicted_upper_ms"] for _, t in rows]) / predicted - 1
    middle = np.array([t["measured_latency_ms"] for _, t in rows]) / predicted - 1
    low, high = (np.array([t["measured_interval_ms"] for _, t in rows]) / predicted[:, None] - 1).T
    figure = go.Figure()
    figure.add_bar(
        x=upper,
        y=names,
        orientation="h",
        width=0.42,
        marker={"color": SEARCHED, "opacity": 0.2},
        hovertemplate="limits are held against %{x:+.1%}<extra></extra>",
        name="predicted, up to the bound that limits are held against",
    )
    figure.add_scatter(
        x=middle,
        y=names,
        error_x={"array": high - middle, "arrayminus": middle - low, "width": 6},
        mode="markers",
        marker={"size": 11, "symbol": "diamond", "color": MEASURED},
        text=[
            f"predicted {t['predicted_latency_ms']:.4g} ms, measured {t['measured_latency_ms']:.4g} ms"
            for _, t in rows
        ],
        hovertemplate="%{text}<extra></extra>",
        name="measured, 95% interval",
    )
    figure.add_vline(x=0, line={"color": SEARCHED, "width": 2})
    x_axis = {"title": "measured, relative to predicted", "tickformat": "+.0%"}
    finish(figure, 80 + 46 * len(rows), x_axis, {"autorange": "reversed"})
    note = "At 0% is the prediction, which was made before the model was measured."
    return Drawn("prediction", "Predicted against measured", note, figure)


def layers_figure(
    space: Space, front: Mapping[str, Any], picks: Mapping[str, Mapping[str, Any]], quality: str
) -> Drawn:
    """What the picks and the members of the front are made of: a strip of equal cells, in slot order."""
    names = {value["key"]: name.split(", ")[0] for name, value in picks.items()}
    members = {m["key"]: m for m in [*front["members"], *picks.values()]}
    rows = thinned(sorted(members.values(), key=lambda m: (m[f"{quality}_nats"], m["key"])), names)
    cells = [
        (row, slot, layer)
        for row, member in enumerate(rows)
        for slot, layer in enumerate(Architecture.from_json(member["architecture"]).layers)
        if layer.present
    ]
    figure = go.Figure()
    for mixer in sorted({layer.mixer for *_, layer in cells}, key=lambda name: (name == "none", name)):
        some = [cell for cell in cells if cell[2].mixer == mixer]
        add_cells(figure, mixer, some, sizes=space.slots <= ROOMY)
    sized = [cell for cell in cells if cell[2].ffn]
    most = max(1, *space.ffn_options)
    figure.add_bar(
        y=[row + 0.27 for row, _, _ in sized],
        x=[0.92 * layer.ffn / most for *_, layer in sized],
        base=[slot + 0.54 for _, slot, _ in sized],
        width=0.13,
        orientation="h",
        marker={"color": INK},
        hoverinfo="skip",
        name=f"FFN size, up to {most}",
    )
    labels = [
        f"<b>{names.get(m['key'], m['key'][:6])}</b> {m[f'{quality}_nats']:.3f}"
        f"<br>width {m['architecture']['width']}"
        for m in rows
    ]
    plain = {"showgrid": False, "zeroline": False}
    finish(
        figure,
        80 + 42 * len(rows),
        {"title": "layer slot, input to output", "range": [0.5, space.slots + 0.5], "dtick": 1, **plain},
        {"tickvals": list(range(len(rows))), "ticktext": labels, "range": [len(rows) - 0.5, -0.5], **plain},
        barmode="overlay",
        bargap=0,
        uniformtext={"minsize": 8, "mode": "show"},
        margin_r=4,
    )
    numbers = "heads and FFN size" if space.slots <= ROOMY else "heads"
    note = (
        f"Best first, with {quality.replace('_', ' ')} in nats and width. In a cell: {numbers}; "
        "a blank slot has no layer."
    )
    if len(rows) < len(members):
        note += f" {len(rows)} of {len(members)} members are drawn."
    return Drawn("layers", "What they are made of", note, figure)


def add_cells(figure: go.Figure, mixer: str, cells: Sequence[tuple[int, int, Layer]], *, sizes: bool) -> None:
    """Draw the layers of one mixer, each with its row and slot, as equal bars that say the heads.

    And the FFN's size, where ``sizes``.
    """
    figure.add_bar(
        y=[row - 0.08 for row, _, _ in cells],
        x=[0.92] * len(cells),
        base=[slot + 0.54 for _, slot, _ in cells],
        width=0.52,
        orientation="h",
        marker={"color": COLOURS[mixer], "cornerradius": 4},
        text=[cell_text(layer, sizes) for *_, layer in cells],
        textfont={"color": "#222" if mixer in LIGHT else "white"},
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        hovertext=[f"slot {slot + 1}: {layer.describe()}" for _, slot, layer in cells],
        hoverinfo="text",
        name="no mixer, FFN only" if mixer == "none" else mixer,
    )


def cell_text(layer: Layer, sizes: bool) -> str:
    """The numbers of a layer: its heads where it has any, and the FFN's size where that is wanted."""
    numbers = [layer.heads] * (layer.heads > 0) + [layer.ffn] * sizes
    return "\u2009\u00b7\u2009".join(map(str, numbers))


def thinned(members: Sequence[dict[str, Any]], keep: Mapping[str, str]) -> list[dict[str, Any]]:
    """At most about ROWS of the members, evenly spaced, and those whose keys are to be kept."""
    spread = set(np.linspace(0, len(members) - 1, min(ROWS, len(members))).round().astype(int).tolist())
    return [m for i, m in enumerate(members) if i in spread or m["key"] in keep]


def progress_figure(found: Progress, strategy: str) -> Drawn:
    """The share of the hypervolume of all that was found, over evaluations."""
    figure, ends = go.Figure(), []
    named = {"random": ("random search", RANDOM), "search": (strategy, SEARCHED)}  # the latter on top
    for name in (name for name in named if name in found.lines):
        (title, colour), (counts, shares) = named[name], found.lines[name]
        figure.add_scatter(
            x=counts,
            y=shares,
            mode="lines",
            line={"color": colour, "width": 2.5, "shape": "hv"},
            hovertemplate="%{y:.2f}%",
            name=title,
        )
        ends.append(f"{title} has {shares[-1]:.1f}% after {counts[-1]:,} evaluations")
    note = f"Of the hypervolume of everything found, {' and '.join(reversed(ends))}."
    if "random" in found.lines:
        note += (
            f" {strategy.capitalize()} had what random search ended with at evaluation {found.matched:,}."
            if found.matched
            else f" {strategy.capitalize()} did not reach what random search ended with."
        )
    finish(
        figure,
        340,
        {"title": "evaluations", "rangemode": "tozero"},
        {"title": "share of the hypervolume, %"},
        hovermode="x unified",
    )
    return Drawn("progress", "How fast it was found", note, figure)
