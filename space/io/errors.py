"""Errors that a user can cause or must know of.

Each carries one line that says what was given, what is allowed, and where. The command line prints that line
and exits with the class's ``exit_code``.
"""


class FormfitError(Exception):
    """Base class of formfit's errors."""

    exit_code = 1


class InputError(FormfitError):
    """Invalid input: a file, a key or a value, or a machine that cannot do what was asked."""

    exit_code = 2


class InfeasibleError(FormfitError):
    """Limits that no architecture of the space can meet."""

    exit_code = 3


class LimitMissedError(FormfitError):
    """A model that missed a limit when it was measured."""

    exit_code = 3


class ParityError(FormfitError):
    """An exported model whose outputs differ from the plain model's by more than rounding."""

    exit_code = 3
