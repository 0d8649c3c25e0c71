"""A mixer whose parts do not fit is refused with one line that names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto

from space import InputError, Layer, ModelConfig
from space.blocks import mixer_block
from space.mixers import MIXERS, register_mixer
from space.onnx.graph import Graph
from space.onnx.model import add_mixer
from space.shapes import mixer_shapes
from tests.contracts import change_mixer
from tests.space.mixers.plugin_mixers import DECAYED

CONFIG = ModelConfig(vocab_size=19, max_seq_len=64, head_dim=16)
LAYER = Layer(mixer="linear", heads=2, kv_heads=1)
SHAPES = mixer_shapes("linear", 32, 2, 1, CONFIG)


def register(**changes: Any) -> None:
    register_mixer(replace(DECAYED, name="bad", **changes))


def write(result: Callable[[Any], Any]) -> None:
    """Append a linear mixer whose writer returns something else."""
    with pytest.MonkeyPatch.context() as patch:
        change_mixer(patch, "linear", write=result)
        graph = Graph(CONFIG)
        x = graph.input("x", TensorProto.FLOAT, ["batch", "length", 32])
        add_mixer(graph, x, 0, LAYER, {name: np.ones(shape) for name, shape in SHAPES.items()}, x)


def run(result: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        change_mixer(patch, "linear", forward=lambda weights, hidden, call: result)
        weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
        mixer_block(weights, torch.ones(1, 3, 32), LAYER, CONFIG)


ERRORS: dict[str, tuple[Callable[[], None], type[Exception], str]] = {
    "output without a shape": (
        lambda: register(output="out"),
        InputError, "mixer bad: output names 'out', which is not among its shapes: pre_norm, q, k, v, o,",
    ),
    "projection without a shape": (
        lambda: register(projections=("q", "k", "w")),
        InputError, "mixer bad: projections names 'w', which is not among its shapes: ",
    ),
    "initialiser without a shape": (
        lambda: register(initial={"gain": DECAYED.initial["rate"]}),
        InputError, "mixer bad: initial names 'gain', which is not among its shapes: ",
    ),
    "state that is not written": (
        lambda: write(lambda block: (block.hidden, {})),
        ValueError, "mixer linear: write returned the states none, but state_shapes has s",
    ),
    "no pair is written": (
        lambda: write(lambda block: block.hidden),
        ValueError, "mixer linear: write returned no pair of an output and states by name: 'v1'",
    ),
    "tuple where a name is expected": (
        lambda: write(lambda block: (block.hidden, {"s": ("a", "b")})),
        ValueError, r"mixer linear: s of write is not the name of a value: \('a', 'b'\)",
    ),
    "array as an input of a node": (
        lambda: write(lambda block: block.graph.add("Add", block.hidden, 3)),
        ValueError, "mixer linear: Add: an input is not the name of a value: 3",
    ),
    "no pair is returned": (
        lambda: run(torch.ones(1)),
        ValueError, "mixer linear: forward returned no pair of an output and states by name",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_a_part_that_does_not_fit_is_one_line(
    call: Callable[[], None], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}") as raised:
        call()
    assert "\n" not in str(raised.value)
    assert "bad" not in MIXERS.known_names()
