"""The report of a search: one self-contained page.

It says in a sentence what was found; then whether the limits were kept, the front, what the picks are
made of, predicted against measured latencies, how the search went and how far its predictions go.
Nothing in it is loaded from elsewhere.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from plotly.io import to_html

from latency import Card
from search.problem.limit import Limit
from search.problem.metric import Metric, format_quantity
from search.report.figures import Drawn, layers_figure, prediction_figure, progress_figure
from search.report.front_figure import axis_of, front_figure, picked, quality_of
from search.report.history import evaluations, progress
from space import Architecture, Space
from space.io.artefact import write_text

STYLE = """
:root { color-scheme: light; --ink: #1f2430; --soft: #5d6472; --line: #e3e6eb; --kept: #00714f;
  --missed: #b00020; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); max-width: 60rem;
  margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.3rem); line-height: 1.2; letter-spacing: -.015em;
  margin: .3rem 0 .8rem; text-wrap: balance; }
h2 { font-size: 1.25rem; letter-spacing: -.005em; margin: 3rem 0 .4rem; padding-top: 1.2rem;
  border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 46rem; }
code { font: .88em/1.4 ui-monospace, "Cascadia Mono", Menlo, monospace; }
figure { margin: 1rem 0 0; } figcaption, p.note { color: var(--soft); font-size: .9rem; max-width: 46rem; }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto; margin: .8rem 0;
  font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: .85rem; }
.eyebrow { color: var(--soft); font-size: .9rem; margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0; }
.tile { border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; line-height: 1.25; }
.tile span { color: var(--soft); font-size: .85rem; display: block; }
.limit { margin: .9rem 0; }
.limit div { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; }
.limit .bar { display: block; height: .55rem; border-radius: .3rem; background: #eceff3; overflow: hidden;
  margin-top: .25rem; }
.limit .bar i { display: block; height: 100%; background: var(--kept); }
.limit .bar i.missed { background: var(--missed); }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; font-size: .85rem; color: var(--soft); }
.legend i { display: inline-block; width: .75rem; height: .75rem; margin-right: .4rem;
  vertical-align: -.05rem; }
.legend .lines { height: .2rem; width: 1.2rem; vertical-align: .2rem; }
.legend .circle { border-radius: 50%; }
.legend .bar { border-radius: .15rem; } .legend .diamond { transform: rotate(45deg) scale(.8); }
.kept { color: var(--kept); font-weight: 600; } .missed { color: var(--missed); font-weight: 600; }
.UNMEASURED { color: var(--soft); font-weight: 600; }
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """An HTML table; cells are HTML already."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def figures(space: Space, front: Mapping[str, Any], summary: Mapping[str, Any], record: Path) -> list[Drawn]:
    """The figures of a search.

    Args:
        space: what was searched.
        front: the content of ``front.json``.
        summary: the content of ``summary.json``.
        record: the search's folder, whose evaluations are drawn where there are any.

    Raises:
        InputError: a part of the evaluations is not whole.
    """
    tables = {"search": evaluations(record), "random": evaluations(record / "random")}
    picks = picked(front, summary)
    found = progress(tables, front.get("objectives", ()))
    return [
        front_figure(front, summary, tables),
        layers_figure(space, front, picks, quality_of(front)),
        prediction_figure(picks),
        *([progress_figure(found, front.get("strategy", "search"))] if found.lines else []),
    ]


def kind(architecture: Architecture) -> str:
    """What an architecture is, by its mixers, the most frequent first."""
    mixers = Counter(name for name in architecture.pattern if name != "none")
    if not mixers:
        return "model without mixers"
    names = "/".join(name for name, _ in mixers.most_common())
    return f"{names} {'hybrid' if len(mixers) > 1 else 'model'}"


def kept(limits: Sequence[Mapping[str, Any]]) -> str:
    """Whether limits were kept, in words."""
    missed = [item["limit"] for item in limits if item["status"] == "missed"]
    unknown = [item["limit"] for item in limits if item["status"] == "UNMEASURED"]
    every = {0: "under no limits", 1: "keeps its limit", 2: "keeps both limits"}
    if missed:
        return f"misses {' and '.join(missed)}"
    if unknown:
        return f"{' and '.join(unknown)} not measured"
    return every.get(len(limits), f"keeps all {len(limits)} limits")


def shown(metric: Metric | str, value: float) -> str:
    """A quantity in base units for people; latencies all in ms, so that they compare."""
    if metric != "latency" and (isinstance(metric, str) or metric.measured_by != "latency"):
        return format_quantity(metric, value)
    return f"{1e3 * value:,.0f}\u00a0ms" if value >= 0.1 else f"{1e3 * value:#.3g}\u00a0ms"


def headline(front: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """What was found, in one sentence."""
    chosen, axis, quality = summary["chosen"], axis_of(front), quality_of(front)
    said = kind(Architecture.from_json(chosen["architecture"]))
    latency = chosen["latency"]
    first = latency.get(axis.workload) or next(iter(latency.values()))
    what = "nats" if quality == "loss" else "nats of recall"
    return (
        f"{said[0].upper()}{said[1:]}, {chosen[f'{quality}_nats']:.2f}\u00a0{what}, "
        f"{shown('latency', first['measured_latency_ms'] / 1e3)}, {kept(summary['limits'])}"
    )


def tiles(summary: Mapping[str, Any]) -> str:
    """The chosen model's numbers, large."""
    chosen, bits = summary["chosen"], summary["text"]["chosen_bits_per_byte"]
    rows = [
        (
            f"{chosen['loss_nats']:.3f}",
            "nats per token" if bits is None else f"nats per token; {bits:.2f} bits per byte",
        )
    ]
    for workload, timing in chosen["latency"].items():
        low, high = (f"{value:.3g}" for value in timing["measured_interval_ms"])
        middle = shown("latency", timing["measured_latency_ms"] / 1e3)
        rows.append((middle, f"{workload}, measured; 95%: {low} to {high} ms"))
    params = format_quantity("params", chosen["predicted"]["params"])
    rows.append((params.removesuffix(" parameters").replace(" parameters", ""), "parameters"))
    body = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in rows)
    return f'<div class="tiles">{body}</div>'


def limit_bars(limits: Sequence[Mapping[str, Any]]) -> str:
    """Each limit with how much of it is used."""
    bars = []
    for item in limits:
        metric = Limit.parse(item["limit"]).metric
        status, used = escape(item["status"]), item.get("used", 0.0)
        said = f"{shown(metric, item['bound'])} at most"
        if item["found"] is not None:
            said = f"{shown(metric, item['found'])} of {shown(metric, item['bound'])}, {100 * used:.1f}% used"
        bars.append(
            f'<div class="limit"><div><code>{escape(item["limit"])}</code>'
            f'<span>{said}, <span class="{status}">{status}</span></span></div>'
            f'<span class="bar"><i class="{status}" style="width:{100 * min(used, 1):.1f}%"></i></span></div>'
        )
    return "".join(bars) or "<p>None were given.</p>"


def picks_table(picks: Mapping[str, Mapping[str, Any]]) -> str:
    """The picks: what was predicted and measured of each."""
    workloads = list(next(iter(picks.values()))["latency"])
    rows = []
    for name, value in picks.items():
        row = [f"<b>{escape(name)}</b>", f"<code>{escape(value['key'])}</code>", f"{value['loss_nats']:.4f}"]
        for workload in workloads:
            timing = value["latency"][workload]
            low, high = timing["measured_interval_ms"]
            row.append(f"{timing['predicted_latency_ms']:.3f}")
            row.append(f"{timing['measured_latency_ms']:.3f} ({low:.3f} to {high:.3f})")
        row.append(f"{value['predicted']['params']:,}")
        row.append(f"{max(value['parity']['errors'].values()):.1e}")
        row.append(escape(Architecture.from_json(value["architecture"]).describe()))
        rows.append(row)
    columns = [column for w in workloads for column in (f"{w}: predicted ms", "measured ms (95%)")]
    return table(["pick", "key", "loss, nats", *columns, "parameters", "parity error", "architecture"], rows)


def noise_note(picks: Mapping[str, Mapping[str, Any]]) -> str:
    """What made measurements unsteady, as a note; nothing where they were steady."""
    said = [
        f"{name} {workload}: {', '.join(timing['problems'])}"
        for name, value in picks.items()
        for workload, timing in value["latency"].items()
        if timing["problems"]
    ]
    return f'<p class="note">Unsteady measurements: {escape("; ".join(said))}.</p>' if said else ""


def search_facts(front: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """The strategy, its surrogate and what failed, as paragraphs."""
    failed = front.get("failed", [])
    mantissa, exponent = f"{summary['space']['architectures']:.1e}".split("e")
    facts = [
        f"Strategy <b>{escape(front.get('strategy', 'unknown'))}</b>: {front['evaluations']:,} evaluations, "
        f"{len(failed):,} failed, in a space of {mantissa} \u00b7 10<sup>{int(exponent)}</sup> architectures."
    ]
    if summary.get("rounds", 1) > 1:
        facts.append(
            f"{summary['rounds']} rounds: finalists were measured, the predictor learned from them, and the "
            "search was repeated. The front drawn is that of the first."
        )
    facts += [
        f"The surrogate's {name.replace('_', ' ')} and that found afterwards have a rank correlation "
        f"(Spearman) of <b>{found['spearman']:.3f}</b> over {found['evaluations']:,} evaluations that it had "
        "not seen."
        for name, found in front.get("surrogate", {}).items()
    ]
    reasons = Counter(item["reason"] for item in failed)
    facts += [f"{count:,} failed with: {escape(reason)}." for reason, count in reasons.most_common(5)]
    return "".join(f"<p>{fact}</p>" for fact in facts)


def percent(value: float | None, digits: int = 2) -> str:
    """A value in percent for people; a dash where it is not known."""
    return "-" if value is None else f"{value:.{digits}f}%"


def predictor_table(workloads: Mapping[str, Any]) -> str:
    """How well the predictor does on whole models that it never saw."""
    rows = []
    for workload, error in workloads.items():
        held, proxy = error["held_out"], error["flops_and_params"]
        rows.append(
            [
                escape(workload),
                percent(held["mape_percent"]),
                percent(100 * held["within_10_percent"], 0),
                "-" if held["spearman"] is None else f"{held['spearman']:.4f}",
                percent(error["repeatability_mape_percent"]),
                percent(proxy["mape_percent"]),
                f"{held['span']:.1f}x",
            ]
        )
    columns = ["workload", "MAPE", "within 10%", "Spearman", "repeat floor", "FLOPs+params", "span"]
    return table(columns, rows)


def text_section(text: Mapping[str, Any]) -> str:
    """Bits per byte of the supernet, the chosen model and the baselines."""
    names = {
        "largest sub-network": "largest_bits_per_byte",
        "chosen": "chosen_bits_per_byte",
        "order-2 model": "order2_bits_per_byte",
        "gzip -9": "gzip_bits_per_byte",
    }
    values = [text[name] for name in names.values()]
    scored = "unknown" if text["held_out_bytes"] is None else f"{text['held_out_bytes']:,}"
    return (
        table(list(names), [["-" if value is None else f"{value:.3f}" for value in values]])
        + f'<p class="note">{escape(str(text["source"]))}; {scored} bytes held out.</p>'
    )


def legend(drawn: Drawn) -> str:
    """What the colours of a figure mean, as text that wraps on a small screen; "" for one thing alone."""
    items = []
    for trace in drawn.figure.data:
        if trace.showlegend is False:
            continue
        line = trace.type == "scatter" and trace.mode == "lines"
        look = trace.line if line else trace.marker
        shape = "lines" if line else "bar" if trace.type == "bar" else look.symbol or "circle"
        faint = "" if line or look.opacity is None else f";opacity:{max(0.4, look.opacity)}"
        items.append(
            f'<span><i class="{shape}" style="background:{look.color}{faint}"></i>{escape(trace.name)}</span>'
        )
    return f'<div class="legend">{"".join(items)}</div>' if len(items) > 1 else ""


def section(drawn: Drawn, *, plotly: bool = False, more: str = "") -> str:
    """A figure under its title, with its note; ``plotly``: the library itself stands before it."""
    config = {"displayModeBar": False, "responsive": True}
    html = to_html(
        drawn.figure, full_html=False, include_plotlyjs=plotly, config=config, div_id=f"figure-{drawn.name}"
    )
    note = f"<figcaption>{escape(drawn.note)}</figcaption>" if drawn.note else ""
    return f"<h2>{escape(drawn.title)}</h2>{more}<figure>{legend(drawn)}{html}{note}</figure>"


def write_report(
    path: Path,
    space: Space,
    front: Mapping[str, Any],
    summary: Mapping[str, Any],
    card: Card,
    more: str = "",
    record: Path | None = None,
) -> None:
    """Write the page.

    Args:
        path: its file.
        space: what was searched.
        front: the content of ``front.json``.
        summary: the content of ``summary.json``.
        card: the device's.
        more: HTML that stands at its end.
        record: the search's folder, whose evaluations are drawn; none: the folder of the page.

    Raises:
        InputError: a part of the evaluations is not whole.
    """
    picks = picked(front, summary)
    drawn = {d.name: d for d in figures(space, front, summary, record or path.parent)}
    chosen, said = summary["chosen"], escape(headline(front, summary))
    where = f"{escape(space.name)} on {escape(card.name)}"
    cpu, runtime, version = (str(card.fingerprint.get(k)) for k in ("cpu", "runtime", "runtime_version"))
    made = f"{cpu}, {runtime} {version}; profiled {str(card.measured)[:10]}"
    facts = search_facts(front, summary)
    body = [
        f'<p class="eyebrow">formfit: {where}</p><h1>{said}</h1>',
        f'<p class="note">{escape(made)}</p>',
        tiles(summary),
        f"<p>Chosen: <code>{escape(chosen['key'])}</code>, "
        f"{escape(Architecture.from_json(chosen['architecture']).describe())}.</p>",
        f"<h2>Limits, as measured</h2>{limit_bars(summary['limits'])}",
        section(drawn["front"], plotly=True),
        section(drawn["layers"]),
        section(drawn["prediction"]),
        picks_table(picks),
        noise_note(picks),
        section(drawn["progress"], more=facts) if "progress" in drawn else f"<h2>The search</h2>{facts}",
        "<h2>The predictor on whole models it never saw</h2>",
        predictor_table(summary["predictor"]),
        "<h2>Bits per byte on the same held-out text</h2>",
        text_section(summary["text"]),
        more,
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>formfit: {where}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>"
    )
    write_text(path, page)
