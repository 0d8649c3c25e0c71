"""Tables of the command line: fronts, limits, latencies, precisions, errors of predictors."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from search.cli.output import make_table

if TYPE_CHECKING:
    from rich.table import Table

    from latency.predictor.accuracy import PredictorErrors
    from search.engine.front import Member
    from search.engine.verification import LatencyComparison, LimitResult, PrecisionResult
    from space import Architecture, Layer


LOSSES = {"kl": "KL, nats", "loss_nats": "loss, nats"}  # of finalists that are shown
MIN_SHOWN_CHARACTERS = 6  # of a key in a table


def limit_table(limits: "Sequence[LimitResult]") -> "Table":
    """Limits, and whether each was kept.

    Args:
        limits: with their measured values.
    """
    rows = [
        [
            item.bounded.text,
            item.bounded.format(item.bounded.bound),
            "-" if item.found is None else item.bounded.format(item.found),
            "-" if item.used is None else f"{100 * item.used:.1f}%",
            item.status,
        ]
        for item in limits
    ]
    return make_table("Limits", ["limit", "bound", "found", "used", "status"], rows)


def distilled_table(distilled: "Mapping[str, Any]") -> "Table":
    """Finalists and baselines before and after distillation.

    Args:
        distilled: the JSON object of a :class:`search.select.search_command.Distillation`.
    """
    trained = [*distilled["finalists"], *distilled.get("baselines", ())]
    names = {name: title for name, title in LOSSES.items() if name in trained[0]["before"]}
    rows = [
        [
            f"{one['name']}\n{one['key']}" if "name" in one else one["key"],
            f"{one['rank_before']} -> {one['rank_after']}",
            *(f"{_number(one['before'], name)} -> {_number(one['after'], name)}" for name in names),
            str(one["failed"] or one["steps"]),
        ]
        for one in trained
    ]
    titles = [f"{title}\ninherited -> distilled" for title in names.values()]
    return make_table("Finalists, distilled", ["key, or baseline", "rank", *titles, "steps"], rows)


def _number(losses: "Mapping[str, float | None] | None", name: str) -> str:
    value = losses[name] if losses else None
    return "-" if value is None else f"{value:.4f}"


def latency_table(latency: "Mapping[str, LatencyComparison]") -> "Table":
    """Predicted beside measured latencies.

    Args:
        latency: by workload.
    """
    rows = [
        [
            workload,
            f"{item.predicted.latency_ms:.3f}",
            f"{item.predicted.upper_ms:.3f}",
            f"{item.measured.latency_ms:.3f}",
            f"{item.error_percent:+.1f}%",
        ]
        for workload, item in latency.items()
    ]
    return make_table("Latency, ms", ["workload", "predicted", "upper bound", "measured", "error"], rows)


def precision_table(precisions: "Mapping[str, PrecisionResult]") -> "Table":
    """Size, loss and latencies of a sub-model's graphs.

    Args:
        precisions: graphs by precision.
    """
    rows = []
    for name, item in precisions.items():
        loss = "UNMEASURED" if item.loss_nats is None else f"{item.loss_nats:.4f}"
        # The row names the precision, so the workload is shown without it.
        times = "\n".join(f"{w.split(',')[0]} {ms:.3f}" for w, ms in item.latency_ms.items())
        rows.append([name, f"{item.bytes / 2**20:.2f} MiB", loss, times])
    return make_table("Precisions", ["precision", "file", "loss, nats", "latency, ms"], rows)


def front_tables(members: "Sequence[Member]", picks: Mapping[str, str]) -> "list[Table]":
    """The members of a front, and the architectures of the picked ones.

    Args:
        members: of the front.
        picks: keys of members by the name of the pick.
    """
    names: dict[str, list[str]] = {}
    for pick, key in picks.items():
        names.setdefault(key, []).append(pick)
    device = next(iter(members[0].predicted.latency), None)
    workloads = list(members[0].predicted.latency[device]) if device else []
    others = [name for name in members[0].qualities if name not in ("loss", "recall_loss")]
    short = short_keys([member.key for member in members])
    rows = [
        [
            short[member.key],
            f"{member.loss_nats:.4f}",
            *(f"{member.quality(name):.4f}" for name in others),
            *(f"{member.predicted.latency[str(device)][w].latency_ms:.3f}" for w in workloads),
            f"{member.predicted.params:,}",
            "\n".join(names.get(member.key, [])),
        ]
        for member in members
    ]
    columns = ["key", "loss\nnats", *others, *(f"{w}\nms" for w in workloads), "params", "pick"]
    picked = [member for member in members if member.key in names]
    letters = mixer_letters([member.architecture for member in picked])
    shapes = [[names[m.key][0], short_description(m.architecture, letters)] for m in picked]
    legend = ", ".join(f"{letter} {mixer}" for mixer, letter in letters.items())
    return [
        make_table("Front", columns, rows),
        make_table("Architectures", ["pick", f"width | mixer, heads.FFN ({legend})"], shapes),
    ]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The shortest beginnings that tell keys apart, which ``--pick`` takes, by key.

    Args:
        keys: of all members of a front.
    """
    for length in range(MIN_SHOWN_CHARACTERS, max(map(len, keys), default=0)):
        if len({key[:length] for key in keys}) == len(set(keys)):
            return {key: key[:length] for key in keys}
    return {key: key for key in keys}


def mixer_letters(architectures: "Sequence[Architecture]") -> dict[str, str]:
    """The shortest beginning of each mixer's name that tells the mixers of architectures apart.

    Args:
        architectures: those that are shown together.
    """
    mixers = sorted({layer.mixer for a in architectures for layer in a.layers} - {"none"})
    return {
        mixer: next(
            mixer[:n]
            for n in range(1, len(mixer) + 1)
            if n == len(mixer) or not any(other.startswith(mixer[:n]) for other in mixers if other != mixer)
        )
        for mixer in mixers
    }


def short_description(architecture: "Architecture", letters: Mapping[str, str]) -> str:
    """An architecture in one line, such as ``160 | 3*a2.256 - g2:1.128 .64``.

    Args:
        architecture: any.
        letters: of its mixers.
    """
    layers = [_short_layer(layer, letters) for layer in architecture.layers]
    return f"{architecture.width} | {counted_runs(layers)}"


def counted_runs(layers: Sequence[str]) -> str:
    """The texts of layers, where equal neighbours stand once with their number, such as ``3*a2.256 -``.

    Args:
        layers: a text for each, without spaces.
    """
    runs = [(text, len(list(same))) for text, same in groupby(layers)]
    return " ".join(text if count == 1 else f"{count}*{text}" for text, count in runs)


def _short_layer(layer: "Layer", letters: Mapping[str, str]) -> str:
    if not layer.present:
        return "-"
    heads = f"{layer.heads}" if layer.heads else ""
    heads += f":{layer.kv_heads}" if layer.kv_heads != layer.heads else ""
    window = f"@{layer.window}" if layer.window else ""
    return f"{letters.get(layer.mixer, '')}{heads}{window}" + (f".{layer.ffn}" if layer.ffn else "")


def error_table(workloads: "Mapping[str, PredictorErrors]") -> "Table":
    """Errors of a predictor on whole models that it was not fitted to.

    Args:
        workloads: the predictor's errors by workload.
    """
    rows = []
    for workload, errors in workloads.items():
        if errors.test is None:
            continue
        held_out, repeated = errors.test.held_out, errors.test.repeatability_mape_percent
        rows.append(
            [
                workload,
                f"{held_out.mape_percent:.2f}%",
                f"{100 * held_out.within_10_percent:.0f}%",
                "-" if held_out.spearman is None else f"{held_out.spearman:.4f}",
                "-" if repeated is None else f"{repeated:.2f}%",
                f"{errors.test.flops_and_params.mape_percent:.2f}%",
            ]
        )
    columns = ["workload", "MAPE", "within 10%", "Spearman", "repeatability", "FLOPs+params MAPE"]
    return make_table("Held-out whole models", columns, rows)
