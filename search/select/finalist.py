"""The finalists of successive halving: records, and the training of one rung."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from space import Architecture, InputError
from space.io.artefact import Artefact, check_inputs, file_digest
from space.io.config import shown
from space.io.record import read_record
from supernet.evaluate import Losses, loss_name
from supernet.training.recipe import TrainConfig

FINALIST = Artefact("finalist", "formfit search")


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A finalist with its losses in nats per token and its ranks; rank 1 is the best.

    Attributes:
        architecture: the architecture.
        before: losses inside the supernet, whose weights it inherits.
        after: losses at the end of the last rung that it finished; None if it finished none.
        rung: the last one that it finished; 0 for none.
        steps: of training until then.
        rank_before: by ``before``.
        rank_after: by the rung, then by ``after``.
        folder: of its weights at the end of that rung, ``model.safetensors``.
        failed: the reason why its training failed, in one line; None if it did not.
    """

    architecture: Architecture
    before: Losses
    after: Losses | None = None
    rung: int = 0
    steps: int = 0
    rank_before: int
    rank_after: int
    folder: Path | None = None
    failed: str | None = None

    def sort_key(self, quality: str) -> tuple[int, float, str]:
        """Key that sorts finalists, the best first: later rungs, then lower losses.

        Args:
            quality: ``loss``, ``recall_loss`` or ``kl``.
        """
        loss = (self.after or self.before)[loss_name(quality)]
        return -self.rung, math.inf if loss is None else loss, self.architecture.key

    def to_json(self, root: Path) -> dict[str, Any]:
        """The JSON object.

        Args:
            root: the finalist's folder is relative to it.
        """
        value = {"key": self.architecture.key, **vars(self), "architecture": self.architecture.to_json()}
        return value | {"folder": self.folder and str(self.folder.relative_to(root))}

    @staticmethod
    def from_json(value: Mapping[str, Any], root: Path) -> "Finalist":
        """The inverse of :meth:`to_json`.

        Args:
            value: the JSON object.
            root: see :meth:`to_json`.
        """
        folder = value["folder"]
        if folder and not (root / folder).resolve().is_relative_to(root.resolve()):
            raise InputError(f"{root}: a finalist's folder {shown(folder)} is outside")
        return read_record(
            Finalist,
            value,
            architecture=Architecture.from_json,
            folder=lambda item: root / item if item else None,
        )


@dataclass(frozen=True, kw_only=True)
class RungResult:
    """The content of a rung's ``result.json``.

    Attributes:
        steps: of training until the end of the rung.
        losses: then, in nats per token; None if the training failed.
        model: sha256 of the weights; None if the training failed.
        failed: the reason of the failure in one line; None without one.
    """

    steps: int
    losses: Losses | None
    model: str | None
    failed: str | None = None


@dataclass(frozen=True, kw_only=True)
class RungTraining:
    """The training of a finalist up to the end of a rung.

    Attributes:
        architecture: the finalist's.
        config: of the training over all rungs.
        until: the step at which the rung ends.
        rung: its number, from 1.
        folder: of the rung, absolute, inside that of the training.
        inputs: sha256 of everything that the result depends on, by name.
    """

    architecture: Architecture
    config: TrainConfig
    until: int
    rung: int
    folder: Path
    inputs: Mapping[str, str]

    def result(self) -> RungResult | None:
        """The result; None if ``result.json`` or the weights that it names are missing.

        Raises:
            InputError: it was made from other inputs.
        """
        path, weights = self.folder / "result.json", self.folder / "model.safetensors"
        try:
            value = FINALIST.read(path)
        except InputError:
            return None
        check_inputs(path, value, self.inputs)
        with FINALIST.checked(path):
            result = read_record(RungResult, value)
        whole = result.failed or (weights.exists() and file_digest(weights) == result.model)
        return result if whole else None

    def applied(self, finalist: Finalist, result: RungResult) -> Finalist:
        """The finalist after the rung.

        Args:
            finalist: before it.
            result: of the rung.
        """
        if result.failed:
            return replace(finalist, failed=result.failed)
        return replace(finalist, after=result.losses, rung=self.rung, steps=self.until, folder=self.folder)

    def write(self, losses: Losses | None, failed: str | None = None) -> None:
        """Write ``result.json``; the weights are written before.

        Args:
            losses: at the end of the rung, in nats per token; None if the training failed.
            failed: the reason of a failure in one line.
        """
        model = None if failed else file_digest(self.folder / "model.safetensors")
        result = RungResult(steps=self.until, losses=losses, model=model, failed=failed)
        FINALIST.write(self.folder / "result.json", self.inputs, vars(result))
