"""The contract suite refuses mixers whose parts or declarations are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from space.mixers import MIXERS, Mixer
from space.mixers.recurrent_onnx import norm_heads_nodes, project_parts, recurrence_node
from space.testing import MixerContract
from tests.space.mixers.plugin_mixers import DECAYED

if TYPE_CHECKING:
    from space.onnx.block import Block

    Written = tuple[str, dict[str, str]]


@pytest.fixture(autouse=True)
def without_bad_mixers() -> Iterator[None]:
    """Remove what a test registered."""
    yield
    MIXERS._values.pop("bad", None)


def contract_of(mixer: Mixer) -> MixerContract:
    """The suite of a mixer, which is registered as ``bad``."""
    MIXERS._values["bad"] = replace(mixer, name="bad")
    return type("Bad", (MixerContract,), {"mixer": "bad"})()


def write_shared_constant(block: Block) -> Written:
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
