"""Identification of a device: its CPU, its system, and the runtime that its latencies were measured with.

Part of every kit: Python 3.8 and the standard library.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Mapping

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimddp", "sve")  # that change kernels' speed


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a device and its runtime; two equal fingerprints mean comparable latencies.

    Attributes:
        machine: instruction set, such as ``x86_64``.
        cpu: name and model of the CPU or GPU.
        system: operating system, such as ``Linux``.
        runtime: registered name of the runtime, such as ``onnxruntime``.
        runtime_version: version of the runtime's library.
    """

    machine: str
    cpu: str
    system: str
    runtime: str
    runtime_version: str

    @staticmethod
    def local(runtime: str, runtime_version: str, cpu: str | None = None) -> Fingerprint:
        """The fingerprint of this machine under a runtime.

        Args:
            runtime: registered name of the runtime.
            runtime_version: version of its library.
            cpu: name of the processor that runs the models; None means the CPU.
        """
        return Fingerprint(
            machine=platform.machine(),
            cpu=cpu or cpu_model(),
            system=platform.system(),
            runtime=runtime,
            runtime_version=runtime_version,
        )

    def to_json(self) -> dict[str, str]:
        """The fields as a JSON object."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, object]) -> Fingerprint:
        """Read a fingerprint; the inverse of :meth:`to_json`.

        Args:
            value: a JSON object; unknown keys are ignored.

        Raises:
            ValueError: a field is missing or is not text.
        """
        names = [field.name for field in fields(Fingerprint)]
        texts = {name: item for name, item in value.items() if name in names and isinstance(item, str)}
        wrong = [name for name in names if name not in texts]
        if wrong:
            raise ValueError(f"not a fingerprint: {', '.join(wrong)} missing or not text")
        return Fingerprint(**texts)

    def differences(self, other: Fingerprint) -> dict[str, tuple[str, str]]:
        """The fields that differ, each with its value in this fingerprint and in the other one.

        Args:
            other: the other fingerprint.
        """
        mine, theirs = self.to_json(), other.to_json()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def cpu_model() -> str:
    """The CPU's name, family, model and relevant feature flags, as far as the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    pairs = (line.partition(":") for line in reversed(lines))
    values = {name.strip(): value.strip() for name, _, value in pairs}
    name = values.get("model name") or values.get("Model") or "unknown"
    flags = (values.get("flags") or values.get("Features") or "").split()
    model = f"family {values.get('cpu family', '?')} model {values.get('model', '?')}"
    return " ".join([name, model, *(flag for flag in CPU_FLAGS if flag in flags)])
