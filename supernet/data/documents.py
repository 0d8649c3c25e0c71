"""Where text comes from: the standard library, one file, or a folder of them.

A document is the bytes of a UTF-8 text without its zero bytes, for byte 0 is what stands
between documents later on. Nothing here is ordered or deduplicated yet.
"""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from space.io.errors import InputError

PIECE_BYTES = 16_384
EXPECTED = "give a UTF-8 text file or a folder of them"


def read_documents(path: Path | None) -> Iterator[bytes]:
    """The documents at a path; None is the standard library of the running interpreter.

    A folder is read recursively, one document a file; a file named directly is cut into pieces.

    Raises:
        InputError: nothing is there, or it cannot be read.
    """
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        return (_read(file) for file in files_below(library) if file.suffix == ".py")
    if path.is_dir():
        return map(_read, files_below(path))
    if path.is_file():
        return pieces(_read(path))
    raise InputError(f"data.path: {path}: not found; {EXPECTED}")


def files_below(folder: Path) -> Iterator[Path]:
    """The files below a folder, without hidden ones, caches and installed packages."""
    skipped = {"__pycache__", "site-packages", "dist-packages"}
    for root, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        files = (Path(root, name) for name in names if not name.startswith("."))
        yield from filter(Path.is_file, files)


def pieces(text: bytes) -> Iterator[bytes]:
    """Cut one long text into documents of at most 16 KiB, at line ends where there are any.

    Where there are none, never inside a character.
    """
    start = 0
    while start < len(text):
        stop = start + PIECE_BYTES
        if stop < len(text):
            line_end = text.rfind(b"\n", start, stop) + 1
            stop = line_end or character_start(text, stop)
        yield text[start:stop]
        start = stop


def character_start(text: bytes, place: int) -> int:
    """The last place up to this one where a UTF-8 character starts."""
    while place > 0 and text[place] & 0xC0 == 0x80:  # 10xxxxxx goes on with a character
        place -= 1
    return place


def _read(file: Path) -> bytes:
    """A file's text without its zero bytes; nothing where it is not UTF-8."""
    try:
        content = file.read_bytes()
        content.decode()
    except UnicodeDecodeError:
        return b""
    except OSError as error:
        _refuse(error)
    return content.replace(b"\0", b"")


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"data.path: {error.filename}: {error.strerror}; {EXPECTED}") from None
