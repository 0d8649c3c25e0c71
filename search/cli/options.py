"""Options and arguments that several commands share, and checks that need no other import."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from space.io.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a run's configuration.")]
RunFolder = Annotated[Path, typer.Option("--run", metavar="RUN", help="Folder of a trained run.")]
SubModelFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a sub-model.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="Name of the device card.")]
MaxNoise = Annotated[
    float,
    typer.Option(min=0.01, metavar="PERCENT", help="Largest difference of two timings of the same work."),
]
Kit = Annotated[
    Path | None,
    typer.Option("--make-kit", metavar="ZIP", help="Write a kit to run on the device as `python3 ZIP`."),
]
KitResult = Annotated[
    Path | None, typer.Option("--kit-result", metavar="JSON", help="Read what a kit measured.")
]
Formats = Annotated[
    list[str] | None,
    typer.Option("--format", metavar="FORMAT", help="onnx or hf, beside the weights. Repeatable."),
]
Precisions = Annotated[
    list[str] | None,
    typer.Option("--precision", metavar="NAME", help="int8 or int8-dynamic: a further graph. Repeatable."),
]


def check_kit_options(make_kit: Path | None, kit_result: Path | None) -> None:
    """Refuse ``--make-kit`` and ``--kit-result`` in one command.

    Args:
        make_kit: the kit to write.
        kit_result: the result to read.

    Raises:
        InputError: both are given, or the result is not a file.
    """
    if make_kit and kit_result:
        raise InputError("give one of --make-kit ZIP and --kit-result JSON")
    if kit_result and not kit_result.is_file():
        raise InputError(f"{kit_result}: not found; a kit writes it: `python3 ZIP --out {kit_result}`")


def check_one_of(option: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    """Check the values of an option.

    Args:
        option: its name, such as ``--format``.
        given: the values given.
        allowed: the values allowed.

    Raises:
        InputError: names the first value that is not allowed, and those that are.
    """
    for value in given:
        if value not in allowed:
            raise InputError(f"{option} {value}: not one of {', '.join(allowed)}")


def check_submodel(folder: Path) -> None:
    """Check that a folder holds a sub-model.

    Args:
        folder: of the sub-model.

    Raises:
        InputError: it has no ``architecture.json``.
    """
    path = folder / "architecture.json"
    if not path.is_file():
        raise InputError(f"{path}: not found; `formfit extract` makes it")
