"""Probe kits: measuring a device that has neither torch nor formfit.

:func:`pack` writes one zip that Python runs (``python3 kit.zip``): the probe with the timer, and a fixed
design of ops and whole models as graphs without their weights, which the probe draws from seeds.
:func:`unpack` makes a card of the result, which :mod:`latency.kit.result` reads as a stranger's file.
"""

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from latency.card import open_card
from latency.device_runner import io_binding as binding
from latency.device_runner import main as probe
from latency.device_runner import timer, timing
from latency.kit.result import read_result, read_timings
from latency.predictor.composition import OpTimes
from latency.predictor.design import choose_models, seeds, stack_heights, stacks
from latency.predictor.op_latencies import Point
from latency.predictor.predictor import Predictor
from latency.profile import ProfileConfig, card_digest, load_prior, settings_digest
from latency.records import Records, model_name, stack_name
from latency.runtimes.onnxruntime import anchor_binding, anchor_graph, graph_binding, stack_graph
from latency.runtimes.protocol import random_weights
from latency.runtimes.reference import COPIES, FRAME, OP, STACKS, reference_name, reference_work
from space import Architecture, InputError, Space, Workload
from space.cost import flops, op_flops, op_params
from space.io.artefact import Artefact, atomic_path, check_inputs, digest
from space.onnx.graph import VERSION
from space.onnx.model import model_graph
from space.onnx.quantise import quantise
from space.ops import Op, space_ops
from space.mixers import MIXERS
from space.shapes import model_shapes

PARTS = (probe, binding, timer, timing)  # modules of this package that run on the device as they are
MAIN = "import sys\n\nfrom latency.device_runner.main import main\n\nsys.exit(main())\n"
SPARE = 6  # ops of a kind and phase beyond one for each size that varies
DRAWN = (TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8)  # of which types weights are
LEAST_WEIGHTS = 64  # a tensor with fewer elements stays in its graph
PROBE_KIT = Artefact("probe kit", "formfit profile --make-kit", schema=2)
# The oldest onnxruntime whose operators do what graphs ask of them, by precision: 1.18 overwrites memory
# where a residual sum and its norm are one node, and rows of a quantised embedding came with 1.23.
OLDEST = {"fp32": "1.19", "int8": "1.23", "int8-dynamic": "1.19"}


def pack(space: Space, folder: Path, config: ProfileConfig, path: Path) -> dict[str, Any]:
    """Write a kit, and its design into the folder of the card-to-be; says what is in it.

    Raises:
        InputError: a workload is not possible.
    """
    workloads = config.parsed(space)
    points = seeds([(op, w) for op in space_ops(space) for w in workloads], SPARE)
    models = _models(space, config, workloads)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as kit:
        writer = Writer(kit)
        ops = _op_items(writer, space, points, config.precision)
        first = {items[0]["mixers"][0]: items for items in reversed(ops) if items[0]["mixers"]}
        early = list(first.values())  # each mixer once, so that what lacks is known before the rest
        rest = [items for items in ops if all(items is not other for other in early)]
        rest = [rest[i] for i in np.random.default_rng(config.seed).permutation(len(rest))]
        whole = _model_items(writer, space, models, workloads, config.precision)
        timers = [vars(config.timer(rounds)) for rounds in (config.op_rounds, config.max_rounds)]
        tied = reference_stacks(writer)
        groups = [
            {"timer": timers[0], "items": [*(item for items in some for item in items), *tied]}
            for some in (early, *_chunks(rest, config.group // 2))
        ] + [{"timer": timers[1], "items": [*some, *tied]} for some in _chunks(whole, config.group)]
        plan = {"space": space.hash, "threads": config.threads, "groups": groups}
        identity = write_plan(writer, plan, config.precision)
    design = {
        "kit": identity,
        "settings": config.model_dump(mode="json"),
        "points": [[op.key, str(w)] for op, w in points],
        "models": [[role, fallback, a.to_json()] for role, fallback, a in models],
    }
    PROBE_KIT.write(folder / "kit.json", {"space": space.hash, "graphs": str(VERSION)}, design)
    return {
        "kit": identity,
        "bytes": path.stat().st_size,
        "ops": len(points),
        "models": len(models),
        "timings": sum(len(item["bindings"]) for group in groups for item in group["items"]),
    }


def reference_stacks(writer: "Writer") -> list[dict[str, Any]]:
    """The reference work, which every group of a kit times."""
    found: list[dict[str, Any]] = []
    for workload, height in STACKS.items():
        graph = stack_graph(OP, height, FRAME)
        layers = [OP.layer] * height
        bindings = {str(workload): graph_binding(graph, workload, FRAME, OP.width, layers).to_json()}
        item = writer.item("", graph, bindings)
        for copy in range(COPIES):
            found.append({**item, "name": reference_name(copy, workload).rpartition("|")[0]})
    return found


def write_plan(writer: "Writer", plan: dict[str, Any], precision: str) -> str:
    """Write what a kit is to do, and the program that does it; returns the kit's identity."""
    kit = writer.kit
    anchor = writer.item("anchor", anchor_graph(), {"": anchor_binding().to_json()})
    oldest = {"oldest": OLDEST[precision], "graphs": VERSION}
    plan = {"schema": probe.SCHEMA, "anchor": anchor, **oldest, **plan}
    identity = digest(json.dumps(plan, sort_keys=True))
    kit.writestr("kit.json", json.dumps({**plan, "kit": identity}))
    kit.writestr("__main__.py", MAIN)
    for package in ("latency", "latency/device_runner"):
        kit.writestr(f"{package}/__init__.py", "")
    for part in PARTS:
        source = Path(str(part.__file__))
        kit.writestr(f"latency/device_runner/{source.name}", source.read_text())
    return identity


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def _models(
    space: Space, config: ProfileConfig, workloads: Sequence[Workload]
) -> list[tuple[str, bool, Architecture]]:
    """Role, whether it is for devices without linear attention, and architecture."""
    # Before anything is measured, an op is as slow as its bytes and FLOPs.
    times = {
        w: OpTimes(
            w,
            {
                op.key: 1e-6 + 1e-10 * op_flops(op, w, space.config) + 4e-10 * op_params(op, space.config)
                for op in space_ops(space)
            },
        )
        for w in workloads
    }
    found = [
        (role, False, a)
        for role, group in choose_models(space, config.counts(), times).items()
        for a in group
    ]

    def plain(architecture: Architecture) -> bool:
        mixers = {layer.mixer for layer in architecture.layers} - {"none"}
        return all(MIXERS.get(name).runs_everywhere for name in mixers)

    if not all(plain(a) for _, _, a in found):
        known = {a.key for _, _, a in found}
        try:
            more = choose_models(space, config.counts(), times, plain)
        except InputError:  # in this space nearly every model has linear attention
            more = {}
        found += [(role, True, a) for role, group in more.items() for a in group if a.key not in known]
    return found


class Writer:
    """Graphs in a zip, without their weights."""

    def __init__(self, kit: zipfile.ZipFile) -> None:
        self.kit, self.count, self.seed = kit, 0, 0

    def item(
        self,
        name: str,
        graph: onnx.ModelProto,
        bindings: Mapping[str, Any],
        mixers: Sequence[str] = (),
        fallback: bool = False,
        op: bool = False,
    ) -> dict[str, Any]:
        """Write a graph; what the plan says of it."""
        weights = []
        for tensor in graph.graph.initializer:
            if tensor.data_type not in DRAWN or math.prod(tensor.dims) < LEAST_WEIGHTS:
                continue
            values, kind = numpy_helper.to_array(tensor), tensor.data_type
            shape, spread = list(tensor.dims), (float(values.mean()), float(values.std()))
            weights.append([tensor.name, shape, *spread, self.seed, values.dtype.name])
            self.seed += 1
            tensor.Clear()
            tensor.name, tensor.data_type = weights[-1][0], kind
            tensor.dims.extend(shape)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="drawn by the probe")
        file = f"graphs/{self.count:05d}.onnx"
        self.count += 1
        self.kit.writestr(file, graph.SerializeToString())
        return {
            "name": name,
            "graph": file,
            "weights": weights,
            "bindings": bindings,
            "mixers": list(mixers),
            "fallback": fallback,
            "op": op,
        }


def _op_items(
    writer: Writer, space: Space, points: Sequence[Point], precision: str
) -> list[list[dict[str, Any]]]:
    """The stacks of each op, which are measured together."""
    workloads: dict[Op, list[Workload]] = {}
    for op, workload in points:
        workloads.setdefault(op, []).append(workload)
    found = []
    for op, some in workloads.items():
        mixers = [op.kind] if op.kind not in ("embedding", "head", "ffn") else []
        items = []
        for (_, height), of_height in stacks(space, [(op, w) for w in some]).items():
            graph = quantise(stack_graph(op, height, space.config), precision)
            layers = [op.layer] * height if op.kind not in ("embedding", "head") else []
            bindings = {
                str(w): graph_binding(graph, w, space.config, op.width, layers).to_json() for w in of_height
            }
            items.append(writer.item(f"{op.key}|{height}", graph, bindings, mixers, op=True))
        found.append(items)
    return found


def _model_items(
    writer: Writer,
    space: Space,
    models: Sequence[tuple[str, bool, Architecture]],
    workloads: Sequence[Workload],
    precision: str,
) -> list[dict[str, Any]]:
    items = []
    for i, (role, fallback, architecture) in enumerate(models):
        weights = random_weights(model_shapes(architecture, space.config), i)
        graph = quantise(model_graph(architecture, space.config, weights), precision)
        bindings = {
            str(w): graph_binding(graph, w, space.config, architecture.width, architecture.layers).to_json()
            for w in workloads
        }
        mixers = sorted({layer.mixer for layer in architecture.layers} - {"none"})
        items.append(writer.item(f"{role}|{architecture.key}", graph, bindings, mixers, fallback))
    return items


def unpack(space: Space, folder: Path, path: Path, prior: str | None = None) -> Predictor:
    """Make or extend a card with what a kit measured, and fit the predictor.

    Args:
        space: that the kit was packed for.
        folder: of the card, with the kit's design.
        path: the result.
        prior: the name of a known device's card, beside this one.

    Raises:
        InputError: the result is not whole, not of this kit, of another device, or holds what cannot be.
    """
    design_path = folder / "kit.json"
    design = PROBE_KIT.read(design_path, f"formfit profile --make-kit KIT --device {folder.name}")
    if design["header"]["inputs"].get("space") != space.hash:
        raise InputError(f"{design_path}: packed for another space than {space.name}")
    check_inputs(design_path, design, {"graphs": str(VERSION)})
    result = read_result(path, design["kit"], folder.name)
    config = ProfileConfig.model_validate(design["settings"])
    known = load_prior(space, folder.parent, prior, config) if prior else None
    workloads = config.parsed(space)
    points = [(Op.parse(op), Workload.parse(w)) for op, w in design["points"]]
    models = [(role, Architecture.from_json(a)) for role, _, a in design["models"]]
    work = {model_name(r, a, w): flops(a, w, space.config) for r, a in models for w in workloads}
    work |= reference_work()
    for op, workload in points:
        for height, name in _stacks(space, op, workload):
            work[name] = height * op_flops(op, workload, space.config)
    points = [(op, w) for op, w in points if op.kind not in result.unsupported]
    models = [(r, a) for r, a in models if not any(x.mixer in result.unsupported for x in a.layers)]
    card = open_card(folder.parent, folder.name, result.fingerprint.model_dump())
    groups = [group for group in result.groups if group.anchor_reference is not None]
    timings = [read_timings(path, group, work) for group in groups]  # all, before anything is kept
    measured = {name for found in timings for name in found}
    missing = [name for point in points for _, name in _stacks(space, *point) if name not in measured]
    if missing:
        raise InputError(f"{path}: lacks {missing[0]} and {len(missing) - 1} more that its kit measures")
    chosen = {
        role: [a for r, a in models if r == role and all(model_name(r, a, w) in measured for w in workloads)]
        for role in ("optimal", "random", "held_out", "repeat")
    }
    if not all(chosen[role] for role in ("optimal", "random", "held_out")):
        lacking = ", ".join(result.unsupported) or "nothing"
        raise InputError(f"{path}: too few whole models ran to fit and test on (the device lacks {lacking})")
    card.unsupported |= result.unsupported
    records = Records(card, space, "onnxruntime", config.threads, config.precision)
    for group, found in zip(groups, timings, strict=True):
        anchor = float(group.anchor_reference or 0.0)
        card.problems += group.problems
        here = [point for point in points if all(name in found for _, name in _stacks(space, *point))]
        if here:
            records.add_ops(here, found, anchor)
        whole = [(r, a) for r, a in models if all(model_name(r, a, w) in found for w in workloads)]
        if whole:
            records.add_models(whole, workloads, found)
    ops = records.fitted(known)
    predictor = records.predictor(ops, workloads, chosen)
    target = card.predictor_path(space.name, "onnxruntime", config.threads, config.precision)
    made_of = {"settings": settings_digest(config), "card": card_digest(card), "graphs": str(VERSION)}
    predictor.save(target, made_of)
    return predictor


def _stacks(space: Space, op: Op, workload: Workload) -> list[tuple[int, str]]:
    return [(h, stack_name(op, h, workload)) for h in stack_heights(space, op, workload)]
