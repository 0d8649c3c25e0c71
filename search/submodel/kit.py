"""Verifying a sub-model on a device that has only Python, numpy and onnxruntime: by a kit, there and back.

The kit holds the exported model as it is, and what the plain model in fp64 says of fixed tokens; the device
times it and compares. What comes back is judged as if it had been measured here.
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import load_model

from latency import Card
from latency.card import differences
from latency.kit.pack import Writer, reference_stacks, write_plan
from latency.kit.result import read_result, read_timings
from latency.runtimes.onnxruntime import graph_binding
from latency.runtimes.reference import reference_work
from search.config import VerifyConfig
from search.submodel.export import exported, models_digest
from search.submodel.parity import PARITY, flat, parity
from search.submodel.verify import chosen_predictions, conclude, graph_loss, latencies
from space import InputError, Workload
from space.blocks import Model
from space.cost import flops
from space.io.artefact import Artefact, atomic_path, check_inputs
from space.onnx.graph import VERSION
from space.precision import model_file
from space.shapes import state_shapes
from supernet.evaluate import EvaluationSet
from supernet.extract import SubModel

VERIFICATION_KIT = Artefact("verification kit", "formfit verify --make-kit", schema=2)
CASES = ("prefill", "split", "decode")


def pack_submodel(submodel: SubModel, card: Card, config: VerifyConfig, path: Path) -> dict[str, Any]:
    """Write a kit that verifies a sub-model on a device; its design goes beside the model.

    Raises:
        InputError: there is no exported model, or nothing was predicted for the device.
    """
    workloads = [Workload.parse(text) for text in chosen_predictions(submodel, card)]
    exported(submodel, workloads)
    conditions = {(w.threads, w.precision) for w in workloads}
    if len(conditions) != 1:
        raise InputError(
            f"{submodel.folder}: a kit needs predictions for {card.name} on one number of threads in one "
            f"precision, there are {len(conditions)}"
        )
    threads, precision = conditions.pop()
    plain, model = model_file(submodel.folder), model_file(submodel.folder, precision)
    graph, architecture = load_model(model), submodel.architecture
    ends = submodel.model_config, architecture.width, architecture.layers
    bindings = {str(w): graph_binding(graph, w, *ends).to_json() for w in workloads}
    timer = {
        "block_ms": config.block_ms,
        "min_rounds": config.rounds,
        "max_rounds": config.rounds,
        "anchor_every": 2,
    }
    item = {
        "graph": model.name,
        "weights": [],
        "bindings": bindings,
        "mixers": [],
        "fallback": False,
        "op": False,
    }
    items: list[dict[str, Any]] = [{**item, "name": str(copy)} for copy in range(config.copies)]
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as kit:
        for graph_file in dict.fromkeys((plain, model)):
            kit.write(graph_file, graph_file.name)
        cases = []
        for name, arrays in _cases(submodel, config.tokens).items():
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            kit.writestr(f"{name}.npz", buffer.getvalue())
            cases.append({"name": name, "graph": plain.name, "arrays": f"{name}.npz"})
        writer = Writer(kit)
        groups = [{"timer": timer, "items": [*items, *reference_stacks(writer)]}]
        plan = {"threads": threads, "groups": groups, "parity": cases}
        packed = models_digest(submodel, ("fp32", precision))
        identity = write_plan(writer, {"model": packed, **plan}, precision)
    design = {
        "kit": identity,
        "model": packed,
        "precision": precision,
        "device": card.name,
        "settings": config.model_dump(mode="json"),
        "workloads": list(bindings),
    }
    VERIFICATION_KIT.write(submodel.folder / "kit.json", {"graphs": str(VERSION)}, design)
    return {"kit": identity, "bytes": path.stat().st_size, "timings": len(items) * len(bindings)}


@torch.inference_mode()
def _cases(submodel: SubModel, tokens: int) -> dict[str, dict[str, Any]]:
    """Inputs of the exported graph, and the outputs that the plain model has in fp64, by what is checked."""
    precise = Model(submodel.architecture, submodel.model_config).double()
    weights = submodel.model().state_dict()
    precise.load_state_dict({name: value.double() for name, value in weights.items()})
    rng = np.random.default_rng(0)
    text = rng.integers(
        0, submodel.model_config.vocab_size, (1, min(tokens, submodel.model_config.max_seq_len))
    )
    length = text.shape[1]
    empty = {
        f"state.{slot}.{name}": np.zeros(shape, np.float32)
        for slot, layer in enumerate(submodel.architecture.layers)
        for name, shape in state_shapes(
            layer, submodel.architecture.width, submodel.model_config, 1, 0
        ).items()
    }
    found = {}
    cuts = (0, length), (length // 3, length), (length - 1, length)
    for name, (start, end) in zip(CASES, cuts, strict=True):
        states = None
        before: Mapping[str, Any] = empty
        if start:
            _, states = precise(torch.from_numpy(text[:, :start]), 0, None)
            before = {key: value.astype(np.float32) for key, value in flat(states).items()}
        logits, after = precise(torch.from_numpy(text[:, start:end]), start, states)
        inputs = {"tokens": text[:, start:end], "position": np.array([start]), **before}
        outputs = {"logits": logits.numpy(), **{f"{key}.next": v for key, v in flat(after).items()}}
        found[name] = {f"in.{k}": v for k, v in inputs.items()}
        found[name] |= {f"out.{k}": v.astype(np.float32) for k, v in outputs.items()}
    return found


def unpack_submodel(
    submodel: SubModel,
    card: Card,
    path: Path,
    inputs: Mapping[str, str],
    data: EvaluationSet | None = None,
) -> dict[str, Any]:
    """Judge a sub-model by what a kit measured, and write ``verify.json``.

    The losses of its graphs on ``data`` are taken here; None leaves them UNMEASURED.

    Raises:
        InputError: the result is not whole, not of this kit, or of another device.
    """
    again = f"formfit verify {submodel.folder} --device {card.name} --make-kit KIT"
    design = VERIFICATION_KIT.read(submodel.folder / "kit.json", again)
    if design["device"] != card.name:
        raise InputError(f"{submodel.folder}: packed for {design['device']}, not for {card.name}; `{again}`")
    check_inputs(submodel.folder / "kit.json", design, {"graphs": str(VERSION)})
    if models_digest(submodel, ("fp32", design["precision"])) != design["model"]:
        raise InputError(f"{submodel.folder}: not the graphs that were packed; `{again}`")
    result = read_result(path, design["kit"], card.name)
    config = VerifyConfig.model_validate(design["settings"])
    other = differences(card.fingerprint, result.fingerprint.model_dump())
    if other:
        raise InputError(f"{path}: measured on another device than {card.name} ({'; '.join(other)})")
    workloads = [Workload.parse(text) for text in design["workloads"]]
    group = result.groups[0]
    work = {
        f"{copy}|{w}": flops(submodel.architecture, w, submodel.model_config)
        for copy in range(config.copies)
        for w in workloads
    }
    work |= reference_work()
    timings = read_timings(path, group, work)
    if set(timings) != set(work) or set(result.parity) != set(CASES):
        raise InputError(f"{path}: lacks what its kit measures; run the kit again")
    measured = latencies(card, timings, workloads, config.copies)
    own = parity(submodel, model_file(submodel.folder), config.tokens)
    errors = {f"device_{name}": error for name, error in result.parity.items()}
    checked = {**own, "errors": {**own["errors"], **errors}}
    checked["kept"] = max(checked["errors"].values()) <= max(PARITY, own["bound"])
    runtime = f"onnxruntime {result.fingerprint.runtime_version}"
    losses = (
        {p: graph_loss(model_file(submodel.folder, p), data) for p in exported(submodel, [])} if data else {}
    )
    return conclude(submodel, card, runtime, measured, checked, {}, losses, inputs)
