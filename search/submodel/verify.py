"""Verification: proof that an exported sub-model computes what it should and keeps its promise.

Parity first (:mod:`search.submodel.parity`), then the device: measured latencies beside what was predicted
and asked, and size and loss of every precision that is there. Latencies are in the card's units: the ratio
to the reference work times what that took for the card, so that a machine that has slowed down since is not
taken for a slower model.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import load_model

from latency import Card, OnnxRuntime
from latency.card import differences, outdated
from latency.device_runner.io_binding import Run
from latency.device_runner.timer import TimerConfig, measure, pinned
from latency.device_runner.timing import Timing
from latency.runtimes.onnxruntime import graph_binding
from latency.runtimes.protocol import Runtime
from latency.runtimes.reference import reference_items, require_stable
from latency.runtimes.registry import open_card_runtime
from latency.runtimes.rss import session_rss
from search.config import VerifyConfig
from search.problem.limit import Limit
from search.submodel.decoder import Decoder
from search.submodel.export import exported
from search.submodel.parity import parity
from space import InputError, Workload
from space.cost import memory_bytes, params
from space.io.artefact import Artefact
from space.precision import model_file
from supernet.data.corpus import load_corpus
from supernet.data.mqar import IGNORED
from supernet.evaluate import EvaluationSet, evaluation_set
from supernet.extract import SubModel

VERIFICATION = Artefact("verification", "formfit verify", schema=3)


def require_card_is_here(card: Card) -> None:
    """Refuse a card that is not this machine's.

    Raises:
        InputError: says in what they differ.
    """
    here = open_card_runtime(card).fingerprint()
    other = [] if outdated(card, here) else differences(card.fingerprint, here)
    if other or not card.references:
        why = "; ".join(other) or "it has no units"
        raise InputError(f"device {card.name}: this machine is not the one of the card ({why})")


def measure_submodel(
    submodel: SubModel, card: Card, workloads: Sequence[Workload], config: VerifyConfig
) -> dict[str, Any]:
    """Measured latencies by workload, in the card's units, with intervals and raw clock times.

    The exported graph is timed on onnxruntime, the plain model on torch.

    Raises:
        InputError: this machine is not the card's, or too noisy.
    """
    require_card_is_here(card)
    found: dict[str, Any] = {}
    for threads in sorted({w.threads for w in workloads}):
        runtime = open_card_runtime(card, threads)
        some = [w for w in workloads if w.threads == threads]
        with pinned(threads):
            items: dict[str, Run] = {}
            for copy in range(config.copies):
                for w, run in sessions(runtime, submodel, some).items():
                    items[f"{copy}|{w}"] = run
            timer = TimerConfig(
                block_ms=config.block_ms, min_rounds=config.rounds, max_rounds=config.rounds, anchor_every=2
            )
            measured = measure({**items, **reference_items(runtime)}, runtime.anchors(), timer)
        if config.max_noise is not None:
            require_stable(measured.timings, config.max_noise)
        found |= latencies(card, measured.timings, some, config.copies)
    return found


def sessions(runtime: Runtime, submodel: SubModel, workloads: Sequence[Workload]) -> dict[Workload, Run]:
    """Runners of the sub-model as the runtime deploys it, one for each workload."""
    architecture, model_config = submodel.architecture, submodel.model_config
    if isinstance(runtime, OnnxRuntime):
        files = {w: model_file(submodel.folder, w.precision) for w in workloads}
        return {w: runtime.load(files[w], architecture, w, model_config) for w in workloads}
    from latency.runtimes.torch import TorchRuntime

    if not isinstance(runtime, TorchRuntime):
        raise TypeError(f"runtime {runtime.name}: no way to deploy a sub-model on it")
    return runtime.load(submodel.model().state_dict(), architecture, workloads, model_config)


def latencies(
    card: Card, timings: Mapping[str, Timing], workloads: Sequence[Workload], copies: int
) -> dict[str, Any]:
    """What the timings of some sessions of a model say of each workload, in the card's units."""
    scales = card.scale(workloads[0].threads, timings)
    found: dict[str, Any] = {}
    for w in workloads:
        scale = scales[w.phase]
        some = [timings[f"{copy}|{w}"] for copy in range(copies)]
        middle = sorted(some, key=lambda t: t.seconds)[len(some) // 2]
        found[str(w)] = {
            "latency_ms": 1e3 * scale * middle.seconds,
            "interval_ms": [1e3 * scale * value for value in middle.interval],
            "copies_ms": [1e3 * scale * t.seconds for t in some],
            "clock_ms": 1e3 * middle.clock_median,
            "problems": middle.problems(),
        }
    return found


def measure_rss(submodel: SubModel) -> dict[str, int]:
    """Peak bytes of a session of the exported model in each workload that a limit on rss names."""
    limits = [Limit.parse(item["limit"]) for item in submodel.chosen.get("limits", [])]
    workloads = [limit.workload for limit in limits if limit.metric == "rss" and limit.workload]
    architecture, found = submodel.architecture, {}
    for w in workloads:
        path = model_file(submodel.folder, w.precision)
        ends = submodel.model_config, architecture.width, architecture.layers
        found[str(w)] = session_rss(path, graph_binding(load_model(path), w, *ends), w.threads)
    return found


def judge(
    submodel: SubModel, device: str, measured: Mapping[str, Any], rss: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Each limit that the sub-model was chosen under: what was found on a device, and whether it was kept.

    What another device is limited in stays UNMEASURED.
    """
    first = next(iter(submodel.chosen.get("predicted", {}).get("latency", {})), device)
    rows = []
    for item in submodel.chosen.get("limits", []):
        limit = Limit.parse(item["limit"])
        if limit.workload is None:
            value: float | None = params(submodel.architecture, submodel.model_config)
        elif limit.metric == "memory":
            value = memory_bytes(submodel.architecture, limit.workload, submodel.model_config)
        elif (limit.device or first) != device:
            value = None
        elif limit.metric == "rss":
            value = rss.get(str(limit.workload))
        else:
            timing = measured.get(str(limit.workload))
            value = timing["latency_ms"] / 1e3 if timing else None
        row = {**item, "found": value, "status": "UNMEASURED"}
        if value is not None:
            row["used"] = value / item["bound"]
            row["status"] = "kept" if value <= item["bound"] else "missed"
        rows.append(row)
    return rows


def verify(
    submodel: SubModel,
    card: Card,
    config: VerifyConfig,
    inputs: Mapping[str, str],
    data: EvaluationSet | None = None,
) -> dict[str, Any]:
    """Verify an exported sub-model on its device and write ``verify.json``.

    Args:
        submodel: with its exported graphs.
        card: the device's.
        config: how.
        inputs: the hashes of what is verified.
        data: what the losses of its graphs are taken on; None leaves them UNMEASURED.

    Raises:
        InputError: there is no exported model, or this is not the card's machine.
    """
    workloads = [Workload.parse(text) for text in chosen_predictions(submodel, card)]
    there = exported(submodel, workloads)
    also = [replace(w, precision=p) for p in there for w in workloads] if is_onnx(card) else workloads
    require_card_is_here(card)
    with warnings.catch_warnings():  # what is not whole is found here, before minutes of measuring
        warnings.simplefilter("error")
        device = "cuda" if "cuda" in str(card.fingerprint["runtime"]) else "cpu"
        checked = parity(submodel, model_file(submodel.folder), config.tokens, device=device)
    losses = {p: graph_loss(model_file(submodel.folder, p), data) for p in there} if data else {}
    measured = measure_submodel(submodel, card, list(dict.fromkeys([*workloads, *also])), config)
    here = open_card_runtime(card).fingerprint()
    runtime = f"{here['runtime']} {here['runtime_version']}"
    return conclude(submodel, card, runtime, measured, checked, measure_rss(submodel), losses, inputs)


def is_onnx(card: Card) -> bool:
    """Whether what a card's device runs is the exported graph."""
    return str(card.fingerprint.get("runtime")) == OnnxRuntime.name


def graph_loss(path: Path, data: EvaluationSet) -> float:
    """The mean loss of an exported graph over an evaluation's targets, in nats per token."""
    decoder, total = Decoder(path), 0.0
    for tokens, targets in zip(data.tokens, data.targets, strict=True):
        asked = targets != IGNORED
        logits = decoder(tokens[None], decoder.start(capacity=len(tokens)))[0][0].astype(np.float64)[asked]
        greatest = logits.max(axis=-1)
        normaliser = greatest + np.log(np.exp(logits - greatest[:, None]).sum(axis=-1))
        total += float((normaliser - logits[np.arange(len(logits)), targets[asked]]).sum())
    return total / data.count


def evaluation_data(submodel: SubModel) -> EvaluationSet | None:
    """The held-out text that a sub-model is judged by; None where it is not known.

    Raises:
        InputError: it is known, and not there.
    """
    if submodel.text is None:
        return None
    # The tokenizer is the one beside the weights: what stands where it came from may be another by now.
    data = submodel.text.data.model_copy(update={"tokenizer": submodel.tokenizer()})
    return evaluation_set(load_corpus(data), submodel.text.windows, submodel.text.length)


def chosen_predictions(submodel: SubModel, card: Card) -> dict[str, Any]:
    """What was predicted of a sub-model on a device when it was chosen, by workload."""
    return dict(submodel.chosen.get("predicted", {}).get("latency", {}).get(card.name, {}))


def conclude(
    submodel: SubModel,
    card: Card,
    runtime: str,
    measured: Mapping[str, Any],
    checked: Mapping[str, Any],
    rss: Mapping[str, int],
    losses: Mapping[str, float],
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    """Compare what was measured with what was predicted and asked, and write ``verify.json``."""
    predicted = chosen_predictions(submodel, card)
    latency = {
        text: {
            **{f"predicted_{key}": value for key, value in predicted[text].items()},
            **{f"measured_{key}" if key.endswith("_ms") else key: value for key, value in timing.items()},
            "error_percent": 100 * (predicted[text]["latency_ms"] / timing["latency_ms"] - 1),
        }
        for text, timing in measured.items()
        if text in predicted
    }
    precisions = {
        p: {
            "bytes": model_file(submodel.folder, p).stat().st_size,
            "loss_nats": losses.get(p, "UNMEASURED"),
            "latency_ms": {
                text: timing["latency_ms"]
                for text, timing in measured.items()
                if Workload.parse(text).precision == p
            },
        }
        for p in exported(submodel, [])
    }
    body = {
        "key": submodel.architecture.key,
        "device": card.name,
        "runtime": runtime,
        "parity": dict(checked),
        "latency": latency,
        "precisions": precisions,
        "rss_bytes": dict(rss),
        "limits": judge(submodel, card.name, measured, rss),
    }
    VERIFICATION.write(submodel.folder / "verify.json", inputs, body)
    return VERIFICATION.read(submodel.folder / "verify.json")
