"""Packing a kit: one zip file that Python runs (``python3 kit.zip``).

It holds the device runner, and a fixed choice of whole models as graphs without their weights, which the
device draws from seeds. The choice is the one that is best before anything was measured.
:mod:`latency.kit.unpack` makes a card of the result.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latency.config import ProfileConfig
from latency.device_runner.plan import KitGroup, KitItem
from latency.kit.manifest import KIT_RUNTIME, KitManifest, KitModel
from latency.kit.writer import KitWriter, reference_stacks, workload_io_bindings, write_plan
from latency.predictor.design import ModelDesign, ModelRole, model_design
from latency.runtimes.onnx_graphs import stack_graph
from latency.runtimes.protocol import random_weights
from space import Architecture, InputError, Space, Workload
from space.io.artefact import atomic_path
from space.mixers import MIXERS
from space.onnx.model import model_graph
from space.onnx.quantise import quantise
from space.ops import Op, space_ops
from space.shapes import model_shapes


@dataclass(frozen=True)
class PackedKit:
    """Summary of a kit.

    Attributes:
        kit: digest of its plan.
        bytes: size of the file.
        models: number of whole models.
        timings: number of timings.
    """

    kit: str
    bytes: int
    models: int
    timings: int


def pack(space: Space, folder: Path, config: ProfileConfig, path: Path) -> PackedKit:
    """Write a kit, and its manifest into the folder of the device's future card.

    Args:
        space: the space to profile.
        folder: folder of the card.
        config: settings of the profiling.
        path: file of the kit.

    Raises:
        InputError: a workload is not possible, the space has too few architectures, or the settings name
            another runtime than onnxruntime.
    """
    if config.runtime != KIT_RUNTIME:
        raise InputError(f"runtime {config.runtime}: a kit runs on {KIT_RUNTIME}")
    workloads = config.parsed(space)
    models = _models(space, config, workloads)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as kit:
        writer = KitWriter(kit)
        groups = _groups(writer, space, config, models, workloads)
        identity = write_plan(
            writer,
            made_for=space.hash,
            return_command="profile",
            threads=config.threads,
            precision=config.precision,
            groups=groups,
        )
    KitManifest(identity, config, len(groups), tuple(models)).write(folder, space)
    return PackedKit(
        kit=identity,
        bytes=path.stat().st_size,
        models=len(models),
        timings=sum(len(item.io_bindings) for group in groups for item in group.items),
    )


def _groups(
    writer: KitWriter,
    space: Space,
    config: ProfileConfig,
    models: Sequence[KitModel],
    workloads: Sequence[Workload],
) -> list[KitGroup]:
    """The groups of a kit: one layer of each mixer, so that unsupported ones are known, then whole models."""
    whole = _model_items(writer, space, models, workloads, config.precision)
    references = reference_stacks(writer)
    order = np.random.default_rng(config.seed).permutation(len(whole))
    shuffled = [whole[i] for i in order]
    # A model that is measured twice is in two groups: its second measurement is of another session.
    repeats = [item for item in shuffled if item.name.startswith("repeat|")]
    others = [item for item in shuffled if not item.name.startswith("repeat|")]
    groups = [_mixer_items(writer, space, workloads[0], config.precision)]
    for items in (others, repeats):
        groups += [items[i : i + config.group] for i in range(0, len(items), config.group)]
    return [KitGroup(config.timer(), (*group, *references)) for group in groups if group]


def _models(space: Space, config: ProfileConfig, workloads: Sequence[Workload]) -> list[KitModel]:
    """The whole models of a kit, with others in place of those that need linear attention."""
    found = _of_design(model_design(space, workloads, config.counts()), config.optimal_models, fallback=False)
    if all(_is_plain(model.architecture) for model in found):
        return found
    known = {model.architecture.key for model in found}
    try:
        plain = model_design(space, workloads, config.counts(), _is_plain)
    except InputError:  # nearly every model of the space has linear attention
        return found
    others = _of_design(plain, config.optimal_models, fallback=True)
    return found + [model for model in others if model.architecture.key not in known]


def _of_design(design: ModelDesign, optimal: int, *, fallback: bool) -> list[KitModel]:
    """The models of a design by role, chosen before anything is measured."""
    roles: dict[ModelRole, Sequence[Architecture]] = {
        "optimal": design.choose(design.expected(), optimal),
        "random": design.random,
        "held_out": design.held_out,
        "repeat": design.repeat,
    }
    return [KitModel(role, fallback, a) for role, models in roles.items() for a in models]


def _is_plain(architecture: Architecture) -> bool:
    """True for an architecture that every supported version of onnxruntime runs."""
    mixers = {layer.mixer for layer in architecture.layers} - {"none"}
    return all(MIXERS.get(name).runs_everywhere for name in mixers)


def _mixer_items(writer: KitWriter, space: Space, workload: Workload, precision: str) -> list[KitItem]:
    """One layer of each mixer of a space."""
    found = []
    for kind, op in first_ops(space).items():
        graph = quantise(stack_graph(op, 1, space.config), precision)
        bindings = workload_io_bindings(graph, [workload], space.config, op.width, [op.layer])
        found.append(writer.item(mixer_item(op), graph, bindings, [kind], is_op=True))
    return found


def first_ops(space: Space) -> dict[str, Op]:
    """One op of each mixer of a space, by mixer.

    Args:
        space: the space.
    """
    first: dict[str, Op] = {}
    for op in space_ops(space):
        if op.kind not in ("embedding", "head", "ffn"):
            first.setdefault(op.kind, op)
    return first


def mixer_item(op: Op) -> str:
    """Name of the item that shows whether a device runs an op's mixer.

    Args:
        op: an op with the mixer.
    """
    return f"mixer|{op.key}"


def _model_items(
    writer: KitWriter,
    space: Space,
    models: Sequence[KitModel],
    workloads: Sequence[Workload],
    precision: str,
) -> list[KitItem]:
    items = []
    for i, model in enumerate(models):
        architecture = model.architecture
        weights = random_weights(model_shapes(architecture, space.config), i)
        graph = quantise(model_graph(architecture, space.config, weights), precision)
        ends = architecture.width, architecture.layers
        bindings = workload_io_bindings(graph, workloads, space.config, *ends)
        mixers = sorted({layer.mixer for layer in architecture.layers} - {"none"})
        name = f"{model.role}|{architecture.key}"
        items.append(writer.item(name, graph, bindings, mixers, model.fallback))
    return items
