"""Documents of a source: the standard library, one file, or a folder of files.

A document is the UTF-8 bytes of a text without its zero bytes, since byte 0 separates documents in a corpus.
A file is UTF-8, or UTF-16 or UTF-32 with a byte order mark, or one of these in a ``.gz``. Other files are
left out and counted. Documents are neither ordered nor deduplicated here.
"""

import codecs
import gzip
import io
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from space.io.errors import InputError
from space.io.filesystem import read_file

PIECE_BYTES = 16_384
MAX_TEXT_BYTES = 1 << 34  # of a file
MAX_UNPACKED_BYTES = 1 << 30  # of a .gz
EXPECTED = "give a UTF-8 text file or a folder of them"
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
# The mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass
class Skipped:
    """Files of a source that are left out.

    Attributes:
        files: number of files seen.
        reasons: by reason, the files left out.
    """

    files: int = 0
    reasons: dict[str, list[Path]] = field(default_factory=dict)

    def add(self, reason: str, file: Path) -> None:
        """Leave a file out.

        Args:
            reason: in a few words.
            file: the file.
        """
        self.reasons.setdefault(reason, []).append(file)

    def describe(self) -> str | None:
        """The number of files that are left out, why, and the first one's name; None if there is none."""
        if not self.reasons:
            return None
        parts = [f"{len(files)} {reason} (first: {files[0]})" for reason, files in self.reasons.items()]
        return f"{sum(map(len, self.reasons.values()))} of {self.files} files left out: {'; '.join(parts)}"


def read_documents(path: Path | None, skipped: Skipped) -> Iterator[bytes]:
    """Read the documents at a path.

    A folder is read recursively, one document per file; a single file is cut into pieces.

    Args:
        path: a file or a folder; None is the standard library of the running interpreter.
        skipped: gets the files that are left out, while the documents are read.

    Raises:
        InputError: the path is missing or cannot be read.
    """
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        return (_read_source(file) for file in files_below(library) if file.suffix == ".py")
    if path.is_dir():
        return (_read(file, skipped) for file in files_below(path, skipped))
    if path.exists():
        return pieces(_read(path, skipped))
    raise InputError(f"data.path: {path}: not found; {EXPECTED}")


def files_below(folder: Path, skipped: Skipped | None = None) -> Iterator[Path]:
    """The files below a folder, without hidden files, caches and installed packages.

    Links are followed; a folder that is reached twice is read once.

    Args:
        folder: the folder.
        skipped: gets what is neither a file nor a folder, such as broken links.

    Raises:
        InputError: a folder cannot be read.
    """
    seen = set()
    for root, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS]
        for name in names:
            file = Path(root, name)
            if name.startswith("."):
                continue
            if file.is_file():
                yield file
            elif skipped is not None:
                skipped.files += 1
                skipped.add("neither a file nor a folder", file)


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


def _read(file: Path, skipped: Skipped) -> bytes:
    """A file's text without zero bytes; empty if it is left out."""
    skipped.files += 1
    try:
        content = read_file(file, MAX_TEXT_BYTES)
    except OSError as error:
        _refuse(error)
    try:
        if file.suffix == ".gz":
            content = _unpacked(content)
        return text_of(content).replace(b"\0", b"")
    except UnicodeError:
        skipped.add("not UTF-8, nor UTF-16 with a byte order mark", file)
    except (OSError, EOFError, zlib.error):
        skipped.add("not a whole .gz of at most 1 GiB", file)
    return b""


def _read_source(file: Path) -> bytes:
    """A file of the standard library without zero bytes; empty if it is not UTF-8."""
    try:
        content = read_file(file)
        content.decode()
    except UnicodeDecodeError:
        return b""
    except OSError as error:
        _refuse(error)
    return content.replace(b"\0", b"")


def text_of(content: bytes) -> bytes:
    """The UTF-8 text of a file, without its byte order mark.

    Args:
        content: UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Raises:
        UnicodeError: the content is none of these.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content.decode(encoding).encode()
    content.decode()
    return content


def _unpacked(content: bytes) -> bytes:
    with gzip.open(io.BytesIO(content)) as file:
        unpacked = file.read(MAX_UNPACKED_BYTES + 1)
    if len(unpacked) > MAX_UNPACKED_BYTES:
        raise EOFError
    return unpacked


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"data.path: {error.filename}: {error.strerror}; {EXPECTED}") from None
