"""What a run is configured by, read without torch."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from latency import ProfileConfig
from search.problem.problem import SearchConfig, precision_of
from space import InputError, Space, load_space
from space.io.config import load_yaml, parse
from supernet.training.recipe import TrainConfig


class VerifyConfig(BaseModel):
    """How a sub-model is verified."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(default=128, gt=1)  # of the parity check
    copies: int = Field(default=3, gt=0)  # sessions measured, since memory layout differs between them
    rounds: int = Field(default=60, ge=4)  # of timing
    block_ms: float = Field(default=3.0, gt=0)
    searches: int = Field(default=3, ge=1)  # at most, each with finalists to measure; see search.promise
    max_noise: float | None = 0.1  # between two timings of the same work, see latency.reference; None: any


class RunConfig(BaseModel):
    """All that one run needs: a space and how each stage treats it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: Space | Path
    device: str = Field(default="here", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    train: TrainConfig = TrainConfig()
    profile: ProfileConfig = ProfileConfig()
    search: SearchConfig = SearchConfig()
    verify: VerifyConfig = VerifyConfig()
    picks: tuple[str, ...] = ("knee", "fastest")  # verified beside the chosen one

    @model_validator(mode="after")
    def _one_precision(self) -> "RunConfig":
        asked, profiled = precision_of(self.search, self.device, self.device), self.profile.precision
        if asked and asked != profiled:
            raise ValueError(f"search: limits and objectives are of {asked}, profile.precision is {profiled}")
        return self

    @property
    def the_space(self) -> Space:
        """The space, read from its file where it was given as a path."""
        return self.space if isinstance(self.space, Space) else load_space(self.space)


def load_run_config(path: Path) -> RunConfig:
    """Read a run configuration; a space given as a path is found beside the file.

    Raises:
        InputError: names every error, in the run's file or in the space's.
    """
    value = load_yaml(path)
    if isinstance(value, dict) and isinstance(value.get("space"), str):
        value = {**value, "space": load_space(path.parent / value["space"])}
    return parse(RunConfig, value, str(path))


def smoke(config: RunConfig) -> RunConfig:
    """The same stages, small: a check that everything works, not a result."""
    changes: dict[str, dict[str, Any]] = {
        "train": {"steps": 12, "batch": 2, "checkpoint_every": 6},
        "profile": {"block_ms": 1.0, "min_rounds": 2, "op_rounds": 2, "max_rounds": 2,
                    "op_error": 1.0, "max_noise": None, "rss_models": 1,
                    "optimal_models": 6, "random_models": 4,
                    "held_out_models": 5, "repeated_models": 2},
        "search": {"generations": 2, "population": 8, "windows": 4, "front_windows": 8},
        "verify": {"tokens": 24, "copies": 1, "rounds": 4, "block_ms": 2.0, "max_noise": None,
                   "searches": 1},
    }  # fmt: skip
    fields = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    data = config.train.data.model_copy(update={"limit_mb": min(config.train.data.limit_mb or 2.0, 2.0)})
    fields["train"] = fields["train"].model_copy(update={"data": data})
    return config.model_copy(update=fields)


def trained_config(folder: Path) -> RunConfig:
    """The configuration of a run's folder.

    Raises:
        InputError: it is not one; names the command that makes it.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise InputError(
            f"{folder}: not a run's folder (no config.yaml); `formfit train CONFIG --out {folder}` makes it"
        )
    return load_run_config(path)
