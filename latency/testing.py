"""Contract suite of a runtime, for the tests of a plug-in.

Subclass :class:`RuntimeContract` in a test module; pytest collects its tests::

    class TestMyRuntime(RuntimeContract):
        def open(self, threads: int = 1) -> Runtime:
            return MyRuntime(threads)

The module imports pytest, and nothing else of this package imports the module.
"""
# ruff: noqa: S101

import json
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from latency.device_runner.fingerprint import Fingerprint
from latency.device_runner.timer import Run, TimerConfig, measure
from latency.runtimes.protocol import ExportedModel, Runtime, random_weights
from latency.runtimes.reference import reference_items
from latency.runtimes.registry import graph_version, precisions
from space import Architecture, InputError, Layer, ModelConfig, Workload
from space.mixers import MIXERS
from space.onnx.graph import VERSION
from space.onnx.model import model_graph
from space.onnx.quantise import quantise
from space.ops import Op, mixer_op
from space.precision import PRECISIONS, model_file
from space.shapes import model_shapes

CONFIG = ModelConfig(vocab_size=48, max_seq_len=32, head_dim=16)
WIDTH = 32
WORKLOADS = tuple(
    Workload(phase=phase, length=16, batch=batch) for phase in ("prefill", "decode") for batch in (1, 2)
)
OTHER_OPS = (
    Op(kind="embedding", width=WIDTH),
    Op(kind="head", width=WIDTH),
    Op(kind="ffn", width=WIDTH, ffn=48),
)
MAX_LOGIT_ERROR = 1e-4  # max|a-b| / max|b| of fp32 logits and those of the plain model in fp64
SHORT_HEIGHT, TALL_HEIGHT = 1, 16
MIN_WORK_RATIO = 3.0  # of the times of the two stacks, for an op that dominates its session's overhead
QUICK = TimerConfig(block_ms=0.5, min_rounds=5, max_rounds=5)


def layer_of(mixer: str) -> Layer:
    """A small layer with one mixer and no FFN.

    Args:
        mixer: registered name of the mixer.
    """
    entry = MIXERS.get(mixer)
    heads = (2, 1) if entry.has_heads else (0, 0)
    return Layer(mixer=mixer, heads=heads[0], kv_heads=heads[1], window=8 if entry.windowed else 0)


class RuntimeContract:
    """Tests that every runtime passes.

    Override :meth:`open`, and :attr:`layers` if the runtime lacks some of their mixers.
    """

    layers: tuple[Layer, ...] = (layer_of("attention"), Layer(ffn=48), layer_of("linear"))

    def open(self, threads: int = 1) -> Runtime:
        """The runtime under test, opened for fp32.

        Args:
            threads: number of threads.
        """
        raise NotImplementedError("override RuntimeContract.open")

    @property
    def architecture(self) -> Architecture:
        """A whole model of :attr:`layers`."""
        return Architecture(WIDTH, self.layers)

    def exported(self, folder: Path) -> ExportedModel:
        """A model with random weights, exported in every precision of the runtime.

        Args:
            folder: where its files are written.
        """
        weights = random_weights(model_shapes(self.architecture, CONFIG), 3)
        files = {precision: model_file(folder, precision) for precision in PRECISIONS}
        for precision, path in files.items():
            graph = quantise(model_graph(self.architecture, CONFIG, weights), precision)
            path.write_bytes(graph.SerializeToString())
        return ExportedModel(
            architecture=self.architecture, model_config=CONFIG, files=files, load_weights=lambda: weights
        )

    def test_name_is_registered_and_in_the_fingerprint(self) -> None:
        """The names of the runtime, its registration and its fingerprint are equal."""
        runtime = self.open()
        assert runtime.fingerprint().runtime == runtime.name
        assert "fp32" in precisions(runtime.name)
        assert graph_version(runtime.name) in (0, VERSION)

    def test_fingerprint_is_json_and_stable(self) -> None:
        """Two openings have equal fingerprints, and JSON keeps them."""
        first, second = self.open().fingerprint(), self.open().fingerprint()
        assert first == second
        assert Fingerprint.from_json(json.loads(json.dumps(first.to_json()))) == first
        assert all(first.to_json().values())

    @pytest.mark.parametrize("op", OTHER_OPS, ids=lambda op: op.key)
    def test_stacks_without_mixer_run_in_every_workload(self, op: Op) -> None:
        """Embedding, head and FFN are supported.

        Args:
            op: the op.
        """
        self._run_all(self.open().stack(op, 2, WORKLOADS, CONFIG))

    @pytest.mark.parametrize("name", MIXERS)
    def test_mixer_runs_in_every_workload_or_is_reported_by_name(self, name: str) -> None:
        """An unsupported mixer is an InputError of one line that names it, from stacks and models alike.

        Args:
            name: registered name of the mixer.
        """
        runtime, layer = self.open(), layer_of(name)
        model = Architecture(WIDTH, (layer,))
        try:
            runs, refused = runtime.stack(mixer_op(WIDTH, layer), 2, WORKLOADS, CONFIG), ""
        except InputError as error:
            runs, refused = {}, str(error)
        if refused:
            assert name in refused
            assert "\n" not in refused
            assert layer not in self.layers
            with pytest.raises(InputError, match=name):
                runtime.model(model, WORKLOADS, CONFIG, 0)
        else:
            self._run_all(runs)
            self._run_all(runtime.model(model, WORKLOADS, CONFIG, 0))

    def test_model_runs_in_every_workload(self) -> None:
        """A whole model has a runner for each workload."""
        self._run_all(self.open().model(self.architecture, WORKLOADS, CONFIG, 0))

    def test_taller_stack_costs_more(self) -> None:
        """No copy of a stack is optimised away, and a runner runs as often as it is asked to."""
        op, workload = Op(kind="ffn", width=256, ffn=512), Workload(phase="prefill", length=32)
        config = ModelConfig(vocab_size=48, max_seq_len=32, head_dim=32)
        runtime = self.open()
        short, tall = (
            runtime.stack(op, height, [workload], config)[workload] for height in (SHORT_HEIGHT, TALL_HEIGHT)
        )
        assert self._seconds(tall, 4) > MIN_WORK_RATIO * self._seconds(short, 4)
        assert self._seconds(tall, 16) > MIN_WORK_RATIO / 2 * self._seconds(tall, 4)

    def test_anchors_and_reference_work_are_timed(self) -> None:
        """The timer accepts the runtime's anchors and reference stacks."""
        runtime = self.open()
        measured = measure(reference_items(runtime), runtime.anchors(), QUICK)
        assert all(timing.seconds > 0 for timing in measured.timings.values())

    def test_logits_equal_the_plain_model(self, tmp_path: Path) -> None:
        """The deployed model computes what the plain model computes, whatever the batch.

        Args:
            tmp_path: folder of the model's files.
        """
        exported = self.exported(tmp_path)
        tokens_BT = np.random.default_rng(0).integers(1, CONFIG.vocab_size, (2, 12))
        expected = self._plain_logits(exported, tokens_BT)
        found = self.open().logits(exported, tokens_BT)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= MAX_LOGIT_ERROR * np.abs(expected).max()

    def test_logits_are_deterministic(self, tmp_path: Path) -> None:
        """Two openings compute equal logits.

        Args:
            tmp_path: folder of the model's files.
        """
        exported = self.exported(tmp_path)
        tokens_BT = np.random.default_rng(1).integers(1, CONFIG.vocab_size, (1, 12))
        first, second = (self.open().logits(exported, tokens_BT) for _ in range(2))
        np.testing.assert_array_equal(first, second)

    def test_deployed_model_runs_in_every_workload_and_precision(self, tmp_path: Path) -> None:
        """A trained model has a runner for each workload in each registered precision.

        Args:
            tmp_path: folder of the model's files.
        """
        runtime = self.open()
        workloads = [
            Workload(phase=w.phase, length=w.length, batch=w.batch, precision=precision)
            for w in WORKLOADS
            for precision in precisions(runtime.name)
        ]
        runs = runtime.deploy(self.exported(tmp_path), workloads)
        assert list(runs) == workloads
        for run in runs.values():
            run(2)

    def test_memory_grows_with_the_model(self, tmp_path: Path) -> None:
        """Peak memory is measured in bytes, if it is measured at all.

        Args:
            tmp_path: folder of the model's files.
        """
        runtime, workload = self.open(), WORKLOADS[0]
        if not runtime.supports_rss:
            pytest.skip("the runtime does not measure memory")
        config = ModelConfig(vocab_size=48, max_seq_len=32, head_dim=32)
        small, large = (Architecture(width, (Layer(ffn=4 * width),) * 2) for width in (32, 512))
        few, many = (runtime.rss(a, [workload], config)[workload] for a in (small, large))
        weights = sum(int(np.prod(shape)) for shape in model_shapes(large, config).values())
        assert many - few > 0.9 * 4 * weights
        assert runtime.deployed_rss(self.exported(tmp_path), [workload])[workload] > 0

    @staticmethod
    def _run_all(runs: dict[Workload, Run]) -> None:
        assert list(runs) == list(WORKLOADS)
        for run in runs.values():
            run(2)

    @staticmethod
    def _seconds(run: Run, loops: int) -> float:
        """The fastest of several timings of some loops."""
        run(1)
        times = []
        for _ in range(7):
            began = time.perf_counter()
            run(loops)
            times.append(time.perf_counter() - began)
        return min(times)

    @staticmethod
    def _plain_logits(exported: ExportedModel, tokens_BT: NDArray[np.int64]) -> NDArray[np.float64]:
        """Logits of the plain model in fp64."""
        import torch

        from space.blocks import forward

        weights = {name: torch.from_numpy(w).double() for name, w in exported.load_weights().items()}
        with torch.inference_mode():
            logits, _ = forward(
                weights, exported.architecture, exported.model_config, torch.from_numpy(tokens_BT)
            )
        return np.asarray(logits.numpy())
