"""Settings of searches, of verification and of finalists, read without torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from search.problem.limit import Limit, check_no_duplicates
from search.problem.objective import Objective, check_objectives
from search.problem.problem import Problem, required_precision
from search.strategies.registry import STRATEGIES, StrategyEntry
from space import InputError, Space, Workload
from supernet.training.recipe import TrainConfig

if TYPE_CHECKING:  # its libraries take seconds to load
    from latency import Predictor

WARMUP = 0.05  # share of the steps of all rungs
CHECKPOINT_EVERY = 50
SEED_OFFSET = 1_000_000  # finalists read other batches than the supernet did


def _registered(name: str) -> str:
    STRATEGIES.get(name)
    return name


class SearchConfig(BaseModel):
    """Settings of a search.

    Attributes:
        limits: such as ``decode@2048<=2ms``.
        objectives: such as ``loss`` and ``params``; default: loss and the latency of the first profiled
            workload; only loss if the strategy takes one objective.
        strategy: the name of a registered strategy.
        surrogate: candidates are screened by predicted quality, where the strategy does that.
        generations: None: the strategy's own number.
        population: architectures of a generation; None: the strategy's own number.
        confidence: at which predicted costs are held against limits.
        windows: held-out sequences of an evaluation in a generation.
        front_windows: held-out sequences of the last re-evaluation, which decides the front.
        baseline: ``random``: a random search of as many evaluations beside it, for the report.
        workers: Ray actors that evaluate; 0: this process.
        ray_address: of a running Ray cluster; None: one is started on this machine.
        seed: of the search.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    limits: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()
    strategy: Annotated[str, AfterValidator(_registered)] = "nsga2"
    surrogate: bool = True
    generations: Annotated[int, Field(gt=0)] | None = None
    population: Annotated[int, Field(gt=1)] | None = None
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.975
    windows: Annotated[int, Field(gt=0)] = 24
    front_windows: Annotated[int, Field(gt=0)] = 96
    baseline: Literal["none", "random"] = "none"
    workers: Annotated[int, Field(ge=0)] = 2
    ray_address: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def strategy_entry(self) -> StrategyEntry:
        """The registered strategy."""
        return STRATEGIES.get(self.strategy)

    @property
    def size(self) -> tuple[int, int]:
        """Population and generations; the strategy's own numbers where none are given."""
        entry = self.strategy_entry
        return self.population or entry.population, self.generations or entry.generations

    def windows_by_stage(self) -> dict[str, int]:
        """The number of held-out sequences of each stage: ``search``, ``middle`` and ``front``."""
        middle = round(math.sqrt(self.windows * self.front_windows))
        return {"search": self.windows, "middle": middle, "front": self.front_windows}


class VerifyConfig(BaseModel):
    """Settings of the verification of a sub-model.

    Attributes:
        tokens: of the parity check.
        copies: sessions that are timed; their memory layouts differ.
        rounds: of timing.
        block_ms: least duration of a timed block.
        searches: greatest number of searches, each with finalists that are measured.
        max_noise: greatest relative difference between two timings of the same work; None: any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tokens: int = Field(default=128, gt=1)
    copies: int = Field(default=3, gt=0)
    rounds: int = Field(default=60, ge=4)
    block_ms: float = Field(default=3.0, gt=0)
    searches: int = Field(default=3, ge=1)
    max_noise: Annotated[float, Field(gt=0)] | None = 0.1


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


def precision_of(config: SearchConfig, device: str, first: str) -> str | None:
    """The precision that a search's limits and objectives ask of a device's models; None where they ask none.

    Args:
        config: of the search.
        device: whose models are meant.
        first: the device of limits and objectives that name none.

    Raises:
        InputError: they ask for several, or one is not understood.
    """
    limits, objectives = map(Limit.parse, config.limits), map(Objective.parse, config.objectives)
    return required_precision(limits, objectives, device, first)


def check_search(config: SearchConfig, devices: Sequence[str]) -> None:
    """Check limits and objectives as far as that needs no predictor, which takes seconds to load.

    Args:
        config: of the search.
        devices: names of the devices; the first is that of limits and objectives that name none.

    Raises:
        InputError: one is malformed, two bound the same quantity, or a device's models need two precisions.
    """
    check_no_duplicates(map(Limit.parse, config.limits), devices[0] if devices else None)
    for device in devices:
        precision_of(config, device, devices[0])


def counted_limits(config: SearchConfig) -> list[Limit]:
    """The limits of a search on what is counted without a device, such as parameters.

    Args:
        config: of the search.
    """
    return [limit for limit in map(Limit.parse, config.limits) if not limit.metric.needs_device]


def limited_workloads(config: SearchConfig) -> list[Workload]:
    """The workloads that a search's limits on a device are of, in their order.

    Args:
        config: of the search.
    """
    limits = map(Limit.parse, config.limits)
    return [limit.workload for limit in limits if limit.workload and limit.metric.needs_device]


def check_profiled(config: SearchConfig, device: str, profiled: Sequence[Workload]) -> None:
    """Check that limits and objectives are of one device and of workloads that it is profiled for.

    Args:
        config: of the search.
        device: name of the device.
        profiled: its workloads.

    Raises:
        InputError: one is of another device, or outside of the profiled lengths; or the objectives contradict
            the strategy.
    """
    objectives = list(map(Objective.parse, config.objectives))
    if objectives:
        require_objectives(config, objectives)
    subjects: list[Limit | Objective] = [*map(Limit.parse, config.limits), *objectives]
    for one in subjects:
        if one.device and one.device != device:
            raise InputError(f"search: {one.text}: the run has one device, {device}")
        if one.workload is None or one.metric is None or not one.metric.needs_device:
            continue
        lengths = [w.length for w in profiled if replace(w, length=one.workload.length) == one.workload]
        if not lengths or not min(lengths) <= one.workload.length <= max(lengths):
            raise InputError(
                f"search: {one.text}: outside of what is profiled ({', '.join(map(str, profiled))}); "
                f"add {one.workload} to profile.workloads"
            )


def require_objectives(config: SearchConfig, objectives: Sequence[Objective]) -> None:
    """Refuse objectives that the strategy of a search cannot minimise.

    Args:
        config: of the search.
        objectives: of its problem.

    Raises:
        InputError: there are too many for the strategy, one is given twice, or none is a quality.
    """
    most = config.strategy_entry.max_objectives
    if most is not None and len(objectives) > most:
        word = "one objective" if most == 1 else f"at most {most} objectives"
        texts = ", ".join(objective.text for objective in objectives)
        raise InputError(f"strategy {config.strategy}: it has {word}, not {texts}")
    check_objectives(objectives)


def make_problem(
    space: Space,
    predictors: "Mapping[str, Predictor]",
    config: SearchConfig,
    reference_predictors: "Mapping[str, Predictor] | None" = None,
) -> Problem:
    """The problem that a configuration states.

    Args:
        space: the search space.
        predictors: by device; the first is meant where a limit or objective names none.
        config: its limits and objectives.
        reference_predictors: by device; a limit in percent is a share of their prediction for the largest
            architecture; None: ``predictors``.

    Raises:
        InputError: a malformed or contradictory limit, an unknown objective or workload.
    """
    texts = config.objectives
    if not texts:
        if not predictors:
            raise InputError("objectives: none are given, and there is no device whose latency is minimised")
        workload = next(iter(next(iter(predictors.values())).models))
        texts = ("loss", f"latency:{workload}")[: config.strategy_entry.max_objectives]
    limits = tuple(map(Limit.parse, config.limits))
    objectives = tuple(map(Objective.parse, texts))
    require_objectives(config, objectives)
    problem = Problem(
        space,
        objectives=objectives,
        limits=limits,
        predictors=predictors,
        confidence=config.confidence,
        reference_predictors=reference_predictors,
    )
    problem.constraints()  # for its errors, before anything is made from the problem
    return problem
