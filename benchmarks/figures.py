"""Draw the figures of the README and of docs/ from the result files in benchmarks/results.

    python benchmarks/figures.py

Nothing is measured here. ``docs/figures/headline.svg`` and ``layers.svg`` show the results of headline.py,
``limits.svg`` those of limits.py, ``decode.svg`` those of decode.py.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from families import FULL
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter
from outcome import RESULTS

from search.report.figures import COLOURS, INK
from space import Architecture
from space.io.artefact import digest

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
SEARCHED = "searched"
MODEL_STYLES = {  # colour and marker by origin of the model
    SEARCHED: ("#0072B2", "*"),
    "Transformer": ("#D55E00", "s"),
    "3:1 GatedDeltaNet": ("#CC79A7", "^"),
    "6:1 GatedDeltaNet": ("#882255", "v"),
    "all-linear": ("#009E73", "D"),
    "random search": ("#999999", "o"),
    "HAT": ("#E69F00", "P"),
}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E7EB",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "formfit",  # equal bytes for equal results
    "path.simplify": False,
}
Outcome = Mapping[str, Any]


def plain_ticks(axis: Axis, places: Sequence[float] = ()) -> None:
    """Label a logarithmic axis with plain numbers, by default at 1, 2 and 5 times the powers of ten."""
    axis.set_major_locator(FixedLocator(places) if places else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def front_panel(axes: Axes, workload: str, fronts: Mapping[str, Any]) -> None:
    """Plot supernet losses over predicted latency: the front of the search and of each family."""
    for name, points in fronts.items():
        x, y = np.array(points).T
        colour, marker = MODEL_STYLES[name]
        wide = name == SEARCHED
        axes.plot(
            x, y, color=colour, lw=2.2 if wide else 1, marker="o" if wide else marker, ms=3.5, label=name
        )
    axes.set(title=f"{workload}, inside the supernet", xscale="log", xlabel="predicted latency, ms")
    plain_ticks(axes.xaxis)


def trained_panel(axes: Axes, workload: str, settings: list[Outcome], figure: str) -> None:
    """Plot stand-alone losses over measured latency, with the standard error over seeds."""
    for setting in settings:
        for name, model in setting["models"].items():
            seeds = np.array([one[figure] for one in model["seeds"]])
            colour, marker = MODEL_STYLES[name]
            error = float(seeds.std(ddof=1) / np.sqrt(len(seeds))) if len(seeds) > 1 else 0.0
            size = 15 if name == SEARCHED else 7
            axes.errorbar(
                model["latency_ms"], seeds.mean(), yerr=error, color=colour, marker=marker, ms=size, ls="none"
            )
        axes.axvline(setting["limit_ms"], color="#9CA3AF", ls=":", lw=1)
    axes.set(title=f"{workload}, trained from scratch", xscale="log", xlabel="measured latency, ms")
    plain_ticks(axes.xaxis)


def headline_figure(found: Outcome) -> Figure:
    """Return the figure of fronts (top) and stand-alone losses (bottom), one column per workload."""
    fronts = found["fronts"]
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    panels = figure.subplots(2, len(fronts), squeeze=False)
    for column, workload in enumerate(fronts):
        front_panel(panels[0, column], workload, fronts[workload])
        settings = [setting for setting in found["settings"] if setting["workload"] == workload]
        trained_panel(panels[1, column], workload, settings, "loss_nats")
    for row in panels:
        row[0].set_ylabel("loss, nats per byte")
    handles = [
        mpl.lines.Line2D([], [], color=c, marker=m, ms=9 if name == SEARCHED else 6, ls="none", label=name)
        for name, (c, m) in MODEL_STYLES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handletextpad=0.2)
    return figure


def layer_strip(axes: Axes, row: float, architecture: Architecture, greatest: int) -> None:
    """Draw one model: a box in the mixer's colour for each layer, and a bar for its FFN size."""
    layers = [layer for layer in architecture.layers if layer.mixer != "none" or layer.ffn]
    for place, layer in enumerate(layers):
        colour = COLOURS[layer.mixer] if layer.mixer != "none" else "#FFFFFF"
        axes.add_patch(Rectangle((place + 0.06, row), 0.88, 0.42, facecolor=colour, edgecolor=INK, lw=0.5))
        axes.add_patch(
            Rectangle((place + 0.06, row + 0.47), 0.88, 0.38 * layer.ffn / greatest, color="#6B7280")
        )


def layers_figure(found: Outcome) -> Figure:
    """Return the figure of the layers of searched models and baselines, by setting."""
    settings, names = found["settings"], [SEARCHED, *FULL]
    models = [Architecture.from_json(s["models"][n]["architecture"]) for s in settings for n in names]
    greatest = max(layer.ffn for a in models for layer in a.layers)
    figure = Figure(figsize=(10, 1.1 + 1.45 * len(settings)), layout="constrained")
    panels = figure.subplots((len(settings) + 1) // 2, 2, squeeze=False).ravel()
    for panel, setting in zip(panels, settings, strict=False):
        labels = []
        for row, name in enumerate(names):
            model = setting["models"][name]
            architecture = Architecture.from_json(model["architecture"])
            layer_strip(panel, row, architecture, greatest)
            labels.append(f"{name}, width {architecture.width}, {model['latency_ms']:.3g} ms")
        panel.set(xlim=(0, 8), ylim=(len(names), -0.1), xticks=[])
        panel.set_title(f"{setting['workload']} <= {setting['limit_ms']:.3g} ms", loc="left", fontsize=10)
        panel.set_yticks(np.arange(len(names)) + 0.4, labels)
        panel.tick_params(length=0)
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
    used = [name for name in COLOURS if any(name in a.pattern for a in models) and name != "none"]
    handles = [Patch(facecolor=COLOURS[name], edgecolor=INK, lw=0.5, label=name) for name in used]
    handles += [
        Patch(facecolor="#FFFFFF", edgecolor=INK, lw=0.5, label="no mixer"),
        Patch(color="#6B7280", label="FFN"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def limits_figure(found: Outcome) -> Figure:
    """Return the figure of measured latency relative to each limit."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for phase, colour in (("prefill", "#0072B2"), ("decode", "#D55E00")):
        rows = [row for row in found["limits"] if row["limit"].startswith(phase)]
        asked = [float(row["limit"].split("<=")[1].removesuffix("ms")) for row in rows]
        used = [100 * row["delivered"]["used"] for row in rows]
        axes.plot(asked, used, "o-", color=colour, lw=1, label=f"{phase}@256")
    axes.axhline(100, color=INK, lw=1)
    axes.set(xscale="log", xlabel="limit, ms", ylabel="measured latency, % of the limit", ylim=(60, 104))
    plain_ticks(axes.xaxis)
    axes.legend()
    return figure


def decode_figure(found: Outcome) -> Figure:
    """Return the figure of time per token over context, exported and in torch."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    colours = {"full attention": "#D55E00", "3:1 hybrid": "#CC79A7", "all linear": "#009E73"}
    for name, model in found["models"].items():
        kind = next((k for k in colours if name == f"large {k}"), None)
        if kind:
            contexts = [int(text) for text in model if text.isdigit()]
            for runtime, style in (("onnxruntime", "o-"), ("torch eager", "s--")):
                times = [1e3 / model[str(c)]["tokens_per_second"][runtime] for c in contexts]
                axes.plot(contexts, times, style, color=colours[kind], label=f"{kind}, {runtime}")
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="ms per token")
    plain_ticks(axes.xaxis, contexts)
    plain_ticks(axes.yaxis, [1, 2, 3, 4, 5])
    figure.legend(ncols=3, loc="outside upper center")
    return figure


FIGURES: dict[str, tuple[str, Callable[[Outcome], Figure]]] = {  # by file: benchmark and drawing function
    "headline": ("headline", headline_figure),
    "layers": ("headline", layers_figure),
    "limits": ("limits", limits_figure),
    "decode": ("decode", decode_figure),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the figures")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    mpl.use("svg")
    with mpl.rc_context(STYLE):
        for name, (benchmark, draw) in FIGURES.items():
            text = (arguments.results / f"{benchmark}.json").read_text()
            metadata = {"Date": None, "Description": f"{benchmark}.json {digest(text)}"}  # checked by a test
            draw(json.loads(text)).savefig(arguments.out / f"{name}.svg", metadata=metadata)
            sys.stdout.write(f"{arguments.out / name}.svg\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
