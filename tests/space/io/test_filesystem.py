"""File systems without locks, syncs or mode bits; files that are none."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from space.io import filesystem
from space.io.artefact import Artefact, write_text
from space.io.errors import InputError
from space.io.filesystem import read_file, require_regular, try_lock


def refuse(monkeypatch: pytest.MonkeyPatch, module: object, name: str, code: int) -> None:
    """Let a system call fail, as a file system that lacks it does."""

    def call(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, name, call)


HOLD = """
import sys, time
from pathlib import Path
from space.io.filesystem import try_lock
with try_lock(Path(sys.argv[1])) as held:
    print(held, flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "True\n"
        with try_lock(tmp_path) as held:
            assert not held
        holder.kill()
        holder.wait()
    with try_lock(tmp_path) as held:
        assert held


def test_the_locked_file_is_opened_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS refuses an exclusive lock on a file that is opened for reading."""
    modes = []
    lock = fcntl.flock

    def spy(descriptor: int, operation: int) -> None:
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", spy)
    with try_lock(tmp_path):
        assert modes == [os.O_RDWR]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EBADF])
def test_without_locks_one_warning_and_on(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(monkeypatch, fcntl, "flock", code)
    for _ in range(3):
        with try_lock(tmp_path) as held:
            assert held
    assert caplog.text.count("its file system has no locks") == 1
    assert str(tmp_path) in caplog.text


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_a_held_lock_is_no_missing_one(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, fcntl, "flock", code)
    with try_lock(tmp_path) as held:
        assert not held


def test_files_are_written_without_mode_bits_and_folder_syncs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, Path, "chmod", errno.EPERM)
    refuse(monkeypatch, os, "fsync", errno.EINVAL)
    write_text(tmp_path / "a.json", "whole")
    assert (tmp_path / "a.json").read_text() == "whole"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_disk_is_an_error_that_names_the_file(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "a.json", "old")
    refuse(monkeypatch, os, "fsync", code)
    with pytest.raises(OSError, match=f"{tmp_path / 'a.json'}") as caught:
        write_text(tmp_path / "a.json", "new")
    assert caught.value.errno == code
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_file(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_file(tmp_path / "file", 4)
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        for read in (read_file, require_regular):
            with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
                read(path)
    with pytest.raises(InputError, match="pipe: cannot be read"):
        Artefact("card", "formfit profile").read(tmp_path / "pipe")


def test_a_folder_that_is_read_only_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, filesystem.os, "open", errno.EROFS)
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)), try_lock(tmp_path):
        pass
