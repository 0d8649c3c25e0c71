"""The figure of a front: all that was evaluated, the front itself, and the picks as they were measured."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from search.problem.limit import Limit
from search.problem.objective import QUALITIES
from search.report.figures import MEASURED, RANDOM, SEARCHED, Drawn, finish
from search.strategies.pareto import non_dominated
from space import Architecture, Workload

NEAR = 1.5  # a limit so many times beyond all that is drawn is only named


class Axis(NamedTuple):
    """What the front is drawn over."""

    column: str  # of the evaluations; "" where they do not have it
    title: str
    scale: float  # from base units to those shown
    unit: str
    metric: str  # latency, memory, rss or params
    workload: str
    device: str


def quality_of(front: Mapping[str, Any]) -> str:
    """The quality that a search made small: ``loss``, or ``recall_loss`` where only that was asked for."""
    return next((name for name in front.get("objectives", ()) if name in QUALITIES), "loss")


def axis_of(front: Mapping[str, Any]) -> Axis:
    """The first cost among the objectives; the first predicted latency where there is none."""
    predicted = front["members"][0]["predicted"]["latency"]
    first = next(iter(predicted))
    for name in front.get("objectives", ()):
        if name in QUALITIES:
            continue
        *device, metric, workload = name.split(":") if ":" in name else (name, "")
        if metric == "params":
            return Axis(name, "parameters, millions", 1e-6, "M", metric, "", first)
        where = str(Workload.parse(workload))
        if metric == "latency":
            return Axis(name, f"{where} latency, ms", 1e3, "ms", metric, where, *(device or [first]))
        return Axis(name, f"{metric} at {where}, MiB", 2.0**-20, "MiB", metric, where, *(device or [first]))
    where = next(iter(predicted[first]))
    return Axis("", f"{where} latency, ms", 1e3, "ms", "latency", where, first)


def position(member: Mapping[str, Any], axis: Axis, table: pd.DataFrame) -> float:
    """Where a member lies on an axis as predicted, in its unit; NaN where that is not known."""
    timing = member["predicted"]["latency"].get(axis.device, {}).get(axis.workload)
    if axis.metric == "latency" and timing:
        return float(timing["latency_ms"])
    if axis.metric == "params":
        return float(member["predicted"]["params"]) * axis.scale
    rows = table[table["key"] == member["key"]] if axis.column in table else table[:0]
    return float(rows[axis.column].iloc[0]) * axis.scale if len(rows) else np.nan


def picked(front: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The verified members with what was measured of them, each once, by the names of their picks."""
    members = {m["key"]: m for m in front["members"]}
    chosen = summary["chosen"]
    names: dict[str, list[str]] = {chosen["key"]: []}
    found = {chosen["key"]: dict(chosen)}
    for pick, value in summary["verified"].items():
        key = value["key"]
        names.setdefault(key, []).append(pick)
        found[key] = {**found.get(key, members.get(key, {})), **value}
    return {", ".join(names[key]) or "chosen": value for key, value in found.items()}


def limit_of(front: Mapping[str, Any], axis: Axis) -> tuple[str, float] | None:
    """The limit that bears on an axis, with its bound in the axis's unit; None where there is none."""
    first = next(iter(front["members"][0]["predicted"]["latency"]))
    for item in front.get("limits", []):
        limit = Limit.parse(item["limit"])
        metric = limit.metric.quantity or limit.metric.name
        where = "" if limit.workload is None else str(limit.workload)
        here = not limit.metric.needs_device or (limit.device or first) == axis.device
        if metric == axis.metric and where == axis.workload and here:
            return item["limit"], item["bound"] * axis.scale
    return None


def front_figure(
    front: Mapping[str, Any], summary: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]
) -> Drawn:
    """Quality against the first cost.

    Args:
        front: the content of ``front.json``.
        summary: the content of ``summary.json``.
        tables: the evaluations of ``search``, and of ``random`` search, either without rows where unknown.
    """
    axis, quality, members = axis_of(front), quality_of(front), front["members"]
    x = np.array([position(m, axis, tables["search"]) for m in members])
    y = np.array([m[f"{quality}_nats"] for m in members], float)
    shift = rescoring(members, y, tables["search"], quality)
    figure, notes = go.Figure(), []
    clouds = {
        name: add_cloud(figure, tables[name], axis, quality, shift, name == "random")
        for name in ("random", "search")
        if axis.column in tables[name]
    }
    steps = np.flatnonzero(non_dominated(np.column_stack([x, y])))
    steps = steps[np.argsort(x[steps], kind="stable")]
    line = {"shape": "hv", "color": SEARCHED, "width": 2}
    figure.add_scatter(x=x[steps], y=y[steps], mode="lines", line=line, hoverinfo="skip", showlegend=False)
    figure.add_scatter(
        x=x,
        y=y,
        mode="markers",
        marker={"size": 8, "color": SEARCHED, "line": {"color": "white", "width": 1}},
        text=[
            f"<b>{m['key']}</b><br>{Architecture.from_json(m['architecture']).describe()}" for m in members
        ],
        hovertemplate=f"%{{text}}<br>%{{x:.4g}} {axis.unit}, %{{y:.4f}} nats<extra></extra>",
        name=f"front, predicted ({len(members):,})",
    )
    add_picks(figure, picked(front, summary), axis, quality, tables["search"])
    drawn = np.concatenate([y, *clouds.values()])
    # The worst of what was evaluated would press the front flat: it is cut off, and that is said.
    low, high = drawn.min(), max(y.max(), float(np.quantile(clouds.get("search", y), 0.95)))
    room = 0.12 * (high - low) or 0.1
    if clouds:
        notes.append(
            f"Faint points were scored on fewer tokens than the front; they are moved by {shift:+.3f} nats, "
            "the median difference for the front's members."
        )
    outside = int((drawn > high + room / 2).sum())
    if outside:
        notes.append(f"{outside:,} of them lie above the picture.")
    limit = limit_of(front, axis)
    if limit:
        add_limit(figure, *limit, axis)
        if axis.metric == "latency":
            notes.append("A limit is held against the upper bound of the prediction, not against its middle.")
    y_axis = {
        "title": f"{quality.replace('_', ' ')}, nats per token",
        "range": [low - room, high + room / 2],
    }
    finish(figure, 430, {"title": axis.title}, y_axis)
    return Drawn("front", "The front", " ".join(notes), figure)


def rescoring(
    members: Sequence[Mapping[str, Any]], found: NDArray[np.float64], table: pd.DataFrame, quality: str
) -> float:
    """The median of what members scored in the end [N] less what they scored while searching, in nats."""
    if quality not in table:
        return 0.0
    before = table.drop_duplicates("key").set_index("key")[quality]
    differences = found - before.reindex([m["key"] for m in members]).to_numpy(float)
    known = differences[np.isfinite(differences)]
    return float(np.median(known)) if len(known) else 0.0


def add_cloud(
    figure: go.Figure, table: pd.DataFrame, axis: Axis, quality: str, shift: float, rival: bool
) -> NDArray[np.float64]:
    """Draw all that a search evaluated, faintly; returns the qualities drawn [N]."""
    cloud = table[[axis.column, quality]].to_numpy(float)
    cloud = cloud[np.isfinite(cloud).all(axis=1)]
    y = cloud[:, 1] + shift
    figure.add_scatter(
        x=cloud[:, 0] * axis.scale,
        y=y,
        mode="markers",
        marker={"size": 5, "color": RANDOM if rival else SEARCHED, "opacity": 0.35 if rival else 0.3},
        hoverinfo="skip",
        name=f"{'random search' if rival else 'evaluated'} ({len(cloud):,})",
    )
    return np.asarray(y)


def add_picks(
    figure: go.Figure, picks: Mapping[str, Mapping[str, Any]], axis: Axis, quality: str, table: pd.DataFrame
) -> None:
    """Mark the picks: where the axis is a latency as measured, with intervals, else as predicted."""
    rows = []
    for value in picks.values():
        timing = value["latency"].get(axis.workload) if axis.metric == "latency" else None
        middle = timing["measured_latency_ms"] if timing else position(value, axis, table)
        low, high = timing["measured_interval_ms"] if timing else (middle, middle)
        rows.append((middle, value[f"{quality}_nats"], middle - low, high - middle))
    x, y, less, more = np.array(rows, float).T
    figure.add_scatter(
        x=x,
        y=y,
        error_x={"array": more, "arrayminus": less, "thickness": 1.5, "width": 5},
        mode="markers",
        marker={"size": 12, "symbol": "diamond", "color": MEASURED, "line": {"color": "white", "width": 1}},
        text=list(picks),
        hovertemplate=f"<b>%{{text}}</b><br>%{{x:.4g}} {axis.unit}, %{{y:.4f}} nats<extra></extra>",
        name="picks, measured, 95% interval" if axis.metric == "latency" else "picks",
    )
    for name, right, up, above in zip(picks, x, y, above_points(x, y), strict=True):
        side = (
            {"yshift": 17, "xshift": -7, "xanchor": "left"}
            if above
            else {"yshift": -12, "xshift": -6, "xanchor": "right"}
        )
        font = {"color": MEASURED, "size": 12}
        figure.add_annotation(x=right, y=up, text=f"<b>{name}</b>", showarrow=False, font=font, **side)


def above_points(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[bool]:
    """Whether the names of points [N] on a front go above them: below and left there is room.

    But for the leftmost, which has the axis beside it, and for one whose next lies close to it.
    """
    order = np.lexsort([-y, x])
    near = np.array([0.1, 0.1]) * [np.ptp(x), np.ptp(y)]
    above = [True] * len(x)
    for i, following in zip(order[1:], [*order[2:], None][: len(order) - 1], strict=True):
        gap = np.inf if following is None else np.abs([x[following] - x[i], y[following] - y[i]])
        above[i] = bool(np.all(gap <= near))
    return above


def add_limit(figure: go.Figure, text: str, bound: float, axis: Axis) -> None:
    """Draw a limit as a dashed line; one far beyond all that is drawn is only named."""
    near = bound <= NEAR * max(float(np.max(trace.x)) for trace in figure.data)
    if near:
        figure.add_vline(x=bound, line={"color": "#222", "dash": "dash", "width": 1.5})
    figure.add_annotation(
        x=bound if near else 1,
        xref="x" if near else "x domain",
        y=1,
        yref="y domain",
        xanchor="right",
        yanchor="top",
        text=f"{text} " if near else f"{text} is at {bound:.3g} {axis.unit} \u2192",
        showarrow=False,
        bgcolor="rgba(255, 255, 255, 0.85)",
    )
