"""The report of a search: one self-contained HTML page.

It starts with the result in one sentence, the chosen model's numbers and the limits. Figures show the front,
the architectures of the picks, and predicted against measured latencies. The search, the predictor's errors
and the quality on held-out text follow.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from latency import Card
from latency.predictor.accuracy import PredictorErrors
from search.engine.front import Front
from search.engine.verification import UNMEASURED, LimitResult
from search.problem.metric import Metric, format_quantity
from search.report.figures import Drawn, layers_figure, prediction_figure, progress_figure
from search.report.front_figure import axis_of, front_figure, picked_members, quality_unit
from search.report.history import evaluations, progress
from search.report.html import page, section, table
from search.report.images import write_images
from search.report.summary import Summary, TextQuality, VerifiedMember
from space import Architecture, Space
from space.io.artefact import write_text

Picks = Mapping[str, VerifiedMember]


def figures(space: Space, front: Front, summary: Summary, record: Path) -> list[Drawn]:
    """The figures of a search.

    Args:
        space: that was searched.
        front: of the search.
        summary: of the run.
        record: the search's folder; its evaluations are drawn if it has any.

    Raises:
        InputError: a file of evaluations cannot be read.
    """
    searched, random = evaluations(record), evaluations(record / "random")
    picks = picked_members(summary)
    history = progress({"search": searched, "random": random}, front.objectives)
    return [
        front_figure(front, summary, searched, random),
        layers_figure(space, front, picks),
        prediction_figure(picks),
        *([progress_figure(history, front.strategy)] if history.lines else []),
    ]


def architecture_kind(architecture: Architecture) -> str:
    """The mixers of an architecture in words, the most frequent first.

    Args:
        architecture: to be described.
    """
    mixers = Counter(name for name in architecture.pattern if name != "none")
    if not mixers:
        return "model without mixers"
    names = "/".join(name for name, _ in mixers.most_common())
    return f"{names} {'hybrid' if len(mixers) > 1 else 'model'}"


def limits_in_words(limits: Sequence[LimitResult]) -> str:
    """A phrase that tells if limits were kept.

    Args:
        limits: with their measured values.
    """
    missed = [item.bounded.text for item in limits if item.missed]
    unknown = [item.bounded.text for item in limits if item.status == UNMEASURED]
    every = {0: "under no limits", 1: "keeps its limit", 2: "keeps both limits"}
    if missed:
        return f"misses {' and '.join(missed)}"
    if unknown:
        return f"{' and '.join(unknown)} not measured"
    return every.get(len(limits), f"keeps all {len(limits)} limits")


def shown(metric: Metric | str, value: float) -> str:
    """A cost with its unit; latencies are all in ms, so that they compare.

    Args:
        metric: or its name, or ``latency``.
        value: in base units.
    """
    if metric != "latency" and (isinstance(metric, str) or metric.measurement != "latency"):
        return format_quantity(metric, value)
    return f"{1e3 * value:,.0f}\u00a0ms" if value >= 0.1 else f"{1e3 * value:#.3g}\u00a0ms"


def headline(front: Front, summary: Summary) -> str:
    """The result of a search in one sentence.

    Args:
        front: of the search.
        summary: of the run.
    """
    chosen, axis, quality = summary.chosen, axis_of(front), front.ranking_quality
    kind = architecture_kind(chosen.member.architecture)
    latency = chosen.latency.get(axis.workload) or next(iter(chosen.latency.values()))
    unit = {"recall_loss": "nats of recall", "kl": "nats of KL"}.get(quality, quality_unit(quality))
    return (
        f"{kind[0].upper()}{kind[1:]}, {chosen.member.quality(quality):.2f}\u00a0{unit}, "
        f"{shown('latency', latency.measured.latency_ms / 1e3)}, {limits_in_words(summary.limits)}"
    )


def tiles(summary: Summary) -> str:
    """The chosen model's numbers as large tiles.

    Args:
        summary: of the run.
    """
    member, bits = summary.chosen.member, summary.text.chosen_bits_per_byte
    rows = [
        (
            f"{member.loss_nats:.3f}",
            "nats per token" if bits is None else f"nats per token; {bits:.2f} bits per byte",
        )
    ]
    for workload, comparison in summary.chosen.latency.items():
        low, high = (f"{value:.3g}" for value in comparison.measured.interval_ms)
        middle = shown("latency", comparison.measured.latency_ms / 1e3)
        rows.append((middle, f"{workload}, measured; 95%: {low} to {high} ms"))
    params = format_quantity("params", member.predicted.params)
    rows.append((params.removesuffix(" parameters").replace(" parameters", ""), "parameters"))
    body = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in rows)
    return f'<div class="tiles">{body}</div>'


def limit_bars(limits: Sequence[LimitResult]) -> str:
    """Limits as bars that show the used share.

    Args:
        limits: with their measured values.
    """
    bars = []
    for item in limits:
        metric = item.bounded.parsed.metric
        status, used, bound = escape(item.status), item.used or 0.0, shown(metric, item.bounded.bound)
        text = f"{bound} at most"
        if item.found is not None:
            text = f"{shown(metric, item.found)} of {bound}, {100 * used:.1f}% used"
        bars.append(
            f'<div class="limit"><div><code>{escape(item.bounded.text)}</code>'
            f'<span>{text}, <span class="{status}">{status}</span></span></div>'
            f'<span class="bar"><i class="{status}" style="width:{100 * min(used, 1):.1f}%"></i></span></div>'
        )
    return "".join(bars) or "<p>None were given.</p>"


def picks_table(picks: Picks) -> str:
    """The picks with their predicted and measured numbers.

    Args:
        picks: verified members by the names of their picks.
    """
    workloads = list(next(iter(picks.values())).latency)
    rows = []
    for name, pick in picks.items():
        row = [f"<b>{escape(name)}</b>", f"<code>{escape(pick.key)}</code>", f"{pick.member.loss_nats:.4f}"]
        for comparison in map(pick.latency.__getitem__, workloads):
            low, high = comparison.measured.interval_ms
            row.append(f"{comparison.predicted.latency_ms:.3f}")
            row.append(f"{comparison.measured.latency_ms:.3f} ({low:.3f} to {high:.3f})")
        row.append(f"{pick.member.predicted.params:,}")
        row.append(f"{pick.parity.worst:.1e}")
        row.append(escape(pick.member.architecture.describe()))
        rows.append(row)
    columns = [column for w in workloads for column in (f"{w}: predicted ms", "measured ms (95%)")]
    return table(["pick", "key", "loss, nats", *columns, "parameters", "parity error", "architecture"], rows)


def noise_note(picks: Picks) -> str:
    """A note on unstable measurements; empty if all were stable.

    Args:
        picks: verified members by the names of their picks.
    """
    notes = [
        f"{name} {workload}: {', '.join(comparison.measured.problems)}"
        for name, pick in picks.items()
        for workload, comparison in pick.latency.items()
        if comparison.measured.problems
    ]
    return f'<p class="note">Unstable measurements: {escape("; ".join(notes))}.</p>' if notes else ""


def search_facts(front: Front, summary: Summary) -> str:
    """The strategy, the agreement of its surrogate and scores, and the failures, as paragraphs.

    Args:
        front: of the search.
        summary: of the run.
    """
    mantissa, exponent = f"{summary.architectures:.1e}".split("e")
    facts = [
        f"Strategy <b>{escape(front.strategy)}</b>: {front.evaluations:,} evaluations, "
        f"{len(front.failed):,} failed, in a space of {mantissa} \u00b7 10<sup>{int(exponent)}</sup> "
        "architectures."
    ]
    if summary.rounds > 1:
        facts.append(
            f"{summary.rounds} rounds: after each, finalists were measured and the predictor was "
            "recalibrated. The front drawn is that of the first."
        )
    facts += [
        f"The {name.replace('_', ' ')} that the surrogate predicted and the evaluated one have a rank "
        f"correlation (Spearman) of <b>{agreement.spearman:.3f}</b> over {agreement.evaluations:,} "
        "evaluations that came after the prediction."
        for name, agreement in front.surrogate.items()
    ]
    facts += [
        f"Single replacements in the largest architecture ({agreement.probes:,} evaluations more): the sum "
        f"of what they add to the {name.replace('_', ' ')} has a rank correlation (Kendall's tau) of "
        f"<b>{agreement.kendall_tau:.3f}</b> with that of {agreement.evaluations:,} architectures, and of "
        f"<b>{agreement.kendall_tau_with_pairs:.3f}</b> with terms of neighbouring blocks, each fitted to "
        "the others."
        for name, agreement in front.scores.items()
    ]
    reasons = Counter(item.reason for item in front.failed)
    facts += [f"{count:,} failed with: {escape(reason)}." for reason, count in reasons.most_common(5)]
    return "".join(f"<p>{fact}</p>" for fact in facts)


def percent(value: float | None, digits: int = 2) -> str:
    """A number of percent as text; a dash for None.

    Args:
        value: in percent.
        digits: decimals.
    """
    return "-" if value is None else f"{value:.{digits}f}%"


def predictor_table(workloads: Mapping[str, PredictorErrors]) -> str:
    """Errors of the predictor on whole models that it was not fitted to.

    Args:
        workloads: errors by workload; those without held-out models are left out.
    """
    rows = [
        [
            escape(workload),
            percent(test.held_out.mape_percent),
            percent(100 * test.held_out.within_10_percent, 0),
            "-" if test.held_out.spearman is None else f"{test.held_out.spearman:.4f}",
            percent(test.repeatability_mape_percent),
            percent(test.flops_and_params.mape_percent),
            f"{test.held_out.span:.1f}x",
        ]
        for workload, errors in workloads.items()
        if (test := errors.test)
    ]
    columns = ["workload", "MAPE", "within 10%", "Spearman", "repeatability", "FLOPs+params", "span"]
    return table(columns, rows)


def text_section(text: TextQuality) -> str:
    """Bits per byte of the supernet, the chosen model and the baselines.

    Args:
        text: quality on held-out text.
    """
    values = {
        "largest sub-network": text.largest_bits_per_byte,
        "chosen": text.chosen_bits_per_byte,
        "order-2 model": text.order2_bits_per_byte,
        "gzip -9": text.gzip_bits_per_byte,
    }
    held_out = "unknown" if text.held_out_bytes is None else f"{text.held_out_bytes:,}"
    cells = ["-" if value is None else f"{value:.3f}" for value in values.values()]
    note = f"{escape(str(text.source))}; {held_out} bytes held out."
    return f'{table(list(values), [cells])}<p class="note">{note}</p>'


def distilled_section(summary: Summary) -> str:
    """Finalists and baselines before and after distillation; empty without any.

    Args:
        summary: of the run.
    """
    if not summary.distilled:
        return ""
    trained = [*summary.distilled["finalists"], *summary.distilled.get("baselines", ())]
    names = [name for name in ("kl", "loss_nats", "recall_loss_nats") if name in trained[0]["before"]]
    rows = []
    for one in trained:
        pairs = [(one["before"][name], one["after"] and one["after"][name]) for name in names]
        rows.append(
            [
                f"<code>{escape(one['key'])}</code>",
                escape(f"baseline: {one['name']}" if "name" in one else "finalist"),
                *(" \u2192 ".join("-" if x is None else f"{x:.4f}" for x in pair) for pair in pairs),
                escape(str(one["failed"] or one["steps"])),
            ]
        )
    losses = (name.removesuffix("_nats").replace("_", " ") + ", nats" for name in names)
    columns = ["key", "kind", *losses, "steps"]
    tuned = summary.distilled.get("tuned")
    note = f'<p class="note">The best one: <code>{escape(tuned["folder"])}</code>.</p>' if tuned else ""
    return f"<h2>Finalists, inherited \u2192 distilled</h2>{table(columns, rows)}{note}"


def report_search(
    folder: Path, space: Space, summary: Summary, card: Card, more: str = "", png: Path | None = None
) -> list[Path]:
    """Write the report of a search into its folder, and optionally its figures as images.

    Args:
        folder: the search's.
        space: that was searched.
        summary: of the run.
        card: the device's.
        more: HTML at the end of the page.
        png: folder of the images; None for none.

    Returns:
        The page, then the images.

    Raises:
        InputError: a file of the search cannot be read, or images cannot be drawn on this machine.
    """
    front, path = Front.read(folder / "front.json"), folder / "report.html"
    write_report(path, space, front, summary, card, more)
    return [path, *(write_images(png, figures(space, front, summary, folder)) if png else [])]


def write_report(
    path: Path,
    space: Space,
    front: Front,
    summary: Summary,
    card: Card,
    more: str = "",
    record: Path | None = None,
) -> None:
    """Write the page.

    Args:
        path: the file.
        space: that was searched.
        front: of the search.
        summary: of the run.
        card: the device's.
        more: HTML at the end of the page.
        record: the search's folder, whose evaluations are drawn; None for the folder of the page.

    Raises:
        InputError: a file of evaluations cannot be read.
    """
    picks = picked_members(summary)
    front_drawn, layers, prediction, *progressed = figures(space, front, summary, record or path.parent)
    chosen = summary.chosen
    title = f"{escape(space.name)} on {escape(card.name)}"
    device = card.fingerprint
    machine = f"{device.cpu}, {device.runtime} {device.runtime_version}; profiled {str(card.measured)[:10]}"
    facts = search_facts(front, summary)
    body = [
        f'<p class="eyebrow">formfit: {title}</p><h1>{escape(headline(front, summary))}</h1>',
        f'<p class="note">{escape(machine)}</p>',
        tiles(summary),
        f"<p>Chosen: <code>{escape(chosen.key)}</code>, {escape(chosen.member.architecture.describe())}.</p>",
        f"<h2>Limits, as measured</h2>{limit_bars(summary.limits)}",
        section(front_drawn, plotly=True),
        section(layers),
        section(prediction),
        picks_table(picks),
        noise_note(picks),
        section(progressed[0], more=facts) if progressed else f"<h2>The search</h2>{facts}",
        "<h2>The predictor on held-out whole models</h2>",
        predictor_table(summary.predictor),
        "<h2>Bits per byte on the same held-out text</h2>",
        text_section(summary.text),
        distilled_section(summary),
        more,
    ]
    write_text(path, page(title, "".join(body)))
