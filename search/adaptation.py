"""The settings of a run that adapts a trained model: what ``parent`` in a configuration stands for."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from latency import ProfileConfig
from search.engine.config import SearchConfig
from search.problem.limit import Limit
from space import InputError, Space, Workload
from space.cpus import available_cpus
from space.io.config import parse, shown
from supernet.parent import read_parent
from supernet.parent.space_file import space_text

CONTEXT = 1024  # longest sequence of a space that is derived from a parent, unless given
ROW = 512  # tokens of a training row, at most
SEARCH = {"strategy": "mip-nsga2", "windows": 4, "front_windows": 16}  # a row is long, and an evaluation slow
# A finalist's weights are close to the parent's, so the rate is low, and the parent is the only target.
FINALISTS = {"count": 2, "batch": 2, "learning_rate": 1e-4, "distillation": 1.0, "baselines": True}


def adaptation(value: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a run's file with ``parent``, without it; settings that the file has stay.

    Args:
        value: the file's settings: ``parent``, a folder of transformers or a GGUF file; ``context``, the
            longest sequence of the space around it; and those of a run.
        folder: that relative paths start at.

    Raises:
        InputError: the parent cannot be read, or ``context`` is not its own or is given beside a space.
    """
    given = dict(value)
    path, context = given.pop("parent"), given.pop("context", None)
    if not isinstance(path, str):
        raise InputError(f"parent: {path!r} is not the path of a folder or a GGUF file")
    if context is not None and "space" in given:
        raise InputError("context: the space has its own max_seq_len; give one of context and space")
    if context is not None and (not isinstance(context, int) or isinstance(context, bool) or context < 2):
        raise InputError(f"context: {context!r} is not a number of tokens from 2")
    parent = read_parent(folder / path)
    if "space" not in given:
        text = space_text(parent, context or min(CONTEXT, parent.model_config.max_seq_len))
        given["space"] = parse(Space, yaml.safe_load(text), f"the space around {path}")
    space = given["space"]
    train, data, profile, search = (
        _section(given, name) for name in ("train", "train.data", "profile", "search")
    )
    limits = map(Limit.parse, parse(SearchConfig, search, "search").limits)
    profile = _profile([one.workload for one in limits if one.workload and one.metric.needs_device]) | profile
    first = parse(ProfileConfig, profile, "profile").parsed(space)[0]
    return {
        **given,
        "train": {
            "method": "blockwise",
            "init": str(parent.folder.absolute()),
            "length": min(ROW, space.max_seq_len),
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
