"""Registry of runtimes: opening a runtime by its name.

A plug-in registers its runtime in the module that its entry point of the group ``formfit.plugins`` names::

    from latency import register_runtime

    register_runtime("tvm", open_tvm)

where ``open_tvm(threads, precision)`` returns a :class:`latency.runtimes.protocol.Runtime`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from latency.device_runner.fingerprint import Fingerprint
from space import InputError
from space.registry import Registry

if TYPE_CHECKING:
    from latency.card import Card
    from latency.runtimes.protocol import Runtime

    OpenRuntime = Callable[[int, str], Runtime]  # of threads and precision


@dataclass(frozen=True, kw_only=True)
class RuntimeEntry:
    """Registration of a runtime: everything that is known without opening it.

    Attributes:
        open: opens the runtime with a number of threads, for models of a precision.
        precisions: precisions of the models that it builds and deploys.
        graph_version: version of the formfit ONNX graphs that it runs, ``space.onnx.graph.VERSION``; 0 if
            it builds models in its own way. Measurements of another version are not used.
    """

    open: OpenRuntime
    precisions: tuple[str, ...]
    graph_version: int


RUNTIMES: Registry[RuntimeEntry] = Registry(
    "runtime",
    {
        "onnxruntime": "latency.runtimes.onnxruntime",
        "torch": "latency.runtimes.torch",
        "torch-compiled": "latency.runtimes.torch",
        "torch-cuda": "latency.runtimes.torch",
        "torch-cuda-compiled": "latency.runtimes.torch",
    },
)


def register_runtime(
    name: str, open: OpenRuntime, *, precisions: Sequence[str] = ("fp32",), graph_version: int = 0
) -> None:
    """Register a runtime, so that configurations and device cards may name it.

    Args:
        name: the name; it is also the runtime's :attr:`Runtime.name` and that of its fingerprint.
        open: opens the runtime with a number of threads, for models of a precision; raises ``InputError`` if
            this machine does not have it.
        precisions: precisions of the models that it builds and deploys.
        graph_version: version of the formfit ONNX graphs that it runs, ``space.onnx.graph.VERSION``; 0 if
            it builds models in its own way.

    Raises:
        InputError: the name is taken.
    """
    entry = RuntimeEntry(open=open, precisions=tuple(precisions), graph_version=graph_version)
    RUNTIMES.register(name, entry)


def open_runtime(name: str, threads: int, precision: str = "fp32") -> Runtime:
    """Open a runtime.

    Args:
        name: the registered name.
        threads: number of threads that its models run on.
        precision: precision of the models that it builds.

    Raises:
        InputError: the name is not registered, the runtime does not have the precision, or this machine does
            not have the runtime.
    """
    entry = RUNTIMES.get(name)
    if precision not in entry.precisions:
        raise InputError(f"runtime {name}: precision {precision} is not one of {', '.join(entry.precisions)}")
    return entry.open(threads, precision)


def open_card_runtime(card: Card, threads: int = 1) -> Runtime:
    """Open the runtime of a device card on this machine.

    Args:
        card: the card.
        threads: number of threads that its models run on.

    Raises:
        InputError: the runtime is not registered, or this machine does not have it.
    """
    return open_runtime(card.fingerprint.runtime, threads)


def local_fingerprint(name: str) -> Fingerprint:
    """The fingerprint of this machine under a runtime; that of onnxruntime does not import its library.

    Args:
        name: the registered name.

    Raises:
        InputError: the name is not registered, or this machine does not have the runtime.
    """
    if name == "onnxruntime":
        with suppress(PackageNotFoundError):  # other distributions have the library too, onnxruntime-gpu
            return Fingerprint.local(name, version(name))
    return open_runtime(name, 1).fingerprint()


def graph_version(name: str) -> int:
    """The version of the formfit ONNX graphs that a runtime runs; 0 if it runs none.

    Args:
        name: the registered name.

    Raises:
        InputError: the name is not registered.
    """
    return RUNTIMES.get(name).graph_version


def precisions(name: str) -> tuple[str, ...]:
    """The precisions of the models that a runtime builds and deploys.

    Args:
        name: the registered name.

    Raises:
        InputError: the name is not registered.
    """
    return RUNTIMES.get(name).precisions
