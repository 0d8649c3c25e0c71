"""Verification: parity, latencies, losses and limits of an exported sub-model, measured on its device.

Parity is checked first (:mod:`search.submodel.parity`). Then the device is measured: latencies beside their
predictions and limits, and size and loss of every exported precision. Latencies are in the card's units: the
ratio to the reference work times the reference work's time on the card, so that a machine that became slower
since the card was made does not make the model look slower.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from latency import Card
from latency.card import differences, outdated
from latency.device_runner.timer import Run, TimerConfig, measure, pinned
from latency.device_runner.timing import Timing
from latency.runtimes.protocol import ExportedModel
from latency.runtimes.reference import card_scale, reference_items, require_stable
from latency.runtimes.registry import open_card_runtime, precisions
from search.engine.choice import BoundedLimit, Choice
from search.engine.config import VerifyConfig
from search.engine.verification import (
    VERIFICATION,
    LatencyComparison,
    LatencyMeasurement,
    LimitResult,
    Parity,
    PrecisionResult,
    Verification,
)
from search.submodel.decoder import Decoder
from search.submodel.export import exported, models_digest
from search.submodel.parity import parity
from space import InputError, Workload
from space.io.machine import check_threads
from space.precision import PRECISIONS, model_file
from supernet.data.corpus import load_corpus
from supernet.data.mqar import IGNORED
from supernet.evaluate import EvaluationSet, evaluation_set
from supernet.extract import SUBMODEL, SubModel


def require_card_is_here(card: Card) -> None:
    """Refuse the card of another machine.

    Args:
        card: the card to measure for.

    Raises:
        InputError: names the differences to this machine.
    """
    here = open_card_runtime(card).fingerprint()
    other = [] if outdated(card, here) else differences(card.fingerprint, here)
    if other or not card.references:
        why = "; ".join(other) or "it has no units"
        raise InputError(f"device {card.name}: this machine is not the one of the card ({why})")


def measure_submodel(
    submodel: SubModel, card: Card, workloads: Sequence[Workload], config: VerifyConfig
) -> dict[str, LatencyMeasurement]:
    """Measured latencies by workload, in the card's units.

    The model is timed as the card's runtime deploys it.

    Args:
        submodel: with its exported graphs.
        card: the device's.
        workloads: may differ in their number of threads.
        config: copies, rounds and block length of the timing.

    Raises:
        InputError: this machine is not the card's, or timings of the same work differ too much.
    """
    require_card_is_here(card)
    measurements: dict[str, LatencyMeasurement] = {}
    for threads in sorted({w.threads for w in workloads}):
        check_threads("workload of", threads)
        runtime = open_card_runtime(card, threads)
        group = [w for w in workloads if w.threads == threads]
        with pinned(threads):
            items: dict[str, Run] = {}
            for copy in range(config.copies):
                for w, run in runtime.deploy(exported_model(submodel), group).items():
                    items[f"{copy}|{w}"] = run
            timer = TimerConfig(
                block_ms=config.block_ms, min_rounds=config.rounds, max_rounds=config.rounds, anchor_every=2
            )
            measured = measure({**items, **reference_items(runtime)}, runtime.anchors(), timer)
        if config.max_noise is not None:
            require_stable(measured.timings, config.max_noise)
        measurements |= latencies(card, measured.timings, group, config.copies)
    return measurements


def exported_model(submodel: SubModel) -> ExportedModel:
    """A sub-model in the forms that a runtime may deploy.

    Args:
        submodel: with its exported graphs.
    """
    return ExportedModel(
        architecture=submodel.architecture,
        model_config=submodel.model_config,
        files={precision: model_file(submodel.folder, precision) for precision in PRECISIONS},
        load_weights=lambda: {name: w.numpy() for name, w in submodel.model().state_dict().items()},
    )


def latencies(
    card: Card, timings: Mapping[str, Timing], workloads: Sequence[Workload], copies: int
) -> dict[str, LatencyMeasurement]:
    """Latencies by workload in the card's units, from the timings of several sessions of a model.

    Args:
        card: the device's.
        timings: of the reference work, and of the sessions by ``COPY|WORKLOAD``.
        workloads: all with the same number of threads.
        copies: sessions of each workload.
    """
    scales = card_scale(card, workloads[0].threads, timings)
    measurements = {}
    for w in workloads:
        scale = scales[w.phase]
        of_workload = [timings[f"{copy}|{w}"] for copy in range(copies)]
        middle = sorted(of_workload, key=lambda t: t.seconds)[len(of_workload) // 2]
        low, high = middle.interval
        measurements[str(w)] = LatencyMeasurement(
            latency_ms=1e3 * scale * middle.seconds,
            interval_ms=(1e3 * scale * low, 1e3 * scale * high),
            copies_ms=tuple(1e3 * scale * t.seconds for t in of_workload),
            clock_ms=1e3 * middle.clock_median,
            problems=tuple(middle.problems()),
        )
    return measurements


def measure_rss(submodel: SubModel, card: Card) -> dict[str, int]:
    """Peak resident bytes of the deployed model, by workload that a limit on rss names.

    Args:
        submodel: with its exported graphs and the limits that it was chosen under.
        card: the device's; nothing is measured if its runtime cannot measure memory.
    """
    limits = [item.parsed for item in choice_of(submodel).limits]
    workloads = [limit.workload for limit in limits if limit.metric.measurement == "rss" and limit.workload]
    runtime = open_card_runtime(card)
    if not workloads or not runtime.supports_rss:
        return {}
    found = runtime.deployed_rss(exported_model(submodel), workloads)
    return {str(w): peak_bytes for w, peak_bytes in found.items()}


def judge(
    submodel: SubModel, device: str, measured: Mapping[str, LatencyMeasurement], rss: Mapping[str, int]
) -> tuple[LimitResult, ...]:
    """The limits that a sub-model was chosen under, beside the measured values.

    A limit that names no device is on the first of those that the sub-model was chosen for. A limit on
    another device stays unmeasured, as does one on memory where the runtime cannot measure it.

    Args:
        submodel: with its limits.
        device: that was measured on.
        measured: latencies by workload.
        rss: peak resident bytes by workload.
    """
    choice = choice_of(submodel)

    def value(item: BoundedLimit) -> float | None:
        limit = item.parsed
        metric, workload = limit.metric, str(limit.workload)
        if metric.needs_device and choice.device_of(limit, device) != device:
            return None
        if metric.measurement == "rss":
            return rss.get(workload)
        if metric.measurement == "latency":
            return measured[workload].latency_ms / 1e3 if workload in measured else None
        if metric.count is None:
            return None
        return metric.count(submodel.architecture, submodel.model_config, limit.workload)

    return tuple(LimitResult(bounded=item, found=value(item)) for item in choice.limits)


def verify(
    submodel: SubModel,
    card: Card,
    config: VerifyConfig | None = None,
    inputs: Mapping[str, str] | None = None,
    data: EvaluationSet | None = None,
) -> Verification:
    """Verify an exported sub-model on its device and write ``verify.json``.

    Args:
        submodel: with its exported graphs.
        card: the device's.
        config: lengths and rounds of the checks; None takes the defaults.
        inputs: sha256 of what is verified, by name; None takes that of the graphs.
        data: for the losses of its graphs; None leaves them unmeasured.

    Raises:
        InputError: there is no exported model, or this is not the card's machine.
    """
    config = config or VerifyConfig()
    inputs = {"model": models_digest(submodel)} if inputs is None else inputs
    workloads = [Workload.parse(text) for text in choice_of(submodel).workloads(card.name)]
    there = exported(submodel, workloads)
    deployable = [p for p in there if p in precisions(card.fingerprint.runtime)]
    timed = [replace(w, precision=p) for p in deployable for w in workloads]
    require_card_is_here(card)
    runtime = open_card_runtime(card)
    with warnings.catch_warnings():  # a file that is not whole is found here, before minutes of measuring
        warnings.simplefilter("error")
        checked = parity(submodel, config.tokens, device=runtime.torch_device)
    losses = {p: graph_loss(model_file(submodel.folder, p), data) for p in there} if data else {}
    measured = measure_submodel(submodel, card, list(dict.fromkeys([*workloads, *timed])), config)
    here = runtime.fingerprint()
    label = f"{here.runtime} {here.runtime_version}"
    rss = measure_rss(submodel, card)
    return conclude(submodel, card, label, measured, checked, rss, losses, inputs)


def graph_loss(path: Path, data: EvaluationSet) -> float:
    """Mean loss of an exported graph over an evaluation's targets, in nats per token.

    Args:
        path: the ONNX file.
        data: sequences and targets.
    """
    decoder, total = Decoder(path), 0.0
    for tokens, targets in zip(data.tokens, data.targets, strict=True):
        counted = targets != IGNORED
        logits_TV = decoder(tokens[None], decoder.start(capacity=len(tokens)))[0][0].astype(np.float64)[
            counted
        ]
        largest = logits_TV.max(axis=-1)
        normaliser = largest + np.log(np.exp(logits_TV - largest[:, None]).sum(axis=-1))
        total += float((normaliser - logits_TV[np.arange(len(logits_TV)), targets[counted]]).sum())
    return total / data.count


def choice_of(submodel: SubModel) -> Choice:
    """The limits and predictions that a sub-model was chosen under.

    Args:
        submodel: the sub-model.

    Raises:
        InputError: the choice in its folder is not whole.
    """
    with SUBMODEL.checked(submodel.folder / "architecture.json"):
        return Choice.from_json(submodel.chosen)


def evaluation_data(submodel: SubModel) -> EvaluationSet | None:
    """The held-out text that a sub-model is evaluated on; None if its folder names no text.

    Args:
        submodel: the sub-model.

    Raises:
        InputError: the text is named but missing.
    """
    if submodel.text is None:
        return None
    # The tokenizer beside the weights: the file at the original path may have changed since.
    data = submodel.text.data.model_copy(update={"tokenizer": submodel.tokenizer()})
    return evaluation_set(load_corpus(data), submodel.text.windows, submodel.text.length)


def conclude(
    submodel: SubModel,
    card: Card,
    runtime: str,
    measured: Mapping[str, LatencyMeasurement],
    checked: Parity,
    rss: Mapping[str, int],
    losses: Mapping[str, float],
    inputs: Mapping[str, str],
) -> Verification:
    """Compare measurements with predictions and limits, and write ``verify.json``.

    Args:
        submodel: with its exported graphs.
        card: the device's.
        runtime: name and version of the runtime that ran the model.
        measured: latencies by workload.
        checked: errors of its forms.
        rss: peak resident bytes by workload.
        losses: held-out losses by precision.
        inputs: sha256 of what was verified, by name.
    """
    predicted = choice_of(submodel).workloads(card.name)
    verification = Verification(
        key=submodel.architecture.key,
        device=card.name,
        runtime=runtime,
        parity=checked,
        latency={
            text: LatencyComparison(predicted=predicted[text], measured=measurement)
            for text, measurement in measured.items()
            if text in predicted
        },
        precisions={
            p: PrecisionResult(
                bytes=model_file(submodel.folder, p).stat().st_size,
                loss_nats=losses.get(p),
                latency_ms={
                    text: measurement.latency_ms
                    for text, measurement in measured.items()
                    if Workload.parse(text).precision == p
                },
            )
            for p in exported(submodel, [])
        },
        rss_bytes=dict(rss),
        limits=judge(submodel, card.name, measured, rss),
        inputs=dict(inputs),
    )
    VERIFICATION.write(submodel.folder / "verify.json", inputs, verification.to_json())
    return verification
