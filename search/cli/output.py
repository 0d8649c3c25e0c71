"""Output of the command line: results on stdout, progress and notes on stderr.

Everything that is shown passes :func:`printable`, because names and texts come from files, and a terminal
obeys escape sequences. rich is imported when a table or a progress bar is shown, not before.
"""

import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from space.io.progress import Stage

if TYPE_CHECKING:
    from rich.table import Table

SECONDS_BETWEEN_LINES = 30.0
LINES_PER_STAGE = 10


MAX_LINE_CHARACTERS = 4000  # of a note
# C0 and C1 control characters but tab and line feed, and those that reorder text.
_ESCAPED = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def printable(text: str) -> str:
    """Text with escaped control characters, such as ``ESC``; tabs and line ends stay.

    Args:
        text: any text.
    """
    return text.translate(_ESCAPED)


def note(text: str) -> None:
    """Write a line to stderr.

    Args:
        text: the line, without its end.
    """
    if len(text) > MAX_LINE_CHARACTERS:
        text = f"{text[:MAX_LINE_CHARACTERS]} ... ({len(text) - MAX_LINE_CHARACTERS:,} more characters)"
    with suppress(OSError):  # a full disk or an ended reader of stderr leaves nowhere to write that to
        sys.stderr.write(f"{printable(text)}\n")
        sys.stderr.flush()


def write_generated(text: str) -> None:
    """Write generated text to stdout at once: as it is into a file, :func:`printable` on a terminal.

    Args:
        text: any text.
    """
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class _Notes(logging.Handler):
    """Shows warnings of formfit's packages as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def prepare_streams() -> None:
    """Escape what stdout or stderr cannot encode, and show logged warnings as notes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before the program started
            setattr(sys, name, io.StringIO())
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    log = logging.getLogger("formfit")
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes())


def discard_output() -> None:
    """Discard what stdout has not written yet, which the interpreter would try again when it exits."""
    with suppress(OSError, ValueError):  # a stream of a test has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Bars:
    """A reporter that shows stages on stderr: as bars on a terminal, as lines elsewhere."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Show a stage until the block ends.

        Args:
            title: the stage's name.
        """
        if not sys.stderr.isatty():
            lines = ProgressLines(title)
            yield lines
            lines.end()
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:<16}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=1.0, text="")
            yield lambda share, text: progress.update(task, completed=share, text=printable(text))
            progress.update(task, completed=1.0)

    def skipped(self, title: str) -> None:
        """Show that a stage was completed earlier.

        Args:
            title: the stage's name.
        """
        note(f"{title}: done already")

    def warn(self, text: str) -> None:
        """Show a warning.

        Args:
            text: the warning in one line.
        """
        note(text)


class ProgressLines:
    """Progress of a stage as lines: one at the start, one every tenth or every 30 s, one at the end.

    Args:
        title: the stage's name.
        clock: gives seconds.
    """

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.title, self.clock = title, clock
        self.text, self.written, self.tenths = "", clock(), 0
        note(f"{title} ...")

    def __call__(self, share: float, text: str) -> None:
        """Report progress.

        Args:
            share: of the work that is done, 0 to 1.
            text: what is known so far.
        """
        self.text = text
        now, tenths = self.clock(), int(LINES_PER_STAGE * share + 1e-9)
        if share < 1 and (tenths > self.tenths or now - self.written >= SECONDS_BETWEEN_LINES):
            note(f"{self.title} {100 * share:.0f}%: {text}")
            self.written, self.tenths = now, tenths

    def end(self) -> None:
        """Write the last line."""
        note(f"{self.title} done: {self.text}" if self.text else f"{self.title} done")


def show(value: Mapping[str, Any], as_json: bool, tables: Callable[[], Sequence["Table"]]) -> None:
    """Print a result.

    Args:
        value: the result as a JSON object.
        as_json: print that object instead of tables.
        tables: makes the tables.
    """
    if as_json:
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
        return
    from rich.console import Console

    console = Console()
    for table in tables():
        console.print(table)


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    """A table of plain text.

    Args:
        title: shown above it.
        columns: their headers.
        rows: one text for each column; square brackets have no meaning.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(printable(title)),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        table.add_column(Text(printable(column)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
