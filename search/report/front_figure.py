"""The figure of a front: all evaluations, the front, and the measured picks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from search.engine.front import QUALITY_KEYS, Front, Member
from search.problem.metric import BYTES, PARAMETERS, SECONDS, Metric
from search.problem.objective import Objective
from search.report.figures import MEASURED, RANDOM, SEARCHED, Drawn, finish
from search.report.summary import Summary, VerifiedMember
from search.strategies.pareto import non_dominated

MAX_LIMIT_DISTANCE = 1.5  # a limit at more than so many times the largest drawn value is named, not drawn
VISIBLE_QUANTILE = 0.95  # of the evaluations' quality: worse ones would flatten the front
Array = NDArray[np.float64]


class Axis(NamedTuple):
    """The cost that a front is drawn over.

    Attributes:
        column: of the evaluations; empty if they do not have the cost.
        title: of the axis.
        scale: shown units in a base unit.
        unit: that is shown.
        quantity: ``latency``, ``memory``, ``rss``, ``params`` or a registered one.
        workload: empty for a cost without one.
        device: whose cost it is.
    """

    column: str
    title: str
    scale: float
    unit: str
    quantity: str
    workload: str
    device: str


def quality_unit(quality: str) -> str:
    """The unit of a quality: ``nats`` for losses, else its name.

    Args:
        quality: its name.
    """
    return "nats" if quality in QUALITY_KEYS else quality.replace("_", " ")


def axis_of(front: Front) -> Axis:
    """The axis of the first cost among the objectives, or else of the first predicted latency.

    Args:
        front: of a search for at least one device.
    """
    predicted = front.members[0].predicted.latency
    first = next(iter(predicted))
    for objective in map(Objective.parse, front.objectives):
        if objective.metric:
            workload = "" if objective.workload is None else str(objective.workload)
            return _axis(objective.text, objective.metric, workload, objective.device or first)
    workload = next(iter(predicted[first]))
    return Axis("", f"{workload} latency, ms", 1e3, "ms", "latency", workload, first)


def _axis(column: str, metric: Metric, workload: str, device: str) -> Axis:
    quantity = metric.quantity or metric.name
    subject = f"{quantity} at {workload}" if workload else quantity
    if metric.unit is SECONDS:
        return Axis(column, f"{workload} {quantity}, ms", 1e3, "ms", quantity, workload, device)
    if metric.unit is BYTES:
        return Axis(column, f"{subject}, MiB", 2.0**-20, "MiB", quantity, workload, device)
    if metric.unit is PARAMETERS:
        return Axis(column, "parameters, millions", 1e-6, "M", quantity, workload, device)
    return Axis(column, f"{subject}, {metric.unit.name}", 1.0, metric.unit.name, quantity, workload, device)


def position(member: Member, axis: Axis, table: pd.DataFrame) -> float:
    """The predicted cost of a member in the axis's unit; NaN if it is unknown.

    Args:
        member: of the front.
        axis: the cost.
        table: evaluations, which have the costs that predictions lack.
    """
    latency = member.predicted.latency.get(axis.device, {}).get(axis.workload)
    if axis.quantity == "latency" and latency:
        return latency.latency_ms
    if axis.quantity == "params":
        return member.predicted.params * axis.scale
    if axis.column in member.predicted.costs:
        return member.predicted.costs[axis.column] * axis.scale
    rows = table[table["key"] == member.key] if axis.column in table else table[:0]
    return float(rows[axis.column].iloc[0]) * axis.scale if len(rows) else np.nan


def picked_members(summary: Summary) -> dict[str, VerifiedMember]:
    """Verified members, each once, by the names of their picks; the chosen one first.

    Args:
        summary: of the run.
    """
    names: dict[str, list[str]] = {summary.chosen.key: []}
    members = {summary.chosen.key: summary.chosen}
    for pick, member in summary.verified.items():
        names.setdefault(member.key, []).append(pick)
        members[member.key] = member
    return {", ".join(names[key]) or "chosen": member for key, member in members.items()}


def limit_of(front: Front, axis: Axis) -> tuple[str, float] | None:
    """The limit on an axis's cost, with its bound in the axis's unit; None without one.

    Args:
        front: with its limits.
        axis: the cost.
    """
    first = next(iter(front.members[0].predicted.latency))
    for item in front.limits:
        limit = item.parsed
        quantity = limit.metric.quantity or limit.metric.name
        workload = "" if limit.workload is None else str(limit.workload)
        same_device = not limit.metric.needs_device or (limit.device or first) == axis.device
        if quantity == axis.quantity and workload == axis.workload and same_device:
            return item.text, item.bound * axis.scale
    return None


def qualities(members: Sequence[Member], name: str) -> Array:
    """Values [N] of a quality; NaN where it was not evaluated.

    Args:
        members: N of them.
        name: of the quality.
    """
    return np.array([m.qualities.get(name) for m in members], float)


def front_figure(front: Front, summary: Summary, searched: pd.DataFrame, random: pd.DataFrame) -> Drawn:
    """Quality against the first cost.

    Args:
        front: of the search.
        summary: of the run.
        searched: evaluations of the search; without rows if there are none.
        random: evaluations of random search; likewise.
    """
    axis, quality, members = axis_of(front), front.ranking_quality, front.members
    x = np.array([position(m, axis, searched) for m in members])
    y = qualities(members, quality)
    shift = rescoring_shift(members, searched, quality)
    figure, notes, unit = go.Figure(), [], quality_unit(quality)
    clouds = {
        name: add_cloud(figure, table, axis, quality, shift, name == "random")
        for name, table in (("random", random), ("search", searched))
        if axis.column in table
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
        text=[f"<b>{m.key}</b><br>{m.architecture.describe()}" for m in members],
        hovertemplate=f"%{{text}}<br>%{{x:.4g}} {axis.unit}, %{{y:.4f}} {unit}<extra></extra>",
        name=f"front, predicted ({len(members):,})",
    )
    add_picks(figure, picked_members(summary), axis, quality, searched)
    drawn = np.concatenate([y, *clouds.values()])
    low, high = drawn.min(), max(y.max(), float(np.quantile(clouds.get("search", y), VISIBLE_QUANTILE)))
    padding = 0.12 * (high - low) or 0.1
    if clouds:
        notes.append(
            f"Faint points were evaluated on fewer tokens than the front; they are moved by {shift:+.3f}, "
            f"the median difference in {unit} for the front's members."
        )
    above = int((drawn > high + padding / 2).sum())
    if above:
        notes.append(f"{above:,} of them lie above the picture.")
    limit = limit_of(front, axis)
    if limit:
        add_limit(figure, *limit, axis)
        if axis.quantity == "latency":
            notes.append("A limit is held against the upper bound of the prediction, not against its mean.")
    label = quality.replace("_", " ")
    y_axis = {
        "title": f"{label}, nats per token" if quality in QUALITY_KEYS else label,
        "range": [low - padding, high + padding / 2],
    }
    finish(figure, 430, {"title": axis.title}, y_axis)
    return Drawn("front", "The front", " ".join(notes), figure)


def rescoring_shift(members: Sequence[Member], table: pd.DataFrame, quality: str) -> float:
    """Median of the front's final qualities minus those found during the search; 0 if these are unknown.

    Args:
        members: of the front, evaluated again at the end.
        table: evaluations during the search.
        quality: its name.
    """
    if quality not in table:
        return 0.0
    before = table.drop_duplicates("key").set_index("key")[quality]
    differences = qualities(members, quality) - before.reindex([m.key for m in members]).to_numpy(float)
    known = differences[np.isfinite(differences)]
    return float(np.median(known)) if len(known) else 0.0


def add_cloud(
    figure: go.Figure, table: pd.DataFrame, axis: Axis, quality: str, shift: float, baseline: bool
) -> Array:
    """Draw all evaluations of a search, faintly.

    Args:
        figure: to be changed.
        table: the evaluations.
        axis: the cost.
        quality: its name.
        shift: added to the qualities.
        baseline: True for random search.

    Returns:
        The qualities drawn [N].
    """
    cloud = table[[axis.column, quality]].to_numpy(float)
    cloud = cloud[np.isfinite(cloud).all(axis=1)]
    y = cloud[:, 1] + shift
    figure.add_scatter(
        x=cloud[:, 0] * axis.scale,
        y=y,
        mode="markers",
        marker={"size": 5, "color": RANDOM if baseline else SEARCHED, "opacity": 0.35 if baseline else 0.3},
        hoverinfo="skip",
        name=f"{'random search' if baseline else 'evaluated'} ({len(cloud):,})",
    )
    return np.asarray(y)


def add_picks(
    figure: go.Figure, picks: Mapping[str, VerifiedMember], axis: Axis, quality: str, table: pd.DataFrame
) -> None:
    """Mark the picks: a latency as measured, with intervals; another cost as predicted.

    Args:
        figure: to be changed.
        picks: verified members by the names of their picks.
        axis: the cost.
        quality: its name.
        table: evaluations during the search.
    """
    rows = []
    for pick in picks.values():
        comparison = pick.latency.get(axis.workload) if axis.quantity == "latency" else None
        middle = comparison.measured.latency_ms if comparison else position(pick.member, axis, table)
        low, high = comparison.measured.interval_ms if comparison else (middle, middle)
        rows.append((middle, pick.member.quality(quality), middle - low, high - middle))
    x, y, less, more = np.array(rows, float).T
    figure.add_scatter(
        x=x,
        y=y,
        error_x={"array": more, "arrayminus": less, "thickness": 1.5, "width": 5},
        mode="markers",
        marker={"size": 12, "symbol": "diamond", "color": MEASURED, "line": {"color": "white", "width": 1}},
        text=list(picks),
        hovertemplate=(
            f"<b>%{{text}}</b><br>%{{x:.4g}} {axis.unit}, %{{y:.4f}} {quality_unit(quality)}<extra></extra>"
        ),
        name="picks, measured, 95% interval" if axis.quantity == "latency" else "picks",
    )
    for name, right, up, above in zip(picks, x, y, above_points(x, y), strict=True):
        side = (
            {"yshift": 17, "xshift": -7, "xanchor": "left"}
            if above
            else {"yshift": -12, "xshift": -6, "xanchor": "right"}
        )
        font = {"color": MEASURED, "size": 12}
        figure.add_annotation(x=right, y=up, text=f"<b>{name}</b>", showarrow=False, font=font, **side)


def above_points(x: Array, y: Array) -> list[bool]:
    """Flags for points [N] on a front: True writes the name above the point, False below, to the left.

    The leftmost point has no space to its left, nor has a point with another one close to it.

    Args:
        x: costs [N].
        y: qualities [N].
    """
    order = np.lexsort([-y, x])
    near = np.array([0.1, 0.1]) * [np.ptp(x), np.ptp(y)]
    above = [True] * len(x)
    for i, following in zip(order[1:], [*order[2:], None][: len(order) - 1], strict=True):
        gap = np.inf if following is None else np.abs([x[following] - x[i], y[following] - y[i]])
        above[i] = bool(np.all(gap <= near))
    return above


def add_limit(figure: go.Figure, text: str, bound: float, axis: Axis) -> None:
    """Draw a limit as a dashed line; a limit far beyond all points is only named.

    Args:
        figure: with its points.
        text: of the limit.
        bound: in the axis's unit.
        axis: the cost.
    """
    near = bound <= MAX_LIMIT_DISTANCE * max(float(np.max(trace.x)) for trace in figure.data)
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
