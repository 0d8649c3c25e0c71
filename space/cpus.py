"""The number of CPUs that this process may use. Kits copy this file, so that it needs Python 3.8 only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Sequence

_ROOT = Path("/")
MIN_ALIKE = 0.8  # speed of a CPU relative to the fastest, below which it is one of the slow kind


def available_cpus(root: Path = _ROOT) -> int:
    """Number of CPUs that this process may use, at least 1.

    It is bounded by the machine, the process's affinity, and the quotas of its control groups (of containers,
    batch systems and systemd), rounded down: threads beyond a quota are stopped, which disturbs timings.

    Args:
        root: folder that ``proc`` and ``sys`` are in.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        count = os.cpu_count() or 1
    return max(1, min([count, *(int(quota) for quota in _quotas(root))]))


def slow_cpus(cpus: Sequence[int], root: Path = _ROOT) -> str | None:
    """A line about CPUs that are slower than others of the machine; None if there are none.

    Args:
        cpus: numbers of CPUs that are used.
        root: folder that ``sys`` is in.
    """
    speeds: dict[int, int] = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*"):
        # Arm reports a capacity; x86 the greatest frequency, which differs little between alike cores.
        text = _read(folder / "cpu_capacity") or _read(folder / "cpufreq/cpuinfo_max_freq")
        if text.strip().isdecimal() and folder.name[3:].isdecimal():
            speeds[int(folder.name[3:])] = int(text)
    fastest = max(speeds.values(), default=0)
    taken = [cpu for cpu in cpus if speeds.get(cpu, fastest) < MIN_ALIKE * fastest]
    if not taken:
        return None
    numbers, slowest = ", ".join(map(str, taken)), min(speeds[cpu] for cpu in taken)
    return "measured on slow CPUs: {} of {} at {:.0%} of the fastest speed".format(
        numbers, ", ".join(map(str, cpus)), slowest / fastest
    )


def _quotas(root: Path) -> list[float]:
    """CPUs allowed by the control groups of this process and by those above them, versions 1 and 2."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [root / "sys/fs/cgroup"]
        if controllers:
            mounts = [root / "sys/fs/cgroup" / name for name in ("cpu", "cpu,cpuacct")]
        # Inside a container the path is often that of the host, and the mount is the container's own group.
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for mount in mounts:
            folders = [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
            found += [quota for folder in folders for quota in _quota(folder)]
    return found


def _quota(folder: Path) -> list[float]:
    """CPUs allowed by one control group; empty if it has no quota."""
    words = _read(folder / "cpu.max").split() or [
        _read(folder / "cpu.cfs_quota_us").strip(),
        _read(folder / "cpu.cfs_period_us").strip(),
    ]
    try:
        quota, period = map(float, words)
    except ValueError:  # "max", or no such files
        return []
    return [quota / period] if quota > 0 and period > 0 else []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
