"""The contract suite refuses mixers whose parts or declarations are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from space.layer import Layer, ModelConfig
from space.mixers import MIXERS, Mixer, MixerCall, Shapes, State, Weights
from space.mixers.recurrent_onnx import norm_heads_nodes, project_parts, recurrence_node
from space.mixers.sliding import sliding_state
from space.testing import MixerContract
from tests.space.mixers.plugin_mixers import DECAYED, NEAR, PLAIN, decayed_forward, shapes

if TYPE_CHECKING:
    from torch import Tensor

    from space.onnx.block import Block


@pytest.fixture(autouse=True)
def without_bad_mixers() -> Iterator[None]:
    """Remove what a test registered."""
    yield
    MIXERS._values.pop("bad", None)


def contract_of(mixer: Mixer) -> MixerContract:
    """The suite of a mixer, which is registered as ``bad``."""
    MIXERS._values["bad"] = replace(mixer, name="bad")
    contract: MixerContract = type("Bad", (MixerContract,), {"mixer": "bad"})()
    return contract


def write_shared_constant(block: Block) -> tuple[str, dict[str, str]]:
    """The writer of ``decayed``, but its decays have a name that all layers share."""
    graph, kv, parts = block.graph, block.layer.kv_heads, project_parts(block)
    heads = graph.constant(f"heads.{kv}", np.array([kv], np.int64))
    shape = graph.add("Concat", graph.size(block.source, 0), graph.size(block.source, 1), heads, axis=0)
    rate = -np.logaddexp(0, block.weights["rate"].astype(np.float64))
    decay = graph.add("Expand", graph.constant("decay", rate.astype(np.float32)), shape)
    out, state = recurrence_node(block, parts["q"], parts["k"], parts["v"], rule="gated", decay=decay)
    return norm_heads_nodes(block, out), {"s": state}


def test_a_constant_that_two_layers_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"constant 'decay' has another value already; .*Block\.constant"):
        contract_of(replace(DECAYED, write=write_shared_constant)).test_the_graph_equals_torch()


def one_shape(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    return shapes(width, 4, 2, model_config)


def extra_matrix(width: int, heads: int, kv_heads: int, model_config: ModelConfig) -> Shapes:
    return shapes(width, heads, kv_heads, model_config) | {"forgotten": (width, width)}


def fixed_state(layer: Layer, width: int, model_config: ModelConfig, batch: int, past: int) -> Shapes:
    return {"s": (batch, 1, 1, 1)}


def double_state(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    out, state = decayed_forward(weights, hidden, call)
    return out, {"s": state["s"].double()}


def wide_window(weights: Weights, hidden: Tensor, call: MixerCall) -> tuple[Tensor, State]:
    """The function of ``near`` with the window 64, whatever the layer has."""
    return NEAR.forward(weights, hidden, call._replace(layer=replace(call.layer, window=64)))


Refused = tuple[Mixer, dict[str, Any], str, str]
REFUSED: dict[str, Refused] = {
    "heads that shapes ignore": (
        PLAIN, {"shapes": one_shape}, "test_shapes_follow_the_heads", "has_heads, but .* depend on heads",
    ),
    "no heads, but shapes of heads": (
        PLAIN, {"has_heads": False}, "test_shapes_are_well_formed", "a dimension is 0",
    ),
    "window that is ignored": (
        NEAR, {"forward": wide_window}, "test_the_window_applies", "the window changes nothing",
    ),
    "matrix that is not declared": (
        PLAIN, {"shapes": extra_matrix}, "test_every_two_dimensional_parameter_is_declared", "forgotten",
    ),
    "full with fixed states": (
        PLAIN, {"state_shapes": fixed_state}, "test_states_grow_as_the_class_says", "class full, but",
    ),
    "linear with growing states": (
        PLAIN, {"mixer_class": "linear"}, "test_states_grow_as_the_class_says", "class linear, but",
    ),
    "linear with a window": (
        NEAR, {"mixer_class": "linear", "state_shapes": sliding_state}, "test_states_grow_as_the_class_says",
        "grow at first",
    ),
    "local that reads all tokens": (
        DECAYED, {"mixer_class": "local"}, "test_outputs_depend_on_the_tokens_of_the_class",
        "class local, but token 63 depends on the first",
    ),
    "no writer": (PLAIN, {"write": None}, "test_the_graph_equals_torch", "write is missing"),
    "states in fp64": (
        DECAYED, {"forward": double_state}, "test_states_have_their_shapes", "states of fp32 weights",
    ),
    "projection that the graph has as a matrix too": (
        NEAR, {"output": "query", "projections": ("out", "near_key", "near_value")},
        "test_declared_matrices_are_matrices", "projection out does not read|output matrix does not write",
    ),
    "function in a function": (
        PLAIN, {"forward": lambda *inputs: inputs}, "test_functions_are_at_the_top_of_a_module",
        "forward is not",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("mixer", "changes", "test", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_declarations_are_refused(
    mixer: Mixer, changes: dict[str, Any], test: str, message: str
) -> None:
    run: Callable[[], None] = getattr(contract_of(replace(mixer, **changes)), test)
    with pytest.raises(AssertionError, match=message):
        run()
    getattr(contract_of(mixer), test)()  # without the changes it passes
