"""Formats and precisions that a sub-model can be exported in; importing this module takes no time."""

from collections.abc import Sequence

from space.io.errors import InputError
from space.precision import PRECISIONS

FORMATS = ("onnx", "hf")


def check_formats(formats: Sequence[str], precisions: Sequence[str]) -> None:
    """Refuse formats and precisions that cannot be written.

    Args:
        formats: ``onnx`` and ``hf``.
        precisions: of the ONNX graphs.

    Raises:
        InputError: a format or precision is unknown, or a precision is given without the format that has it.
    """
    for given, known, option in ((formats, FORMATS, "--format"), (precisions, PRECISIONS, "--precision")):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise InputError(f"{option} {unknown[0]}: not one of {', '.join(known)}")
    if "onnx" not in formats and any(name != "fp32" for name in precisions):
        raise InputError(f"--precision {precisions[0]}: only --format onnx has it; give that too")
