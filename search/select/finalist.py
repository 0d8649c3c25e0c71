"""The finalists of successive halving: configuration, standing, rungs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from space import Architecture, InputError
from space.io.artefact import Artefact, check_inputs, file_digest
from supernet.evaluate import Losses
from supernet.training.recipe import TrainConfig

FINALIST = Artefact("finalist", "formfit search")


MADE_BY = "formfit search"


WARMUP = 0.05  # share of all rungs' steps


CHECKPOINT_EVERY = 50


OTHER_BATCHES = 1_000_000  # added to the seed: what the supernet saw first is not seen again


class FinalistsConfig(BaseModel):
    """How the finalists of a search learn on.

    Attributes:
        count: how many finalists; 0 leaves the choice to the supernet.
        steps: of the first rung; every later one ends at twice the steps of the one before.
        batch: rows of a step.
        learning_rate: the greatest; it rises shortly, then falls along a cosine to the last rung's end.
        distillation: the weight of the teacher against the text.
        seed: of the batches.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    count: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(gt=0)] = 100
    batch: Annotated[int, Field(gt=0)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.5
    seed: Annotated[int, Field(ge=0)] = 0

    def training(self, finalists: int, length: int) -> TrainConfig:
        """How each of so many finalists is trained, on rows of ``length`` tokens."""
        return TrainConfig(
            steps=rungs(finalists, self.steps)[-1][1],
            batch=self.batch,
            length=length,
            learning_rate=self.learning_rate,
            warmup=WARMUP,
            distillation=self.distillation,
            threads=1,
            checkpoint_every=CHECKPOINT_EVERY,
            seed=self.seed + OTHER_BATCHES,
        )


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """What became of a finalist; ranks count from 1, the best; losses in nats per token."""

    architecture: Architecture
    before: Losses  # inside the supernet, whose weights it inherits
    after: Losses | None = None  # at the end of the last rung that it finished; None where it finished none
    rung: int = 0  # the last that it finished
    steps: int = 0  # until there
    rank_before: int
    rank_after: int
    folder: Path | None = None  # of its weights there, ``model.safetensors``
    failed: str | None = None  # why it got no further, where that was not by its loss

    def standing(self, column: str) -> tuple[int, float, str]:
        """What finalists are sorted by, the best first: the rung they finished, then the loss there."""
        loss = (self.after or self.before)[column]
        return -self.rung, math.inf if loss is None else loss, self.architecture.key

    def to_json(self, root: Path) -> dict[str, Any]:
        """As a JSON value; its folder is relative to ``root``."""
        value = {"key": self.architecture.key, **vars(self), "architecture": self.architecture.to_json()}
        return value | {"folder": self.folder and str(self.folder.relative_to(root))}

    @staticmethod
    def from_json(value: Mapping[str, Any], root: Path) -> "Finalist":
        """The opposite of :meth:`to_json`."""
        given = {name: value[name] for name in Finalist.__dataclass_fields__}
        given["architecture"] = Architecture.from_json(value["architecture"])
        given["folder"] = root / value["folder"] if value["folder"] else None
        return Finalist(**given)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A finalist's training up to the end of a rung."""

    architecture: Architecture
    config: TrainConfig
    until: int
    folder: Path  # absolute; of the rung, in that of the training
    inputs: Mapping[str, str]  # the hashes of all that the result depends on

    def result(self) -> dict[str, Any] | None:
        """What ``result.json`` says; None where it is not there, or the weights that it speaks of.

        Raises:
            InputError: it was made from other inputs.
        """
        path, weights = self.folder / "result.json", self.folder / "model.safetensors"
        try:
            value = FINALIST.read(path)
        except InputError:
            return None
        check_inputs(path, value, self.inputs)
        whole = value["failed"] or (weights.exists() and file_digest(weights) == value["model"])
        return value if whole else None

    def after(self, rung: int, result: Mapping[str, Any]) -> dict[str, Any]:
        """What a result changes of its finalist."""
        if result["failed"]:
            return {"failed": result["failed"]}
        return {"after": result["losses"], "rung": rung, "steps": self.until, "folder": self.folder}

    def write(self, reached: Losses | None, failed: str | None = None) -> None:
        """Write ``result.json``, after the weights where there are some."""
        model = None if failed else file_digest(self.folder / "model.safetensors")
        body = {"steps": self.until, "losses": reached, "model": model, "failed": failed}
        FINALIST.write(self.folder / "result.json", self.inputs, body)


def rungs(count: int, steps: int) -> list[tuple[int, int]]:
    """How many finalists each rung has, and the step at which it ends: the last has two, or the only one."""
    found = [(count, steps)]
    while found[-1][0] > 2:
        count, steps = found[-1]
        found.append(((count + 1) // 2, 2 * steps))
    return found
