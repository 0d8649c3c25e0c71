"""The runtime ``eager``: torch, one operator after the other."""

from latency import Runtime, register_runtime


def open_eager(threads: int, precision: str) -> Runtime:
    """Open the runtime; torch is imported only now."""
    from latency.runtimes.torch import TorchRuntime

    runtime = TorchRuntime(threads)
    runtime.name = "eager"
    return runtime


register_runtime("eager", open_eager)
