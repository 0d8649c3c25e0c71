"""Options and arguments that several commands of the command line have."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
SpaceFile = Annotated[Path, typer.Argument(metavar="SPACE", help="A space in YAML.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's configuration in YAML.")]
RunFolder = Annotated[Path, typer.Option("--run", metavar="RUN", help="A run's folder, trained in.")]
Device = Annotated[str, typer.Option(help="The device card's name.")]
