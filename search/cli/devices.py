"""The commands that measure devices: profile, verify, devices."""

from collections.abc import Mapping, Sequence
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
    check_submodel,
)
from search.cli.output import Bars, make_table, note, show
from space.io.errors import InputError, LimitMissedError, ParityError
from space.io.names import check_name

if TYPE_CHECKING:
    from rich.table import Table

    from latency import Predictor, ProfileConfig
    from search.engine.verification import Verification
    from supernet.evaluate import EvaluationSet
    from supernet.extract import SubModel


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
    check_name(device, "--device")
    check_kit_options(make_kit, kit_result)
    if (make_kit or kit_result) and runtime != "onnxruntime":
        raise InputError(f"--runtime {runtime}: a kit runs on onnxruntime")
    given = {"threads": threads, "precision": precision, "runtime": runtime, "max_noise": max_noise / 100}
    config = profile_config(given, workload or (), budget)

    from space import load_space

    loaded, folder = load_space(space), context.obj / device
    if make_kit:
        from latency.kit.pack import pack

        show_kit(vars(pack(loaded, folder, config, make_kit)), as_json)
        return
    if kit_result:
        from latency.kit.unpack import unpack

        predictor = unpack(loaded, folder, kit_result, prior)
    else:
        from latency.profiling import load_prior
        from latency.profiling import profile as measure

        known = load_prior(loaded, context.obj, prior, config) if prior else None
        with Bars().stage("profile") as stage:
            predictor = measure(
                loaded, context.obj, device, config, lambda what, share: stage(share, what), known
            )
    show_profile(context.obj, device, predictor, as_json)


def profile_config(given: dict[str, Any], workloads: Sequence[str], budget: str | None) -> "ProfileConfig":
    """The settings of a profile, checked.

    Args:
        given: values by setting.
        workloads: such as ``decode@256``; none takes the defaults.
        budget: such as ``10m``.

    Raises:
        InputError: a value is not allowed.
    """
    from latency import ProfileConfig
    from latency.config import minutes
    from space import Workload
    from space.io.config import parse

    for text in workloads:
        Workload.parse(text)
    settings = {"workloads": tuple(workloads), "budget_minutes": minutes(budget) if budget else None}
    return parse(ProfileConfig, given | settings, "profile")


def show_profile(devices: Path, name: str, predictor: "Predictor", as_json: bool) -> None:
    """Print what a profile gave: the errors of the predictor, and problems of the card.

    Args:
        devices: folder of all cards.
        name: of the card.
        predictor: that was fitted.
        as_json: print a JSON object instead of a table.
    """
    from latency import load_card
    from search.cli.tables import error_table

    card = load_card(devices, name)
    errors = {str(w): model.errors for w, model in predictor.models.items() if model.errors}
    value = {
        "device": name,
        "workloads": {workload: item.to_json() for workload, item in errors.items()},
        "memory": {str(w): vars(m.errors) if m.errors else {} for w, m in predictor.memory.items()},
        "unsupported": card.unsupported,
        "aa_difference_percent": None if card.aa_difference is None else 100 * card.aa_difference,
        "problems": card.problems,
    }
    show(value, as_json, lambda: [error_table(errors)])
    if as_json:
        return
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

    Its exported graphs are compared with the plain model first. The exit code is 3 if a limit is missed. A
    limit that was not measured (of another device, say) stays UNMEASURED and does not change the exit code.
    """
    check_name(device, "--device")
    check_kit_options(make_kit, kit_result)
    check_submodel(folder)

    from latency import load_card

    card = load_card(context.obj, device)

    from latency.card import outdated
    from latency.runtimes.registry import open_card_runtime
    from search.engine.config import VerifyConfig
    from search.engine.verification import describe_unmeasured
    from search.submodel.export import models_digest
    from search.submodel.kit import pack_submodel, unpack_submodel
    from search.submodel.verify import choice_of
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
    unmeasured = describe_unmeasured(found.limits, choice_of(submodel), device)
    if unmeasured:
        note(unmeasured)
    if not found.parity.kept:
        raise ParityError(f"{folder}: the exported model differs from the plain one; see verify.json")
    if found.missed:
        raise LimitMissedError(f"{folder}: missed {', '.join(found.missed)} when measured")


def _verification_tables(found: "Verification") -> "list[Table]":
    """Latencies, limits and precisions of a verified sub-model."""
    from search.cli.tables import latency_table, limit_table, precision_table

    return [latency_table(found.latency), limit_table(found.limits), precision_table(found.precisions)]


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
        typer.Argument(metavar="NAME", help="Name of one device, to show its errors and op latencies."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List device cards with their age and errors.

    Warns of a card that no longer fits its machine.
    """
    from search.cli.cards import card_tables, summarise_card

    root = context.obj
    names = [name] if name else sorted(path.parent.name for path in root.glob("*/device.json"))
    cards = []
    for each in names:
        try:
            cards.append(summarise_card(root, each))
        except InputError as error:
            if name:
                raise
            note(str(error))
    value = {"devices": [card.to_json(details=name is not None) for card in cards]}
    show(value, as_json, lambda: card_tables(root, cards, details=name is not None))
    for card in cards if not as_json else ():
        if card.warning:
            note(card.warning)
        if name and card.differences:
            note(f"not this machine: {'; '.join(card.differences)}")
