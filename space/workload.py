"""Workloads: runs of a model whose latency and memory are measured, predicted and limited."""

import re
from dataclasses import dataclass

from space.io.errors import InputError
from space.precision import PRECISIONS

PHASES = ("prefill", "decode")
SYNTAX = "prefill@TOKENS or decode@CONTEXT, then optionally ,batch=B ,threads=T ,precision=P"


@dataclass(frozen=True, kw_only=True, order=True)
class Workload:
    """One run of a model.

    Attributes:
        phase: ``prefill`` reads ``length`` tokens from an empty state; ``decode`` reads one token after a
            state of ``length - 1`` tokens.
        length: tokens of the sequence after the run.
        batch: number of sequences.
        threads: threads of the runtime.
        precision: one of :data:`space.precision.PRECISIONS`.
    """

    phase: str
    length: int
    batch: int = 1
    threads: int = 1
    precision: str = "fp32"

    @property
    def tokens(self) -> int:
        """Tokens read in the run, per sequence."""
        return self.length if self.phase == "prefill" else 1

    @property
    def past(self) -> int:
        """Tokens in the state before the run."""
        return 0 if self.phase == "prefill" else self.length - 1

    def __str__(self) -> str:
        text = f"{self.phase}@{self.length}"
        if self.batch != 1:
            text += f",batch={self.batch}"
        if self.threads != 1:
            text += f",threads={self.threads}"
        if self.precision != "fp32":
            text += f",precision={self.precision}"
        return text

    @staticmethod
    def parse(text: str) -> "Workload":
        """Parse ``phase@length[,batch=B][,threads=T][,precision=P]``; the inverse of ``str``.

        Args:
            text: such as ``decode@256,batch=4``.

        Raises:
            InputError: the text has another form, or a value is not allowed.
        """
        head, *options = [part.strip() for part in text.split(",")]
        match = re.fullmatch(r"(\w+)@([0-9]{1,9})", head)
        if not match or match[1] not in PHASES or int(match[2]) == 0:
            raise InputError(f"workload {text!r}: expected {SYNTAX}")
        values, precision = {"batch": 1, "threads": 1}, "fp32"
        given: set[str] = set()
        for option in options:
            name, _, value = option.partition("=")
            if name in given:
                raise InputError(f"workload {text!r}: {name} is given twice")
            given.add(name)
            if name == "precision":
                if value not in PRECISIONS:
                    raise InputError(
                        f"workload {text!r}: precision {value!r} is not one of {', '.join(PRECISIONS)}"
                    )
                precision = value
            elif name in values and re.fullmatch("[0-9]{1,9}", value) and int(value) > 0:
                values[name] = int(value)
            else:
                raise InputError(f"workload {text!r}: {option!r} is not understood; expected {SYNTAX}")
        return Workload(phase=match[1], length=int(match[2]), precision=precision, **values)
