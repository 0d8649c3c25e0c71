"""Runtimes by name, built in and registered by others."""

import json
from pathlib import Path

import numpy as np
import pytest

from latency import ProfileConfig, load_card, load_predictor, profile, register_runtime
from latency.device_runner.fingerprint import Fingerprint
from latency.device_runner.timer import Run
from latency.runtimes.onnxruntime import OnnxRuntime
from latency.runtimes.protocol import Runtime
from latency.runtimes.registry import (
    RUNTIMES,
    graph_version,
    local_fingerprint,
    open_card_runtime,
    open_runtime,
    precisions,
)
from latency.testing import RuntimeContract
from space import InputError, ModelConfig, Workload, variation
from space.onnx.graph import VERSION
from space.ops import Op
from tests.contracts import tiny_space

QUICK = ProfileConfig(
    workloads=("prefill@16", "decode@16"),
    block_ms=0.5,
    min_rounds=2,
    max_rounds=2,
    optimal_models=4,
    random_models=3,
    held_out_models=3,
    repeated_models=1,
    max_noise=None,
    max_error=None,
)


class FullOnly(OnnxRuntime):
    """A plug-in's runtime: it has full attention and no other mixer."""

    name = "full-only"
    supports_rss = False

    def fingerprint(self) -> Fingerprint:
        return Fingerprint.local(self.name, "1.0")

    def stack(
        self, op: Op, height: int, workloads: list[Workload], model_config: ModelConfig
    ) -> dict[Workload, Run]:
        if op.kind not in ("embedding", "head", "ffn", "attention"):
            raise InputError(f"mixer {op.kind}: runtime {self.name} does not have it")
        return super().stack(op, height, workloads, model_config)

    def model(self, architecture, workloads, model_config, seed):  # type: ignore[no-untyped-def]
        for layer in architecture.layers:
            if layer.mixer not in ("none", "attention"):
                raise InputError(f"mixer {layer.mixer}: runtime {self.name} does not have it")
        return super().model(architecture, workloads, model_config, seed)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RUNTIMES.builtin:  # a module registers once a process: not into what is undone here
        RUNTIMES.get(name)
    monkeypatch.setattr(RUNTIMES, "_values", dict(RUNTIMES._values))
    register_runtime("full-only", FullOnly)


class TestFullOnly(RuntimeContract):
    layers = RuntimeContract.layers[:2]

    def open(self, threads: int = 1) -> Runtime:
        return FullOnly(threads)


def test_registered_runtime_is_profiled_like_a_built_in_one(tmp_path: Path) -> None:
    space = tiny_space(
        mixer=["attention"], ratios=["full"], width=[16], heads=[1], depth=[1, 2, 3], ffn=[0, 16]
    )
    config = QUICK.model_copy(update={"runtime": "full-only"})
    profile(space, tmp_path, "here", ProfileConfig.model_validate(config.model_dump()))
    card = load_card(tmp_path, "here")
    assert json.loads((card.folder / "device.json").read_text())["fingerprint"]["runtime"] == "full-only"
    assert all(name.endswith("graphs0") for name in card.references)
    assert isinstance(open_card_runtime(card), FullOnly)
    assert card.table("memory").empty
    predictor = load_predictor(card.predictor_path("tiny", "full-only", 1, "fp32"), space, "formfit profile")
    rows = variation.sample(space, np.random.default_rng(0), 20)
    assert (predictor.predict(rows, Workload.parse("decode@16")) > 0).all()
    with pytest.raises(InputError, match="rss was not measured"):
        predictor.memory_cost(Workload.parse("prefill@16"))


def test_precision_that_a_runtime_lacks_is_refused() -> None:
    for name in ("torch", "full-only"):
        with pytest.raises(InputError, match=f"runtime {name}: precision int8 is not one of fp32"):
            open_runtime(name, 1, "int8")
    assert precisions("onnxruntime") == ("fp32", "int8", "int8-dynamic")


def test_graph_version_is_known_without_opening() -> None:
    assert [graph_version(name) for name in ("onnxruntime", "torch-cuda", "full-only")] == [VERSION, 0, 0]


def test_taken_and_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="'torch' is registered already"):
        register_runtime("torch", FullOnly)
    with pytest.raises(InputError, match="runtime 'tvm': not one of onnxruntime, torch"):
        open_runtime("tvm", 1)


def test_local_fingerprint_is_the_runtimes_own() -> None:
    assert local_fingerprint("onnxruntime") == OnnxRuntime().fingerprint()
    assert local_fingerprint("torch") == open_runtime("torch", 1).fingerprint()
    with pytest.raises(InputError, match="runtime 'none': not one of"):
        local_fingerprint("none")
