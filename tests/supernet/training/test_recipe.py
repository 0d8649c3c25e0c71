"""The training recipe: sub-networks of a step, learning rate."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from space import Space, genome
from supernet.training.recipe import (
    ELASTIC_AXES,
    TrainConfig,
    _max_size_subnet,
    draw_subnets,
    elastic_axes,
    restrict_axes,
    step_rate,
    step_subnets,
    subnet_count,
)
from tests.contracts import every_architecture, tiny_space


def wide_space() -> Space:
    return tiny_space(
        mixer=["attention", "gated_deltanet", "sliding", "linear", "short_conv", "retnet", "none"],
        window=[8, 16],
        width=[16, 32, 48],
        depth=[1, 2, 4],
        heads=[1, 2],
        ffn=[0, 16, 32],
        ratios=["full", 1, "linear"],
        max_linear_kinds=2,
    )


def test_step_subnets_follow_sandwich_rule() -> None:
    space = wide_space()
    settings = TrainConfig(steps=100, largest_warmup=0.1, sampled=2)
    assert step_subnets(space, settings, 5) == [genome.largest(space)]
    chosen = step_subnets(space, settings, 50)
    assert chosen[:2] == [genome.largest(space), genome.smallest(space)]
    assert len(chosen) == 4
    assert step_subnets(space, settings, 51) == step_subnets(space, settings, 51)
    assert step_subnets(space, settings, 51) != step_subnets(space, settings, 53)
    assert step_subnets(space, settings, 51)[0] != genome.largest(space)
    plain = settings.model_copy(update={"maximal_mixers": False})
    assert step_subnets(space, plain, 51)[0] == genome.largest(space)
    random = settings.model_copy(update={"rule": "random", "sampled": 1})
    for config in (settings, plain, random):
        for step in (0, 9, 10, 51):
            assert len(step_subnets(space, config, step)) == subnet_count(config, step)


def test_step_subnets_are_in_space() -> None:
    space = wide_space()
    for changes in (
        {},
        {"progressive_shrinking": 0.8, "depth_warmup": 0.0},
        {"rule": "random"},
        {"balanced_sampling": False},
    ):
        settings = TrainConfig(steps=200).model_copy(update=changes)
        chosen = [a for step in range(200) for a in step_subnets(space, settings, step)]
        assert genome.contains(space, genome.encode(space, chosen)).all()


def test_progressive_shrinking_adds_axes_in_order() -> None:
    space = wide_space()
    top = genome.largest(space)
    settings = TrainConfig(steps=1000, largest_warmup=0.1, progressive_shrinking=0.5, maximal_mixers=False)
    opened = [elastic_axes(settings, step) for step in range(100, 1000)]
    assert [len(axes) for axes in opened] == sorted(len(axes) for axes in opened)
    assert set(opened) == {ELASTIC_AXES[:n] for n in range(1, 6)}
    assert opened[499] != ELASTIC_AXES or opened[500] == ELASTIC_AXES
    for step in range(100, 600, 7):
        axes = elastic_axes(settings, step)
        for architecture in step_subnets(space, settings, step)[1:]:
            if "width" not in axes:
                assert architecture.width == top.width
            if "depth" not in axes:
                assert architecture.depth == top.depth
            present = [layer for layer in architecture.layers if layer.present]
            if "ffn" not in axes:
                assert {layer.ffn for layer in present} == {32}
            if "heads" not in axes:
                assert {layer.heads for layer in present} <= {2, 0}


@pytest.mark.parametrize("axes", [ELASTIC_AXES[:n] for n in range(1, 5)])
def test_restricted_space_is_subset(axes: tuple[str, ...]) -> None:
    space = tiny_space(mixer=["attention", "linear", "none"], heads=[1, 2], ffn=[0, 16], depth=[1, 2])
    inside = every_architecture(restrict_axes(space, axes))
    assert inside < every_architecture(space)
    assert genome.largest(space) in inside


def test_max_size_subnet_cycles_through_mixers() -> None:
    space = tiny_space(
        mixer=["attention", "gated_deltanet", "sliding", "linear"], window=[8], ratios=["full", 1, "linear"]
    )
    drawn: Counter[str] = Counter()
    pairs = 2 * 3  # ratios 1 and linear, three linear mixers
    for turn in range(4 * pairs):
        architecture = _max_size_subnet(space, 0, turn, np.random.default_rng(turn))
        assert genome.contains(space, genome.encode(space, [architecture])).all()
        top = genome.largest(space)
        assert (architecture.width, architecture.depth) == (top.width, top.depth)
        assert all(
            a.heads == b.heads and a.ffn == b.ffn
            for a, b in zip(architecture.layers, top.layers, strict=True)
        )
        drawn.update({layer.mixer for layer in architecture.layers} - {"attention"})
    assert set(drawn.values()) == {4 * 2}


def test_balanced_sampling_evens_out_mixers() -> None:
    kinds = ["linear", "retnet", "mamba2", "gla", "kda"]
    space = tiny_space(
        mixer=["attention", *kinds, "none"],
        depth=[2, 4, 6, 8],
        ratios=["full", 1, 3, "linear"],
        max_linear_kinds=2,
    )

    def shares(balanced_sampling: bool) -> Counter[str]:
        layers: Counter[str] = Counter()
        for step in range(40):
            drawn = draw_subnets(space, np.random.default_rng(step), 7, balanced_sampling, 8)
            subnets = genome.decode(space, drawn)
            layers.update(mixer for a in subnets for mixer in a.pattern)
        return layers

    plain, balanced_sampling = shares(balanced_sampling=False), shares(balanced_sampling=True)
    assert plain["attention"] > 4 * max(plain[kind] for kind in kinds)
    assert balanced_sampling["attention"] < 2 * min(balanced_sampling[kind] for kind in kinds)
    drawn = draw_subnets(space, np.random.default_rng(0), 200, True, 8)
    assert genome.contains(space, drawn).all()
    depths = Counter(a.depth for a in genome.decode(space, drawn))
    assert min(depths.values()) > 30  # of 200 over four
    assert len(draw_subnets(space, np.random.default_rng(0), 0, True, 8)) == 0


@pytest.mark.parametrize("balanced_sampling", [False, True])
@pytest.mark.parametrize("rule", ["sandwich", "random"])
def test_depth_warmup_raises_depth(rule: str, balanced_sampling: bool) -> None:
    space = tiny_space(mixer=["attention", "linear", "gla", "none"], depth=[2, 4, 6, 8], ratios=["full", 1])
    settings = TrainConfig.model_validate(
        {
            "steps": 100,
            "depth_warmup": 0.4,
            "sampled": 7,
            "rule": rule,
            "balanced_sampling": balanced_sampling,
        }
    )
    deepest = []
    for step in range(0, 100, 5):
        chosen = step_subnets(space, settings, step)
        assert len(chosen) == subnet_count(settings, step)
        assert genome.contains(space, genome.encode(space, chosen)).all()
        deepest.append(max(a.depth for a in chosen))
        if rule == "sandwich":
            assert chosen[1] == genome.smallest(space)
    assert deepest[:8] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert set(deepest[8:]) <= ({8} if rule == "sandwich" else {4, 6, 8})


@pytest.mark.parametrize("mixers", [["attention", "linear", "gla"], ["attention", "short_conv", "gla"]])
def test_max_size_subnet_keeps_ratio_without_full(mixers: list[str]) -> None:
    space = tiny_space(mixer=mixers, depth=[8], heads=[1, 2], ratios=[1, 3])
    seen = set()
    for turn in range(8):
        architecture = _max_size_subnet(space, 0, turn, np.random.default_rng(turn))
        seen.add(
            (architecture.pattern.count("attention"), *sorted(set(architecture.pattern) - {"attention"}))
        )
        assert {layer.heads for layer in architecture.layers} <= {0, 2}
    assert seen == {(count, mixer) for count in (2, 4) for mixer in mixers[1:]}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"largest_warmup": 0.5, "progressive_shrinking": 0.5}, "leave no step"),
        ({"rule": "random", "distillation": 0.5}, "has no teacher"),
        ({"depth_warmup": 0.2, "progressive_shrinking": 0.2}, "set depth_warmup: 0"),
        ({"clip": float("inf")}, "finite"),
    ],
)
def test_contradictory_settings_are_errors(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainConfig.model_validate(settings)


def test_learning_rate_rises_then_falls() -> None:
    settings = TrainConfig(steps=100, warmup=0.1, learning_rate=1.0)
    rates = [step_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] < 0.06
