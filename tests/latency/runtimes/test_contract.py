"""The shipped contract suite of a runtime, on the built-in runtimes."""

from latency.runtimes.onnxruntime import OnnxRuntime
from latency.runtimes.protocol import Runtime
from latency.runtimes.torch import TorchRuntime
from latency.testing import RuntimeContract


class TestOnnxRuntime(RuntimeContract):
    def open(self, threads: int = 1) -> Runtime:
        return OnnxRuntime(threads)


class TestTorch(RuntimeContract):
    def open(self, threads: int = 1) -> Runtime:
        return TorchRuntime(threads)
