"""Objectives: qualities and costs, parsed and registered."""

import re

import pytest

from search.problem.objective import QUALITIES, Objective, check_objectives, register_objective
from space import InputError, Workload

DECODE = Workload(phase="decode", length=64)


@pytest.mark.parametrize(
    ("text", "metric", "device", "workload"),
    [
        ("loss", None, None, None),
        ("recall_loss", None, None, None),
        ("params", "params", None, None),
        ("latency:decode@64", "decode", None, DECODE),
        ("phone:latency:decode@64", "decode", "phone", DECODE),
        ("phone:rss:prefill@64", "rss", "phone", Workload(phase="prefill", length=64)),
        ("rss:decode@64", "rss", None, DECODE),
        ("memory:prefill@64,batch=2", "memory", None, Workload(phase="prefill", length=64, batch=2)),
        ("memory@64", "memory", None, Workload(phase="prefill", length=64)),
        ("phone:decode@64", "decode", "phone", DECODE),
    ],
)
def test_objective_is_read_as_written(
    text: str, metric: str | None, device: str | None, workload: Workload | None
) -> None:
    objective = Objective.parse(text)
    assert objective.text == text
    assert (objective.metric and objective.metric.name) == metric
    assert objective.is_quality == (metric is None)
    assert (objective.device, objective.workload) == (device, workload)


@pytest.mark.parametrize(
    "text",
    [
        "accuracy",
        "",
        "latency",
        "phone:params",
        "phone:memory:prefill@64",
        "a:b:latency:decode@64",
        "decode:64",
    ],
)
def test_unknown_objective_is_refused_with_the_forms(text: str) -> None:
    forms = "loss, recall_loss, kl, [DEVICE:]latency:WORKLOAD, memory:WORKLOAD, [DEVICE:]rss:WORKLOAD, params"
    with pytest.raises(InputError, match=re.escape(forms)):
        Objective.parse(text)


def test_malformed_workload_is_refused() -> None:
    with pytest.raises(InputError, match="workload 'decode@'"):
        Objective.parse("latency:decode@")
    with pytest.raises(InputError, match="memory needs a number of tokens"):
        Objective.parse("memory")


def test_objectives_are_distinct_and_one_is_a_quality() -> None:
    check_objectives(map(Objective.parse, ("loss", "params")))
    with pytest.raises(InputError, match="names one twice"):
        check_objectives(map(Objective.parse, ("loss", "latency:decode@64", "decode@64")))
    with pytest.raises(InputError, match="one of loss, recall_loss, kl must be among params"):
        check_objectives([Objective.parse("params")])


def test_registered_objective_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QUALITIES, "_values", dict(QUALITIES._values))
    register_objective("worst_loss", lambda _model, _data: 1.0)
    assert Objective.parse("worst_loss").is_quality
    for name in ("worst_loss", "params", "two words", "loss"):
        with pytest.raises(InputError):
            register_objective(name, lambda _model, _data: 2.0)
