"""Export and verification: the sub-model as one ONNX graph, and proof that it keeps its promise.

Verification checks that the exported graph computes what the plain model computes, for
prefill and token by token with state, then measures it on the device and compares with what
was predicted and asked. Latencies are in the card's units: the ratio to the reference work times what
that took for the card, so that a machine that has slowed down since is not taken for a slower model.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import load_model, save_model

from latency import Card, OnnxRuntime
from latency.binding import Run
from latency.card import differences, outdated
from latency.profile import open_card_runtime
from latency.reference import reference_items, require_quiet
from latency.rss import session_rss
from latency.runtime import Runtime, graph_binding, lacks
from latency.timer import TimerConfig, measure, pinned
from latency.timing import Timing
from search.limits import Limit
from search.run_config import VerifyConfig
from space import InputError, Workload
from space.blocks import Model, State
from space.cost import memory_bytes, params
from space.files import atomic_path, canonical_json, read_json, write_json
from space.graphs import model_graph
from space.shapes import state_shapes
from supernet.extract import SubModel

KIND = "verification"
PARITY = 1e-5  # max|a-b| / max|b|
States = dict[str, NDArray[Any]]


def export_onnx(submodel: SubModel) -> Path:
    """Write ``model.onnx`` beside the weights; returns its path."""
    weights = {name: p.numpy() for name, p in submodel.model().named_parameters()}
    metadata = {
        "formfit.key": submodel.architecture.key,
        "formfit.architecture": canonical_json(submodel.architecture.to_json()),
        "formfit.frame": canonical_json(vars(submodel.frame)),
        "formfit.chosen": canonical_json(dict(submodel.chosen)),
    }
    model = model_graph(submodel.architecture, submodel.frame, weights, metadata)
    path = submodel.folder / "model.onnx"
    with atomic_path(path) as temporary:
        save_model(model, str(temporary))
    return path


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """``max|a-b| / max|b|``; infinite where something is not finite."""
    if not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - expected).max() / np.abs(expected).max())


class OnnxModel:
    """An exported model, run call by call with its state."""

    def __init__(self, path: Path, submodel: SubModel) -> None:
        self.submodel = submodel
        runtime, architecture = OnnxRuntime(), submodel.architecture
        try:
            self.session = runtime.session(path)
        except Exception as error:  # onnxruntime's own classes have no common base but this one
            lacking = runtime.lacking(architecture.layers, architecture.width, submodel.frame)
            if lacking:
                raise InputError(f"{path}: {lacks(lacking, error)}") from None
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{path}: onnxruntime cannot load it ({reason}); `formfit extract` writes it"
            ) from None
        self.names = [output.name for output in self.session.get_outputs()]

    def empty(self, batch: int = 1) -> States:
        """The state at the start of a sequence."""
        architecture, frame = self.submodel.architecture, self.submodel.frame
        return {
            f"state.{slot}.{name}": np.zeros(shape, np.float32)
            for slot, layer in enumerate(architecture.layers)
            for name, shape in state_shapes(layer, architecture.width, frame, batch, 0).items()
        }

    def __call__(self, tokens: NDArray[Any], position: int, states: States) -> tuple[NDArray[Any], States]:
        """Tokens [B, T] -> (logits [B, T, vocabulary], states)."""
        feeds = {"tokens": tokens, "position": np.array([position]), **states}
        known = {item.name for item in self.session.get_inputs()}
        found = self.session.run(self.names, {k: v for k, v in feeds.items() if k in known})
        values = dict(zip(self.names, found, strict=True))
        logits = values.pop("logits")
        return logits, {name.removesuffix(".next"): value for name, value in values.items()}


@torch.inference_mode()
def parity(submodel: SubModel, path: Path, tokens: int, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Errors of the plain fp32 model and of the exported graph against the plain model in fp64.

    Where ``device`` is not the CPU, also of the plain model there.

    Prefill, token by token, and a prefill split in two are compared, logits and final states.
    The bound is 1e-5, or three times the plain fp32 model's own error where that is more.
    """
    plain, onnx_model = submodel.model(), OnnxModel(path, submodel)
    precise = Model(submodel.architecture, submodel.frame).double()
    precise.load_state_dict({name: p.double() for name, p in plain.state_dict().items()})
    rng = np.random.default_rng(seed)
    text = rng.integers(0, submodel.frame.vocabulary, (1, min(tokens, submodel.frame.context)))
    length = text.shape[1]
    expected, expected_states = precise(torch.from_numpy(text))

    def torch_run(cuts: list[int], where: str = "cpu") -> tuple[NDArray[Any], States]:
        model, logits, states = plain.to(where), [], None
        for start, end in pairwise(cuts):
            out, states = model(torch.from_numpy(text[:, start:end]).to(where), start, states)
            logits.append(out.cpu().numpy())
        return np.concatenate(logits, axis=1), flat(states or {})

    def onnx_run(cuts: list[int]) -> tuple[NDArray[Any], States]:
        logits, states = [], onnx_model.empty()
        for start, end in pairwise(cuts):
            out, states = onnx_model(text[:, start:end], start, states)
            logits.append(out)
        return np.concatenate(logits, axis=1), states

    reference = {"logits": expected.numpy(), **flat(expected_states)}
    errors = {}
    ways = {"prefill": [0, length], "split": [0, length // 3, length], "decode": list(range(length + 1))}
    runs = {"torch": torch_run, "onnx": onnx_run}
    if device != "cpu":
        runs[device] = partial(torch_run, where=device)
    for name, run in runs.items():
        for way, cuts in ways.items():
            logits, states = run(cuts)
            errors[f"{name}_{way}"] = max(
                relative_error(value, reference[key]) for key, value in {"logits": logits, **states}.items()
            )
    own = max(error for name, error in errors.items() if name.startswith("torch"))
    bound = max(PARITY, 3 * own)
    return {"errors": errors, "bound": bound, "tokens": length, "kept": max(errors.values()) <= bound}


def flat(states: Mapping[int, State]) -> States:
    """States by the names that the exported graph gives them."""
    return {
        f"state.{slot}.{name}": t.cpu().numpy() for slot, state in states.items() for name, t in state.items()
    }


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
    submodel: SubModel, path: Path, card: Card, workloads: list[Workload], config: VerifyConfig
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
                for w, run in sessions(runtime, submodel, path, some).items():
                    items[f"{copy}|{w}"] = run
            timer = TimerConfig(
                block_ms=config.block_ms, min_rounds=config.rounds, max_rounds=config.rounds, anchor_every=2
            )
            measured = measure({**items, **reference_items(runtime)}, runtime.anchors(), timer)
        if config.most_noise is not None:
            require_quiet(measured.timings, config.most_noise)
        found |= latencies(card, measured.timings, some, config.copies)
    return found


def sessions(
    runtime: Runtime, submodel: SubModel, path: Path, workloads: Sequence[Workload]
) -> dict[Workload, Run]:
    """Runners of the sub-model as the runtime deploys it, one for each workload."""
    architecture, frame = submodel.architecture, submodel.frame
    if isinstance(runtime, OnnxRuntime):
        return {w: runtime.load(path, architecture, w, frame) for w in workloads}
    from latency.torch_runtime import TorchRuntime

    if not isinstance(runtime, TorchRuntime):
        raise TypeError(f"runtime {runtime.name}: no way to deploy a sub-model on it")
    return runtime.load(submodel.model().state_dict(), architecture, workloads, frame)


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


def measure_rss(submodel: SubModel, path: Path) -> dict[str, int]:
    """Peak bytes of a session of the exported model in each workload that a limit on rss names."""
    limits = [Limit.parse(item["limit"]) for item in submodel.chosen.get("limits", [])]
    workloads = [limit.workload for limit in limits if limit.metric == "rss" and limit.workload]
    if not workloads:
        return {}
    graph, architecture = load_model(path), submodel.architecture
    return {
        str(w): session_rss(
            path, graph_binding(graph, w, submodel.frame, architecture.width, architecture.layers), w.threads
        )
        for w in workloads
    }


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
            value: float | None = params(submodel.architecture, submodel.frame)
        elif limit.metric == "memory":
            value = memory_bytes(submodel.architecture, limit.workload, submodel.frame)
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


def verify(submodel: SubModel, card: Card, config: VerifyConfig, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Verify an exported sub-model on its device and write ``verify.json``.

    Raises:
        InputError: there is no exported model, or this is not the card's machine.
    """
    path = submodel.folder / "model.onnx"
    if not path.exists():
        raise InputError(f"{path}: not found; `formfit extract --format onnx` writes it")
    predicted = chosen_predictions(submodel, card)
    measured = measure_submodel(submodel, path, card, [Workload.parse(text) for text in predicted], config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        device = "cuda" if "cuda" in str(card.fingerprint["runtime"]) else "cpu"
        checked = parity(submodel, path, config.tokens, device=device)
    here = open_card_runtime(card).fingerprint()
    runtime = f"{here['runtime']} {here['runtime_version']}"
    return conclude(submodel, card, runtime, measured, checked, measure_rss(submodel, path), inputs)


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
    }
    body = {
        "key": submodel.architecture.key,
        "device": card.name,
        "runtime": runtime,
        "parity": dict(checked),
        "latency": latency,
        "rss_bytes": dict(rss),
        "limits": judge(submodel, card.name, measured, rss),
    }
    write_json(submodel.folder / "verify.json", KIND, inputs, body)
    return read_json(submodel.folder / "verify.json", KIND, "formfit verify")
