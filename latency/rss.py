"""The peak resident memory of an inference session, measured in a process of its own.

What counts is what the session adds to a process that has loaded onnxruntime: weights (and, while they are
read, their file), states, activations, and the runtime's own buffers. This file is also the program of that
process, which loads nothing else of this package but :mod:`latency.binding`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latency.binding import Binding

STATUS = Path("/proc/self/status")


def session_rss(model: Path, binding: Binding, threads: int = 1) -> int:
    """Bytes that loading a model and running it twice adds, at their peak, to a fresh process.

    Raises:
        OSError: the platform does not tell (Linux does), or the model does not run.
    """
    if not STATUS.exists():
        raise OSError("this system does not tell a process's peak memory; Linux does")
    asked = json.dumps({"path": str(model), "binding": binding.to_json(), "threads": threads})
    command = [sys.executable, str(Path(__file__).resolve())]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(
            f"{model.name} does not run: {(done.stderr.strip().splitlines() or ['it was killed'])[-1]}"
        )
    return int(done.stdout)


def _status(name: str) -> int:
    """Bytes that the system tells of this process."""
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def main() -> None:
    """Load and run the model that is described on stdin; print the bytes that it added."""
    package = types.ModuleType("latency")  # the package without what its own door loads
    package.__path__ = [str(Path(__file__).resolve().parent)]
    sys.modules["latency"] = package
    import onnxruntime as ort

    from latency.binding import Binding, bind, session_options

    asked = json.loads(sys.stdin.read())
    anew = Path("/proc/self/clear_refs")
    if anew.exists():
        anew.write_text("5", encoding="ascii")  # the peak so far, of imports, is forgotten
    before = _status("VmRSS")
    options = session_options(asked["threads"])
    session = ort.InferenceSession(asked["path"], options, providers=["CPUExecutionProvider"])
    bind(session, Binding.from_json(asked["binding"]))(2)
    sys.stdout.write(f"{_status('VmHWM') - before}\n")


if __name__ == "__main__":
    main()
