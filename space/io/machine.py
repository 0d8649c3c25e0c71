"""Limits of this machine: threads, and a folder for Ray's sockets."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from space.cpus import available_cpus
from space.io.errors import InputError

# A socket's path has at most 107 bytes, of which Ray takes those of
# /ray/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store and a suffix.
MAX_SESSION_BYTES = 107 - 74


def check_threads(what: str, threads: int) -> None:
    """Refuse more threads than CPUs that this process may use: two on one CPU measure neither.

    Args:
        what: option or key of the threads, for the error message.
        threads: number of threads.

    Raises:
        InputError: there are fewer CPUs; names the reason if the machine has more.
    """
    cpus, machine = available_cpus(), os.cpu_count() or 1
    if threads > cpus:
        why = "" if cpus == machine else f", of {machine}, because of its affinity or its container's quota"
        raise InputError(f"{what} {threads}: this process may use {cpus} CPUs{why}")


def session_folder(candidates: Sequence[str] | None = None) -> Path:
    """A folder in which Ray can place its session: writable, and short enough for the paths of its sockets.

    Args:
        candidates: folders in the order of preference; None is ``RAY_TMPDIR``, ``TMPDIR``, ``/tmp``,
            ``/var/tmp`` and ``/dev/shm``.

    Raises:
        InputError: there is none.
    """
    if candidates is None:
        given = (os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR"))
        candidates = [*(folder for folder in given if folder), "/tmp", "/var/tmp", "/dev/shm"]  # noqa: S108
    for folder in candidates:
        path = Path(folder).absolute()
        if len(os.fsencode(path)) <= MAX_SESSION_BYTES and _is_writable(path):
            return path
    raise InputError(
        f"Ray needs a writable folder of at most {MAX_SESSION_BYTES} characters for its sockets, and none of "
        f"{', '.join(dict.fromkeys(candidates))} is one; set TMPDIR to one, or search.workers and "
        "train.workers to 0"
    )


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
