"""Figures of a search's report, except that of the front.

Each is a :class:`Drawn`: on a page, title, legend and note are text around the figure; an image contains
title and legend. Colours are from palettes for colour-blind readers.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from search.engine.front import QUALITY_KEYS, Front, Member
from search.report.history import Progress
from search.report.summary import VerifiedMember
from space import Layer, Space

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
OTHER_COLOURS = ("#44AA99", "#AA4499", "#6699CC", "#661100")  # of mixers from plug-ins (Tol)
LIGHT = ("sliding", "short_conv", "linear", "gla", "kda", "none")  # text on these is dark
INK = "#3C4250"
SEARCHED, RANDOM, MEASURED = "#0072B2", "#E69F00", "#D55E00"
LAYOUT = {
    "template": "plotly_white",
    "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
    "font": {"family": "system-ui, sans-serif", "size": 14},
    "legend": {"orientation": "h", "y": -0.2},
}
# On a page, title and legend are text around the figure, and scrolling on a touch screen must not zoom.
ON_PAGE = LAYOUT | {
    "margin": {"l": 10, "r": 20, "t": 12, "b": 10},
    "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
    "showlegend": False,
    "dragmode": False,
    "hoverlabel": {"align": "left", "font": {"family": "system-ui, sans-serif"}},
}
MAX_DRAWN_MEMBERS = 24  # of a front in the figure of layers
MAX_WIDE_SLOTS = 8  # with up to so many slots, a cell has space for two numbers on a phone


def mixer_colour(mixer: str) -> str:
    """The colour of a mixer; one of :data:`OTHER_COLOURS` for a mixer from a plug-in.

    Args:
        mixer: its name.
    """
    return COLOURS.get(mixer) or OTHER_COLOURS[sum(mixer.encode()) % len(OTHER_COLOURS)]


class Drawn(NamedTuple):
    """A figure with its texts.

    Attributes:
        name: of its file.
        title: plain text.
        note: plain text.
        figure: without title and legend.
    """

    name: str
    title: str
    note: str
    figure: go.Figure


def finish(figure: go.Figure, height: int, x: Mapping[str, Any], y: Mapping[str, Any], **layout: Any) -> None:
    """Apply the style of the page to a figure.

    Args:
        figure: to be changed.
        height: in pixels.
        x: settings of the x axis.
        y: settings of the y axis.
        layout: further settings of the layout.
    """
    figure.update_layout(**ON_PAGE, height=height, **layout)
    for update, axis in ((figure.update_xaxes, x), (figure.update_yaxes, y)):
        update(fixedrange=True, automargin=True, title_standoff=8, **axis)
        update(title_font_size=13)  # after the title, which would reset it


def prediction_figure(picks: Mapping[str, VerifiedMember]) -> Drawn:
    """Measured latencies of the picks relative to the predicted ones, with intervals.

    Args:
        picks: verified members by the names of their picks.
    """
    rows = [
        (f"{name}<br>{workload}", comparison)
        for name, pick in picks.items()
        for workload, comparison in pick.latency.items()
    ]
    names = [name for name, _ in rows]
    predicted = np.array([c.predicted.latency_ms for _, c in rows])
    upper = np.array([c.predicted.upper_ms for _, c in rows]) / predicted - 1
    middle = np.array([c.measured.latency_ms for _, c in rows]) / predicted - 1
    low, high = (np.array([c.measured.interval_ms for _, c in rows]) / predicted[:, None] - 1).T
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
            f"predicted {c.predicted.latency_ms:.4g} ms, measured {c.measured.latency_ms:.4g} ms"
            for _, c in rows
        ],
        hovertemplate="%{text}<extra></extra>",
        name="measured, 95% interval",
    )
    figure.add_vline(x=0, line={"color": SEARCHED, "width": 2})
    x_axis = {"title": "measured, relative to predicted", "tickformat": "+.0%"}
    finish(figure, 80 + 46 * len(rows), x_axis, {"autorange": "reversed"})
    note = "0% is the prediction, made before the model was measured."
    return Drawn("prediction", "Predicted against measured", note, figure)


def layers_figure(space: Space, front: Front, picks: Mapping[str, VerifiedMember]) -> Drawn:
    """Architectures of the picks and of the front's members: a row of equal cells each, in slot order.

    Args:
        space: of the front.
        front: of the search.
        picks: verified members by the names of their picks.
    """
    quality = front.ranking_quality
    names = {pick.key: name.split(", ")[0] for name, pick in picks.items()}
    members = {m.key: m for m in [*front.members, *(pick.member for pick in picks.values())]}
    ordered = sorted(members.values(), key=lambda m: (m.quality(quality), m.key))
    rows = thinned(ordered, names)
    figure = go.Figure()
    add_layers(figure, space, rows)
    labels = [
        f"<b>{names.get(m.key, m.key[:6])}</b> {m.quality(quality):.3f}<br>width {m.architecture.width}"
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
    numbers = "heads and FFN size" if space.slots <= MAX_WIDE_SLOTS else "heads"
    unit = " in nats" if quality in QUALITY_KEYS else ""
    note = (
        f"Best first, with {quality.replace('_', ' ')}{unit} and width. In a cell: {numbers}; "
        "a blank slot has no layer."
    )
    if len(rows) < len(members):
        note += f" {len(rows)} of {len(members)} members are drawn."
    return Drawn("layers", "Architectures", note, figure)


def add_layers(figure: go.Figure, space: Space, members: Sequence[Member]) -> None:
    """Draw the layers of members as cells, one trace a mixer, with bars of the FFN sizes.

    Args:
        figure: to be changed.
        space: of the members.
        members: a row each.
    """
    cells = [
        (row, slot, layer)
        for row, member in enumerate(members)
        for slot, layer in enumerate(member.architecture.layers)
        if layer.present
    ]
    for mixer in sorted({layer.mixer for *_, layer in cells}, key=lambda name: (name == "none", name)):
        of_mixer = [cell for cell in cells if cell[2].mixer == mixer]
        add_cells(figure, mixer, of_mixer, sizes=space.slots <= MAX_WIDE_SLOTS)
    sized = [cell for cell in cells if cell[2].ffn]
    largest = max(1, *space.ffn_options)
    figure.add_bar(
        y=[row + 0.27 for row, _, _ in sized],
        x=[0.92 * layer.ffn / largest for *_, layer in sized],
        base=[slot + 0.54 for _, slot, _ in sized],
        width=0.13,
        orientation="h",
        marker={"color": INK},
        hoverinfo="skip",
        name=f"FFN size, up to {largest}",
    )


def add_cells(figure: go.Figure, mixer: str, cells: Sequence[tuple[int, int, Layer]], *, sizes: bool) -> None:
    """Draw the layers of one mixer as equal bars with their numbers.

    Args:
        figure: to be changed.
        mixer: its name.
        cells: row, slot and layer.
        sizes: write the FFN size beside the heads.
    """
    figure.add_bar(
        y=[row - 0.08 for row, _, _ in cells],
        x=[0.92] * len(cells),
        base=[slot + 0.54 for _, slot, _ in cells],
        width=0.52,
        orientation="h",
        marker={"color": mixer_colour(mixer), "cornerradius": 4},
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
    """The numbers in a layer's cell: its heads, if it has any, and the FFN size.

    Args:
        layer: the layer.
        sizes: include the FFN size.
    """
    numbers = [layer.heads] * (layer.heads > 0) + [layer.ffn] * sizes
    return "\u2009\u00b7\u2009".join(map(str, numbers))


def thinned(members: Sequence[Member], keep: Collection[str]) -> list[Member]:
    """At most :data:`MAX_DRAWN_MEMBERS` members, evenly spaced, and those to be kept.

    Args:
        members: in order.
        keep: keys of members that are always included.
    """
    count = min(MAX_DRAWN_MEMBERS, len(members))
    spaced = set(np.linspace(0, len(members) - 1, count).round().astype(int).tolist())
    return [m for i, m in enumerate(members) if i in spaced or m.key in keep]


def progress_figure(history: Progress, strategy: str) -> Drawn:
    """Share of the hypervolume of all evaluations over the number of evaluations.

    Args:
        history: of the search, and of random search beside it.
        strategy: the name of the search's strategy.
    """
    figure, ends = go.Figure(), []
    named = {"random": ("random search", RANDOM), "search": (strategy, SEARCHED)}  # the latter on top
    for name in (name for name in named if name in history.lines):
        (title, colour), (counts, shares) = named[name], history.lines[name]
        figure.add_scatter(
            x=counts,
            y=shares,
            mode="lines",
            line={"color": colour, "width": 2.5, "shape": "hv"},
            hovertemplate="%{y:.2f}%",
            name=title,
        )
        ends.append(f"{title} has {shares[-1]:.1f}% after {counts[-1]:,} evaluations")
    note = f"Of the hypervolume of all evaluations, {' and '.join(reversed(ends))}."
    if "random" in history.lines:
        note += (
            f" {strategy.capitalize()} reached the final hypervolume of random search at evaluation "
            f"{history.matched:,}."
            if history.matched
            else f" {strategy.capitalize()} did not reach the final hypervolume of random search."
        )
    finish(
        figure,
        340,
        {"title": "evaluations", "rangemode": "tozero"},
        {"title": "share of the hypervolume, %"},
        hovermode="x unified",
    )
    return Drawn("progress", "Progress of the search", note, figure)
