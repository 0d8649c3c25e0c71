"""An exported model run call by call on onnxruntime alone: prefill, decoding, and going back.

A softmax cache is one buffer with room for the whole context, bound to both ends of the graph: a step
writes its token in place and copies nothing. It needs no going back, since only what lies before a position
is read. The other states are small and new after every call, so an earlier :class:`State` can be continued
from as long as its buffers were not taken again. torch is not imported here.
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
from space import Architecture, InputError, ModelConfig
from space.shapes import state_shapes

CHUNK = 256  # tokens of a prompt read at once, so that logits and scores of a long one need no memory
Tokens = NDArray[np.int64]
Values = dict[str, ort.OrtValue]


@dataclass(frozen=True, eq=False)
class State:
    """What a model carries after ``position`` tokens.

    Attributes:
        position: how many tokens were read.
        values: by the name of the input; a cache has room for more tokens than were read.
        sequence: which call of :meth:`Decoder.start` it goes back to.
        place: the ring buffer that the small states lie in, and when it was taken; None for their own.
    """

    position: int
    values: Values
    sequence: int
    place: tuple[int, int] | None = None


class Decoder:
    """An exported model with its states.

    Args:
        path: of the model.
        threads: of the session.
        kept: how many states before the last one stay valid in step-by-step decoding.

    Attributes:
        metadata: what the export wrote beside the graph.
        architecture: of the model.
        model_config: what its space fixes.
    """

    def __init__(self, path: Path, threads: int = 1, kept: int = 1) -> None:
        if not path.exists():
            raise InputError(f"{path}: not found; `formfit extract --format onnx` writes it")
        self.session = _session(path, threads)
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        try:
            self.architecture = Architecture.from_json(json.loads(self.metadata["formfit.architecture"]))
            self.model_config = ModelConfig(**json.loads(self.metadata["formfit.model_config"]))
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path}: not a model that formfit exported ({error})") from None
        self.inputs = {item.name for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs()]
        layers = self.architecture.layers
        self.caches = {name for name in self.inputs if _mixer(name, layers) == "attention"}
        self.full_from = max((layer.window - 1 for layer in layers if layer.window), default=0)
        self.ring = [_Place(i) for i in range(kept + 1)]
        self.steps: dict[tuple[int, int], _Step] = {}  # by the places of the states before and after
        self.sequence = 0

    @property
    def is_rewindable(self) -> bool:
        """Whether all states are softmax caches, which a smaller position cuts back."""
        return all(name in self.caches for name in self.inputs if name.startswith("state."))

    def start(self, batch: int = 1, room: int | None = None) -> State:
        """The state before the first token of a new sequence; those of the one before are let go.

        Args:
            batch: how many rows.
            room: tokens that the caches have room for; the context, if None.
        """
        self.steps.clear()
        for place in self.ring:
            place.values.clear()
        self.sequence += 1
        room = min(room or self.model_config.max_seq_len, self.model_config.max_seq_len)
        return State(0, self.zeros(batch, room), self.sequence)

    def zeros(self, batch: int, room: int) -> Values:
        """States of an empty sequence."""
        values = {}
        for slot, layer in enumerate(self.architecture.layers):
            past = room if layer.mixer == "attention" else 0
            shapes = state_shapes(layer, self.architecture.width, self.model_config, batch, past)
            for name, shape in shapes.items():
                zeros = np.zeros(shape, np.float32)
                values[f"state.{slot}.{name}"] = ort.OrtValue.ortvalue_from_numpy(zeros)
        return values

    def back(self, state: State, position: int) -> State:
        """The state of fewer tokens, of a model that can go back."""
        return State(position, state.values, state.sequence)

    def read(self, tokens: Sequence[int], state: State) -> tuple[NDArray[Any], State]:
        """Read a sequence, a chunk at a time: the logits after its last token [vocabulary], and the state."""
        row = np.array([tokens], np.int64)
        for start in range(0, row.shape[1], CHUNK):
            logits, state = self(row[:, start : start + CHUNK], state)
        return logits[0, -1], state

    def __call__(self, tokens: Tokens, state: State) -> tuple[NDArray[Any], State]:
        """Tokens [B, T] -> (logits [B, T, vocabulary], state after them).

        Raises:
            InputError: the sequence would be longer than the context.
            RuntimeError: the state's buffers were taken again.
        """
        end = state.position + tokens.shape[1]
        if end > self.model_config.max_seq_len:
            raise InputError(
                f"{end} tokens are more than the model's context of {self.model_config.max_seq_len}"
            )
        taken = state.place and self.ring[state.place[0]].taken != state.place[1]
        if taken or state.sequence != self.sequence:
            raise RuntimeError(f"the state after {state.position} tokens is no longer kept")
        if tokens.shape[1] == 1 and state.position >= self.full_from:
            return self._step(tokens, state)
        bound = self.session.io_binding()
        # A binding does not own the arrays: they live until the session has run.
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
        found = dict(zip(self.outputs, bound.get_outputs(), strict=True))
        # Of a cache the first value is kept: it is the one that owns the memory.
        values = {
            name: value if name in self.caches else found[f"{name}.next"]
            for name, value in state.values.items()
        }
        # A copy, here and below: what a value gives as an array is its memory, which dies with it.
        return found["logits"].numpy().copy(), State(end, values, state.sequence)

    def _step(self, tokens: Tokens, state: State) -> tuple[NDArray[Any], State]:
        """One token, from and to buffers that are bound once: binding anew takes 0.1 ms in 8 layers."""
        before = state.place[0] if state.place else None
        after = min((p for p in self.ring if p.index != before), key=lambda place: place.taken)
        after.taken = 1 + max(place.taken for place in self.ring)
        if before is None:
            step = self._bound(state, after, len(tokens))
        elif (before, after.index) not in self.steps:
            step = self.steps[before, after.index] = self._bound(state, after, len(tokens))
        else:
            step = self.steps[before, after.index]
        step.tokens[:] = tokens
        step.position[0] = state.position
        self.session.run_with_iobinding(step.binding)
        place = after.index, after.taken
        return step.logits.copy(), State(state.position + 1, step.values, state.sequence, place)

    def _bound(self, state: State, after: "_Place", batch: int) -> "_Step":
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
        """Copies of the states as arrays, caches cut to what was read."""
        found = {name: value.numpy().copy() for name, value in state.values.items()}
        return {name: x[:, :, : state.position] if name in self.caches else x for name, x in found.items()}


@dataclass
class _Place:
    """One ring buffer for the small states, and when it was last taken."""

    index: int
    taken: int = 0

    def __post_init__(self) -> None:
        self.values: Values = {}


@dataclass
class _Step:
    """A session bound to the buffers of one step; the arrays are the session's own memory."""

    binding: ort.IOBinding
    tokens: Tokens
    position: NDArray[np.int64]
    logits: NDArray[np.float32]
    values: Values


def _mixer(name: str, layers: Sequence[Any]) -> str:
    """The mixer that an input is the state of; empty for other inputs."""
    return str(layers[int(name.split(".")[1])].mixer) if name.startswith("state.") else ""


def _session(path: Path, threads: int) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes have no common base but this one
        lacking = _lacking(path)
        reason = str(error).splitlines()[0]
        what = f"mixer {', '.join(lacking)}: " if lacking else ""
        then = "install another" if lacking else "`formfit extract` writes it"
        text = f"{what}onnxruntime {ort.__version__} cannot run it ({reason}); {then}"
        raise InputError(f"{path}: {text}") from None


def _lacking(path: Path) -> list[str]:
    """The mixers of a model that onnxruntime cannot load which it does not have."""
    import onnx

    from latency.runtimes.onnxruntime import OnnxRuntime

    try:
        found = {item.key: item.value for item in onnx.load_model(path).metadata_props}
        architecture = Architecture.from_json(json.loads(found["formfit.architecture"]))
        model_config = ModelConfig(**json.loads(found["formfit.model_config"]))
    except Exception:  # not a model at all: protobuf's errors have no common base but this one
        return []
    return OnnxRuntime().lacking(architecture.layers, architecture.width, model_config)
