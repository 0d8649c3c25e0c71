"""Parity of sub-network, sub-model and graph in fp32 with fp64, and judging of limits."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from search.engine.choice import Choice
from search.engine.verification import LatencyMeasurement, describe_unmeasured
from search.submodel.export import export_onnx
from search.submodel.parity import parity, relative_error
from search.submodel.verify import judge
from space import Architecture, InputError, Layer, genome, variation
from space.blocks import Model
from space.io.artefact import canonical_json
from space.mixers import MIXERS
from supernet.extract import read_submodel, write_submodel
from supernet.supernet import Supernet
from tests.contracts import change_mixer, scatter, tiny_space, unknown_operator

SPACE = tiny_space(
    width=[32, 48, 64],
    depth=[1, 2, 3, 4],
    mixer=[*MIXERS, "none"],
    heads=[1, 2, 4],
    kv_heads=[1, 2],
    ffn=[0, 32, 64],
    window=[8, 16],
    ratios=["full", 1, 3, "linear"],
    vocab_size=61,
)
MEASURED = LatencyMeasurement(
    latency_ms=1.5, interval_ms=(1.4, 1.6), copies_ms=(1.5,), clock_ms=1.5, problems=()
)
ARCHITECTURES = genome.decode(SPACE, variation.sample(SPACE, np.random.default_rng(4), 20))


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    made = Supernet(SPACE)
    scatter(made)
    return made.requires_grad_(False)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.key)
def test_parity_of_twenty_architectures(
    architecture: Architecture, supernet: Supernet, tmp_path: Path
) -> None:
    submodel = write_submodel(tmp_path, supernet, architecture, {}, {})
    export_onnx(submodel)
    found = parity(submodel, tokens=40)
    assert set(found.errors) == {
        f"{who}_{way}" for who in ("torch", "onnx") for way in ("prefill", "split", "decode")
    }
    assert found.worst <= 1e-5, found
    assert found.kept

    # The sub-network inside the supernet, prefill and token by token, against the sub-model in fp64.
    precise = Model(architecture, SPACE.config).double()
    precise.load_state_dict({k: v.double() for k, v in submodel.model().state_dict().items()})
    text = torch.from_numpy(np.random.default_rng(0).integers(0, 61, (1, 40)))
    with torch.no_grad():
        expected = precise(text)[0].numpy()
        states, steps = None, []
        for t in range(40):
            out, states = supernet(text[:, t : t + 1], architecture, t, states)
            steps.append(out.numpy())
        assert relative_error(supernet(text, architecture)[0].numpy(), expected) <= 1e-5
        assert relative_error(np.concatenate(steps, axis=1), expected) <= 1e-5


def test_twenty_architectures_cover_the_mixers() -> None:
    mixers = {layer.mixer for a in ARCHITECTURES for layer in a.layers}
    assert mixers == {*MIXERS, "none"}
    assert any(layer.heads > layer.kv_heads for a in ARCHITECTURES for layer in a.layers)
    assert any(not layer.present for a in ARCHITECTURES for layer in a.layers)


def test_parity_detects_a_changed_weight(supernet: Supernet, tmp_path: Path) -> None:
    submodel = write_submodel(tmp_path, supernet, genome.largest(SPACE), {}, {})
    path = export_onnx(submodel)
    model = onnx.load(path)
    weight = next(t for t in model.graph.initializer if t.name.endswith("mixer.o"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 0.1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)
    assert not parity(submodel, tokens=20).kept


def test_graph_metadata(supernet: Supernet, tmp_path: Path) -> None:
    architecture = genome.largest(SPACE)
    path = export_onnx(write_submodel(tmp_path, supernet, architecture, {}, {"limits": []}))
    metadata = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert metadata["formfit.key"] == architecture.key
    assert metadata["formfit.architecture"] == canonical_json(architecture.to_json())
    assert (metadata["formfit.vocab_size"], metadata["formfit.max_seq_len"]) == ("61", "64")
    assert (metadata["formfit.precision"], metadata["formfit.tokenizer"]) == ("fp32", "bytes")
    assert json.loads(metadata["formfit.limits"]) == []


def test_damaged_submodel_is_refused(supernet: Supernet, tmp_path: Path) -> None:
    submodel = write_submodel(tmp_path, supernet, genome.largest(SPACE), {}, {})
    export_onnx(submodel)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="not a whole weights file"):
        read_submodel(tmp_path).model()
    other = write_submodel(tmp_path / "other", supernet, genome.smallest(SPACE), {}, {})
    (tmp_path / "model.safetensors").write_bytes((other.folder / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="not the weights of architecture"):
        read_submodel(tmp_path).model()
    graph = (tmp_path / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(graph[: len(graph) // 2])
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="cannot run it"):
        parity(read_submodel(tmp_path), 8)
    value = json.loads((tmp_path / "architecture.json").read_text())
    value["architecture"]["width"] = 32
    (tmp_path / "architecture.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="but its architecture has"):
        read_submodel(tmp_path)


def test_mixer_missing_in_the_runtime_is_named(
    supernet: Supernet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_mixer(monkeypatch, "gla", write=unknown_operator)
    layers = (Layer(mixer="gla", heads=1, kv_heads=1), Layer(mixer="linear", heads=1, kv_heads=1))
    architecture = Architecture(32, (*layers, Layer(ffn=32), Layer(ffn=32)))
    submodel = write_submodel(tmp_path, supernet, architecture, {}, {})
    export_onnx(submodel)
    with pytest.raises(InputError, match=r"model.onnx: mixer gla: onnxruntime \S+ cannot run it .*Nowhere"):
        parity(submodel, tokens=8)


def test_limits_are_judged_by_measurements(supernet: Supernet, tmp_path: Path) -> None:
    limits = [
        {"limit": "prefill@64<=2ms", "bound": 0.002, "unit": "seconds"},
        {"limit": "decode@64<=1ms", "bound": 0.001, "unit": "seconds"},
        {"limit": "params<=1K", "bound": 1000.0, "unit": "parameters"},
        {"limit": "rss@64<=1KB", "bound": 1000.0, "unit": "bytes"},
    ]
    submodel = write_submodel(tmp_path, supernet, genome.largest(SPACE), {}, {"limits": limits})
    results = judge(submodel, "desk", {"prefill@64": MEASURED}, {"prefill@64": 900})
    assert [result.status for result in results] == ["kept", "UNMEASURED", "missed", "kept"]
    assert results[0].used == pytest.approx(0.75)


def test_limits_on_another_device_stay_unmeasured(supernet: Supernet, tmp_path: Path) -> None:
    """A limit without a device is on the first device that the model was chosen for."""
    limits = [
        {"limit": "prefill@64<=2ms", "bound": 0.002, "unit": "seconds"},
        {"limit": "phone:prefill@64<=1ms", "bound": 0.001, "unit": "seconds"},
        {"limit": "phone:rss@64<=1KB", "bound": 1000.0, "unit": "bytes"},
        {"limit": "params<=100M", "bound": 1e8, "unit": "parameters"},
    ]
    chosen = {"limits": limits, "predicted": {"params": 1, "latency": {"desk": {}, "phone": {}}}}
    submodel = write_submodel(tmp_path, supernet, genome.largest(SPACE), {}, chosen)
    found = {"prefill@64": MEASURED}, {"prefill@64": 900}
    here, there = judge(submodel, "desk", *found), judge(submodel, "phone", *found)
    choice = Choice.from_json(chosen)
    assert describe_unmeasured(here, choice, "desk") == (
        "limits that were not measured: phone:prefill@64<=1ms (it is on device phone); "
        "phone:rss@64<=1KB (it is on device phone)"
    )
    assert describe_unmeasured(there, choice, "phone").endswith(": prefill@64<=2ms (it is on device desk)")
    without = judge(submodel, "phone", {}, {})
    assert "phone:prefill@64<=1ms (prefill@64 was not timed on phone)" in describe_unmeasured(
        without, choice, "phone"
    )
    assert "phone:rss@64<=1KB (kits and some runtimes cannot measure rss)" in describe_unmeasured(
        without, choice, "phone"
    )
    assert describe_unmeasured([here[0], here[3]], choice, "desk") == ""
    assert [result.status for result in here] == ["kept", *["UNMEASURED"] * 2, "kept"]
    assert [result.status for result in there] == [
        "UNMEASURED",
        "missed",
        "kept",
        "kept",
    ]
