from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch.utils.flop_counter import FlopCounterMode

from space import Architecture, Layer, ModelConfig, Space, Workload, blocks
from space.attention import convolution, projection
from space.attention.convolution import causal_conv
from space.cost import (
    flops,
    flops_table,
    memory_bytes,
    memory_cost,
    op_activation_bytes,
    op_flops,
    op_params,
    op_state_bytes,
    params,
    params_cost,
)
from space.genome import decode, encode
from space.mixers import MIXERS, recurrent_torch, softmax_torch
from space.onnx.graph import Graph
from space.onnx.model import add_embedding, add_ffn, add_head, add_mixer, model_graph
from space.ops import Cost, Footprint, Op, OpTables, count_ops, depths, op_kinds, space_ops
from space.shapes import end_shapes, ffn_shapes, mixer_shapes, model_shapes, state_shapes
from space.variation import sample
from tests.contracts import TINY_SPACES, every_genome, tiny_space, uses_linear_attention

SPACES = {name: tiny_space(**changes) for name, changes in TINY_SPACES.items()}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)

FRAME = ModelConfig(vocab_size=37, max_seq_len=64, head_dim=16)
FRAMES = {
    "tie_embeddings": FRAME,
    "untied": replace(FRAME, tie_embeddings=False),
    "q/k norm": replace(FRAME, qk_norm=True),
    "wide heads": replace(FRAME, head_dim=32),
}
WORKLOADS = [
    Workload.parse(text)
    for text in ("prefill@1", "prefill@21,batch=2", "prefill@40", "decode@1", "decode@13,batch=3")
]
WINDOW = 8
CHOSEN_LAYERS = {
    "attention": Layer(mixer="attention", heads=4, kv_heads=2),
    "sliding": Layer(mixer="sliding", heads=2, kv_heads=2, window=WINDOW),
    "linear": Layer(mixer="linear", heads=3, kv_heads=1),
    "retnet": Layer(mixer="retnet", heads=4, kv_heads=4),
    "mamba2": Layer(mixer="mamba2", heads=4, kv_heads=2),
    "gla": Layer(mixer="gla", heads=4, kv_heads=1),
    "hgrn2": Layer(mixer="hgrn2", heads=4, kv_heads=2),
    "deltanet": Layer(mixer="deltanet", heads=3, kv_heads=3),
    "gated_deltanet": Layer(mixer="gated_deltanet", heads=4, kv_heads=2),
    "kda": Layer(mixer="kda", heads=4, kv_heads=2),
    "short_conv": Layer(mixer="short_conv"),
}


def layer_of(mixer: str) -> Layer:
    """A layer of a mixer that has no chosen one."""
    entry = MIXERS.get(mixer)
    if not entry.has_heads:
        return Layer(mixer=mixer)
    return Layer(mixer=mixer, heads=4, kv_heads=2, window=WINDOW if entry.windowed else 0)


MIXER_LAYERS = {mixer: CHOSEN_LAYERS.get(mixer) or layer_of(mixer) for mixer in (*CHOSEN_LAYERS, *MIXERS)}
each_mixer = pytest.mark.parametrize("mixer", MIXER_LAYERS)
each_frame = pytest.mark.parametrize("model_config", FRAMES.values(), ids=FRAMES)
each_workload = pytest.mark.parametrize("workload", WORKLOADS, ids=str)
EVERYTHING = Architecture(
    48,
    (*(replace(layer, ffn=16 * i) for i, layer in enumerate(MIXER_LAYERS.values())), Layer(), Layer(ffn=96)),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: several are slow for small models on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def only(layer: Layer) -> Architecture:
    return Architecture(32, (layer,))


def bytes_of(states: dict[int, dict[str, torch.Tensor]]) -> int:
    return sum(
        tensor.numel() * tensor.element_size() for state in states.values() for tensor in state.values()
    )


def run_model(model: blocks.Model, workload: Workload) -> dict[int, dict[str, torch.Tensor]]:
    """The states after a workload; preceding tokens are read in one call."""
    tokens = torch.zeros(workload.batch, workload.length, dtype=torch.int64)
    states = None
    with torch.no_grad():
        if workload.past:
            states = model(tokens[:, : workload.past])[1]
        return dict(model(tokens[:, workload.past :], workload.past, states)[1])


# Ops and their tables.


def test_ops_of_architecture() -> None:
    attention = Layer(mixer="attention", heads=4, kv_heads=2, ffn=64)
    sliding = Layer(mixer="sliding", heads=4, kv_heads=4, window=8)
    ops = count_ops(Architecture(48, (attention, Layer(), sliding, attention, Layer(ffn=64))))
    assert {op.key: number for op, number in ops.items()} == {
        "embedding-w48": 1,
        "head-w48": 1,
        "attention-w48-h4-k2": 2,
        "sliding-w48-h4-k4-n8": 1,
        "ffn-w48-f64": 3,
    }


@each_space
def test_space_ops_equal_ops_of_all_architectures(space: Space) -> None:
    found = {op for architecture in decode(space, every_genome(space)) for op in count_ops(architecture)}
    assert set(space_ops(space)) == found
    assert all(a < b for a, b in pairwise(space_ops(space)))
    assert len({op.key for op in found}) == len(found)
    assert op_kinds(space) == tuple(sorted({op.kind for op in found}))


def numbered(space: Space) -> dict[Op, int]:
    """A different whole number for each op, so that sums are exact."""
    numbers = np.random.default_rng(0).permutation(10_000)[: len(space_ops(space))]
    return dict(zip(space_ops(space), (1 + numbers).tolist(), strict=True))


def counted(space: Space, genomes: NDArray[Any]) -> NDArray[np.int64]:
    """The dense matrix of op counts [N, ops]."""
    ops = space_ops(space)
    counts = [count_ops(architecture) for architecture in decode(space, genomes)]
    return np.array([[count[op] for op in ops] for count in counts])


@each_space
def test_tables_agree_with_counted_ops(space: Space) -> None:
    genomes, ops, numbers = every_genome(space), space_ops(space), numbered(space)
    dense, values = counted(space, genomes), np.array(list(numbers.values()))
    tables = OpTables(space, numbers.__getitem__)
    np.testing.assert_array_equal(tables.totals(genomes), dense @ values)
    np.testing.assert_array_equal(tables.greatest(genomes), np.where(dense > 0, values, 0).max(axis=1))
    by_kind = tables.by_kind(genomes)
    for column, kind in enumerate(op_kinds(space)):
        of_kind = np.array([op.kind == kind for op in ops])
        np.testing.assert_array_equal(by_kind[:, column], dense @ (values * of_kind))
    assert by_kind.shape == (len(genomes), len(op_kinds(space)))
    np.testing.assert_array_equal(depths(genomes), [a.depth for a in decode(space, genomes)])
    assert tables.totals(genomes[:0]).shape == (0,)


@each_space
def test_gathered_numbers_are_in_their_slot(space: Space) -> None:
    genomes, numbers = every_genome(space)[:200], numbered(space)
    mixers, ffns = OpTables(space, numbers.__getitem__).gather(genomes)
    for row, architecture in enumerate(decode(space, genomes)):
        for slot, layer in enumerate(architecture.layers):
            alone = Counter(count_ops(Architecture(architecture.width, (layer,))))
            found = {op.kind: numbers[op] for op in alone if op.kind not in ("embedding", "head")}
            assert ffns[row, slot] == found.pop("ffn", 0)
            assert mixers[row, slot] == sum(found.values())


@each_space
def test_cost_adds_constant_layers_sum_shared_and_maximum(space: Space) -> None:
    genomes, numbers = every_genome(space)[::3], numbered(space)
    table, peak = OpTables(space, numbers.__getitem__), OpTables(space, lambda op: 7 * numbers[op] % 1013)
    without = Cost(table, constant=3.0, per_layer=0.5)(genomes)
    with_peak = Cost(table, constant=3.0, per_layer=0.5, max_op=peak)(genomes)
    with_shared = Cost(table, constant=3.0, per_layer=0.5, shared=(0.25, 2.0, 16.0))(genomes)
    for i, architecture in enumerate(decode(space, genomes)):
        ops = count_ops(architecture)
        expected = 3 + 0.5 * architecture.depth + sum(n * numbers[op] for op, n in ops.items())
        assert without[i] == expected
        classes = {space.mixer_class(layer.mixer) for layer in architecture.layers if layer.mixer != "none"}
        shared = 0.25 * ("full" in classes) + 2.0 * ("linear" in classes) + 16.0 * ("local" in classes)
        assert with_shared[i] == expected + shared
        assert with_peak[i] == expected + max(7 * numbers[op] % 1013 for op in ops)


def climbed(footprint: Footprint, total: float) -> float:
    """A footprint's cost at a sum, piece by piece."""
    ends = [*footprint.starts[1:], np.inf]
    parts = zip(footprint.starts, ends, footprint.slopes, strict=True)
    return sum(slope * max(0.0, min(total, end) - start) for start, end, slope in parts)


@each_space
def test_footprint_adds_its_slope_on_each_piece(space: Space) -> None:
    genomes, numbers = every_genome(space)[::3], numbered(space)
    table, sums = OpTables(space, numbers.__getitem__), OpTables(space, lambda op: 7 * numbers[op] % 1013)
    held = sums.totals(genomes)
    low, high = float(held.min()), float(held.max())
    middle = (low + high + 1) / 2
    for starts, slopes in (
        ((0.0,), (2.0,)),
        ((0.0, middle), (0.0, 3.0)),
        ((0.0, low, middle, high + 1), (1.0, 4.0, 0.0, 0.5)),
        ((0.0, middle, high + 1), (0.25, 9.0, 0.5)),
    ):
        footprint = Footprint(sums, starts, slopes)
        expected = [climbed(footprint, total) for total in held]
        np.testing.assert_allclose(footprint(held), expected, rtol=1e-12)
        np.testing.assert_array_equal(footprint(np.array(starts)), footprint.heights)
        assert footprint(np.zeros(1)) == [0.0]
        cost = Cost(table, constant=3.0, footprint=footprint)
        np.testing.assert_allclose(cost(genomes), Cost(table, constant=3.0)(genomes) + expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("starts", "slopes", "number"),
    [
        ((), (), 1.0),
        ((1.0,), (1.0,), 1.0),
        ((0.0, 2.0, 2.0), (1.0, 1.0, 1.0), 1.0),
        ((0.0, 2.0), (1.0,), 1.0),
        ((0.0, 2.0), (1.0, -1.0), 1.0),
        ((0.0,), (np.inf,), 1.0),
        ((0.0,), (1.0,), -1.0),
        ((0.0,), (1.0,), np.inf),
    ],
)
def test_footprint_that_may_fall_is_refused(
    starts: tuple[float, ...], slopes: tuple[float, ...], number: float
) -> None:
    with pytest.raises(ValueError, match=r"at least 0|rise from 0"):
        Footprint(OpTables(SPACES["plain"], lambda _: number), starts, slopes)


@each_space
@each_workload
def test_costs_of_genomes_equal_costs_of_architectures(space: Space, workload: Workload) -> None:
    genomes, model_config = sample(space, np.random.default_rng(0), 40), space.config
    architectures = decode(space, genomes)
    memory = [memory_bytes(a, workload, model_config) for a in architectures]
    np.testing.assert_array_equal(memory_cost(space, workload)(genomes), memory)
    np.testing.assert_array_equal(
        params_cost(space)(genomes), [params(a, model_config) for a in architectures]
    )
    work = [flops(a, workload, model_config) for a in architectures]
    np.testing.assert_array_equal(flops_table(space, workload).totals(genomes), work)


# Against the built module.


@each_frame
def test_params_equal_module_parameters(model_config: ModelConfig) -> None:
    architectures = [EVERYTHING, *(only(replace(layer, ffn=16)) for layer in MIXER_LAYERS.values())]
    for architecture in architectures:
        built = sum(parameter.numel() for parameter in blocks.Model(architecture, model_config).parameters())
        assert params(architecture, model_config) == built


@each_space
def test_params_equal_sum_of_shapes(space: Space) -> None:
    for architecture in decode(space, every_genome(space)[::7]):
        shapes = model_shapes(architecture, space.config)
        assert params(architecture, space.config) == sum(map(prod, shapes.values()))


@each_mixer
@pytest.mark.parametrize("tokens", [1, 2, 3, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 3 * WINDOW + 5])
def test_state_bytes_equal_module_states(mixer: str, tokens: int) -> None:
    architecture = Architecture(32, (MIXER_LAYERS[mixer], Layer(), replace(MIXER_LAYERS[mixer], ffn=16)))
    model = blocks.Model(architecture, FRAME)
    for phase in ("prefill", "decode"):
        workload = Workload(phase=phase, length=tokens, batch=2)
        expected = sum(n * op_state_bytes(op, workload, FRAME) for op, n in count_ops(architecture).items())
        assert expected == bytes_of(run_model(model, workload)) > 0


def mixing_flops(layer: Layer, workload: Workload, model_config: ModelConfig) -> int:
    """FLOPs of the mixing itself: its multiply-adds, counted one by one, times two."""
    width, done = model_config.head_dim, 0
    for place in range(workload.past, workload.length):
        if layer.mixer == "short_conv":
            continue
        if layer.mixer in ("attention", "sliding"):
            seen = [key for key in range(place + 1) if not layer.window or place - key < layer.window]
            done += layer.heads * len(seen) * 2 * width  # a score and a weighted value
            continue
        done += layer.kv_heads * width * width  # k v^T into the state
        done += layer.heads * width * width  # the state times q
        if "delta" in layer.mixer or layer.mixer == "kda":
            done += layer.kv_heads * width * width  # the state times k, before it is written
    return 2 * workload.batch * done


@each_mixer
@each_workload
@each_frame
def test_flops_equal_counted_products_and_mixing(
    mixer: str, workload: Workload, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts the projections; convolution and mixing are counted in the test."""
    if mixer not in CHOSEN_LAYERS and not uses_linear_attention(mixer):
        pytest.skip(f"mixing_flops has no count of {mixer}")
    layer = replace(MIXER_LAYERS[mixer], ffn=48)
    model = blocks.Model(only(layer), model_config)
    tokens = torch.zeros(workload.batch, workload.length, dtype=torch.int64)
    counted = []

    def counting(function: Any) -> Any:
        def call(*inputs: torch.Tensor) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = function(*inputs)
            counted.append(counter.get_total_flops())
            return result

        return call

    def convolving(x: torch.Tensor, taps: torch.Tensor, past: torch.Tensor | None) -> Any:
        counted.append(2 * x.numel() * taps.shape[1])
        return causal_conv(x, taps, past)

    with torch.no_grad():
        states = model(tokens[:, : workload.past])[1] if workload.past else None
        counted_project = counting(projection.project)
        for module in (blocks, projection, recurrent_torch, softmax_torch):
            monkeypatch.setattr(module, "project", counted_project)
        for module in (convolution, recurrent_torch):
            monkeypatch.setattr(module, "causal_conv", convolving)
        model(tokens[:, workload.past :], workload.past, states)
    assert min(counted) > 0
    assert flops(only(layer), workload, model_config) == sum(counted) + mixing_flops(
        layer, workload, model_config
    )


def test_flops_of_ops_sum_to_flops_of_architecture() -> None:
    workload = Workload(phase="prefill", length=9)
    by_layer = [
        flops(Architecture(48, (layer,)), workload, FRAME) for layer in EVERYTHING.layers if layer.present
    ]
    head = op_flops(Op(kind="head", width=48), workload, FRAME)
    assert head == 2 * 9 * 48 * 37
    assert flops(EVERYTHING, workload, FRAME) == sum(by_layer) - (len(by_layer) - 1) * head


# Peak activations, against the values of the graph.


def inlined(model: onnx.ModelProto, tokens: int) -> onnx.ModelProto:
    """The graph with every ``If`` replaced by the branch for a number of tokens."""
    found, nodes = onnx.ModelProto(), []
    found.CopyFrom(model)
    for node in found.graph.node:
        if node.op_type != "If":
            nodes.append(node)
            continue
        taken = next(a.g for a in node.attribute if (a.name == "then_branch") == (tokens == 1))
        names = {old.name: new for old, new in zip(taken.output, node.output, strict=True)}
        for inner in taken.node:
            inner.output[:] = [names.get(name, name) for name in inner.output]
            nodes.append(inner)
    del found.graph.node[:]
    found.graph.node.extend(nodes)
    return found


def run_with_all_values(model: onnx.ModelProto, feed: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Every value of a graph, by running its nodes one by one."""
    open_model = onnx.ModelProto()
    open_model.CopyFrom(model)
    known = {output.name for output in open_model.graph.output}
    for node in open_model.graph.node:
        for name in node.output:
            if name and name not in known:
                open_model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        open_model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, feed)
    return feed | dict(zip(names, values, strict=True))


def peak_bytes(model: onnx.ModelProto, feed: dict[str, NDArray[Any]], result: str) -> int:
    """The most bytes of float values that are alive at one node, its inputs and outputs included.

    Weights, what is computed from weights alone, and states do not count. A value is alive from
    the node that makes it to the last that reads it; the result to the end.
    """
    given = feed["tokens"] if "tokens" in feed else feed["x"]  # [B, T] or [B, T, width]
    model = inlined(model, given.shape[1] if given.ndim > 1 else 1)
    nodes = model.graph.node
    constant = {tensor.name for tensor in model.graph.initializer}
    for node in nodes:
        if constant.issuperset(name for name in node.input if name):
            constant.update(node.output)
    born, dies = dict.fromkeys(feed, 0), {}
    for step, node in enumerate(nodes):
        born |= dict.fromkeys(node.output, step)
        dies |= dict.fromkeys((*node.output, *node.input), step)
    dies[result] = len(nodes)
    sizes = {
        name: value.nbytes
        for name, value in run_with_all_values(model, feed).items()
        if value.dtype == np.float32 and name not in constant and not name.startswith("state.")
    }
    return max(
        sum(size for name, size in sizes.items() if born[name] <= step <= dies.get(name, -1))
        for step in range(len(nodes))
    )


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def op_peak_bytes(op: Op, workload: Workload, model_config: ModelConfig) -> int:
    """The peak of a graph that consists of one op."""
    graph, feed = Graph(model_config), dict[str, NDArray[Any]]()
    if op.kind == "embedding":
        feed["tokens"] = np.zeros((workload.batch, workload.tokens), np.int64)
        tokens = graph.input("tokens", TensorProto.INT64, ["batch", "length"])
        result = add_embedding(graph, tokens, drawn(end_shapes(op.width, model_config))["embedding"])
    else:
        feed["x"] = np.ones((workload.batch, workload.tokens, op.width), np.float32)
        x = graph.input("x", TensorProto.FLOAT, ["batch", "length", op.width])
        if op.kind == "head":
            weights = drawn(end_shapes(op.width, model_config))
            matrix = graph.constant("head", weights.get("head", weights["embedding"]))
            result = add_head(graph, x, weights["norm"], matrix)
        elif op.kind == "ffn":
            result = add_ffn(graph, x, 0, drawn(ffn_shapes(op.width, op.ffn)))
        else:
            graph.input("position", TensorProto.INT64, [1])
            weights = drawn(mixer_shapes(op.kind, op.width, op.heads, op.kv_heads, model_config))
            result = add_mixer(graph, x, 0, op.layer, weights, x)
            states = state_shapes(op.layer, op.width, model_config, workload.batch, workload.past)
            feed |= {f"state.0.{name}": np.zeros(shape, np.float32) for name, shape in states.items()}
            feed["position"] = np.array([workload.past])
        if op.kind != "head":  # in a model the next op's norm follows
            graph.norm(result, "next", np.ones(op.width))
    graph.outputs.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, None))
    return peak_bytes(graph.model(), feed, result)


def test_peak_of_known_graph() -> None:
    """x and the first sum are freed at the second, where a third value is created; weights do not count."""
    graph = Graph(FRAME)
    x = graph.input("x", TensorProto.FLOAT, [3])
    weight = graph.constant("w", np.ones((3, 50), np.float32))
    first = graph.add("Add", x, x)
    wide = graph.add("MatMul", graph.add("Add", first, x), weight)
    result = graph.add("ReduceSum", wide)
    graph.outputs.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, None))
    assert peak_bytes(graph.model(), {"x": np.ones(3, np.float32)}, result) == 4 * (3 + 50)
    assert peak_bytes(graph.model(), {"x": np.ones(3, np.float32)}, first) == 4 * (3 + 3 + 50)


ACTIVATION_OPS = [
    *(Op(kind=kind, width=width) for kind in ("embedding", "head") for width in (16, 64)),
    *(Op(kind="ffn", width=width, ffn=ffn) for width in (16, 128) for ffn in (16, 32, 256)),
    *(
        Op(kind=kind, width=width, heads=heads, kv_heads=kv, window=layer.window)
        for kind, layer in MIXER_LAYERS.items()
        for width in (16, 80, 400)
        for heads, kv in ((1, 1), (4, 1), (6, 3))
        if layer.heads
    ),
    *(
        Op(kind=kind, width=width)
        for kind, layer in MIXER_LAYERS.items()
        for width in (16, 80, 400)
        if not layer.heads
    ),
]


@pytest.mark.parametrize("op", ACTIVATION_OPS, ids=[op.key for op in ACTIVATION_OPS])
def test_activation_bytes_equal_peak_of_op_graph(op: Op) -> None:
    for model_config in (FRAMES["untied"], FRAMES["q/k norm"]):
        for workload in WORKLOADS:
            assert op_activation_bytes(op, workload, model_config) == op_peak_bytes(
                op, workload, model_config
            ), workload


@each_workload
def test_memory_equals_weights_states_and_peak_of_graph(workload: Workload) -> None:
    """All but retnet's decays, which its layers share and which stay alive after their first use."""
    for model_config in (FRAME, FRAMES["q/k norm"]):
        for layers in ([m] for m in MIXER_LAYERS.values()), [[*MIXER_LAYERS.values()]]:
            for mixers in layers:
                architecture = Architecture(48, tuple(replace(layer, ffn=32) for layer in mixers))
                model = blocks.Model(architecture, model_config)
                weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
                feed: dict[str, NDArray[Any]] = {
                    "tokens": np.zeros((workload.batch, workload.tokens), np.int64),
                    "position": np.array([workload.past]),
                }
                for slot, layer in enumerate(architecture.layers):
                    shapes = state_shapes(layer, 48, model_config, workload.batch, workload.past)
                    for name, shape in shapes.items():
                        feed[f"state.{slot}.{name}"] = np.zeros(shape, np.float32)
                graph = model_graph(architecture, model_config, weights)
                held = sum(4 * weight.size for weight in weights.values()) + bytes_of(
                    run_model(model, workload)
                )
                shared = 4 * workload.batch * workload.tokens * MIXER_LAYERS["retnet"].kv_heads
                slack = shared if any(layer.mixer == "retnet" for layer in mixers) else 0
                measured = held + peak_bytes(graph, feed, "logits")
                assert 0 <= measured - memory_bytes(architecture, workload, model_config) <= slack


def test_params_of_embedding_and_head() -> None:
    """A tied head's matrix is the embedding's and counts once."""
    tied, untied = FRAME, FRAMES["untied"]
    assert op_params(Op(kind="embedding", width=32), tied) == 37 * 32
    assert op_params(Op(kind="head", width=32), tied) == 32
    assert op_params(Op(kind="head", width=32), untied) == 32 + 37 * 32


def test_cost_of_encoded_architecture_equals_cost() -> None:
    space = SPACES["plain"]
    architecture = decode(space, every_genome(space)[-1:])[0]
    assert params_cost(space)(encode(space, [architecture]))[0] == params(architecture, space.config)
