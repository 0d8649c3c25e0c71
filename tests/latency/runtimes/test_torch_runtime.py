"""torch as a runtime: ops, models and profiles; on a GPU if there is one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from latency import ProfileConfig, load_card
from latency.profiling import profile
from latency.runtimes.registry import open_runtime
from latency.runtimes.torch import TorchRuntime
from space import InputError, Workload, genome, variation
from space.ops import space_ops
from tests.contracts import tiny_space

SPACE = tiny_space(mixer=["attention", "linear", "short_conv", "sliding"], window=[8], heads=[1], ffn=[0, 16])
WORKLOADS = [Workload.parse(text) for text in ("prefill@16", "decode@16")]
QUICK = {
    "workloads": ("prefill@16", "decode@16"),
    "block_ms": 0.5,
    "min_rounds": 2,
    "max_rounds": 2,
    "optimal_models": 4,
    "random_models": 3,
    "held_out_models": 3,
    "repeated_models": 1,
    "max_noise": None,
    "max_error": None,
}


@pytest.mark.parametrize("op", space_ops(SPACE), ids=lambda op: op.key)
def test_every_op_runs(op: object) -> None:
    runs = TorchRuntime().stack(op, 2, WORKLOADS, SPACE.config)  # type: ignore[arg-type]
    for run in runs.values():
        run(2)


def test_whole_models_run_in_every_workload() -> None:
    for architecture in genome.decode(SPACE, variation.sample(SPACE, np.random.default_rng(0), 10)):
        for run in TorchRuntime().model(architecture, WORKLOADS, SPACE.config, 0).values():
            run(1)


def test_profile_of_torch_makes_a_card(tmp_path: Path) -> None:
    small = tiny_space(width=[16], heads=[1], depth=[1, 2, 3])
    predictor = profile(small, tmp_path, "here", ProfileConfig(**QUICK, runtime="torch"))
    card = load_card(tmp_path, "here")
    assert card.fingerprint.runtime == "torch"
    assert card.predictor_path("tiny", "torch", 1, "fp32").exists()
    rows = variation.sample(small, np.random.default_rng(0), 20)
    for workload in WORKLOADS:
        assert (predictor.predict(rows, workload) > 0).all()
    with pytest.raises(InputError, match="measured on another device"):
        profile(small, tmp_path, "here", ProfileConfig(**QUICK))


def test_cuda_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="torch sees no CUDA device"):
        open_runtime("torch-cuda", 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in what it imports to compile
def test_compiled_models_run() -> None:
    architecture = genome.largest(SPACE)
    for run in TorchRuntime(compiled=True).model(architecture, WORKLOADS, SPACE.config, 0).values():
        run(2)


@pytest.mark.gpu
def test_gpu_is_profiled(tmp_path: Path) -> None:
    config = ProfileConfig(
        **{**QUICK, "block_ms": 5.0, "min_rounds": 8, "max_rounds": 8}, runtime="torch-cuda"
    )
    predictor = profile(SPACE, tmp_path, "gpu", config)
    assert load_card(tmp_path, "gpu").fingerprint.cpu == torch.cuda.get_device_name()
    rows = variation.sample(SPACE, np.random.default_rng(0), 20)
    assert (predictor.predict(rows, WORKLOADS[0]) > 0).all()
