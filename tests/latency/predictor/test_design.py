"""Choice of measurements: initial design, stack heights, budget."""

from pathlib import Path

import numpy as np
import pytest

from latency import ProfileConfig, load_card
from latency.config import minutes
from latency.predictor.composition import held_bytes
from latency.predictor.design import STACK_HEIGHTS, stack_heights, stacks
from latency.predictor.initial_design import features, grouped, initial_design
from latency.profiling import profile
from space import InputError, Space, Workload, load_space, variation
from space.cost import op_held_bytes
from space.ops import Op, space_ops
from tests.contracts import tiny_space

SMALL = load_space(Path(__file__).parents[3] / "configs" / "spaces" / "small.yaml")
DECODE, PREFILL = Workload.parse("decode@2048"), Workload.parse("prefill@512")


LARGE = tiny_space(width=[512, 1024], depth=[4, 8], heads=[4, 8], ffn=[0, 2048, 4096], max_seq_len=2048)
STACKED = [(space, op) for space in (SMALL, LARGE) for op in space_ops(space)[::7]]


@pytest.mark.parametrize(
    ("space", "op"), STACKED, ids=lambda value: value.name if isinstance(value, Space) else value.key
)
def test_stack_holds_the_bytes_of_a_model_or_more_than_a_cache(space: Space, op: Op) -> None:
    low, high = stack_heights(space, op, DECODE)
    assert 2 <= low < high <= STACK_HEIGHTS[1]
    drawn = variation.sample(space, np.random.default_rng(3), 2000)
    held = held_bytes(space, DECODE, drawn[drawn[:, 0] == space.width.index(op.width)])
    own = high * op_held_bytes(op, DECODE, space.config)
    if (
        STACK_HEIGHTS[0] < high < STACK_HEIGHTS[1] and op.kind != "head"
    ):  # whose stack has an embedding beside it
        wanted = max(12 * 2**20, np.median(held))
        assert 0.9 * wanted < own < 1.1 * wanted
    assert stack_heights(space, op, PREFILL)[1] == STACK_HEIGHTS[0]


def test_stacks_hold_the_bytes_of_a_large_median_model() -> None:
    ends = [
        stack_heights(LARGE, op, DECODE)[1] * op_held_bytes(op, DECODE, LARGE.config)
        for op in space_ops(LARGE)
    ]
    assert max(ends) > 2 * 12 * 2**20


def test_initial_design_has_every_kind_and_phase_and_varies_every_size() -> None:
    points = [(op, w) for op in space_ops(SMALL) for w in (DECODE, PREFILL, Workload.parse("decode@64"))]
    chosen = initial_design(points)
    assert len(chosen) < len(points) / 2
    assert set(grouped(chosen)) == set(grouped(points))
    for places in grouped(points).values():
        all_of = features([points[i] for i in places])
        some = features([p for p in chosen if p in {points[i] for i in places}])
        assert ((np.ptp(some, axis=0) > 0) == (np.ptp(all_of, axis=0) > 0)).all()


def test_workloads_of_one_height_share_a_stack() -> None:
    op = Op(kind="ffn", width=96, ffn=128)
    found = stacks(SMALL, [(op, DECODE), (op, PREFILL)], [(op, DECODE)])
    low, high = stack_heights(SMALL, op, DECODE)
    assert found[op, high] == [DECODE]
    assert found[op, (low + high) // 2] == [DECODE]
    assert found[op, STACK_HEIGHTS[0]] == [PREFILL]


def many_shapes() -> Space:
    return tiny_space(
        mixer=["attention", "linear"], width=[16, 32, 48, 64], heads=[1, 2, 4], ffn=[0, 16, 32, 48, 64, 80]
    )


def test_budget_ends_the_ops_and_progress_tells_their_accuracy(tmp_path: Path) -> None:
    config = ProfileConfig(
        workloads=("decode@16",), block_ms=0.2, min_rounds=2, op_rounds=2, max_rounds=2, optimal_models=4,
        random_models=2, held_out_models=3, repeated_models=1, max_noise=None, op_error=1e-6, group=8,
        budget_minutes=1 / 60,
    )  # fmt: skip
    said: list[str] = []
    predictor = profile(many_shapes(), tmp_path, "here", config, lambda what, _: said.append(what))
    measured = len(load_card(tmp_path, "here").table("ops"))
    assert 12 <= measured < len(space_ops(many_shapes()))
    assert any("ops known to" in what and f"of {len(space_ops(many_shapes()))}" in what for what in said)
    rows = variation.sample(many_shapes(), np.random.default_rng(0), 50)
    assert (predictor.predict(rows, Workload.parse("decode@16")) > 0).all()


@pytest.mark.parametrize(("text", "expected"), [("90s", 1.5), ("10m", 10.0), ("1.5h", 90.0)])
def test_budget_is_parsed_as_minutes(text: str, expected: float) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "10", "m", "-1m", "0s", "1d", "1m30s", "nan m"])
def test_malformed_budget_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a time above 0 such as 90s, 10m"):
        minutes(text)
