"""Mixers that are registered from outside work in every part: nothing but the registry knows them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from onnx import TensorProto

from latency import OnnxRuntime
from latency.runtimes.torch import TorchRuntime
from search.submodel.decoder import Decoder
from search.submodel.export import export_onnx
from space import Architecture, InputError, Layer, Space, Workload, genome, load_space, variation
from space.blocks import Model
from space.cost import flops, memory_bytes, memory_cost, op_weight_bytes, params, params_cost
from space.mixers import MIXERS, Mixer, mixers_of_class, register_mixer
from space.onnx.model import model_graph
from space.onnx.quantise import quantise
from space.ops import count_ops, has_full, space_ops
from space.testing import MixerContract
from supernet.extract import extract, write_submodel
from supernet.hf.export import load_hf, write_hf
from supernet.supernet import Supernet
from tests.contracts import change_mixer, scatter, tiny_value
from tests.numerics import assert_close
from tests.space.mixers.plugin_mixers import ALL

NAMES = [mixer.name for mixer in ALL]


@pytest.fixture(autouse=True)
def plugins() -> Iterator[None]:
    """The mixers of the plug-in, registered until the test ends."""
    for mixer in ALL:
        register_mixer(mixer)
    yield
    for mixer in ALL:
        del MIXERS._values[mixer.name]


@pytest.fixture
def space(tmp_path: Path) -> Space:
    value = tiny_value(
        width=[16, 32], depth=[2, 3], mixer=["gla", *NAMES, "attention", "none"], heads=[2, 4],
        kv_heads=[1, 2], ffn=[0, 32], window=[4, 8], ratios=["full", 1, "linear"], local="separate",
    )  # fmt: skip
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(value))
    return load_space(tmp_path / "space.yaml")


def layer_of(mixer: Mixer, ffn: int = 0) -> Layer:
    return Layer(mixer=mixer.name, heads=4, kv_heads=2, window=8 if mixer.windowed else 0, ffn=ffn)


def mixed() -> Architecture:
    return Architecture(32, (*(layer_of(mixer, ffn=32) for mixer in ALL), Layer(ffn=32)))


def trained(architecture: Architecture, space: Space) -> Model:
    model = Model(architecture, space.config)
    scatter(model)
    return model.requires_grad_(False)


class TestPlainAttention(MixerContract):
    mixer = "plain_attention"


class TestDecayed(MixerContract):
    mixer = "decayed"


class TestNear(MixerContract):
    mixer = "near"


def test_lists_derive_from_the_registry(space: Space) -> None:
    assert [*MIXERS][-3:] == NAMES
    assert mixers_of_class("full") == ("attention", "plain_attention")
    assert mixers_of_class("local")[-1] == "near"
    assert [space.mixer_class(name) for name in NAMES] == ["full", "linear", "local"]
    assert space.mixer_options[1:6] == (
        ("gla", 0), ("plain_attention", 0), ("decayed", 0), ("near", 4), ("near", 8),
    )  # fmt: skip


def test_describing_every_mixer_imports_neither_torch_nor_onnx() -> None:
    program = (
        "import sys\nfrom space.cost import op_flops\nfrom space.mixers import MIXERS\n"
        "found = [MIXERS.get(name).mixer_class for name in MIXERS]\n"
        "sys.exit(len(found) < 11 or bool({'torch', 'onnx', 'pytest'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_names_that_cannot_be_registered_are_refused() -> None:
    for name in ("a-b", "Ab", "ffn", "shared", "kda", "gla"):
        with pytest.raises(InputError, match=f"mixer '?{name}"):
            register_mixer(replace(ALL[0], name=name))
    with pytest.raises(InputError, match="class 'wide' is not one of full, linear, local"):
        register_mixer(replace(ALL[0], name="wide", mixer_class="wide"))


def test_an_unknown_mixer_is_one_line_that_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(tiny_value(mixer=["attention", "nearest"])))
    with pytest.raises(InputError) as error:
        load_space(tmp_path / "space.yaml")
    (line,) = str(error.value).splitlines()
    known = ", ".join([*MIXERS.builtin, *NAMES])
    assert f"layer.mixer[1]: 'nearest' is not one of {known}, none" in line


def test_genomes_and_costs(space: Space) -> None:
    genomes = variation.sample(space, np.random.default_rng(0), 60)
    architectures = genome.decode(space, genomes)
    assert {layer.mixer for a in architectures for layer in a.layers} >= set(NAMES)
    assert np.array_equal(genome.encode(space, architectures), genomes)
    full = [any(x.mixer in ("attention", "plain_attention") for x in a.layers) for a in architectures]
    assert has_full(space, genomes).tolist() == full
    workload = Workload.parse("decode@16")
    count, memory = params_cost(space)(genomes), memory_cost(space, workload)(genomes)
    for i, architecture in enumerate(architectures):
        assert Architecture.from_json(json.loads(architecture.text)) == architecture
        assert count[i] == params(architecture, space.config)
        assert memory[i] == memory_bytes(architecture, workload, space.config)
        assert flops(architecture, workload, space.config) > 0


def test_subnetworks_are_their_submodels(space: Space) -> None:
    supernet = Supernet(space)
    scatter(supernet)
    names = dict(supernet.named_parameters())
    assert "layers.0.decayed.rate" in names
    assert "layers.0.near.query" in names
    text = torch.randint(space.vocab_size, (2, 15), generator=torch.Generator().manual_seed(0))
    for architecture in genome.decode(space, variation.sample(space, np.random.default_rng(1), 20)):
        model = Model(architecture, space.config)
        model.load_state_dict(extract(supernet, architecture))
        found, _ = supernet(text, architecture)
        assert_close("logits", found, model(text)[0], 1e-5)
        found.logsumexp(-1).sum().backward()


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic"])
def test_quantised_graphs(space: Space, precision: str) -> None:
    model = trained(mixed(), space)
    weights = {name: value.numpy() for name, value in model.named_parameters()}
    graphs = [quantise(model_graph(mixed(), space.config, weights), p) for p in ("fp32", precision)]
    feed = {
        "tokens": np.arange(14)[None] % space.vocab_size,
        "position": np.zeros(1, np.int64),
    }
    found = []
    for graph in graphs:
        session = OnnxRuntime().session(graph)
        states = {
            x.name: np.zeros(
                [1 if d == "batch" else d if isinstance(d, int) else 0 for d in x.shape], np.float32
            )
            for x in session.get_inputs()
            if x.name.startswith("state.")
        }
        found.append(session.run(["logits"], feed | states)[0])
    assert_close(precision, found[1], found[0], 0.05)
    sizes = {TensorProto.FLOAT: 4, TensorProto.UINT8: 1, TensorProto.INT8: 1}
    stored = sum(np.prod(t.dims) * sizes.get(t.data_type, 0) for t in graphs[1].graph.initializer)
    expected = sum(n * op_weight_bytes(op, space.config, precision) for op, n in count_ops(mixed()).items())
    assert expected <= stored < 1.3 * expected + 2048  # and small constants


def test_stacks_of_ops_run_on_both_runtimes(space: Space) -> None:
    workloads = [Workload.parse(text) for text in ("prefill@16", "decode@16", "decode@16,batch=2")]
    ops = [op for op in space_ops(space) if op.kind in NAMES and op.width == 32 and op.heads == 4]
    assert {op.kind for op in ops} == set(NAMES)
    for runtime in (OnnxRuntime(), TorchRuntime()):
        for op in ops:
            for run in runtime.stack(op, 2, workloads, space.config).values():
                run(2)
    assert OnnxRuntime().lacking(mixed().layers, 32, space.config) == []


def test_decoding_equals_torch(space: Space, tmp_path: Path) -> None:
    wide = space.model_copy(update={"depth": (4,)})
    supernet = Supernet(wide)
    scatter(supernet)
    submodel = write_submodel(tmp_path, supernet, mixed(), {}, {})
    decoder = Decoder(export_onnx(submodel), num_kept_states=2)
    assert not decoder.is_rewindable
    text = np.random.default_rng(0).integers(0, space.vocab_size, (1, 24))
    with torch.no_grad():
        expected = submodel.model()(torch.from_numpy(text))[0]
    out, state = decoder(text[:, :11], decoder.start())
    logits = [out]
    for t in range(11, 24):
        out, state = decoder(text[:, t : t + 1], state)
        logits.append(out)
    assert_close("logits", np.concatenate(logits, 1), expected, 1e-5)


OUTSIDE = """
import sys, torch
for name in ("space", "supernet", "latency", "search", "tests"):
    sys.modules[name] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(15)[None]).logits, sys.argv[2])
"""


def test_hugging_face_folders_hold_their_code(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(mixed(), space)
    write_hf(tmp_path / "hf", model.state_dict(), mixed(), space.config, None)
    command = [sys.executable, "-W", "ignore", "-c", OUTSIDE, "hf", "logits.pt"]
    subprocess.run(command, cwd=tmp_path, check=True, env={"HF_HOME": str(tmp_path / "home"), "PATH": ""})
    expected = model(torch.arange(15)[None])[0]
    assert_close("logits", torch.load(tmp_path / "logits.pt"), expected, 1e-5)
    assert_close("here", load_hf(tmp_path / "hf")(torch.arange(15)[None]).logits, expected, 1e-5)
    for change in ({"forward": lambda *inputs: inputs}, {"initial": {"rate": lambda *inputs: inputs}}):
        change_mixer(monkeypatch, "decayed", **change)
        with pytest.raises(
            InputError, match=r"^mixer decayed: its (forward|initial) is not a function at the top"
        ):
            write_hf(tmp_path / "no", model.state_dict(), mixed(), space.config, None)
        monkeypatch.undo()


def needs_numpy(weights: Any, hidden: Any, call: Any) -> Any:
    import numpy as np

    return np.zeros(1)


def test_code_that_a_folder_cannot_hold_is_refused(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(mixed(), space)
    change_mixer(monkeypatch, "near", forward=needs_numpy)
    with pytest.raises(
        InputError, match=r"a Hugging Face folder cannot hold its code .*needs numpy"
    ) as error:
        write_hf(tmp_path, model.state_dict(), mixed(), space.config, None)
    assert "\n" not in str(error.value)
