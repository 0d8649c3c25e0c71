"""Writing graphs, a plan and the device runner into a kit."""

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

from latency.device_runner import fingerprint, io_binding, main, plan, timer, timing
from latency.device_runner.io_binding import IoBinding
from latency.device_runner.plan import KitGroup, KitItem, KitPlan, ParityCase, RandomWeight
from latency.runtimes.onnx_graphs import anchor_graph, anchor_io_binding, graph_io_binding, stack_graph
from latency.runtimes.reference import (
    REFERENCE_CONFIG,
    REFERENCE_COPIES,
    REFERENCE_HEIGHTS,
    REFERENCE_OP,
    reference_item,
)
from space import Layer, ModelConfig, Workload, cpus
from space.io.artefact import digest
from space.onnx.graph import VERSION

DEVICE_MODULES = (cpus, main, plan, fingerprint, io_binding, timer, timing)  # copied into a kit unchanged
MAIN = "import sys\n\nfrom latency.device_runner.main import main\n\nsys.exit(main())\n"
RANDOM_TYPES = (TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8)  # of weights that are left out
MIN_WEIGHT_ELEMENTS = 64  # a smaller tensor stays in its graph
# The oldest onnxruntime that runs the graphs correctly, by precision: 1.18 overwrites memory where a residual
# sum and its norm are fused, and 1.23 is the first that reads rows of a quantised embedding.
MIN_RUNTIME_VERSION = {"fp32": "1.19", "int8": "1.23", "int8-dynamic": "1.19"}


class KitWriter:
    """Writes the files of a kit; graphs are written without their weights.

    Args:
        kit: the zip file.
    """

    def __init__(self, kit: zipfile.ZipFile) -> None:
        self.kit, self.count, self.seed = kit, 0, 0

    def item(
        self,
        name: str,
        graph: onnx.ModelProto,
        io_bindings: Mapping[str, IoBinding],
        mixers: Sequence[str] = (),
        fallback: bool = False,
        is_op: bool = False,
    ) -> KitItem:
        """Write a graph.

        Args:
            name: name of the item.
            graph: the graph; its weights are removed from it.
            io_bindings: buffers by workload.
            mixers: mixers in the graph.
            fallback: True if the item is timed only on devices that lack a mixer.
            is_op: True for a stack of ops.

        Returns:
            The item of the plan.
        """
        weights = []
        for tensor in graph.graph.initializer:
            if tensor.data_type in RANDOM_TYPES and math.prod(tensor.dims) >= MIN_WEIGHT_ELEMENTS:
                weights.append(self._removed(tensor))
        file = f"graphs/{self.count:05d}.onnx"
        self.count += 1
        self.kit.writestr(file, graph.SerializeToString())
        return KitItem(
            name=name,
            graph=file,
            io_bindings=io_bindings,
            weights=tuple(weights),
            mixers=tuple(mixers),
            fallback=fallback,
            is_op=is_op,
        )

    def _removed(self, tensor: TensorProto) -> RandomWeight:
        """Remove the values of a tensor; returns the distribution that the device draws them from."""
        values, data_type = numpy_helper.to_array(tensor), tensor.data_type
        weight = RandomWeight(
            name=tensor.name,
            shape=tuple(tensor.dims),
            mean=float(values.mean()),
            std=float(values.std()),
            seed=self.seed,
            dtype=values.dtype.name,
        )
        self.seed += 1
        tensor.Clear()
        tensor.name, tensor.data_type = weight.name, data_type
        tensor.dims.extend(weight.shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="drawn by the device runner")
        return weight


def workload_io_bindings(
    graph: onnx.ModelProto,
    workloads: Sequence[Workload],
    model_config: ModelConfig,
    width: int,
    layers: Sequence[Layer],
) -> dict[str, IoBinding]:
    """The buffers of a graph, by workload.

    Args:
        graph: a graph of a stack or of a whole model.
        workloads: the workloads.
        model_config: vocabulary, context and heads.
        width: residual width.
        layers: the layers that have states, by slot.
    """
    return {str(w): graph_io_binding(graph, w, model_config, width, layers) for w in workloads}


def reference_stacks(writer: KitWriter) -> list[KitItem]:
    """Write the reference work, which every group of a kit times.

    Args:
        writer: writer of the kit.
    """
    found: list[KitItem] = []
    for workload, height in REFERENCE_HEIGHTS.items():
        graph = stack_graph(REFERENCE_OP, height, REFERENCE_CONFIG)
        layers = [REFERENCE_OP.layer] * height
        bindings = workload_io_bindings(graph, [workload], REFERENCE_CONFIG, REFERENCE_OP.width, layers)
        item = writer.item("", graph, bindings)
        found += [replace(item, name=reference_item(copy)) for copy in range(REFERENCE_COPIES)]
    return found


def write_plan(
    writer: KitWriter,
    *,
    made_for: str,
    return_command: str,
    threads: int,
    precision: str,
    groups: Sequence[KitGroup],
    parity: Sequence[ParityCase] = (),
) -> str:
    """Write the plan of a kit and the program that carries it out.

    Args:
        writer: writer of the kit, with all graphs of the plan written.
        made_for: digest of the space or the sub-model that the kit measures.
        return_command: formfit command that reads the result, such as ``profile``.
        threads: number of threads of every session.
        precision: precision of the graphs.
        groups: items to time.
        parity: graphs to compare with known outputs.

    Returns:
        The digest of the plan, which identifies the kit.
    """
    kit_plan = KitPlan(
        made_for=made_for,
        return_command=return_command,
        threads=threads,
        min_runtime_version=MIN_RUNTIME_VERSION[precision],
        graph_version=VERSION,
        anchor=writer.item("anchor", anchor_graph(), {"": anchor_io_binding()}),
        groups=tuple(groups),
        parity=tuple(parity),
    )
    identity = digest(json.dumps(kit_plan.to_json(), sort_keys=True))
    kit = writer.kit
    kit.writestr("kit.json", json.dumps(replace(kit_plan, kit=identity).to_json()))
    kit.writestr("__main__.py", MAIN)
    for package in ("space", "latency", "latency/device_runner"):
        kit.writestr(f"{package}/__init__.py", "")
    for module in DEVICE_MODULES:
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        kit.writestr(f"{module.__name__.replace('.', '/')}.py", source)
    return identity
