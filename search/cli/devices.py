"""The commands that measure devices: profile, verify, devices."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.cli.options import (
    Device,
    Json,
    Kit,
    KitResult,
    MaxNoise,
    SubModelFolder,
    check_kit_options,
    check_name,
    check_submodel,
)
from search.cli.output import Bars, make_table, note, show
from space.io.errors import InputError, LimitMissedError

if TYPE_CHECKING:
    from rich.table import Table

    from latency import Card
    from latency.device_runner.fingerprint import Fingerprint
    from search.engine.verification import Verification
    from supernet.evaluate import EvaluationSet
    from supernet.extract import SubModel

SECONDS_PER_DAY = 86400


def profile(
    context: typer.Context,
    space: Annotated[Path, typer.Option(metavar="SPACE", help="YAML file of a space.")],
    device: Device,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORKLOAD",
            help="prefill@TOKENS or decode@CONTEXT. Repeatable. [default: both at the space's max_seq_len]",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="Threads that models will run with.")] = 1,
    precision: Annotated[
        str, typer.Option(metavar="NAME", help="Precision of the models: fp32, int8 or int8-dynamic.")
    ] = "fp32",
    runtime: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="onnxruntime, torch, torch-compiled, torch-cuda, torch-cuda-compiled or a registered one.",
        ),
    ] = "onnxruntime",
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time for measuring ops, such as 90s, 10m or 1.5h.")
    ] = None,
    prior: Annotated[
        str | None, typer.Option(metavar="NAME", help="Card of another device to start from.")
    ] = None,
    max_noise: MaxNoise = 10.0,
    make_kit: Kit = None,
    kit_result: KitResult = None,
    as_json: Json = False,
) -> None:
    """Measure a device and fit its latency predictor. Resumes."""
    from space import Workload, load_space

    check_name(device)
    check_kit_options(make_kit, kit_result)
    if (make_kit or kit_result) and runtime != "onnxruntime":
        raise InputError(f"--runtime {runtime}: a kit runs on onnxruntime")
    for text in workload or ():
        Workload.parse(text)
    loaded = load_space(space)

    from latency import ProfileConfig, load_card
    from latency.config import minutes
    from space.io.config import parse

    given = {
        "workloads": tuple(workload or ()),
        "threads": threads,
        "precision": precision,
        "runtime": runtime,
        "budget_minutes": minutes(budget) if budget else None,
        "max_noise": max_noise / 100,
    }
    config = parse(ProfileConfig, given, "profile")

    from latency.kit.pack import pack
    from latency.kit.unpack import unpack
    from latency.profiling import load_prior
    from latency.profiling import profile as measure

    if make_kit:
        show_kit(vars(pack(loaded, context.obj / device, config, make_kit)), as_json)
        return
    if kit_result:
        predictor = unpack(loaded, context.obj / device, kit_result, prior)
    else:
        known = load_prior(loaded, context.obj, prior, config) if prior else None
        with Bars().stage("profile") as stage:
            predictor = measure(
                loaded, context.obj, device, config, lambda what, share: stage(share, what), known
            )
    card = load_card(context.obj, device)
    errors = {str(w): m.errors.to_json() for w, m in predictor.models.items() if m.errors}
    value = {
        "device": device,
        "workloads": errors,
        "memory": {str(w): vars(m.errors) if m.errors else {} for w, m in predictor.memory.items()},
        "unsupported": card.unsupported,
        "aa_difference_percent": None if card.aa_difference is None else 100 * card.aa_difference,
        "problems": card.problems,
    }
    show(value, as_json, lambda: _error_tables([errors]))
    if not as_json:
        for mixer, reason in card.unsupported.items():
            note(f"{mixer} does not run on the device and is excluded from searches: {reason}")
        if card.problems:
            note(f"{len(card.problems)} measurement problems; the last: {card.problems[-1]}")


def show_kit(packed: Mapping[str, Any], as_json: bool) -> None:
    """Print what a new kit holds.

    Args:
        packed: its checksum, size and number of timings.
        as_json: print a JSON object instead of a table.
    """
    show(packed, as_json, lambda: [make_table("Kit", list(packed), [list(map(str, packed.values()))])])


def verify(
    context: typer.Context,
    folder: SubModelFolder,
    device: Device,
    make_kit: Kit = None,
    kit_result: KitResult = None,
    max_noise: MaxNoise = 10.0,
    as_json: Json = False,
) -> None:
    """Measure a sub-model against its predictions and limits.

    Its exported graphs are compared with the plain model first. The exit code is 3 if a limit is missed.
    """
    check_name(device)
    check_kit_options(make_kit, kit_result)
    check_submodel(folder)

    from latency import load_card

    card = load_card(context.obj, device)

    from latency.card import outdated
    from latency.runtimes.registry import open_card_runtime
    from search.engine.config import VerifyConfig
    from search.submodel.export import models_digest
    from search.submodel.kit import pack_submodel, unpack_submodel
    from search.submodel.verify import verify as carry_out
    from supernet.extract import read_submodel

    submodel = read_submodel(folder)
    inputs = {"model": models_digest(submodel)}
    if make_kit:
        show_kit(vars(pack_submodel(submodel, card, VerifyConfig(), make_kit)), as_json)
        return
    if kit_result:
        found = unpack_submodel(submodel, card, kit_result, inputs, _evaluation_data(submodel))
    else:
        warning = outdated(card, open_card_runtime(card).fingerprint())
        if warning:
            note(warning)
        config = VerifyConfig(max_noise=max_noise / 100)
        found = carry_out(submodel, card, config, inputs, _evaluation_data(submodel))
    show(found.document(), as_json, lambda: _verification_tables(found))
    if not as_json:
        note(f"parity: worst error {found.parity.worst:.1e}, bound {found.parity.bound:.1e}")
        if not found.latency:
            note(f"nothing was predicted for {device}: latencies stay UNMEASURED")
    if not found.parity.kept:
        raise LimitMissedError(f"{folder}: the exported model differs from the plain one; see verify.json")
    if found.missed:
        raise LimitMissedError(f"{folder}: missed {', '.join(found.missed)} when measured")


def _verification_tables(found: "Verification") -> "list[Table]":
    """Latencies, limits and precisions of a verified sub-model."""
    from search.cli.tables import latency_table, limit_table, precision_table

    return [latency_table(found.latency), limit_table(found.limits), precision_table(found.precisions)]


def _error_tables(predictors: Iterable[Mapping[str, Any]]) -> "list[Table]":
    """Held-out errors of predictors, a table for each."""
    from search.cli.tables import error_table

    return list(map(error_table, predictors))


def _evaluation_data(submodel: "SubModel") -> "EvaluationSet | None":
    """The text that a sub-model's losses are measured on; None, with a note, if there is none."""
    from search.submodel.verify import evaluation_data

    try:
        data = evaluation_data(submodel)
        reason = "its folder names no text" if data is None else ""
    except InputError as error:
        data, reason = None, str(error)
    if reason:
        note(f"losses stay UNMEASURED: {reason}")
    return data


def devices(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Name of one device, to show its predictors' errors."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List device cards with their age and errors.

    Warns of a card that no longer fits its machine.
    """
    from latency import load_card

    root = context.obj
    names = [name] if name else sorted(path.parent.name for path in root.glob("*/device.json"))
    entries = []
    for each in names:
        try:
            entries.append(_device_entry(load_card(root, each)))
        except InputError as error:
            if name:
                raise
            note(str(error))
    show({"devices": entries}, as_json, lambda: _device_tables(root, entries, details=name is not None))
    for entry in entries if not as_json else ():
        if entry["warning"]:
            note(entry["warning"])
        if name and entry["differences"]:
            note(f"not this machine: {'; '.join(entry['differences'])}")


def _device_entry(card: "Card") -> dict[str, Any]:
    """A card as a JSON object."""
    from latency.card import PREDICTOR, differences, outdated

    predictors = {}
    for path in sorted((card.folder / "predictors").glob("*.json")):
        fitted = PREDICTOR.read(path)
        predictors[path.stem] = {w: model["errors"] for w, model in fitted["workloads"].items()}
    here = _fingerprint(card)
    other = differences(card.fingerprint, here)
    return {
        "name": card.name,
        "measured": card.measured,
        "age_days": _age_days(card.measured),
        "fingerprint": card.fingerprint.to_json(),
        "this_machine": not other,
        "differences": other,
        "warning": outdated(card, here),
        "aa_difference_percent": None if card.aa_difference is None else 100 * card.aa_difference,
        "unsupported": card.unsupported,
        "predictors": predictors,
        "problems": card.problems,
    }


def _device_tables(root: Path, entries: list[dict[str, Any]], details: bool) -> "list[Table]":
    """The table of all cards; with ``details`` the errors of the first one's predictors too."""
    rows = [
        [
            entry["name"],
            f"{entry['age_days']:.0f} days",
            f"{entry['fingerprint']['cpu']}, {entry['fingerprint']['runtime_version']}",
            "yes" if entry["this_machine"] else "no",
            "\n".join(entry["predictors"]) or "-",
            "\n".join(map(_worst_error, entry["predictors"].values())) or "-",
        ]
        for entry in entries
    ]
    columns = ["name", "age", "measured on", "this machine", "predictors", "worst MAPE"]
    tables = [make_table(f"Devices in {root}", columns, rows)]
    return tables + (_error_tables(entries[0]["predictors"].values()) if details else [])


def _fingerprint(card: "Card") -> "Fingerprint":
    """Fingerprint of this machine with the card's runtime, or with onnxruntime if that is not installed."""
    from latency.runtimes.registry import local_fingerprint

    try:
        return local_fingerprint(card.fingerprint.runtime)
    except InputError:
        return local_fingerprint("onnxruntime")


def _age_days(measured: str | None) -> float:
    """Days since a card was measured; 0 if it was not."""
    if measured is None:
        return 0.0
    return (datetime.now(UTC) - datetime.fromisoformat(measured)).total_seconds() / SECONDS_PER_DAY


def _worst_error(errors: Mapping[str, Any]) -> str:
    """The largest held-out MAPE of a predictor's workloads."""
    held_out = [item["held_out"]["mape_percent"] for item in errors.values() if "held_out" in item]
    return f"{max(held_out):.2f}%" if held_out else "-"
