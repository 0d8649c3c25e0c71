"""The peak resident memory of an inference session, measured in a process of its own.

What counts is what the session adds to a process that has loaded onnxruntime: weights (and, while they are
read, their file), states, activations, and the runtime's own buffers. This file is also the program of that
process, which loads nothing else of this package but :mod:`latency.device_runner.io_binding`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latency.device_runner.io_binding import Binding

STATUS = Path("/proc/self/status")


def session_rss(model: Path, binding: Binding, threads: int = 1) -> int:
    """Bytes that loading a model and running it twice adds, at their peak, to a fresh process.

    Raises:
        OSError: the platform does not tell (Linux does), or the model does not run.
    """
    if not STATUS.exists():
        raise OSError("this system does not tell a process's peak memory; Linux does")
    asked = json.dumps({"path": str(model), "binding": binding.to_json(), "threads": threads})
    # -P keeps the working directory, where a person may have a latency.py, off the path.
    command = [sys.executable, "-P", "-m", "latency.runtimes.rss"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False, env=environment)
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
    import onnxruntime as ort

    from latency.device_runner.io_binding import Binding, bind, session_options

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
