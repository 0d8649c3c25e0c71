"""Contents of a kit's ``kit.json`` and of the ``result.json`` that the device runner writes.

Part of every kit: Python 3.8, the standard library, numpy and onnxruntime.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Mapping

from latency.device_runner.fingerprint import Fingerprint
from latency.device_runner.io_binding import IoBinding
from latency.device_runner.timer import TimerConfig
from latency.device_runner.timing import JsonObject, Timing

RESULT_SCHEMA = 2
REFERENCE_PREFIX = "reference|"  # of the names of the reference work


@dataclass(frozen=True)
class RandomWeight:
    """A weight that a kit leaves out; the device draws it from a normal distribution.

    Attributes:
        name: name of the initializer in the graph.
        shape: shape of the tensor.
        mean: mean of its values.
        std: standard deviation of its values.
        seed: seed of its values.
        dtype: numpy name of its type; integers are clipped to the type's range.
    """

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float
    seed: int
    dtype: str

    @staticmethod
    def from_json(value: JsonObject) -> RandomWeight:
        """Read a weight from a JSON object of its fields."""
        return RandomWeight(**{**value, "shape": tuple(value["shape"])})


@dataclass(frozen=True)
class KitItem:
    """A graph to time, in one or more workloads.

    Attributes:
        name: name of the item; the timing of a workload is called ``name|workload``.
        graph: path of the ONNX graph in the kit.
        io_bindings: buffers by workload.
        weights: weights to draw.
        mixers: mixers in the graph; the item is skipped if the device lacks one.
        fallback: True if the item is timed only on devices that lack a mixer.
        is_op: True for a stack of ops, whose failure means that its mixer is unsupported.
    """

    name: str
    graph: str
    io_bindings: Mapping[str, IoBinding]
    weights: tuple[RandomWeight, ...] = ()
    mixers: tuple[str, ...] = ()
    fallback: bool = False
    is_op: bool = False

    def to_json(self) -> JsonObject:
        """The item as a JSON object."""
        changed = {
            "io_bindings": {workload: item.to_json() for workload, item in self.io_bindings.items()},
            "weights": [asdict(weight) for weight in self.weights],
        }
        return {**vars(self), **changed}

    @staticmethod
    def from_json(value: JsonObject) -> KitItem:
        """Read an item; the inverse of :meth:`to_json`."""
        changed = {
            "io_bindings": {w: IoBinding.from_json(item) for w, item in value["io_bindings"].items()},
            "weights": tuple(map(RandomWeight.from_json, value["weights"])),
            "mixers": tuple(value["mixers"]),
        }
        return KitItem(**{**value, **changed})


@dataclass(frozen=True)
class KitGroup:
    """Items that are timed together, after which the result is saved.

    Attributes:
        timer: settings of the timer.
        items: graphs to time.
    """

    timer: TimerConfig
    items: tuple[KitItem, ...]

    def to_json(self) -> JsonObject:
        """The group as a JSON object."""
        return {"timer": asdict(self.timer), "items": [item.to_json() for item in self.items]}

    @staticmethod
    def from_json(value: JsonObject) -> KitGroup:
        """Read a group; the inverse of :meth:`to_json`."""
        return KitGroup(TimerConfig(**value["timer"]), tuple(map(KitItem.from_json, value["items"])))


@dataclass(frozen=True)
class ParityCase:
    """Inputs of a graph, and the outputs that it should have.

    Attributes:
        name: name of the case.
        graph: path of the ONNX graph in the kit.
        arrays: path of an npz file in the kit, with ``in.NAME`` and ``out.NAME`` for every input and output.
    """

    name: str
    graph: str
    arrays: str


@dataclass(frozen=True)
class KitPlan:
    """Work of a kit.

    Attributes:
        made_for: digest of the space or the sub-model that the kit measures.
        return_command: formfit command that reads the result, such as ``profile``.
        threads: number of threads of every session.
        min_runtime_version: oldest onnxruntime that runs the graphs correctly.
        graph_version: version of formfit's graphs.
        anchor: the timer's reference work.
        groups: items to time.
        parity: graphs to compare with known outputs.
        kit: digest of all of this; empty until it is computed.
    """

    made_for: str
    return_command: str
    threads: int
    min_runtime_version: str
    graph_version: int
    anchor: KitItem
    groups: tuple[KitGroup, ...]
    parity: tuple[ParityCase, ...] = ()
    kit: str = ""

    def to_json(self) -> JsonObject:
        """The plan as a JSON object."""
        changed = {
            "anchor": self.anchor.to_json(),
            "groups": [group.to_json() for group in self.groups],
            "parity": [asdict(case) for case in self.parity],
        }
        return {**vars(self), **changed}

    @staticmethod
    def from_json(value: JsonObject) -> KitPlan:
        """Read a plan; the inverse of :meth:`to_json`."""
        changed = {
            "anchor": KitItem.from_json(value["anchor"]),
            "groups": tuple(map(KitGroup.from_json, value["groups"])),
            "parity": tuple(ParityCase(**case) for case in value["parity"]),
        }
        return KitPlan(**{**value, **changed})


@dataclass
class GroupResult:
    """Measurement of one group.

    Attributes:
        timings: by item and workload.
        anchor_reference: median time of the anchor, s; None if nothing was timed.
        problems: reasons to distrust the group.
        ended: when it was saved, UTC, ISO 8601.
    """

    timings: dict[str, Timing] = field(default_factory=dict)
    anchor_reference: float | None = None
    problems: list[str] = field(default_factory=list)
    ended: str = ""

    def to_json(self) -> JsonObject:
        """The group as a JSON object."""
        return {**vars(self), "timings": {name: timing.to_json() for name, timing in self.timings.items()}}

    @staticmethod
    def from_json(value: JsonObject) -> GroupResult:
        """Read a group; the inverse of :meth:`to_json`."""
        timings = {name: Timing.from_json(timing) for name, timing in value["timings"].items()}
        return GroupResult(**{**value, "timings": timings})


@dataclass
class KitResult:
    """Everything that a kit measured on a device.

    Attributes:
        kit: digest of the kit's plan.
        fingerprint: identity of the device.
        threads: number of threads of every session.
        groups: the groups measured so far, in the plan's order.
        unsupported: reason by mixer that the device lacks.
        parity: relative error by parity case.
        complete: True once all groups and parity cases are done.
    """

    kit: str
    fingerprint: Fingerprint
    threads: int
    groups: list[GroupResult] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)
    parity: dict[str, float] = field(default_factory=dict)
    complete: bool = False

    def to_json(self) -> JsonObject:
        """The result as a JSON object, with its schema version and checksum."""
        body = {
            "schema": RESULT_SCHEMA,
            **vars(self),
            "fingerprint": self.fingerprint.to_json(),
            "groups": [group.to_json() for group in self.groups],
        }
        return {**body, "checksum": checksum(body)}

    @staticmethod
    def from_json(value: JsonObject) -> KitResult:
        """Read a result; the inverse of :meth:`to_json`.

        Raises:
            ValueError: it is of another schema version, or its checksum does not match.
            KeyError: a field is missing.
        """
        if value["schema"] != RESULT_SCHEMA or value["checksum"] != checksum(value):
            raise ValueError("another schema version, or a checksum that does not match")
        body = {name: item for name, item in value.items() if name not in ("schema", "checksum")}
        changed = {
            "fingerprint": Fingerprint.from_json(value["fingerprint"]),
            "groups": [GroupResult.from_json(group) for group in value["groups"]],
        }
        return KitResult(**{**body, **changed})


def checksum(result: Mapping[str, object]) -> str:
    """Sha256 of a result's JSON object without its own checksum; detects truncation and accidental edits.

    Args:
        result: a JSON object, with or without ``checksum``.
    """
    body = {name: value for name, value in result.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
