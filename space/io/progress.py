"""Protocols for reporting the progress of long stages."""

from contextlib import AbstractContextManager
from typing import Protocol


class Stage(Protocol):
    """Reports the progress of one stage."""

    def __call__(self, share: float, text: str) -> None:
        """Report progress.

        Args:
            share: share of the stage that is done, from 0 to 1.
            text: status in a few words.
        """
        ...


class Reporter(Protocol):
    """Shows the progress of stages to the user."""

    def stage(self, title: str) -> AbstractContextManager[Stage]:
        """Start a stage, which ends with the context.

        Args:
            title: name of the stage.
        """
        ...

    def skipped(self, title: str) -> None:
        """Report a stage whose files exist already.

        Args:
            title: name of the stage.
        """
        ...

    def warn(self, text: str) -> None:
        """Show a warning.

        Args:
            text: one line.
        """
        ...
