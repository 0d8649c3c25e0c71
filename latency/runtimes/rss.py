"""Peak resident memory of an inference session, measured in a process of its own.

The result is the memory that the session adds to a process that has loaded onnxruntime: weights (and their
file while it is read), states, activations, and the runtime's own buffers. This file is also the program of
that process, which imports nothing else of this package but :mod:`latency.device_runner`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latency.device_runner.io_binding import IoBinding

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # written to clear_refs, sets a process's peak to its current memory: see proc(5)
RUNS = 2


def is_supported() -> bool:
    """True if the system reports the peak memory of a process; Linux does."""
    return STATUS.exists()


def session_rss(model: Path, io_binding: IoBinding, threads: int = 1) -> int:
    """Peak memory of loading a model and running it twice, in a new process.

    Args:
        model: file of an ONNX graph.
        io_binding: buffers that it runs on.
        threads: number of threads of the session.

    Returns:
        Bytes beyond those that the process had before.

    Raises:
        OSError: the system does not report a process's peak memory, or the model does not run.
    """
    if not is_supported():
        raise OSError("this system does not report a process's peak memory; Linux does")
    request = json.dumps({"path": str(model), "io_binding": io_binding.to_json(), "threads": threads})
    # -P keeps the working directory, which may hold another latency.py, off the path.
    command = [sys.executable, "-P", "-m", "latency.runtimes.rss"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        command, input=request, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise OSError(f"{model.name} does not run: {reason}")
    return int(done.stdout)


def _status(name: str) -> int:
    """A memory field of this process, bytes."""
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def main() -> None:
    """Load and run the model that is described on stdin; print the bytes that it added."""
    import onnxruntime as ort

    from latency.device_runner.io_binding import IoBinding, bind, session_options

    request = json.loads(sys.stdin.read())
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")  # imports may have had a higher peak
    before = _status("VmRSS")
    options = session_options(request["threads"])
    session = ort.InferenceSession(request["path"], options, providers=["CPUExecutionProvider"])
    bind(session, IoBinding.from_json(request["io_binding"]))(RUNS)
    sys.stdout.write(f"{_status('VmHWM') - before}\n")


if __name__ == "__main__":
    main()
