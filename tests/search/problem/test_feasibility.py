"""Feasibility against brute force: every architecture of small spaces, under random costs."""

from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import milp

import search.problem.integer_program as integer
from search.problem.feasibility import check_feasible, least_relaxation
from search.problem.limit import Constraint, Limit, within
from search.problem.metric import format_quantity
from search.problem.milp import feasible, least, optimum
from space import InfeasibleError, Space, Workload, load_space
from space.cost import flops_table, memory_cost, params_cost
from space.genome import Genomes, contains, decode, encode, encoding, size
from space.ops import Cost, Footprint, Op, OpTables
from space.variation import sample

Floats = NDArray[np.float64]


def space_of(hybrid: dict[str, Any], **changes: Any) -> Space:
    fields: dict[str, Any] = {"name": "tiny", "max_seq_len": 64, "head_dim": 16, "width": [16, 32]}
    layer = changes.pop("layer")
    return Space.model_validate(fields | changes | {"layer": layer, "hybrid": hybrid})


SPACES = {
    "one kind of two, layers may be absent": space_of(
        {"ratios": ["full", 1, 2, "linear"], "max_linear_kinds": 1},
        depth=[2, 3],
        layer={"mixer": ["attention", "linear", "retnet", "none"], "heads": [1, 2], "ffn": [0, 16]},
    ),
    "two kinds of four, every layer whole": space_of(
        {"ratios": [1, 3, "linear"], "max_linear_kinds": 2},
        width=[16],
        depth=[3, 4],
        layer={
            "mixer": ["attention", "linear", "retnet", "gated_deltanet", "sliding"],
            "heads": [1],
            "ffn": [16, 32],
            "window": [8],
        },
    ),
    "local apart, a forced layer": space_of(
        {"ratios": ["full", 1, "linear"], "full_layers": [1], "local": "separate"},
        depth=[1, 2, 3],
        layer={
            "mixer": ["sliding", "attention", "linear", "none"],
            "heads": [2, 4],
            "kv_heads": [2],
            "ffn": [0, 16, 32],
            "window": [8, 16],
        },
    ),
    "two windows are one kind, forced ends": space_of(
        {"ratios": ["full", 1, 2], "full_layers": [0, 2], "max_linear_kinds": 1},
        depth=[2, 3, 4],
        width=[16],
        layer={
            "mixer": ["attention", "retnet", "sliding"],
            "heads": [1, 2],
            "ffn": [0, 16],
            "window": [8, 16],
        },
    ),
    "any mixture": space_of(
        {"ratios": ["any"], "local": "separate"},
        width=[16],
        depth=[2, 3],
        layer={
            "mixer": ["attention", "linear", "sliding", "none"],
            "heads": [1],
            "ffn": [0, 16],
            "window": [8],
        },
    ),
    "no FFN": space_of(
        {"ratios": [1, 2, "linear"], "max_linear_kinds": 2},
        depth=[2, 3],
        layer={"mixer": ["attention", "linear", "retnet", "gated_deltanet"], "heads": [1, 2], "ffn": [0]},
    ),
}


@cache
def everything(name: str) -> Genomes:
    """Every genome of a space: the product of the genes, filtered."""
    space = SPACES[name]
    alphabet = encoding(space).cardinalities
    product = np.indices(tuple(alphabet.tolist())).reshape(len(alphabet), -1).T.astype(np.int16)
    genomes = np.concatenate([part[contains(space, part)] for part in np.array_split(product, 16)])
    assert len(genomes) == size(space)
    return genomes


def random_table(space: Space, rng: np.random.Generator, style: str) -> OpTables:
    """A number for each op: any, or few different ones (so that ties abound), some of them infinite."""
    numbers: dict[Op, float] = {}

    def number(op: Op) -> float:
        if op not in numbers:
            numbers[op] = float(rng.integers(1, 5)) if style == "ties" else float(rng.lognormal())
            if style == "kinds" and op.kind != "ffn":  # what one cost likes, another does not
                numbers[op] = {"attention": 20.0, "embedding": 0.1, "head": 0.1}.get(op.kind, numbers[op])
                numbers[op] = numbers.setdefault(replace(op, heads=0, kv_heads=0, window=0), numbers[op])
            if style == "lacking" and rng.random() < 0.25 and op.kind not in ("embedding", "head"):
                numbers[op] = np.inf
        return numbers[op]

    return OpTables(space, number)


def random_footprint(space: Space, rng: np.random.Generator, style: str) -> Footprint:
    """Up to 4 pieces within the sums of the space: steep, flat and level ones, and jumps, in any order."""
    sums = random_table(space, rng, "ties" if style == "ties" else "any")
    some = sums.totals(sample(space, rng, 40))
    starts, slopes = [0.0], [float(rng.choice([0.0, 0.3]))]
    for start in sorted(set(rng.choice(some, rng.integers(0, 4)))):  # some exactly at what a genome has
        if rng.random() < 0.3:
            start *= rng.uniform(0.9, 1.1)
        if start <= starts[-1] * 1.001:
            continue
        starts.append(float(start))
        if rng.random() < 0.3 and len(starts) < 4:  # a jump
            width = float(start * rng.choice([1e-5, 1e-3]))
            slopes.append(float(rng.uniform(0.5, 8)) / width)
            starts.append(float(start + width))
        slopes.append(float(rng.choice([0.0, 0.2, 1.0, 4.0])) * float(rng.uniform(0.5, 1.5)))
    return Footprint(sums, tuple(starts), tuple(slopes))


def random_cost(space: Space, rng: np.random.Generator, style: str, *, footprint: bool | None = None) -> Cost:
    table = random_table(space, rng, style)
    peak = random_table(space, rng, "ties" if style == "ties" else "any") if rng.random() < 0.6 else None
    if peak is not None and rng.random() < 0.5:  # a peak that matters more than the sum
        peak.ends, peak.mixer, peak.ffn = peak.ends * 0.1, peak.mixer * 5, peak.ffn * 5
    constant, per_layer = float(rng.integers(8, 11)), float(rng.integers(-2, 3))
    full, linear, local = map(float, rng.integers(0, 4, 3))
    rises = rng.random() < 0.6 if footprint is None else footprint
    rise = random_footprint(space, rng, style) if rises else None
    return Cost(table, constant, per_layer, (full, linear, local), peak, rise)


def priced(costs: list[Cost], genomes: Genomes) -> Floats:
    """The costs of all genomes [N, costs]; sums with infinity in them are infinite."""
    with np.errstate(invalid="ignore"):
        return np.stack([cost(genomes) for cost in costs], axis=1)


@pytest.mark.parametrize("style", ["any", "ties", "kinds", "lacking"])
@pytest.mark.parametrize("name", SPACES)
def test_least_equals_brute_force(name: str, style: str) -> None:
    space, genomes = SPACES[name], everything(name)
    rng = np.random.default_rng(0)
    for turn in range(40):
        cost = random_cost(space, rng, style, footprint=turn % 2 == 0)
        values = cost(genomes)
        value, architecture = least(space, cost)
        row = encode(space, [architecture])
        assert contains(space, row).all()
        assert value == pytest.approx(values.min(), rel=1e-9)
        assert cost(row)[0] == value


def bounds_to_try(values: Floats, rng: np.random.Generator) -> list[Floats]:
    """Bounds about what can be met: those of an architecture, its neighbourhood, hopeless and easy ones.

    Those a little below an undominated architecture are closer than the solver can see.
    """
    finite = values[np.isfinite(values).all(axis=1)]
    if not len(finite):
        return [np.full(values.shape[1], 1e9)]
    picked = finite[rng.integers(0, len(finite), 3)]
    low, high = finite.min(axis=0), np.median(finite, axis=0)
    ends = finite[finite.argmin(axis=0)]  # of each cost, the architecture that is best in it
    good = finite[np.argmin((finite / low) @ rng.dirichlet(np.ones(values.shape[1])))]
    return [
        *picked,
        low,
        ends.mean(axis=0),
        ends.mean(axis=0) * rng.uniform(0.8, 1.2),
        good,
        good * (1 - 3e-8),
        good * np.where(np.arange(len(good)) == 0, 1 - 1e-7, 1.0),
        low + (high - low) * rng.random() ** 3,
        low * rng.uniform(1, 1.5, len(low)),
        np.where(rng.random(len(good)) < 0.5, np.inf, good),
        low * 0.9,
        finite.max(axis=0),
    ]


@pytest.mark.parametrize("style", ["any", "ties", "kinds", "lacking"])
@pytest.mark.parametrize("name", SPACES)
def test_joint_feasibility_equals_brute_force(name: str, style: str) -> None:
    space, genomes = SPACES[name], everything(name)
    rng = np.random.default_rng(1)
    decided = set()
    for count in (1, 2, 3, 4):
        costs = [random_cost(space, rng, style) for _ in range(count)]
        values = priced(costs, genomes)
        for bounds in bounds_to_try(values, rng):
            kept = (values <= bounds * (1 + 1e-9)).all(axis=1) & np.isfinite(values).all(axis=1)
            architecture = feasible(space, costs, list(bounds))
            assert (architecture is not None) == kept.any(), (count, bounds)
            decided.add(bool(kept.any()))
            if architecture is not None:
                row = encode(space, [architecture])
                assert contains(space, row).all()
                found = priced(costs, row)[0]
                assert all(within(value, bound) for value, bound in zip(found, bounds, strict=True))
                comfort = (values[kept] / bounds).sum(axis=1).min()
                assert (found / bounds).sum() == pytest.approx(comfort, rel=1e-8)
    assert decided == {True, False}


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 60), marks=pytest.mark.slow)])
@pytest.mark.parametrize("style", ["any", "ties", "kinds", "lacking"])
@pytest.mark.parametrize("name", SPACES)
def test_footprints_equal_brute_force(name: str, style: str, seeds: range) -> None:
    """The least of one cost, and the least weighted sum, beside others with footprints."""
    space, genomes = SPACES[name], everything(name)
    for seed in seeds:
        rng = np.random.default_rng((9, seed))
        number = 1 + seed % 3
        costs = [random_cost(space, rng, style, footprint=True) for _ in range(number)]
        values = priced(costs, genomes)
        runs = np.isfinite(values).all(axis=1)
        for bounds in bounds_to_try(values, rng)[seed % 2 :: 2]:
            kept = (values <= bounds * (1 + 1e-9)).all(axis=1) & runs
            sums = [np.eye(number)[0], rng.uniform(0.1, 2, number)]
            some = np.where(np.arange(number) == 0, np.inf, bounds)  # the first is only minimised
            beside = (values <= some * (1 + 1e-9)).all(axis=1) & runs
            for weights, limits, mask in ((sums[0], some, beside), (sums[1], bounds, kept)):
                genome = optimum(space, costs, list(limits), list(weights))
                assert (genome is not None) == mask.any(), (seed, limits)
                if genome is None:
                    continue
                assert contains(space, genome).all()
                found = priced(costs, genome)[0]
                assert all(within(value, bound) for value, bound in zip(found, limits, strict=True))
                assert weights @ found == pytest.approx((values[mask] @ weights).min(), rel=1e-8), seed


@pytest.mark.parametrize("name", ["no FFN", "one kind of two, layers may be absent"])
def test_solutions_beyond_a_bound_are_cut_away(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs about 1e-7 apart, in a solver made too coarse to tell: its finds must be cut away one by one."""
    monkeypatch.setattr(integer, "SCALE", 1.0)
    solved = 0

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal solved
        solved += 1
        return milp(*arguments, **options)

    monkeypatch.setattr(integer, "milp", counting)
    space, genomes = SPACES[name], everything(name)
    rng = np.random.default_rng(6)
    tables = [random_table(space, rng, "any") for _ in range(2)]
    for seed in range(3):
        close = random_table(space, np.random.default_rng(seed), "any")
        for part in (close.mixer, close.ffn):
            part[part > 0] = 1 + 1e-7 * part[part > 0]
        costs = [Cost(close), Cost(tables[0]), Cost(tables[1])]
        values = priced(costs, genomes)
        for place in rng.integers(0, min(len(values), 60), 3):
            row = values[np.argsort(values[:, 0])[place]]
            for bounds in (row, row * [1, 1.2, 1.2], row * [1, 0.9, 2], values.min(axis=0) * [1, 2, 2]):
                kept = (values <= bounds * (1 + 1e-9)).all(axis=1)
                assert (feasible(space, costs, list(bounds)) is not None) == kept.any()
    assert solved > 100


def test_option_dominated_by_another_kind_is_kept() -> None:
    """One kind allowed, two layers within (6, 6): linear with both its heads, though retnet betters one."""
    space = SPACES["one kind of two, layers may be absent"]
    numbers = {("linear", 1): (1, 5), ("linear", 2): (5, 1), ("retnet", 1): (1, 4), ("retnet", 2): (9, 9)}

    def table(which: int) -> OpTables:
        ends = ("embedding", "head")
        return OpTables(
            space, lambda op: numbers.get((op.kind, op.heads), (0 if op.kind in ends else 20,) * 2)[which]
        )

    architecture = feasible(space, [Cost(table(0)), Cost(table(1))], [6.0, 6.0])
    assert architecture is not None
    assert sorted((layer.mixer, layer.heads) for layer in architecture.layers if layer.present) == [
        ("linear", 1),
        ("linear", 2),
    ]


def test_bounds_not_above_zero_are_refused() -> None:
    space = SPACES["no FFN"]
    with pytest.raises(ValueError, match="above 0"):
        feasible(space, [params_cost(space)], [0.0])
    with pytest.raises(ValueError, match="must be given"):
        feasible(space, [], [])


SUBJECTS = ("params", "phone:params", "memory@8", "decode@8")


def asked_of(costs: list[Cost], bounds: Floats) -> list[Constraint]:
    """Limits that stand for random costs: only their names and units matter."""
    units = ("", "", "B", "s")
    return [
        Constraint(Limit.parse(f"{subject}<={float(bound)!r}{unit}"), cost, float(bound))
        for subject, unit, cost, bound in zip(SUBJECTS, units, costs, bounds, strict=False)
    ]


def refusal(space: Space, asked: list[Constraint]) -> str:
    with pytest.raises(InfeasibleError) as error:
        check_feasible(space, asked)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_device_that_runs_no_architecture_is_refused() -> None:
    """A device lacks ops: no architecture has a finite latency; or the ones that have one break a limit."""
    space = SPACES["one kind of two, layers may be absent"]
    costs = params_cost(space), memory_cost(space, Workload.parse("prefill@8"))
    nowhere = replace(costs[1], constant=costs[1].constant + np.inf)
    asked = [Constraint(Limit.parse("params<=1B"), costs[0], 1e9)]
    check_feasible(space, asked, [costs[1]])
    with pytest.raises(InfeasibleError, match=r"no architecture runs on the device within the limits$"):
        check_feasible(space, asked, [nowhere])
    with pytest.raises(InfeasibleError, match=r"no architecture runs on the device$"):
        check_feasible(space, [], [nowhere])


def named_architectures(message: str, name: str) -> Genomes:
    """The genomes of the architectures that a message names by key and description."""
    space = SPACES[name]
    keyed = {a.key: a for a in decode(space, everything(name))}
    found = [keyed[word] for word in message.split() if word in keyed]
    for architecture in found:
        assert f"{architecture.key} ({architecture.describe()})" in message
    return encode(space, found)


@pytest.mark.parametrize("name", SPACES)
def test_infeasible_limits_are_named_with_their_least_values(name: str) -> None:
    space, genomes = SPACES[name], everything(name)
    rng = np.random.default_rng(2)
    costs = [random_cost(space, rng, "any") for _ in range(4)]
    values = priced(costs, genomes)
    low = values.min(axis=0)
    asked = asked_of(costs, low * [0.9, 1.0, 0.5, 1.0])
    message = refusal(space, asked)
    assert message.startswith("space tiny: ")
    for i in (0, 2):
        shown = format_quantity(asked[i].limit.metric, low[i])
        assert f"{asked[i].limit.text} cannot be met: the least is {shown}, of " in message
    assert asked[1].limit.text not in message
    assert asked[3].limit.text not in message
    leasts = priced(costs, named_architectures(message, name))
    assert [leasts[0, 0], leasts[1, 2]] == pytest.approx([low[0], low[2]], rel=1e-9)


def conflicting(values: Floats, together: int, rng: np.random.Generator) -> Floats:
    """Bounds of which, often, the first ``together`` conflict and no fewer."""
    bounds: Floats = values.max(axis=0)
    for i in range(together - 1):
        kept = (values <= bounds).all(axis=1)
        bounds[i] = values[kept, i].min() * rng.uniform(1, 1.3)
    kept, last = values <= bounds, together - 1
    fewer = [[j for j in range(last) if j != i] for i in range(last)]
    leasts = [values[kept[:, some].all(axis=1), last].min() for some in [*fewer, list(range(last))]]
    bounds[last] = (max(leasts[:-1]) + leasts[-1]) / 2
    return bounds


@pytest.mark.parametrize("together", [2, 3])
@pytest.mark.parametrize("name", SPACES)
def test_fewest_conflicting_limits_are_named_with_the_least_values_that_others_leave(
    name: str, together: int
) -> None:
    space, genomes = SPACES[name], everything(name)
    rng = np.random.default_rng(3)
    checked = 0
    for _ in range(500):
        costs = [random_cost(space, rng, "any") for _ in range(4)]
        values = priced(costs, genomes)
        bounds = conflicting(values, together, rng)
        kept = values <= bounds
        sizes = {n: list(combinations(range(4), n)) for n in (1, 2, 3)}
        conflicts = [s for n in sizes for s in sizes[n] if not kept[:, s].all(axis=1).any()]
        if not conflicts or len(conflicts[0]) != together:
            continue
        first = list(conflicts[0])
        asked = asked_of(costs, bounds)
        message = refusal(space, asked)
        names = [asked[i].limit.text for i in first]
        assert f"{', '.join(names[:-1])} and {names[-1]} cannot be met together" in message
        assert "; if every limit were " in message
        assert " would keep them all, with " in message
        for other in set(range(4)) - set(first):
            assert asked[other].limit.text not in message
        reached = priced(costs, named_architectures(message, name))
        for row, i in enumerate(first):
            others = [j for j in first if j != i]
            best = values[kept[:, others].all(axis=1), i].min()
            assert reached[row, i] == pytest.approx(best, rel=1e-8)
            assert f"the least {asked[i].limit.subject} is {asked[i].show(best)}, of " in message
        checked += 1
        if checked == 1 + (together == 2):
            return
    pytest.fail(f"only {checked} conflicts of {together} limits were drawn")


def test_feasible_limits_and_no_limits_pass() -> None:
    space = SPACES["no FFN"]
    rng = np.random.default_rng(4)
    costs = [random_cost(space, rng, "any") for _ in range(3)]
    check_feasible(space, [])
    check_feasible(space, asked_of(costs, priced(costs, everything("no FFN"))[77]))


def test_value_is_shown_with_enough_digits_to_differ_from_the_bound() -> None:
    cost = params_cost(SPACES["no FFN"])
    one = Constraint(Limit.parse("decode@8<=2ms"), cost, 2e-3)
    assert [one.show(v) for v in (3e-3, 2.001e-3, 2e-3)] == ["3 ms", "2.001 ms", "2 ms"]
    half = Constraint(Limit.parse("decode@8<=50%"), cost, 2e-3)
    assert (one.text, half.text) == ("decode@8<=2ms", "decode@8<=50% (2 ms)")


def test_space_whose_ops_a_device_lacks_is_refused() -> None:
    space = SPACES["no FFN"]
    lacking = Cost(OpTables(space, lambda op: np.inf if op.heads else 1.0))
    held = params_cost(space)
    for each in SPACES.values():
        value, architecture = least(each, Cost(OpTables(each, lambda op: np.inf if op.heads else 1.0)))
        assert value == np.inf
        assert contains(each, encode(each, [architecture])).all()
    assert feasible(space, [lacking, held], [1.0, 1e9]) is None
    message = refusal(space, [Constraint(Limit.parse("decode@8<=1s"), lacking, 1.0)])
    assert (
        message
        == "space tiny: decode@8<=1s cannot be met: every architecture needs an op that the device lacks"
    )

    # All but linear are lacking, and a parameter limit that only attention could keep.
    some = Cost(
        OpTables(space, lambda op: np.inf if op.kind in ("retnet", "gated_deltanet", "attention") else 1.0)
    )
    other = Cost(OpTables(space, lambda op: np.inf if op.kind == "linear" else 1.0))
    asked = [
        Constraint(Limit.parse(f"{s}:decode@8<=9s"), cost, 9.0) for s, cost in (("a", some), ("b", other))
    ]
    message = refusal(space, asked)
    assert "with b:decode@8<=9s, every architecture needs an op that the device lacks" in message


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
def test_quickstart_space_with_its_own_costs(share: float) -> None:
    space = load_space(Path("configs/spaces/quickstart.yaml"))
    prefill = Cost(flops_table(space, Workload(phase="prefill", length=256)), 0.0, 1e4)
    costs = [prefill, memory_cost(space, Workload(phase="prefill", length=512)), params_cost(space)]
    rng = np.random.default_rng(5)
    values = priced(costs, sample(space, rng, 4000))
    lows = np.array([least(space, cost)[0] for cost in costs])
    assert (values >= lows * (1 - 1e-9)).all()
    bounds = lows + share * (values.max(axis=0) - lows)
    architecture = feasible(space, costs, list(bounds))
    assert architecture is not None or not (values <= bounds).all(axis=1).any()
    if architecture is not None:
        assert (priced(costs, encode(space, [architecture])) <= bounds * (1 + 1e-9)).all()


@pytest.mark.parametrize("style", ["any", "ties", "lacking"])
@pytest.mark.parametrize("name", SPACES)
def test_least_relaxation_equals_brute_force(name: str, style: str) -> None:
    space, genomes = SPACES[name], everything(name)
    rng = np.random.default_rng(3)
    for count in (2, 3, 2):
        costs = [random_cost(space, rng, style) for _ in range(count)]
        values = priced(costs, genomes)
        finite = values[np.isfinite(values).all(axis=1)]
        if not len(finite) or (finite <= 0).any():
            continue
        bounds = finite.min(axis=0) * rng.uniform(0.3, 1.2, count)
        found = least_relaxation(space, asked_of(costs, bounds))
        assert found is not None
        factor, architecture = found
        least_factor = (finite / bounds).max(axis=1).min()
        assert least_factor * (1 - 1e-6) <= factor <= least_factor * 1.006
        reached = priced(costs, encode(space, [architecture]))[0]
        assert (reached / bounds).max() == pytest.approx(factor, rel=1e-9)
