"""Peak memory: a known law is recovered, and larger sessions measure larger."""

from pathlib import Path

import numpy as np
import pytest

from latency import OnnxRuntime
from latency.device_runner.io_binding import IoBinding
from latency.predictor.memory import MemoryModel, fit_memory
from latency.runtimes import rss
from latency.runtimes.rss import session_rss
from space import Workload, genome, variation
from space.cost import memory_bytes, params
from tests.contracts import tiny_space

W = Workload.parse("prefill@64")
SPACE = tiny_space(mixer=["attention", "linear", "none"], depth=[1, 2, 3, 4], ffn=[0, 64], width=[16, 32])


def law(genomes: np.ndarray) -> np.ndarray:
    """Weights twice, states and activations once, 300 kB and 20 kB a layer; by a loop over models."""
    found = []
    for a in genome.decode(SPACE, genomes):
        weights = 4 * params(a, SPACE.config)
        found.append(3e5 + 2e4 * a.depth + 2 * weights + memory_bytes(a, W, SPACE.config) - weights)
    return np.array(found)


def test_known_law_is_recovered() -> None:
    rng = np.random.default_rng(0)
    fitted, others = variation.sample(SPACE, rng, 30), variation.sample(SPACE, rng, 100)
    model = fit_memory(SPACE, W, fitted, law(fitted), others, law(others))
    assert model.errors.mape_percent < 0.5
    predicted = model.cost(SPACE, W)(others)
    assert np.abs(predicted / law(others) - 1).max() < 0.02
    assert (model.cost(SPACE, W, 0.9)(others) >= predicted).all()
    assert MemoryModel.from_json(model.to_json()) == model
    middle = model.interpolate(model, 0.3).cost(SPACE, Workload.parse("prefill@32"))(others)
    assert (middle <= predicted).all()


@pytest.mark.skipif(not rss.is_supported(), reason="only Linux tells a process's peak memory")
def test_larger_model_has_larger_rss() -> None:
    large = tiny_space(width=[64, 256], ffn=[0, 1024], depth=[1, 4], heads=[2], max_seq_len=64)
    small_, large_ = genome.smallest(large), genome.largest(large)
    runtime = OnnxRuntime(1)
    few, many = (runtime.rss(a, [W], large.config)[W] for a in (small_, large_))
    assert many - few > 4 * (params(large_, large.config) - params(small_, large.config))
    assert many < 200 * 2**20


@pytest.mark.skipif(not rss.is_supported(), reason="only Linux tells a process's peak memory")
def test_model_that_does_not_run_gives_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(OSError, match=r"model\.onnx does not run") as caught:
        session_rss(path, IoBinding((), ()))
    assert "\n" not in str(caught.value)
