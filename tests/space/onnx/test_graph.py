"""The writer of graphs: constants, branches and names of outputs."""

from collections.abc import Sequence

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from space import ModelConfig
from space.onnx.graph import Graph

CONFIG = ModelConfig(vocab_size=19, max_seq_len=64, head_dim=16)


def test_a_name_has_one_value() -> None:
    graph = Graph(CONFIG)
    assert graph.scalar("half", 0.5) == graph.scalar("half", 0.5) == "half"
    for value in (np.array(0.25, np.float32), np.array([0.5], np.float32), np.array(0.5)):
        with pytest.raises(ValueError, match="constant 'half' has another value already"):
            graph.constant("half", value)


def test_branches_of_one_value_read_values_that_become_outputs() -> None:
    """The value ``twice`` is read inside both branches after it was renamed to an output."""
    graph = Graph(CONFIG)
    x = graph.input("x", TensorProto.FLOAT, ["n"])
    flag = graph.input("flag", TensorProto.BOOL, [])
    twice = graph.add("Add", x, x)
    made = graph.branch(
        flag,
        lambda inner: (inner.add("Neg", twice),),
        lambda inner: (inner.add("Mul", twice, twice),),
    )
    assert isinstance(made, tuple)
    graph.output("twice", twice, TensorProto.FLOAT, ["n"])
    graph.output("chosen", made[0], TensorProto.FLOAT, ["n"])
    session = onnxruntime.InferenceSession(graph.model().SerializeToString())
    for value, expected in ((True, [-2, -4]), (False, [4, 16])):
        feed = {"x": np.array([1, 2], np.float32), "flag": np.array(value)}
        doubled, chosen = session.run(["twice", "chosen"], feed)
        assert doubled.tolist() == [2, 4]
        assert chosen.tolist() == expected


def test_a_branch_that_returns_a_string_is_refused() -> None:
    graph = Graph(CONFIG)
    with pytest.raises(ValueError, match="then_branch: a branch returns a tuple of names, not 'v1'"):
        graph.branch("flag", lambda inner: inner.add("Neg", "x"), lambda inner: ("x",))


def test_scan_equals_a_loop() -> None:
    graph = Graph(CONFIG)
    x = graph.input("x", TensorProto.FLOAT, ["batch", "length", 3])
    start = graph.input("start", TensorProto.FLOAT, ["batch", 3])
    half = graph.scalar("half", 0.5)

    def step(inner: Graph, states: Sequence[str], inputs: Sequence[str]) -> tuple[list[str], list[str]]:
        average = inner.add("Add", inner.add("Mul", states[0], half), inputs[0])
        return [average], [inner.add("Neg", average)]

    last, outs = graph.scan([start], [x], step)
    graph.output("last", last, TensorProto.FLOAT, ["batch", 3])
    graph.output("outs", outs, TensorProto.FLOAT, ["batch", "length", 3])
    session = onnxruntime.InferenceSession(graph.model().SerializeToString())
    values = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    state, expected = np.ones((2, 3), np.float32), []
    found = session.run(["last", "outs"], {"x": values, "start": state})
    for t in range(5):
        state = 0.5 * state + values[:, t]
        expected.append(-state)
    np.testing.assert_allclose(found[0], state, rtol=1e-6)
    np.testing.assert_allclose(found[1], np.stack(expected, 1), rtol=1e-6)
