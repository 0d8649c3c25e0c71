"""Packing a kit: one zip file that Python runs (``python3 kit.zip``).

It holds the device runner, and a fixed choice of ops and whole models as graphs without their weights, which
the device draws from seeds. :mod:`latency.kit.unpack` makes a card of the result.
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
from latency.predictor.composition import OpTimes
from latency.predictor.design import choose_models, stacks
from latency.predictor.initial_design import Point, initial_design
from latency.runtimes.onnx_graphs import stack_graph
from latency.runtimes.protocol import random_weights
from space import Architecture, InputError, Space, Workload
from space.cost import op_flops, op_params
from space.io.artefact import atomic_path
from space.mixers import MIXERS
from space.onnx.model import model_graph
from space.onnx.quantise import quantise
from space.ops import Op, space_ops
from space.shapes import model_shapes

EXTRA_POINTS = 6  # ops of a kind and phase beyond one for each size that varies
# Latency of an op before anything is measured, s: a call, per FLOP, and per parameter.
CALL_SECONDS, FLOP_SECONDS, PARAM_SECONDS = 1e-6, 1e-10, 4e-10


@dataclass(frozen=True)
class PackedKit:
    """Summary of a kit.

    Attributes:
        kit: digest of its plan.
        bytes: size of the file.
        ops: number of ops and workloads that it measures.
        models: number of whole models.
        timings: number of timings.
    """

    kit: str
    bytes: int
    ops: int
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
    points = initial_design([(op, w) for op in space_ops(space) for w in workloads], EXTRA_POINTS)
    models = _models(space, config, workloads)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as kit:
        writer = KitWriter(kit)
        groups = _groups(writer, space, config, points, models, workloads)
        identity = write_plan(
            writer,
            made_for=space.hash,
            return_command="profile",
            threads=config.threads,
            precision=config.precision,
            groups=groups,
        )
    KitManifest(identity, config, tuple(points), tuple(models)).write(folder, space)
    return PackedKit(
        kit=identity,
        bytes=path.stat().st_size,
        ops=len(points),
        models=len(models),
        timings=sum(len(item.io_bindings) for group in groups for item in group.items),
    )


def _groups(
    writer: KitWriter,
    space: Space,
    config: ProfileConfig,
    points: Sequence[Point],
    models: Sequence[KitModel],
    workloads: Sequence[Workload],
) -> list[KitGroup]:
    """The groups of a kit: one op of each mixer, all other ops in random order, whole models."""
    ops = _op_items(writer, space, points, config.precision)
    # One op of each mixer comes first, so that unsupported mixers are known before the rest.
    first: dict[str, int] = {}
    for place, items in enumerate(ops):
        for mixer in items[0].mixers:
            first.setdefault(mixer, place)
    rest = [items for place, items in enumerate(ops) if place not in first.values()]
    order = np.random.default_rng(config.seed).permutation(len(rest))
    shuffled = [rest[i] for i in order]
    whole = _model_items(writer, space, models, workloads, config.precision)
    references = reference_stacks(writer)
    op_timer, model_timer = (config.timer(rounds) for rounds in (config.op_rounds, config.max_rounds))
    early = [ops[place] for place in first.values()]
    size = config.group // 2  # in ops, which have two stacks each
    op_groups = [early, *(shuffled[i : i + size] for i in range(0, len(shuffled), size))]
    model_groups = [whole[i : i + config.group] for i in range(0, len(whole), config.group)]
    return [
        KitGroup(op_timer, (*(item for items in group for item in items), *references)) for group in op_groups
    ] + [KitGroup(model_timer, (*group, *references)) for group in model_groups]


def _models(space: Space, config: ProfileConfig, workloads: Sequence[Workload]) -> list[KitModel]:
    """The whole models of a kit, with others in place of those that need linear attention."""
    times = {
        w: OpTimes(
            w,
            {
                op.key: CALL_SECONDS
                + FLOP_SECONDS * op_flops(op, w, space.config)
                + PARAM_SECONDS * op_params(op, space.config)
                for op in space_ops(space)
            },
        )
        for w in workloads
    }
    chosen = choose_models(space, config.counts(), times)
    found = [KitModel(role, False, a) for role, models in chosen.items() for a in models]
    if all(_is_plain(model.architecture) for model in found):
        return found
    known = {model.architecture.key for model in found}
    try:
        plain = choose_models(space, config.counts(), times, _is_plain)
    except InputError:  # nearly every model of the space has linear attention
        return found
    return found + [
        KitModel(role, True, a) for role, models in plain.items() for a in models if a.key not in known
    ]


def _is_plain(architecture: Architecture) -> bool:
    """True for an architecture that every supported version of onnxruntime runs."""
    mixers = {layer.mixer for layer in architecture.layers} - {"none"}
    return all(MIXERS.get(name).runs_everywhere for name in mixers)


def _op_items(
    writer: KitWriter, space: Space, points: Sequence[Point], precision: str
) -> list[list[KitItem]]:
    """The stacks of each op, which are timed in the same group."""
    workloads: dict[Op, list[Workload]] = {}
    for op, workload in points:
        workloads.setdefault(op, []).append(workload)
    found = []
    for op, op_workloads in workloads.items():
        is_mixer = op.kind not in ("embedding", "head", "ffn")
        has_layers = op.kind not in ("embedding", "head")
        items = []
        for (_, height), of_height in stacks(space, [(op, w) for w in op_workloads]).items():
            graph = quantise(stack_graph(op, height, space.config), precision)
            layers = [op.layer] * height if has_layers else []
            bindings = workload_io_bindings(graph, of_height, space.config, op.width, layers)
            mixers = [op.kind] if is_mixer else []
            items.append(writer.item(f"{op.key}|{height}", graph, bindings, mixers, is_op=True))
        found.append(items)
    return found


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
