"""How long work tells a person what it is doing."""

from contextlib import AbstractContextManager
from typing import Protocol


class Stage(Protocol):
    """Says what a long stage is doing."""

    def __call__(self, share: float, text: str) -> None:
        """Report the share that is done, and what is known so far."""
        ...


class Reporter(Protocol):
    """Shows the progress of stages to a person."""

    def stage(self, title: str) -> AbstractContextManager[Stage]:
        """A stage that is about to start."""
        ...

    def skipped(self, title: str) -> None:
        """A stage whose files are there already."""
        ...

    def warn(self, text: str) -> None:
        """Something to know that stops nothing."""
        ...
