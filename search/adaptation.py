"""The settings of a run that adapts a trained model: what ``parent`` in a configuration stands for."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from search.problem.limit import Limit
from space import InputError, Space, Workload
from space.cpus import available_cpus
from space.io.config import parse
from space.workload import PHASES
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
    space, train, search = given["space"], _section(given, "train"), _section(given, "search")
    data = {"tokenizer": str(parent.tokenizer.absolute())} if parent.tokenizer else {}
    limits = [limit for limit in map(Limit.parse, search.get("limits", ())) if limit.metric.needs_device]
    profile = _profile([limit.workload for limit in limits if limit.workload], space)
    profile |= _section(given, "profile")
    return {
        **given,
        "train": {
            "method": "blockwise",
            "init": str(parent.folder.absolute()),
            "length": min(ROW, space.max_seq_len),
            "workers": available_cpus(),
            **train,
            "data": data | _section(train, "data"),
        },
        "profile": profile,
        "search": SEARCH | {"objectives": ["kl", f"latency:{profile['workloads'][0]}"]} | search,
        "finalists": FINALISTS | _section(given, "finalists"),
    }


def _profile(workloads: Sequence[Workload], space: Space) -> dict[str, Any]:
    """Settings that profile what limits are on; without limits on the device, prefill and decode."""
    if not workloads:
        workloads = [Workload(phase=phase, length=space.max_seq_len) for phase in PHASES]
    plain = dict.fromkeys(str(replace(one, threads=1, precision="fp32")) for one in workloads)
    return {"workloads": list(plain), "threads": workloads[0].threads, "precision": workloads[0].precision}


def _section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of a file, empty if it is missing or, which is refused later, no mapping."""
    value = settings.get(name)
    return dict(value) if isinstance(value, Mapping) else {}
