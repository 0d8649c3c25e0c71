"""The commands that measure devices: profile, verify, devices."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from search.cli.options import Device, Json
from search.cli.output import (
    Bars,
    err,
    error_table,
    latency_table,
    limit_table,
    make_table,
    precision_table,
    show,
)
from space.io.errors import InputError, LimitMissedError

Noise = Annotated[
    float, typer.Option(min=0.01, help="How far, in percent, two timings of the same work may differ.")
]
PackTo = typer.Option("--make-kit", metavar="ZIP", help="Write a kit instead: `python3 ZIP` on the device.")


if TYPE_CHECKING:
    from latency import Card
    from supernet.evaluate import EvaluationSet
    from supernet.extract import SubModel


def profile(
    context: typer.Context,
    space: Annotated[Path, typer.Option(metavar="SPACE", help="A space in YAML.")],
    device: Device,
    workload: Annotated[
        list[str] | None,
        typer.Option(help="prefill@TOKENS or decode@CONTEXT [default: both at the space's context]."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads that the device will use.")] = 1,
    precision: Annotated[
        str, typer.Option(help="fp32, int8 or int8-dynamic: of the models to ship.")
    ] = "fp32",
    runtime: Annotated[
        str, typer.Option(help="onnxruntime, torch, torch-compiled, torch-cuda or torch-cuda-compiled.")
    ] = "onnxruntime",
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Such as 10m: ops are measured until then, at most.")
    ] = None,
    prior: Annotated[
        str | None, typer.Option(metavar="NAME", help="A known device's card: less need be measured.")
    ] = None,
    noise: Noise = 10.0,
    pack_to: Annotated[Path | None, PackTo] = None,
    unpack_from: Annotated[
        Path | None,
        typer.Option("--kit-result", metavar="JSON", help="Make the card of what a kit measured."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure some of a space's ops and whole models, here or by a kit elsewhere, and fit the predictor."""
    from latency import ProfileConfig, load_card
    from latency.kit.pack import pack, unpack
    from latency.profile import load_prior, minutes
    from latency.profile import profile as measure
    from space import load_space
    from space.io.config import parse

    given = {
        "workloads": tuple(workload or ()),
        "threads": threads,
        "precision": precision,
        "runtime": runtime,
        "budget_minutes": minutes(budget) if budget else None,
        "max_noise": noise / 100,
    }
    config = parse(ProfileConfig, given, "profile")
    the_space = load_space(space)
    if pack_to and unpack_from:
        raise InputError("give one of --make-kit ZIP and --kit-result JSON")
    if (pack_to or unpack_from) and runtime != "onnxruntime":
        raise InputError(f"--runtime {runtime}: a kit runs on onnxruntime")
    if pack_to:
        packed = pack(the_space, context.obj / device, config, pack_to)
        show(packed, as_json, lambda: [make_table("Kit", list(packed), [[str(v) for v in packed.values()]])])
        return
    if unpack_from:
        predictor = unpack(the_space, context.obj / device, unpack_from, prior)
    else:
        known = load_prior(the_space, context.obj, prior, config) if prior else None
        with Bars().stage("profile") as stage:
            predictor = measure(
                the_space, context.obj, device, config, lambda what, share: stage(share, what), known
            )
    card = load_card(context.obj, device)
    value = {
        "device": device,
        "workloads": {str(w): dict(m.errors) for w, m in predictor.models.items()},
        "memory": {str(w): dict(m.errors) for w, m in predictor.memory.items()},
        "unsupported": card.unsupported,
        "aa_difference_percent": None if card.aa_difference is None else 100 * card.aa_difference,
        "problems": card.problems,
    }
    show(value, as_json, lambda: [error_table(value["workloads"])])
    if not as_json:
        for mixer, reason in card.unsupported.items():
            text = f"{mixer} does not run there and stays out of searches: {reason}"
            err.print(text, highlight=False, markup=False)
        if card.problems:
            text = f"{len(card.problems)} problems were seen, such as: {card.problems[-1]}"
            err.print(text, highlight=False, markup=False)


def verify(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A sub-model's folder, with its model.onnx.")],
    device: Device,
    pack_to: Annotated[Path | None, PackTo] = None,
    unpack_from: Annotated[
        Path | None, typer.Option("--kit-result", metavar="JSON", help="Judge by what a kit measured.")
    ] = None,
    noise: Noise = 10.0,
    as_json: Json = False,
) -> None:
    """Check parity, measure on this device, compare with prediction and limits. Exit 3 if one is missed."""
    from latency import load_card
    from latency.card import outdated
    from latency.runtimes.registry import open_card_runtime
    from search.config import VerifyConfig
    from search.submodel.export import models_digest
    from search.submodel.kit import pack_submodel, unpack_submodel
    from search.submodel.verify import verify as check
    from supernet.extract import read_submodel

    submodel = read_submodel(folder)
    card = load_card(context.obj, device)
    inputs = {"model": models_digest(submodel)}
    if pack_to and unpack_from:
        raise InputError("give one of --make-kit ZIP and --kit-result JSON")
    if pack_to:
        packed = pack_submodel(submodel, card, VerifyConfig(), pack_to)
        show(packed, as_json, lambda: [make_table("Kit", list(packed), [[str(v) for v in packed.values()]])])
        return
    if unpack_from:
        value = unpack_submodel(submodel, card, unpack_from, inputs, _judged_by(submodel))
    else:
        warning = outdated(card, open_card_runtime(card).fingerprint())
        if warning:
            err.print(warning, highlight=False, soft_wrap=True)
        value = check(submodel, card, VerifyConfig(max_noise=noise / 100), inputs, _judged_by(submodel))
    show(
        value,
        as_json,
        lambda: [
            latency_table(value["latency"]),
            limit_table(value["limits"]),
            precision_table(value["precisions"]),
        ],
    )
    if not as_json:
        worst = max(value["parity"]["errors"].values())
        err.print(f"parity: worst error {worst:.1e}, bound {value['parity']['bound']:.1e}", highlight=False)
        if not value["latency"]:
            err.print(f"nothing was predicted for {device}: latencies stay UNMEASURED", highlight=False)
    missed = [item["limit"] for item in value["limits"] if item["status"] == "missed"]
    if not value["parity"]["kept"]:
        raise LimitMissedError(f"{folder}: the exported model differs from the plain one; see verify.json")
    if missed:
        raise LimitMissedError(f"{folder}: missed {', '.join(missed)} when measured")


def _judged_by(submodel: "SubModel") -> "EvaluationSet | None":
    """The text that a sub-model is judged by; says where there is none."""
    from search.submodel.verify import evaluation_data

    try:
        data = evaluation_data(submodel)
        why = "its folder names no text" if data is None else ""
    except InputError as error:
        data, why = None, str(error)
    if why:
        err.print(f"losses stay UNMEASURED: {why}", highlight=False, soft_wrap=True, markup=False)
    return data


def devices(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One device, with its errors.")] = None,
    as_json: Json = False,
) -> None:
    """List the device cards: what they are of, how old, how good; warns of those that no longer fit."""
    from latency import load_card
    from latency.card import differences, outdated
    from latency.predictor.predictor import PREDICTOR

    root = context.obj
    names = [name] if name else sorted(p.parent.name for p in root.glob("*/device.json"))
    value: dict[str, Any] = {"devices": []}
    for each in names:
        try:
            card = load_card(root, each)
        except InputError as error:
            if name:
                raise
            err.print(str(error), highlight=False, soft_wrap=True, markup=False)
            continue
        predictors = {}
        for path in sorted((card.folder / "predictors").glob("*.json")):
            fitted = PREDICTOR.read(path)
            predictors[path.stem] = {w: model["errors"] for w, model in fitted["workloads"].items()}
        here = _fingerprint(card)
        other = differences(card.fingerprint, here)
        entry = {
            "name": card.name,
            "measured": card.measured,
            "age_days": _age(card.measured),
            "fingerprint": card.fingerprint,
            "this_machine": not other,
            "differences": other,
            "warning": outdated(card, here),
            "aa_difference_percent": None if card.aa_difference is None else 100 * card.aa_difference,
            "unsupported": card.unsupported,
            "predictors": predictors,
            "problems": card.problems,
        }
        value["devices"].append(entry)

    def tables() -> list[Table]:
        rows = [
            [
                d["name"],
                f"{d['age_days']:.0f} days",
                escape(f"{d['fingerprint']['cpu']}, {d['fingerprint']['runtime_version']}"),
                "yes" if d["this_machine"] else "no",
                "\n".join(d["predictors"]) or "-",
                "\n".join(map(_worst, d["predictors"].values())) or "-",
            ]
            for d in value["devices"]
        ]
        columns = ["name", "age", "measured on", "this machine", "predictors", "worst MAPE"]
        found = [make_table(f"Devices in {root}", columns, rows)]
        if name:
            found += [error_table(errors) for errors in value["devices"][0]["predictors"].values()]
        return found

    show(value, as_json, tables)
    for entry in value["devices"]:
        if entry["warning"] and not as_json:
            err.print(entry["warning"], highlight=False, soft_wrap=True, markup=False)
        if name and entry["differences"] and not as_json:
            text = f"not this machine: {'; '.join(entry['differences'])}"
            err.print(text, highlight=False, soft_wrap=True, markup=False)


def _fingerprint(card: "Card") -> dict[str, Any]:
    """This machine's under the runtime that a card is of; under onnxruntime where it does not have that."""
    from latency import OnnxRuntime
    from latency.runtimes.registry import open_card_runtime

    try:
        return open_card_runtime(card).fingerprint()
    except InputError:
        return OnnxRuntime().fingerprint()


def _age(measured: str | None) -> float:
    """Days since a card was measured."""
    if measured is None:
        return 0.0
    return (datetime.now(UTC) - datetime.fromisoformat(measured)).total_seconds() / 86400


def _worst(errors: dict[str, Any]) -> str:
    held = [e["held_out"]["mape_percent"] for e in errors.values() if "held_out" in e]
    return f"{max(held):.2f}%" if held else "-"
