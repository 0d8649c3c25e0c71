"""Baselines against brute force over their families, on a small space."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from search.engine.block_scores import BLOCK_SCORES
from search.problem.problem import Problem
from search.select.baselines import baselines, removal_order
from space import Architecture, InputError, Layer, Space, genome
from space.cost import params
from space.io.parquet import write_table
from tests.contracts import tiny_space

SPACE = tiny_space(
    width=[32], depth=[4, 5, 6, 7, 8], mixer=["attention", "sliding", "gated_deltanet", "none"], heads=[2],
    ffn=[0, 16, 32, 48, 64], window=[8, 16], ratios=["any"],
)  # fmt: skip


def found_under(limit: str, space: Space = SPACE, **changes: object) -> dict[str, Architecture]:
    return baselines(Problem(space, limits=(limit,)), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("percent", [55, 70, 85, 95])
def test_each_is_the_largest_of_its_family_within_the_limit(percent: int) -> None:
    largest = genome.largest(SPACE)
    bound = percent / 100 * params(largest, SPACE.config)
    found = found_under(f"params<={percent}%", removal_order=[3, 0, 1, 2, 4, 5, 6, 7], seed=1)
    assert all(params(one, SPACE.config) <= bound for one in found.values())

    if "fewer layers" in found:
        layers = found["fewer layers"].layers
        gone = [slot for slot in [3, 0, 1, 2] if not layers[slot].present]
        assert gone == [3, 0, 1, 2][: len(gone)]
        assert all(layers[slot] == largest.layers[slot] for slot in range(8) if slot not in gone)
        back = [largest.layers[s] if s == gone[-1] else layer for s, layer in enumerate(layers)]
        assert params(replace(largest, layers=tuple(back)), SPACE.config) > bound

    names = {"smaller FFNs": None, "1:3 sliding": "sliding", "1:3 gated_deltanet": "gated_deltanet"}
    for name, mixer in names.items():
        if name not in found:
            continue
        layers = found[name].layers
        assert [layer.mixer for layer in layers] == [
            "attention" if mixer is None or slot in (3, 7) else mixer for slot in range(8)
        ]
        assert {layer.window for layer in layers if layer.mixer == "sliding"} <= {16}
        (size,) = {layer.ffn for layer in layers}
        for larger in (16, 32, 48, 64):
            other = replace(found[name], layers=tuple(replace(layer, ffn=larger) for layer in layers))
            assert larger <= size or params(other, SPACE.config) > bound
    assert params(found["random"], SPACE.config) > 0.9 * bound  # of thousands, one that uses the limit


def test_families_that_a_space_does_not_have() -> None:
    plain = tiny_space(mixer=["attention"], depth=[4], ratios=["full"], ffn=[16, 32], width=[32], heads=[2])
    assert set(found_under("params<=90%", plain)) == {"smaller FFNs", "random"}
    assert found_under("params<=1%", plain) == {}
    with pytest.raises(InputError, match="needs a device"):
        found_under("decode@64<=50%", plain)


def test_removal_order_is_that_of_the_scores(tmp_path: Path) -> None:
    assert removal_order(tmp_path, SPACE) == ()
    alone = [5.0, 1.0, 4.0, 2.0, 8.0, 7.0, 6.0, 3.0]
    rows = [
        {"slot": slot, "candidate": name, "kl": share * value, "loss_nats": 0.0, "recall_loss_nats": 0.0}
        for slot, value in enumerate(alone)
        for name, share in (("none", 0.75), ("ffn-0", 0.25), ("ffn-32", 9.0))
    ]
    write_table(tmp_path / "scores.parquet", BLOCK_SCORES, {}, pd.DataFrame(rows))
    order = removal_order(tmp_path, SPACE)
    assert order == (1, 3, 7, 2, 0, 6, 5, 4)
    found = found_under("params<=80%", removal_order=order)["fewer layers"]
    assert [slot for slot, layer in enumerate(found.layers) if layer == Layer()] == [1, 3]
