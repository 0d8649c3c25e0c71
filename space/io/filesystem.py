"""Differences of file systems: locks, syncs, mode bits; and reading of regular files only.

Network and flat file systems lack some of these (NFS, Lustre, CIFS, gcsfuse, FAT). Mode bits and syncs of
folders are best effort. Where locks do not exist, one line of warning says so. Content is always synced: an
error there is one of the disk.
"""

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_FILE_BYTES = 256 * 2**20  # of a file that is read whole, unless the caller gives another bound
LOCK_FILE = ".lock"
# Reading does not wait for the other end of a pipe. Windows lacks the first two and needs the last.
_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
_HELD = (errno.EAGAIN, errno.EACCES)  # flock on NFS may report a held lock as EACCES
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS)
_log = logging.getLogger("formfit")
_warned: set[Path] = set()  # folders without locks


def read_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file.

    Devices, pipes and sockets are refused without waiting for them; the bound holds for files that grow too.

    Args:
        path: path of the file.
        max_bytes: maximum size.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger than ``max_bytes``.
    """
    descriptor = os.open(path, _READ)
    with os.fdopen(descriptor, "rb") as file:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes:,} bytes", str(path))
    return content


def require_regular(path: Path) -> None:
    """Check that a path is a regular file, for libraries that open it themselves.

    Args:
        path: path of the file.

    Raises:
        OSError: the file is missing or not a regular file.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add a path to errors of the operating system that name none, such as a full disk.

    Args:
        path: path of the file that is written.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync_file(path: Path) -> None:
    """Sync a file's content to the disk.

    Args:
        path: path of the file.

    Raises:
        OSError: the disk is full or broken.
    """
    with path.open("rb") as file:
        _sync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames in it survive a power failure, where the file system can do that.

    Args:
        folder: the folder.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_readable(path: Path) -> None:
    """Let everybody read a file, where the file system has mode bits.

    Args:
        path: path of the file.
    """
    with suppress(OSError):
        path.chmod(0o644)


@contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Try to hold an exclusive lock on a folder; the operating system releases it if the process dies.

    The lock is on a file in the folder that is opened for writing: NFS refuses locks on others.

    Args:
        folder: an existing folder.

    Yields:
        False if another process holds the lock. True on a file system without locks, with a warning once.

    Raises:
        OSError: the folder cannot be written to.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        yield _flock(descriptor, folder)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, folder: Path) -> bool:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if folder not in _warned:
            _warned.add(folder)
            reason = error.strerror or error
            _log.warning(
                "formfit: %s: its file system has no locks (%s); start no second process that writes there",
                folder,
                reason,
            )
    return True


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
