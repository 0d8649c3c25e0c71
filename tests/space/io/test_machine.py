"""CPUs that a process may use, a folder for Ray, names of folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from space import InputError
from space.cpus import available_cpus, slow_cpus
from space.io.machine import MAX_SESSION_BYTES, check_threads, session_folder
from space.io.names import check_name, is_name

VERSION_2 = {"proc/self/cgroup": "0::/user/job\n"}
VERSION_1 = {"proc/self/cgroup": "7:memory:/job\n3:cpu,cpuacct:/job\n"}
GROUP_1 = "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_"
QUOTAS = {
    "one and a half": (VERSION_2 | {"sys/fs/cgroup/user/job/cpu.max": "150000 100000\n"}, 1),
    "of a group above": (
        VERSION_2
        | {"sys/fs/cgroup/user/cpu.max": "100000 100000", "sys/fs/cgroup/user/job/cpu.max": "max 1"},
        1,
    ),
    "a container's own mount": (VERSION_2 | {"sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
    "less than one": (VERSION_2 | {"sys/fs/cgroup/cpu.max": "20000 100000"}, 1),
    "version 1": (VERSION_1 | {f"{GROUP_1}quota_us": "100000\n", f"{GROUP_1}period_us": "100000\n"}, 1),
    "version 1 without one": (VERSION_1 | {f"{GROUP_1}quota_us": "-1\n", f"{GROUP_1}period_us": "1\n"}, None),
    "no quota": (VERSION_2 | {"sys/fs/cgroup/user/job/cpu.max": "max 100000"}, None),
    "no control groups": ({}, None),
    "garbage": (VERSION_2 | {"sys/fs/cgroup/cpu.max": "lots", "proc/self/cgroup": "::\nx"}, None),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_quotas_of_control_groups_count(name: str, tmp_path: Path) -> None:
    files, expected = QUOTAS[name]
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    allowed = len(os.sched_getaffinity(0))
    assert available_cpus(tmp_path) == (allowed if expected is None else min(allowed, expected))


def test_slow_cpus_are_named(tmp_path: Path) -> None:
    assert slow_cpus([0, 1], tmp_path) is None
    for number, speed in enumerate([3_500_000, 3_400_000, 2_000_000, 2_000_000]):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "cpuinfo_max_freq").write_text(f"{speed}\n")
    (tmp_path / "sys/devices/system/cpu/cpuidle").mkdir()
    assert slow_cpus([0, 1], tmp_path) is None
    assert slow_cpus([1, 2], tmp_path) == "measured on slow CPUs: 2 of 1, 2 at 57% of the fastest speed"
    for number, capacity in enumerate([1024, 1024, 446, 446]):
        (tmp_path / f"sys/devices/system/cpu/cpu{number}/cpu_capacity").write_text(f"{capacity}\n")
    assert slow_cpus([2, 3], tmp_path) == "measured on slow CPUs: 2, 3 of 2, 3 at 44% of the fastest speed"


def test_the_affinity_counts_and_more_threads_are_refused() -> None:
    code = (
        "import os; cpus = os.sched_getaffinity(0); os.sched_setaffinity(0, list(cpus)[:1])\n"
        "from space.cpus import available_cpus; assert available_cpus() == 1\n"
        "from space.io.machine import check_threads; check_threads('--threads', 1)\n"
        "check_threads('--threads', 2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "InputError: --threads 2: this process may use 1 CPUs" in done.stderr
    assert ("because of its affinity" in done.stderr) == ((os.cpu_count() or 1) > 1)
    with pytest.raises(InputError, match=r"profile.threads 9999: this process may use"):
        check_threads("profile.threads", 9999)


def test_no_other_count_of_cpus_is_used() -> None:
    root = Path(__file__).parents[3]
    packages = ("space", "supernet", "latency", "search")
    files = [root / "formfit.py", *(file for name in packages for file in (root / name).rglob("*.py"))]
    users = [f.relative_to(root).as_posix() for f in files if "cpu_count" in f.read_text()]
    assert users == ["space/cpus.py", "space/io/machine.py"]


def test_a_folder_for_ray_is_short_and_writable(tmp_path: Path) -> None:
    long = tmp_path / ("x" * MAX_SESSION_BYTES)
    long.mkdir()
    missing = "/tmp/formfit-missing"  # noqa: S108
    assert session_folder([str(long), missing, "/tmp"]) == Path("/tmp")  # noqa: S108
    with pytest.raises(InputError, match="Ray needs a writable folder of at most") as refused:
        session_folder([str(long), missing])
    assert str(long) in str(refused.value)


def test_ray_starts_under_a_long_tmpdir(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    code = (
        "from supernet.training.parallel import ray_session\n"
        "with ray_session(1):\n"
        "    import os, ray; print(ray.get(ray.remote(lambda: 7).remote()))\n"
        "    assert os.environ['RAY_ENABLE_UV_RUN_RUNTIME_ENV'] == '0'"  # its hook uploads the working folder
    )
    environment = {**os.environ, "TMPDIR": str(long)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


BAD_NAMES = [
    "",
    ".",
    "..",
    "../evil",
    "a/b",
    "/abs",
    "a" * 101,
    "-x",
    "a b",
    "a\n",
    "a\x1b[2J",
    "\u0430",
    "a\0",
]


def test_names_that_are_no_folders() -> None:
    assert all(map(is_name, ["a", "A.b_c-1", "0", "a" * 100, "a.."]))
    for name in BAD_NAMES:
        assert not is_name(name)
        with pytest.raises(InputError, match="letters, digits") as refused:
            check_name(name, "device")
        assert len(str(refused.value)) < 250
        assert str(refused.value).isprintable()
