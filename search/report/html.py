"""HTML of reports: the style sheet, tables, figures, and a page that loads nothing from elsewhere."""

from collections.abc import Sequence
from html import escape

from plotly.io import to_html

from search.report.figures import Drawn

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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table.

    Args:
        header: as text.
        rows: as HTML.
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def legend(drawn: Drawn) -> str:
    """The legend of a figure as text, which wraps on a small screen; empty for a single entry.

    Args:
        drawn: the figure.
    """
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
    """A figure under its title, with its legend and note.

    Args:
        drawn: the figure.
        plotly: include the plotting library; the first figure of a page needs it.
        more: HTML between title and figure.
    """
    config = {"displayModeBar": False, "responsive": True}
    html = to_html(
        drawn.figure, full_html=False, include_plotlyjs=plotly, config=config, div_id=f"figure-{drawn.name}"
    )
    note = f"<figcaption>{escape(drawn.note)}</figcaption>" if drawn.note else ""
    return f"<h2>{escape(drawn.title)}</h2>{more}<figure>{legend(drawn)}{html}{note}</figure>"


def page(title: str, body: str) -> str:
    """A self-contained HTML page.

    Args:
        title: as HTML.
        body: as HTML.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>formfit: {title}</title><style>{STYLE}</style></head><body>{body}</body></html>"
    )
