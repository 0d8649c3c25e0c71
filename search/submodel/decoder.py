"""An exported model on onnxruntime: prefill, decoding, and rewinding to an earlier state.

A softmax cache is one buffer with the capacity of the whole sequence, bound to the graph's input and output:
a step writes its token in place and copies nothing. Rewinding it is free, because only the tokens before the
current position are read. The other states are small and new after every call, so decoding can continue from
an earlier :class:`State` until its buffers are reused. torch is not imported here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from latency.device_runner.io_binding import session_options
from space import Architecture, InputError, Layer, ModelConfig
from space.mixers import MIXERS
from space.shapes import fixed_shapes_from, state_shapes

MAX_CONTEXT = 1 << 24  # tokens
CHUNK = 256  # tokens per call in prefill: bounds the memory of logits and attention scores
Tokens = NDArray[np.int64]
Values = dict[str, ort.OrtValue]


@dataclass(frozen=True, eq=False)
class State:
    """The states of a model after ``position`` tokens.

    Attributes:
        position: number of tokens read.
        values: state values by the name of the graph's input; caches have the capacity of the whole sequence.
        sequence: the call of :meth:`Decoder.start` that the state descends from.
        slot: index of the ring buffer that holds the small states, and the time of its use; None if the
            states have buffers of their own.
    """

    position: int
    values: Values
    sequence: int
    slot: tuple[int, int] | None = None


class Decoder:
    """An exported model with its states.

    Args:
        path: the ONNX file.
        threads: intra-op threads of the session.
        num_kept_states: number of states before the last one that stay valid in token-by-token decoding.

    Attributes:
        metadata: the graph's metadata, by key.
        architecture: of the model.
        model_config: of the model.

    Raises:
        InputError: there is no such file, it was not exported by formfit, or onnxruntime cannot run it.
    """

    def __init__(self, path: Path, threads: int = 1, num_kept_states: int = 1) -> None:
        if not path.exists():
            raise InputError(f"{path}: not found; `formfit extract --format onnx` writes it")
        self.session = _session(path, threads)
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        try:
            self.architecture = Architecture.from_json(json.loads(self.metadata["formfit.architecture"]))
            self.model_config = ModelConfig.from_json(
                json.loads(self.metadata["formfit.model_config"]), f"{path}: model_config"
            )
            self._check_shapes()
        except (KeyError, ValueError, TypeError, ArithmeticError, RecursionError, InputError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)[:200]
            raise InputError(f"{path}: not a model that formfit exported ({reason})") from None
        self.inputs = {item.name for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs()]
        layers = self.architecture.layers
        in_place = {slot for slot, layer in enumerate(layers) if _cache_in_place(layer)}
        self.caches = {name for name in self.inputs if _slot(name) in in_place}
        # From this position on, all other states have their final shapes, so that buffers can be reused.
        width, others = self.architecture.width, [x for i, x in enumerate(layers) if i not in in_place]
        self.fixed_shapes_from = max(
            (fixed_shapes_from(layer, width, self.model_config) for layer in others), default=0
        )
        self.ring = [_RingSlot(i) for i in range(num_kept_states + 1)]
        self.steps: dict[tuple[int, int], _Step] = {}  # by the slots of the states before and after
        self.sequence = 0

    def _check_shapes(self) -> None:
        """Compare the metadata with the graph's inputs, before buffers of their sizes are made.

        Raises:
            ValueError: they are of different models.
        """
        config, width = self.model_config, self.architecture.width
        if not 0 < config.max_seq_len <= MAX_CONTEXT:
            raise ValueError(f"max_seq_len {config.max_seq_len} is not between 1 and {MAX_CONTEXT}")
        expected: dict[str, tuple[int, ...]] = {"tokens": (1, 1), "position": (1,)}
        for slot, layer in enumerate(self.architecture.layers):
            shapes = state_shapes(layer, width, config, 1, 1)
            expected |= {f"state.{slot}.{name}": shape for name, shape in shapes.items()}
        found = {item.name: item.shape for item in self.session.get_inputs()}
        if found.keys() != expected.keys():
            name = min(found.keys() ^ expected.keys())
            raise ValueError(f"its architecture and its graph differ in input {name}")
        for name, shape in found.items():  # axes of any length have a name
            if len(shape) != len(expected[name]) or any(
                isinstance(size, int) and size != wanted
                for size, wanted in zip(shape, expected[name], strict=True)
            ):
                raise ValueError(f"its architecture and its graph differ in the shape of {name}")
        logits = next((item.shape for item in self.session.get_outputs() if item.name == "logits"), None)
        if not logits or logits[-1] != config.vocab_size:
            raise ValueError(f"its vocab_size {config.vocab_size} is not that of its logits")

    @property
    def is_rewindable(self) -> bool:
        """True if all states are softmax caches, which a smaller position truncates."""
        return all(name in self.caches for name in self.inputs if name.startswith("state."))

    def start(self, batch: int = 1, capacity: int | None = None) -> State:
        """The state before the first token of a new sequence; invalidates the states of the previous one.

        Args:
            batch: number of rows.
            capacity: tokens that the caches can hold; None for the model's ``max_seq_len``.
        """
        self.steps.clear()
        for ring_slot in self.ring:
            ring_slot.values.clear()
        self.sequence += 1
        capacity = min(capacity or self.model_config.max_seq_len, self.model_config.max_seq_len)
        return State(0, self.zeros(batch, capacity), self.sequence)

    def zeros(self, batch: int, capacity: int) -> Values:
        """The states of an empty sequence, by the name of the graph's input.

        Args:
            batch: number of rows.
            capacity: tokens that the caches can hold.
        """
        values = {}
        for slot, layer in enumerate(self.architecture.layers):
            past = capacity if _cache_in_place(layer) else 0
            shapes = state_shapes(layer, self.architecture.width, self.model_config, batch, past)
            for name, shape in shapes.items():
                zeros = np.zeros(shape, np.float32)
                values[f"state.{slot}.{name}"] = ort.OrtValue.ortvalue_from_numpy(zeros)
        return values

    def rewind(self, state: State, position: int) -> State:
        """The state after fewer tokens; only valid if :attr:`is_rewindable`.

        Args:
            state: a state of the current sequence.
            position: the number of tokens to keep.
        """
        return State(position, state.values, state.sequence)

    def read(self, tokens: Sequence[int], state: State) -> tuple[NDArray[Any], State]:
        """Read a sequence in chunks.

        Args:
            tokens: at least one.
            state: the state before them.

        Returns:
            The logits after the last token [vocab_size], and the state.
        """
        row = np.array([tokens], np.int64)
        for start in range(0, row.shape[1], CHUNK):
            logits, state = self(row[:, start : start + CHUNK], state)
        return logits[0, -1], state

    def __call__(self, tokens: Tokens, state: State) -> tuple[NDArray[Any], State]:
        """Read tokens in one call of the graph.

        Args:
            tokens: [B, T].
            state: the state before them.

        Returns:
            The logits [B, T, vocab_size], and the state after the tokens.

        Raises:
            InputError: the sequence would be longer than ``max_seq_len``.
            RuntimeError: the state's buffers were reused.
        """
        end = state.position + tokens.shape[1]
        if end > self.model_config.max_seq_len:
            raise InputError(
                f"{end} tokens are more than the model's context of {self.model_config.max_seq_len}"
            )
        reused = state.slot and self.ring[state.slot[0]].used != state.slot[1]
        if reused or state.sequence != self.sequence:
            raise RuntimeError(f"the state after {state.position} tokens is no longer kept")
        if tokens.shape[1] == 1 and state.position >= self.fixed_shapes_from:
            return self._step(tokens, state)
        bound = self.session.io_binding()
        # The binding does not own these arrays: the names keep them alive until the session has run.
        read, position = np.ascontiguousarray(tokens), np.array([state.position], np.int64)
        bound.bind_cpu_input("tokens", read)
        if "position" in self.inputs:
            bound.bind_cpu_input("position", position)
        for name, value in state.values.items():
            bound.bind_ortvalue_input(name, value)
        for name in self.outputs:
            cache = name.removesuffix(".next")
            if cache in self.caches:
                bound.bind_ortvalue_output(name, state.values[cache])
            else:
                bound.bind_output(name, "cpu")
        self.session.run_with_iobinding(bound)
        outputs = dict(zip(self.outputs, bound.get_outputs(), strict=True))
        # A cache keeps its input value, which owns the memory that the graph wrote to.
        values = {
            name: value if name in self.caches else outputs[f"{name}.next"]
            for name, value in state.values.items()
        }
        # Copied, here and below: the array is a view of the value's memory, which is freed with the value.
        return outputs["logits"].numpy().copy(), State(end, values, state.sequence)

    def _step(self, tokens: Tokens, state: State) -> tuple[NDArray[Any], State]:
        """One token with buffers that are bound once: binding anew takes 0.1 ms with 8 layers."""
        before = state.slot[0] if state.slot else None
        after = min((s for s in self.ring if s.index != before), key=lambda ring_slot: ring_slot.used)
        after.used = 1 + max(ring_slot.used for ring_slot in self.ring)
        if before is None:
            step = self._bound(state, after, len(tokens))
        elif (before, after.index) not in self.steps:
            step = self.steps[before, after.index] = self._bound(state, after, len(tokens))
        else:
            step = self.steps[before, after.index]
        step.tokens[:] = tokens
        step.position[0] = state.position
        self.session.run_with_iobinding(step.binding)
        slot = after.index, after.used
        return step.logits.copy(), State(state.position + 1, step.values, state.sequence, slot)

    def _bound(self, state: State, after: "_RingSlot", batch: int) -> "_Step":
        """A session bound from the buffers of a state to those of a ring slot, which are made if missing."""
        values = dict(state.values)
        for name, value in state.values.items():
            if name not in self.caches:
                if name not in after.values:
                    after.values[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(value.shape(), np.float32))
                values[name] = after.values[name]
        step = _Step(
            self.session.io_binding(),
            np.zeros((batch, 1), np.int64),
            np.zeros(1, np.int64),
            np.zeros((batch, 1, self.model_config.vocab_size), np.float32),
            values,
        )
        ends: dict[str, ort.OrtValue] = {
            name: ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in (("tokens", step.tokens), ("position", step.position), ("logits", step.logits))
        }
        for name in self.inputs:
            step.binding.bind_ortvalue_input(name, ends.get(name) or state.values[name])
        for name in self.outputs:
            step.binding.bind_ortvalue_output(name, ends.get(name) or values[name.removesuffix(".next")])
        return step

    def arrays(self, state: State) -> Mapping[str, NDArray[Any]]:
        """Copies of a state's values as arrays, caches truncated to the tokens read.

        Args:
            state: a state of the current sequence.
        """
        copies = {name: value.numpy().copy() for name, value in state.values.items()}
        return {name: x[:, :, : state.position] if name in self.caches else x for name, x in copies.items()}


@dataclass
class _RingSlot:
    """One ring buffer for the small states, with the time of its last use (a counter)."""

    index: int
    used: int = 0

    def __post_init__(self) -> None:
        self.values: Values = {}


@dataclass
class _Step:
    """A session bound to the buffers of one step; the session reads and writes the arrays' memory."""

    binding: ort.IOBinding
    tokens: Tokens
    position: NDArray[np.int64]
    logits: NDArray[np.float32]
    values: Values


def _slot(name: str) -> int:
    """The slot that an input is a state of; -1 for other inputs."""
    return int(name.split(".")[1]) if name.startswith("state.") else -1


def _cache_in_place(layer: Layer) -> bool:
    return layer.mixer != "none" and MIXERS.get(layer.mixer).cache_in_place


def _session(path: Path, threads: int) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes have no common base but this one
        lacking = _lacking(path)
        reason = str(error).splitlines()[0]
        mixers = f"mixer {', '.join(lacking)}: " if lacking else ""
        remedy = "install another" if lacking else "`formfit extract` writes it"
        text = f"{mixers}onnxruntime {ort.__version__} cannot run it ({reason}); {remedy}"
        raise InputError(f"{path}: {text}") from None


def _lacking(path: Path) -> list[str]:
    """The mixers of a model that cannot be loaded for which this onnxruntime has no operator."""
    import onnx

    from latency.runtimes.onnxruntime import OnnxRuntime

    try:
        found = {item.key: item.value for item in onnx.load_model(path).metadata_props}
        architecture = Architecture.from_json(json.loads(found["formfit.architecture"]))
        model_config = ModelConfig.from_json(json.loads(found["formfit.model_config"]))
    except Exception:  # not a model: protobuf's errors have no common base but this one
        return []
    return OnnxRuntime().lacking(architecture.layers, architecture.width, model_config)
