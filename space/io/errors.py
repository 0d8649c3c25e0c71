"""The two ways in which a person's request can fail.

Both carry one line that says what was given, what is allowed, and where. The
command line prints that line and turns the class into an exit code.
"""


class InputError(Exception):
    """Something the person gave is wrong: a file, a key, a value (exit code 2)."""


class LimitError(Exception):
    """A limit cannot be met, or was not met when measured (exit code 3)."""
