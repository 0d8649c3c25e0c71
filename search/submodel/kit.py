"""Kits that verify a sub-model on a device with nothing but Python, numpy and onnxruntime.

A kit holds the exported model as it is, and the outputs of the plain model in fp64 on fixed tokens. The
device times the model and compares the outputs; the result file is judged here like a measurement on this
machine.
"""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import load_model

from latency import Card
from latency.card import differences
from latency.device_runner.plan import KitGroup, KitItem, ParityCase
from latency.device_runner.timer import TimerConfig
from latency.kit.result import read_result, read_timings, require_design
from latency.kit.writer import KitWriter, reference_stacks, workload_io_bindings, write_plan
from latency.runtimes.reference import reference_work
from search.engine.config import VerifyConfig
from search.engine.verification import Verification
from search.submodel.export import exported, models_digest
from search.submodel.parity import flat, fp64_model, parity, parity_tokens
from search.submodel.verify import choice_of, conclude, graph_loss, latencies
from space import InputError, Workload
from space.cost import flops
from space.io.artefact import Artefact, atomic_path, check_inputs
from space.io.record import read_document
from space.onnx.graph import VERSION
from space.precision import model_file
from space.shapes import state_shapes
from supernet.evaluate import EvaluationSet
from supernet.extract import SubModel

VERIFICATION_KIT = Artefact("verification kit", "formfit verify --make-kit", schema=2)
CASES = ("prefill", "split", "decode")


@dataclass(frozen=True, kw_only=True)
class KitManifest:
    """The content of ``kit.json``, which stays beside the model: the kit that was written.

    Attributes:
        kit: sha256 of the kit's plan.
        model: sha256 of the graphs in it.
        precision: of the timed graph.
        device: the name of the device's card.
        settings: of the verification.
        workloads: that the kit measures.
        inputs: the version of the graphs.
    """

    kit: str
    model: str
    precision: str
    device: str
    settings: VerifyConfig
    workloads: tuple[str, ...]
    inputs: Mapping[str, str]

    def write(self, path: Path) -> None:
        """Write the file.

        Args:
            path: of ``kit.json``.
        """
        body = {
            "kit": self.kit,
            "model": self.model,
            "precision": self.precision,
            "device": self.device,
            "settings": self.settings.model_dump(mode="json"),
            "workloads": list(self.workloads),
        }
        VERIFICATION_KIT.write(path, self.inputs, body)

    @staticmethod
    def read(path: Path, command: str) -> "KitManifest":
        """Read the file.

        Args:
            path: of ``kit.json``.
            command: that writes it, for error messages.

        Raises:
            InputError: the file is missing, not whole, or was made with another version of the graphs.
        """
        value = VERIFICATION_KIT.read(path, command)
        check_inputs(path, value, {"graphs": str(VERSION)})
        with VERIFICATION_KIT.checked(path, command):
            return read_document(KitManifest, value, settings=VerifyConfig.model_validate)


@dataclass(frozen=True, kw_only=True)
class PackedKit:
    """A kit that was written.

    Attributes:
        kit: sha256 of its plan.
        bytes: size of the file.
        timings: the number of timings that the device takes.
    """

    kit: str
    bytes: int
    timings: int


def pack_submodel(submodel: SubModel, card: Card, config: VerifyConfig, path: Path) -> PackedKit:
    """Write a kit that verifies a sub-model on a device, and ``kit.json`` beside the model.

    Args:
        submodel: with its exported graphs.
        card: the device's.
        config: lengths and rounds of the checks.
        path: of the kit, a zip.

    Raises:
        InputError: there is no exported model, or nothing was predicted for the device.
    """
    workloads = [Workload.parse(text) for text in choice_of(submodel).workloads(card.name)]
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
    io_bindings = workload_io_bindings(graph, workloads, *ends)
    timer = TimerConfig(
        block_ms=config.block_ms, min_rounds=config.rounds, max_rounds=config.rounds, anchor_every=2
    )
    items = [KitItem(str(copy), model.name, io_bindings) for copy in range(config.copies)]
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as kit:
        for graph_file in dict.fromkeys((plain, model)):
            kit.write(graph_file, graph_file.name)
        cases = []
        for name, arrays in _cases(submodel, config.tokens).items():
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            kit.writestr(f"{name}.npz", buffer.getvalue())
            cases.append(ParityCase(name, plain.name, f"{name}.npz"))
        writer = KitWriter(kit)
        packed = models_digest(submodel, ("fp32", precision))
        identity = write_plan(
            writer,
            made_for=packed,
            return_command="verify",
            threads=threads,
            precision=precision,
            groups=[KitGroup(timer, (*items, *reference_stacks(writer)))],
            parity=cases,
        )
    manifest = KitManifest(
        kit=identity,
        model=packed,
        precision=precision,
        device=card.name,
        settings=config,
        workloads=tuple(io_bindings),
        inputs={"graphs": str(VERSION)},
    )
    manifest.write(submodel.folder / "kit.json")
    return PackedKit(kit=identity, bytes=path.stat().st_size, timings=len(items) * len(io_bindings))


@torch.inference_mode()
def _cases(submodel: SubModel, tokens: int) -> dict[str, dict[str, Any]]:
    """Inputs of the parity checks and the fp64 model's outputs, by check and name."""
    precise, text = fp64_model(submodel), parity_tokens(submodel, tokens)
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
) -> Verification:
    """Judge a sub-model by the result of a kit, and write ``verify.json``.

    Args:
        submodel: with the exported graphs that were packed.
        card: the device's.
        path: of the result.
        inputs: sha256 of what is verified, by name.
        data: for the losses of its graphs, which are computed here; None leaves them unmeasured.

    Raises:
        InputError: the result is not whole, not of this kit, or of another device.
    """
    again = f"formfit verify {submodel.folder} --device {card.name} --make-kit KIT"
    manifest = KitManifest.read(submodel.folder / "kit.json", again)
    if manifest.device != card.name:
        raise InputError(f"{submodel.folder}: packed for {manifest.device}, not for {card.name}; `{again}`")
    if models_digest(submodel, ("fp32", manifest.precision)) != manifest.model:
        raise InputError(f"{submodel.folder}: not the graphs that were packed; `{again}`")
    result = read_result(path, manifest.kit, card.name)
    config = manifest.settings
    other = differences(card.fingerprint, result.device)
    if other:
        raise InputError(f"{path}: measured on another device than {card.name} ({'; '.join(other)})")
    workloads = [Workload.parse(text) for text in manifest.workloads]
    group = result.groups[0]
    work = {
        f"{copy}|{w}": flops(submodel.architecture, w, submodel.model_config)
        for copy in range(config.copies)
        for w in workloads
    }
    work |= reference_work()
    require_design(path, result, workloads[0].threads, 1, (), CASES)
    timings = read_timings(path, group, work, (config.rounds, config.rounds))
    if set(timings) != set(work):
        raise InputError(f"{path}: lacks what its kit measures; run the kit again")
    measured = latencies(card, timings, workloads, config.copies)
    here = parity(submodel, config.tokens)
    errors = {f"device_{name}": error for name, error in result.parity.items()}
    checked = replace(here, errors={**here.errors, **errors})
    runtime = f"onnxruntime {result.fingerprint.runtime_version}"
    losses = (
        {p: graph_loss(model_file(submodel.folder, p), data) for p in exported(submodel, [])} if data else {}
    )
    return conclude(submodel, card, runtime, measured, checked, {}, losses, inputs)
