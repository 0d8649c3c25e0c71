"""The audit's results as a page, as rows of tables, and as a section of a run's report."""

from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.subplots import make_subplots

from search.audit.rank_correlation import RankCorrelations
from search.audit.result import SETS, AuditResult
from search.report.figures import LAYOUT
from search.report.html import page, table
from space import InputError
from space.io.artefact import write_text

NAMES = {
    "supernet": "supernet",
    "params": "parameters",
    "flops": "FLOPs",
    "two_seeds": "another seed",
}
CORRELATION_COLUMNS = ["set", "loss", "ranked by", "Kendall's tau-b", "Spearman's rho"]
COLOURS = ("#0072B2", "#D55E00")


def correlation_rows(result: AuditResult) -> list[list[str]]:
    """Rows of a table with :data:`CORRELATION_COLUMNS`, as text.

    Args:
        result: of an audit.
    """
    rows = []
    for name, where in SETS.items():
        of_set = result.sets[name]
        rows += _rows(where, "loss", of_set.loss)
        rows += _rows(where, "recall loss", of_set.recall_loss) if of_set.recall_loss else []
    return rows


def _rows(where: str, loss: str, correlations: RankCorrelations) -> list[list[str]]:
    rows = [
        [where, loss, NAMES[by], str(tau), str(correlations.spearman_rho[by])]
        for by, tau in correlations.kendall_tau.items()
    ]
    return [*rows, [where, loss, "supernet - parameters", str(correlations.supernet_minus_params), ""]]


def audit_section(run: Path, supernet: str) -> str:
    """The audit of a run's supernet as a section of the run's report, in HTML; empty without an audit.

    Args:
        run: the run's folder.
        supernet: sha256 of the supernet's weights; an audit of others is ignored.
    """
    try:
        result = AuditResult.read(run / "audit" / "audit.json")
    except InputError:
        return ""
    return findings(result) if result.inputs.get("supernet") == supernet else ""


def findings(result: AuditResult) -> str:
    """Verdicts, rank correlations and settings, in HTML.

    Args:
        result: of an audit.
    """
    settings = result.settings
    counts = " and ".join(str(len(result.sets[name].architectures)) for name in SETS)
    return (
        "<h2>Ranking by the supernet and by stand-alone training</h2>"
        + "".join(f"<p>{escape(result.sets[name].text)}</p>" for name in SETS)
        + table(CORRELATION_COLUMNS, [[escape(cell) for cell in row] for row in correlation_rows(result)])
        + f'<p class="note">{counts} architectures, each trained from scratch for '
        f"{settings.steps:,} steps of {settings.batch} x {settings.length} tokens, "
        f"{len(settings.seeds)} seeds; equal latency: within {settings.within_percent:.0f}% of "
        f"{result.equal_latency_ms:.3f} ms at {escape(settings.workload)} on "
        f"{escape(settings.device)}. In brackets: 95% bootstrap intervals over architectures.</p>"
    )


def losses_figure(result: AuditResult) -> go.Figure:
    """Losses inside the supernet over mean stand-alone losses, one panel a set; bars span the seeds.

    Args:
        result: of an audit.
    """
    figure = make_subplots(cols=2, subplot_titles=list(SETS.values()))
    for column, (name, colour) in enumerate(zip(SETS, COLOURS, strict=True), 1):
        members = [item for item in result.architectures if name in item.sets]
        losses = [item.stand_alone_loss_nats for item in members]
        means = [sum(by_seed) / len(by_seed) for by_seed in losses]
        texts = [
            f"{item.key} {item.description}<br>{item.params:,} parameters, {item.predicted_latency_ms:.3f} ms"
            for item in members
        ]
        figure.add_scatter(
            x=means,
            y=[item.supernet_loss_nats for item in members],
            error_x={
                "array": [max(by_seed) - mean for by_seed, mean in zip(losses, means, strict=True)],
                "arrayminus": [mean - min(by_seed) for by_seed, mean in zip(losses, means, strict=True)],
                "thickness": 1,
            },
            mode="markers",
            marker={"size": 10, "color": colour},
            text=texts,
            hovertemplate="%{text}<br>stand-alone %{x:.4f}, supernet %{y:.4f} nats<extra></extra>",
            showlegend=False,
            row=1,
            col=column,
        )
    figure.update_xaxes(title="stand-alone training, nats per token")
    figure.update_yaxes(title="inside the supernet, nats per token", col=1)
    figure.update_layout(**LAYOUT)
    return figure


def taus_figure(result: AuditResult) -> go.Figure:
    """Kendall's tau of each predictor with intervals, for both sets.

    Args:
        result: of an audit.
    """
    figure = go.Figure()
    for (name, where), colour in zip(SETS.items(), COLOURS, strict=True):
        taus = {NAMES[by]: tau for by, tau in result.sets[name].loss.kendall_tau.items()}
        figure.add_scatter(
            x=[tau.value for tau in taus.values()],
            y=list(taus),
            error_x={
                "array": [tau.high - tau.value for tau in taus.values()],
                "arrayminus": [tau.value - tau.low for tau in taus.values()],
            },
            mode="markers",
            marker={"size": 11, "color": colour},
            name=where,
            orientation="h",  # the two sets side by side on a line
        )
    figure.add_vline(x=0, line={"color": "#888", "dash": "dot"})
    figure.update_layout(
        title="Rank correlation with stand-alone training",
        xaxis={"title": "Kendall's tau", "range": [-1.05, 1.05]},
        yaxis={"autorange": "reversed"},
        scattermode="group",
        **LAYOUT,
    )
    return figure


def write_audit_page(path: Path, result: AuditResult) -> None:
    """Write ``audit.html``, a self-contained page.

    Args:
        path: the file.
        result: of an audit.
    """
    config = {"displayModeBar": False, "responsive": True}
    drawn = [
        to_html(f, full_html=False, include_plotlyjs=(i == 0), config=config, div_id=f"figure-{i}")
        for i, f in enumerate((losses_figure(result), taus_figure(result)))
    ]
    rows = [
        [
            f"<code>{escape(item.key)}</code>",
            escape(", ".join(SETS[name] for name in item.sets)),
            f"{item.supernet_loss_nats:.4f}",
            ", ".join(f"{loss:.4f}" for loss in item.stand_alone_loss_nats),
            f"{item.params:,}",
            f"{item.predicted_latency_ms:.3f}",
            escape(item.description),
        ]
        for item in result.architectures
    ]
    columns = [
        "key",
        "set",
        "supernet, nats",
        "stand-alone, nats",
        "parameters",
        "predicted ms",
        "architecture",
    ]
    title = f"Audit of the supernet of {escape(result.space)}"
    body = (
        f"<h1>{title}</h1>{findings(result)}{''.join(drawn)}<h2>The architectures</h2>{table(columns, rows)}"
    )
    write_text(path, page(title, body))
