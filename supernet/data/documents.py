"""Documents of a source: the standard library, one file, or a folder of files.

A document is the bytes of a UTF-8 text without its zero bytes, since byte 0 separates documents in a corpus.
Documents are neither ordered nor deduplicated here.
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
    """Read the documents at a path.

    A folder is read recursively, one document per file; a single file is cut into pieces.

    Args:
        path: a file or a folder; None is the standard library of the running interpreter.

    Raises:
        InputError: the path is missing or cannot be read.
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
    """The files below a folder, without hidden files, caches and installed packages.

    Args:
        folder: the folder.

    Raises:
        InputError: a folder cannot be read.
    """
    skipped = {"__pycache__", "site-packages", "dist-packages"}
    for root, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        files = (Path(root, name) for name in names if not name.startswith("."))
        yield from filter(Path.is_file, files)


def pieces(text: bytes) -> Iterator[bytes]:
    """Cut a text into documents of at most ``PIECE_BYTES``, at a line end or else between two characters.

    Args:
        text: UTF-8 text.
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
    """Start of the UTF-8 character that covers a position.

    Args:
        text: UTF-8 text.
        place: index into the text.
    """
    while place > 0 and text[place] & 0xC0 == 0x80:  # 10xxxxxx is a continuation byte
        place -= 1
    return place


def _read(file: Path) -> bytes:
    """A file's text without zero bytes; empty if it is not UTF-8."""
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
