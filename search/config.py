"""A run: its configuration and its folder, read without torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from latency import ProfileConfig
from search.engine.config import (
    FinalistsConfig,
    SearchConfig,
    VerifyConfig,
    check_profiled,
    check_search,
    counted_limits,
    limited_workloads,
    precision_of,
)
from search.engine.front import PICKS
from space import InputError, Space, Workload, load_space
from space.cpus import available_cpus
from space.io.artefact import write_text
from space.io.config import Name, load_yaml, parse, shown
from space.io.machine import check_threads, session_folder
from space.io.names import check_name
from supernet.data.corpus import Corpus, load_corpus
from supernet.training.recipe import TrainConfig

if TYPE_CHECKING:  # they need torch
    from supernet.extract import Text
    from supernet.training.checkpoint import Checkpoint
    from supernet.training.train import Trained

CONTEXT = 1024  # longest sequence of a space that is derived from a parent, unless given
ROW = 512  # least tokens of a training row, in a context that is as long
SEARCH = {"strategy": "mip-nsga2", "windows": 4, "front_windows": 16}  # a row is long, and an evaluation slow
# A finalist's weights are close to the parent's, so the rate is low, and the parent is the only target.
FINALISTS = {"count": 2, "batch": 2, "learning_rate": 1e-4, "distillation": 1.0, "baselines": True}


def _pick(name: str) -> str:
    if name not in PICKS and not re.fullmatch("[0-9a-f]{4,12}", name):
        raise ValueError(f"{shown(name)} is not one of {', '.join(PICKS)}, nor a key of an architecture")
    return name


class RunConfig(BaseModel):
    """The configuration of a run: a space and the settings of each stage.

    Attributes:
        space: the search space; in a file, also the path of its own file, relative to the run's.
        device: the name of this machine's card.
        train: settings of the training.
        profile: settings of the profiling.
        search: settings of the search.
        verify: settings of verification.
        picks: members of the front that are verified beside the chosen one: ``best``, ``knee``, ``fastest``.
        finalists: settings of the distillation of the best members that kept the limits; by default no member
            is distilled.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: Space
    device: Name = "here"
    train: TrainConfig = TrainConfig()
    profile: ProfileConfig = ProfileConfig()
    search: SearchConfig = SearchConfig()
    verify: VerifyConfig = VerifyConfig()
    picks: tuple[Annotated[str, AfterValidator(_pick)], ...] = ("knee", "fastest")
    finalists: FinalistsConfig = FinalistsConfig()

    @model_validator(mode="after")
    def _one_precision(self) -> "RunConfig":
        asked, profiled = precision_of(self.search, self.device, self.device), self.profile.precision
        if asked and asked != profiled:
            raise ValueError(f"search: limits and objectives are of {asked}, profile.precision is {profiled}")
        return self


def load_run_config(path: Path) -> RunConfig:
    """The configuration of a YAML file, with absolute paths.

    Args:
        path: the file; relative paths in it start at its folder.

    Raises:
        InputError: names every error, in the run's file or in the space's.
    """
    return run_config(load_yaml(path), path.parent, str(path))


def run_config(value: Any, folder: Path, where: str) -> RunConfig:
    """The configuration of settings as a file has them, with absolute paths.

    Args:
        value: the settings; ``parent`` stands for those that :func:`adaptation` gives.
        folder: that relative paths start at.
        where: names the settings in errors.

    Raises:
        InputError: names every error.
    """
    if isinstance(value, dict) and isinstance(value.get("space"), str):
        value = {**value, "space": load_space(folder / value["space"])}
    if isinstance(value, dict) and "parent" in value:
        value = adaptation(value, folder)
    return with_absolute_paths(parse(RunConfig, value, where), folder)


def adaptation(value: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a run's file with ``parent``, without it; settings that the file has stay.

    Args:
        value: the file's settings: ``parent``, a folder of transformers or a GGUF file; ``context``, the
            longest sequence of the space around it; and those of a run.
        folder: that relative paths start at.

    Raises:
        InputError: the parent cannot be read, or ``context`` is not its own or is given beside a space.
    """
    from supernet.parent import read_parent  # needs torch
    from supernet.parent.space_file import space_text

    given = dict(value)
    path, context = given.pop("parent"), given.pop("context", None)
    if not isinstance(path, str):
        raise InputError(f"parent: {path!r} is not the path of a folder or a GGUF file")
    if context is not None and "space" in given:
        raise InputError("context: the space has its own max_seq_len; give one of context and space")
    if context is not None and (not isinstance(context, int) or isinstance(context, bool) or context < 2):
        raise InputError(f"context: {context!r} is not a number of tokens from 2")
    train, data, profile, search = (
        _section(given, name) for name in ("train", "train.data", "profile", "search")
    )
    limited = limited_workloads(parse(SearchConfig, search, "search"))  # checked before weights are read
    parent = read_parent(folder / path)
    if "space" not in given:
        text = space_text(parent, context or min(CONTEXT, parent.model_config.max_seq_len))
        given["space"] = parse(Space, yaml.safe_load(text), f"the space around {path}")
    space = given["space"]
    profile = _profile(limited) | profile
    first = parse(ProfileConfig, profile, "profile").parsed(space)[0]
    return {
        **given,
        "train": {
            "method": "blockwise",
            "init": str(parent.folder.absolute()),
            # In half of a row or more, sliding attention lacks what full attention sees.
            "length": min(max(ROW, 2 * max(space.layer.window, default=0)), space.max_seq_len),
            "workers": available_cpus(),
            **train,
            "data": ({"tokenizer": str(parent.tokenizer.absolute())} if parent.tokenizer else {}) | data,
        },
        "profile": profile,
        "search": SEARCH | {"objectives": ["kl", f"latency:{first}"]} | search,
        "finalists": FINALISTS | _section(given, "finalists"),
    }


def _profile(workloads: Sequence[Workload]) -> dict[str, Any]:
    """Settings that profile what limits are on; the defaults without limits on the device."""
    if not workloads:
        return {}
    plain = dict.fromkeys(str(replace(one, threads=1, precision="fp32")) for one in workloads)
    return {"workloads": list(plain), "threads": workloads[0].threads, "precision": workloads[0].precision}


def _section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of a file, by its keys; empty if it is missing."""
    value: Any = settings
    for key in name.split("."):
        value = value.get(key, {})
        if not isinstance(value, Mapping):
            raise InputError(f"{name}: {shown(value)} are no settings; expected keys with values")
    return dict(value)


def with_absolute_paths(config: RunConfig, folder: Path) -> RunConfig:
    """A configuration whose files are found from every working directory.

    Args:
        config: a configuration.
        folder: that relative paths start at.
    """

    def absolute(settings: BaseModel, *names: str) -> dict[str, Path]:
        paths = {name: getattr(settings, name) for name in names}
        # Not resolved: a link may be what stays when the file behind it changes.
        return {name: (folder / item).absolute() for name, item in paths.items() if item}

    data = config.train.data.model_copy(update=absolute(config.train.data, "path", "tokenizer"))
    train = config.train.model_copy(update={"data": data, **absolute(config.train, "init")})
    return config.model_copy(update={"train": train})


def smoke(config: RunConfig) -> RunConfig:
    """The configuration of a run of the same stages that takes a minute: a test, not a result.

    Args:
        config: of a whole run.
    """
    changes: dict[str, dict[str, Any]] = {
        "train": {"steps": 12, "batch": 2, "checkpoint_every": 6},
        "profile": {"block_ms": 1.0, "min_rounds": 2, "max_rounds": 2,
                    "error": 1.0, "max_noise": None, "max_error": None, "rss_models": 1,
                    "optimal_models": 6, "random_models": 4,
                    "held_out_models": 5, "repeated_models": 2},
        "search": {"generations": 2, "population": 8, "windows": 4, "front_windows": 8},
        "verify": {"tokens": 24, "copies": 1, "rounds": 4, "block_ms": 2.0, "max_noise": None,
                   "searches": 1},
        "finalists": {"steps": 2, "batch": 2},
    }  # fmt: skip
    fields = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    data = config.train.data.model_copy(update={"limit_mb": min(config.train.data.limit_mb or 2.0, 2.0)})
    update: dict[str, Any] = {"data": data}
    if config.train.method == "blockwise":
        few = {"tokens": 4096, "score_windows": 2}
        update["blockwise"] = config.train.blockwise.model_copy(update=few)
    fields["train"] = fields["train"].model_copy(update=update)
    return config.model_copy(update=fields)


def trained_config(folder: Path) -> RunConfig:
    """The configuration of a run's folder.

    Args:
        folder: the run's.

    Raises:
        InputError: the folder is not a run's; names the command that makes it.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise InputError(
            f"{folder}: not a run's folder (no config.yaml); `formfit train CONFIG --out {folder}` makes it"
        )
    return load_run_config(path)


@dataclass(frozen=True)
class Run:
    """A run's folder and configuration.

    Attributes:
        folder: the run's.
        config: its configuration.
        devices: the folder of device cards.
    """

    folder: Path
    config: RunConfig
    devices: Path

    @property
    def space(self) -> Space:
        """The search space."""
        return self.config.space

    def save_config(self) -> None:
        """Write the configuration to the run's folder, the space inside."""
        path = self.folder / "config.yaml"
        config = with_absolute_paths(self.config, Path())
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)

    def search_folder(self, name: str) -> Path:
        """The folder of a search.

        Args:
            name: of the search.

        Raises:
            InputError: the name cannot be a folder's.
        """
        return self.folder / "searches" / check_name(name, "search")

    def check(self) -> None:
        """Refuse what would fail after minutes of training, as far as it can be known before.

        Raises:
            InfeasibleError: no architecture keeps the limits on what is counted.
            InputError: an objective or a limit is of another device or a workload that is not profiled, or
                this machine has too few CPUs, or no folder for Ray.
        """
        config, search = self.config, self.config.search
        check_threads("profile.threads", config.profile.threads)
        check_threads("train.threads", config.train.threads or 1)
        check_search(search, [config.device])
        check_profiled(search, config.device, config.profile.parsed(self.space))
        self.check_counted_limits()
        if config.train.workers or (search.workers and not search.ray_address):
            session_folder()

    def check_counted_limits(self) -> None:
        """Refuse limits on parameters or memory that no architecture keeps, before minutes of training.

        Limits that need a device are checked when it is profiled.

        Raises:
            InfeasibleError: the limits cannot be met.
        """
        if counted_limits(self.config.search):
            from search.engine.devices import check_counted_limits  # its libraries take a second to load

            check_counted_limits(self.space, self.config.search.limits)

    def trained(self, checkpoint: "Checkpoint", corpus: Corpus) -> "Trained":
        """The trained supernet with the text that it is evaluated on.

        Args:
            checkpoint: the supernet's last.
            corpus: that it was trained on.
        """
        from supernet.training.train import Trained

        return Trained(self.space, checkpoint, corpus, self.text)

    @property
    def text(self) -> "Text":
        """The text that the supernet is trained on and its sub-models are evaluated on."""
        from supernet.extract import Text

        train = self.config.train
        length = train.length or self.space.max_seq_len
        return Text(data=train.data, length=length, windows=self.config.search.front_windows)


def open_run(folder: Path, devices: Path) -> Run:
    """A run that was trained.

    Args:
        folder: the run's.
        devices: the folder of device cards.

    Raises:
        InputError: the folder is not a run's; names the command that makes it.
    """
    return Run(folder, trained_config(folder), devices)


def open_trained(run: Run) -> "Trained":
    """The trained supernet of a run with its text.

    Args:
        run: a run that was trained.

    Raises:
        InputError: nothing was trained, with other inputs, or not to the end; or the text is missing.
    """
    corpus = load_corpus(run.config.train.data)
    return run.trained(open_supernet(run, corpus), corpus)


def open_supernet(run: Run, corpus: Corpus | None) -> "Checkpoint":
    """The finished checkpoint of a run.

    Args:
        run: a run that was trained.
        corpus: that it was trained on; None for a run whose text may be missing here.

    Raises:
        InputError: there is none, it was made from other inputs, or the training is not finished.
    """
    from supernet.training.checkpoint import latest_checkpoint
    from supernet.training.train import training_inputs

    inputs = training_inputs(run.space, run.config.train, corpus)
    checkpoint = latest_checkpoint(run.folder / "supernet", inputs)
    if checkpoint is None:
        raise InputError(
            f"{run.folder}: no whole checkpoint; `formfit train CONFIG --out {run.folder}` makes it"
        )
    if checkpoint.step < run.config.train.steps:
        raise InputError(
            f"{run.folder}: the training stopped at step {checkpoint.step} of {run.config.train.steps}; "
            f"`formfit train {run.folder}/config.yaml --out {run.folder}` goes on"
        )
    return checkpoint
