"""Settings of the distillation of finalists, read without torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from supernet.training.recipe import TrainConfig

WARMUP = 0.05  # share of the steps of all rungs
CHECKPOINT_EVERY = 50
SEED_OFFSET = 1_000_000  # finalists read other batches than the supernet did


class FinalistsConfig(BaseModel):
    """Settings of the distillation of finalists, the key ``finalists`` of a run's configuration.

    Attributes:
        count: finalists; 0 trains none, and the ranking is the supernet's.
        steps: of the first rung; each later rung ends at twice the steps of the one before.
        batch: rows of a step.
        learning_rate: peak; after a short warm-up it decays along a cosine until the end of the last rung.
        distillation: weight of the teacher's loss; the text's loss has the rest, up to 1.
        baselines: also train uniform cuts of the largest architecture and a random one, within the same
            limits, as long as the best finalist.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    count: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(gt=0)] = 100
    batch: Annotated[int, Field(gt=0)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.5
    baselines: bool = False

    def training(self, finalists: int, length: int, seed: int = 0) -> TrainConfig:
        """The training's configuration of one finalist.

        Args:
            finalists: their number, which gives the number of rungs.
            length: tokens of a row.
            seed: of the batches.
        """
        return TrainConfig(
            steps=rungs(finalists, self.steps)[-1][1],
            batch=self.batch,
            length=length,
            learning_rate=self.learning_rate,
            warmup=WARMUP,
            distillation=self.distillation,
            threads=1,
            checkpoint_every=CHECKPOINT_EVERY,
            seed=seed + SEED_OFFSET,
        )


def rungs(count: int, steps: int) -> list[tuple[int, int]]:
    """The number of finalists of each rung, and the step at which it ends.

    Args:
        count: finalists of the first rung; each later one has half of the one before, rounded up, and at
            least two.
        steps: of the first rung.
    """
    plan = [(count, steps)]
    while plan[-1][0] > 2:
        count, steps = plan[-1]
        plan.append(((count + 1) // 2, 2 * steps))
    return plan
