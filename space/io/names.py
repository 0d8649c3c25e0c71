"""Names that become parts of paths: of devices, searches and spaces."""

import re

from space.io.errors import InputError

MAX_NAME_CHARACTERS = 100  # files add to it, and file systems allow 255 bytes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RULE = f"letters, digits, '.', '_' and '-', the first a letter or digit, at most {MAX_NAME_CHARACTERS}"


def is_name(text: str) -> bool:
    """True if a text can be the name of a folder on every file system, and of nothing outside its parent.

    Args:
        text: of a user or a file.
    """
    return len(text) <= MAX_NAME_CHARACTERS and _NAME.fullmatch(text) is not None


def check_name(name: str, what: str = "name") -> str:
    """Check a name before it becomes a part of a path.

    Args:
        name: of a device, a search or a space.
        what: noun for the error message.

    Returns:
        The name.

    Raises:
        InputError: it has other characters than letters, digits, ``.``, ``_`` and ``-``, or too many.
    """
    if not is_name(name):
        shown = repr(name if len(name) <= MAX_NAME_CHARACTERS else f"{name[:40]}...")
        raise InputError(f"{what} {shown}: {RULE}")
    return name
