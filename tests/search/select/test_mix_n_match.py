"""Mix'n'Match against brute force over all FFN sizes of an architecture, on small spaces."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

from latency import Predictor, load_predictor
from search.config import load_run_config, open_run, open_supernet
from search.engine.choice import BoundedLimit, Choice, FamilyPick, Prediction
from search.engine.make_front import predictions
from search.engine.verification import LatencyMeasurement
from search.problem.limit import Limit, within
from search.problem.problem import Problem
from search.select.mix_n_match import family, mix_and_match, mix_problem, select_by_limit
from search.select.picks import select_member
from search.submodel.verify import judge
from space import Architecture, InfeasibleError, InputError, Space, Workload, genome, load_space, variation
from space.cost import memory_bytes, params
from space.io.artefact import canonical_json
from supernet.data.corpus import load_corpus
from supernet.extract import write_submodel
from supernet.training.train import load_supernet
from tests.conftest import Quiet
from tests.contracts import TINY_SPACES, belongs, tiny_space

ROOT = Path(__file__).parents[3]
Sizes = tuple[int, ...]
SMALL = tiny_space(ffn=[0, 16, 32, 64], mixer=["attention", "linear", "none"], depth=[2, 3, 4])
# The small spaces as they are, and with more sizes to nest.
SPACES = {name: tiny_space(**changes) for name, changes in TINY_SPACES.items()}
for name, space in list(SPACES.items()):
    none = [0] if 0 in space.layer.ffn else []
    SPACES[f"{name}, more sizes"] = tiny_space(**TINY_SPACES[name] | {"ffn": [*none, 16, 32, 64]})


def problem_of(space: Space) -> Problem:
    return mix_problem(space, {}, 0.975)


def sizes_of(architecture: Architecture) -> Sizes:
    return tuple(layer.ffn for layer in architecture.layers if layer.ffn)


def with_sizes(base: Architecture, sizes: Sizes) -> Architecture:
    """The architecture with other FFN sizes, in the order of the layers with an FFN."""
    left = iter(sizes)
    return replace(
        base, layers=tuple(replace(layer, ffn=next(left) if layer.ffn else 0) for layer in base.layers)
    )


def allowed(space: Space, sizes: Sizes) -> bool:
    """The paper's rule: never smaller with depth, at most two sizes, which are neighbours."""
    choices = [size for size in space.layer.ffn if size]
    places = [choices.index(size) for size in sizes]
    return all(b >= a for a, b in pairwise(places)) and (not places or places[-1] - places[0] <= 1)


def by_force(space: Space, base: Architecture) -> list[Architecture]:
    """All architectures that the rule allows, by parameters."""
    choices = [size for size in space.layer.ffn if size]
    ways = product(choices, repeat=len(sizes_of(base)))
    found = [with_sizes(base, sizes) for sizes in ways if allowed(space, sizes)]
    return sorted(found, key=lambda a: params(a, space.config))


def some_bases(space: Space) -> list[Architecture]:
    return [genome.largest(space), genome.smallest(space), *random_members(space, 30)]


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_family_equals_brute_force(space: Space) -> None:
    for base in some_bases(space):
        rows = family(space, base)
        members = genome.decode(space, rows)
        assert genome.contains(space, rows).all()
        assert all(belongs(space, member) for member in members)
        assert members == by_force(space, base)
        layers, choices = len(sizes_of(base)), len([size for size in space.layer.ffn if size])
        assert len(members) == layers * (choices - 1) + 1
        for member in members:  # all else is kept
            assert with_sizes(member, sizes_of(base)) == base
        for less, more in pairwise(members):  # each holds the one before
            steps = [b - a for a, b in zip(sizes_of(less), sizes_of(more), strict=True)]
            assert sum(step > 0 for step in steps) == 1
            assert min(steps) >= 0
            assert params(less, space.config) < params(more, space.config)
            again = genome.decode(space, family(space, less))
            assert again == members  # whoever is taken, the family is one


def random_members(space: Space, count: int) -> list[Architecture]:
    return genome.decode(space, variation.sample(space, np.random.default_rng(0), count))


def test_deeper_layers_grow_first() -> None:
    base = next(
        a for a in random_members(SMALL, 200) if [bool(x.ffn) for x in a.layers] == [True, False, True, True]
    )
    found = [tuple(layer.ffn for layer in a.layers) for a in genome.decode(SMALL, family(SMALL, base))]
    assert found == [
        (16, 0, 16, 16), (16, 0, 16, 32), (16, 0, 32, 32), (32, 0, 32, 32),
        (32, 0, 32, 64), (32, 0, 64, 64), (64, 0, 64, 64),
    ]  # fmt: skip


@pytest.mark.parametrize("metric", ["params", "memory@64", "memory@64,batch=3"])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_largest_member_within_the_limit_is_selected(space: Space, metric: str) -> None:
    """Without a device; bounds at, below and above the cost of every member."""

    def cost(architecture: Architecture) -> int:
        if metric == "params":
            return params(architecture, space.config)
        return memory_bytes(architecture, Workload.parse(metric.replace("memory", "prefill")), space.config)

    for base in (genome.largest(space), *random_members(space, 3)):
        members = by_force(space, base)
        costs = [cost(member) for member in members]
        assert all(b > a for a, b in pairwise(costs))
        for bound in sorted({value + more for value in costs for more in (-1, 0, 1)}):
            limit = Limit.parse(f"{metric}<={bound}{'' if metric == 'params' else 'B'}")
            kept = [member for member, value in zip(members, costs, strict=True) if value <= bound]
            if not kept:
                with pytest.raises(InfeasibleError, match=f"the least is .*, of {members[0].key} ") as caught:
                    mix_and_match(base, problem_of(space), limit)
                assert f"{limit.text} cannot be met by other FFN sizes of {base.key}" in str(caught.value)
                continue
            found = mix_and_match(base, problem_of(space), limit)
            assert found.architecture == kept[-1]
            unit = "parameters" if metric == "params" else "bytes"
            assert found.choice == Choice(
                limits=(BoundedLimit(text=limit.text, bound=bound, unit=unit),),
                confidence=0.975,
                predicted=Prediction(params=params(found.architecture, space.config), latency={}),
                picked=FamilyPick(how="mix'n'match", base=base.key, family=len(members)),
            )


def test_no_sampled_architecture_within_the_limit_is_larger() -> None:
    """On a shipped space, by sampling instead of enumeration."""
    space, rng = load_space(ROOT / "configs" / "spaces" / "quickstart.yaml"), np.random.default_rng(1)
    choices = np.array([size for size in space.layer.ffn if size])
    for base in (genome.largest(space), *random_members(space, 5)):
        layers = len(sizes_of(base))
        draws = rng.choice(choices, (20_000, layers))
        draws[:10_000] = np.sort(draws[:10_000], axis=1)  # else few of so many layers would never fall
        ways = {tuple(map(int, row)) for row in draws}
        costs = [params(with_sizes(base, way), space.config) for way in ways if allowed(space, way)]
        least, most = (
            params(a, space.config) for a in (by_family(space, base)[0], by_family(space, base)[-1])
        )
        assert min(costs) >= least
        assert max(costs) <= most
        for bound in rng.integers(least, most + 1, 10):
            found = mix_and_match(base, problem_of(space), Limit.parse(f"params<={bound}"))
            used = params(found.architecture, space.config)
            assert used <= bound
            assert used >= max((value for value in costs if value <= bound), default=0)


def by_family(space: Space, base: Architecture) -> list[Architecture]:
    return genome.decode(space, family(space, base))


def test_percentage_is_of_the_largest_architecture() -> None:
    """For any base."""
    whole = params(genome.largest(SMALL), SMALL.config)
    for base in random_members(SMALL, 30):
        costs = [params(member, SMALL.config) for member in by_family(SMALL, base)]
        for percent in (40, 60, 100):
            limit = Limit.parse(f"params<={percent}%")
            kept = [value for value in costs if within(value, whole * percent / 100)]
            if kept:
                found = mix_and_match(base, problem_of(SMALL), limit)
                assert params(found.architecture, SMALL.config) == kept[-1]
                assert found.choice is not None
                (bounded,) = found.choice.limits
                assert (bounded.text, bounded.unit) == (f"params<={percent}%", "parameters")
                assert bounded.bound == pytest.approx(whole * percent / 100)
            else:
                with pytest.raises(
                    InfeasibleError, match=rf"params<={percent}% \(.* parameters\) cannot be met"
                ):
                    mix_and_match(base, problem_of(SMALL), limit)
    largest = genome.largest(SMALL)
    assert mix_and_match(largest, problem_of(SMALL), Limit.parse("params<=100%")).architecture == largest


def test_limit_that_needs_a_device_is_refused_without_one() -> None:
    largest = genome.largest(SMALL)
    for text in ("decode@64<=2ms", "prefill@64<=60%", "rss@64<=1MiB", "phone:params<=1M"):
        with pytest.raises(InputError, match=f"limit '{text}': needs a device; say with --device"):
            mix_and_match(largest, problem_of(SMALL), Limit.parse(text))
    other = genome.largest(tiny_space(width=[48]))
    with pytest.raises(InputError, match="is not of space tiny"):
        mix_and_match(other, problem_of(SMALL), Limit.parse("params<=1M"))


@pytest.fixture(scope="module")
def predictor(finished_run: Path) -> Predictor:
    path = next((finished_run / "devices" / "desk" / "predictors").glob("*.json"))
    space = load_run_config(finished_run / "run" / "config.yaml").space
    return load_predictor(path, space, "formfit profile")


@pytest.mark.parametrize("metric", ["prefill", "decode", "rss"])
def test_upper_bound_is_held_against_the_limit(predictor: Predictor, metric: str) -> None:
    space, confidence = predictor.space, 0.9
    problem = mix_problem(space, {"desk": predictor}, confidence)
    workload = Workload.parse("decode@64" if metric == "decode" else "prefill@64")
    price = predictor.memory_cost if metric == "rss" else predictor.cost
    unit = "B" if metric == "rss" else "s"
    whole = float(price(workload)(genome.encode(space, [genome.largest(space)]))[0])
    for base in (genome.largest(space), *random_members(space, 20)):
        rows = family(space, base)
        upper = price(workload, confidence)(rows)
        for bound in [*upper, *(upper * 0.999), *(upper * 1.001)]:
            kept = np.flatnonzero(upper <= bound * (1 + 1e-9))
            limit = Limit.parse(f"desk:{metric}@64<={float(bound)!r}{unit}")
            if not len(kept):
                with pytest.raises(
                    InfeasibleError, match=f"of {genome.decode(space, rows[upper.argmin()][None])[0].key}"
                ):
                    mix_and_match(base, problem, limit)
                continue
            found = mix_and_match(base, problem, limit)
            assert found.architecture == genome.decode(space, rows[kept[-1:]])[0]
            assert found.choice is not None
            limited = replace(problem, limits=(limit,))
            assert found.choice.predicted == predictions(limited, found.architecture)
            assert found.choice.confidence == confidence
            canonical_json(found.chosen)
        share = 100 * float(upper[-1]) / whole
        if share <= 100:
            limit = Limit.parse(f"{metric}@64<={share!r}%")
            found = mix_and_match(base, problem, limit)
            assert found.architecture == genome.decode(space, rows[-1:])[0]
            assert found.choice is not None
            assert found.choice.limits[0].bound == pytest.approx(upper[-1])


def test_latency_that_decreases_along_the_family(predictor: Predictor) -> None:
    """A larger FFN may be faster when measured."""
    space, workload = predictor.space, Workload.parse("prefill@64")
    model = predictor.models[workload]
    seconds = {key: value * (100 if key.endswith("f32") else 1) for key, value in model.op_seconds.items()}
    changed = replace(predictor, models={**predictor.models, workload: replace(model, op_seconds=seconds)})
    base = genome.largest(space)
    upper = changed.cost(workload, 0.9)(family(space, base))
    assert upper[0] > upper[-1]
    problem = mix_problem(space, {"desk": changed}, 0.9)
    bound = float(upper[-1]) * 1.001
    assert mix_and_match(base, problem, Limit.parse(f"prefill@64<={bound!r}s")).architecture == base
    least = by_family(space, base)[-1]
    with pytest.raises(InfeasibleError, match=f"the least is .*, of {least.key} "):
        mix_and_match(base, problem, Limit.parse(f"prefill@64<={bound / 2!r}s"))


def test_architectures_the_device_cannot_run_are_excluded(predictor: Predictor) -> None:
    """Not even under a limit on parameters: it would have no predicted latency."""
    space = predictor.space
    without = lacking(predictor, lambda key: key.startswith("attention"))
    base = genome.largest(space)
    problem = mix_problem(space, {"desk": without}, 0.9)
    with pytest.raises(InfeasibleError, match=f"all of {base.key} need an op that the device lacks"):
        mix_and_match(base, problem, Limit.parse("params<=100%"))
    with pytest.raises(InputError, match="cannot run the largest architecture"):
        mix_and_match(base, problem, Limit.parse("prefill@64<=100%"))
    small_only = lacking(predictor, lambda key: key.startswith("ffn") and key.endswith("f64"))
    problem = mix_problem(space, {"desk": small_only}, 0.9)
    assert mix_and_match(base, problem, Limit.parse("params<=100%")).architecture == by_family(space, base)[0]
    with pytest.raises(InputError, match="device phone: not among those given"):
        mix_and_match(base, mix_problem(space, {"desk": predictor}, 0.9), Limit.parse("phone:params<=100%"))


def test_choice_is_kept_beside_the_submodel(finished_run: Path, tmp_path: Path) -> None:
    """The README names the limit, and verification judges it; without a device and with one."""
    run = open_run(finished_run / "run", finished_run / "devices")
    supernet = load_supernet(run.space, open_supernet(run, load_corpus(run.config.train.data)))
    path = next((run.devices / "desk" / "predictors").glob("*.json"))
    predictor = load_predictor(path, run.space, "formfit profile")
    for text, predictors in {"params<=80%": {}, "decode@64<=9s": {"desk": predictor}}.items():
        base = genome.largest(run.space)
        found = mix_and_match(base, mix_problem(run.space, predictors, 0.975), Limit.parse(text))
        submodel = write_submodel(tmp_path, supernet, found.architecture, {}, found.chosen, run.text)
        assert submodel.chosen == found.chosen
        assert f"- `{text}`" in (tmp_path / "README.md").read_text()
        measured = LatencyMeasurement(
            latency_ms=1.0, interval_ms=(1.0, 1.0), copies_ms=(1.0,), clock_ms=1.0, problems=()
        )
        (judged,) = judge(submodel, "desk", {"decode@64": measured}, {})
        assert judged.status == "kept"
        value = params(found.architecture, run.space.config) if "params" in text else 1e-3
        assert judged.found == value


def test_selection_by_limit_from_a_run(finished_run: Path, predictor: Predictor, tmp_path: Path) -> None:
    """The base is the search's or the largest; a card is read only if the limit needs one."""
    run = open_run(finished_run / "run", finished_run / "devices")
    largest, best = genome.largest(run.space), select_member(run, "desk", None).architecture
    nowhere = replace(run, devices=tmp_path)
    devices = {"desk": predictor}
    for search, base in ((None, largest), ("desk", best)):
        for text, cards in {
            "params<=95%": {},
            "memory@64<=9MiB": {},
            "decode@64<=9s": devices,
            "desk:prefill@64<=9s": devices,
            "desk:params<=95%": devices,
        }.items():
            wanted = mix_and_match(base, mix_problem(run.space, cards, 0.975), Limit.parse(text))
            where = run if cards else nowhere
            assert select_by_limit(where, search, text, None, Quiet()) == wanted
    choice = select_by_limit(run, None, "params<=95%", "desk", Quiet()).choice
    assert choice is not None
    assert set(choice.workloads("desk")) >= {"prefill@64", "decode@64"}
    for text, device, why in (
        ("decode@64<2ms", None, "'<' is not allowed"),
        ("phone:decode@64<=2ms", None, "phone"),
        ("phone:decode@64<=2ms", "desk", "device phone: not among those given"),
        ("decode@63<=2ms", None, "outside what was measured"),
    ):
        with pytest.raises(InputError, match=why):
            select_by_limit(run, None, text, device, Quiet())
    with pytest.raises(InfeasibleError, match="cannot be met: the least is"):  # by the whole space
        select_by_limit(run, None, "decode@64<=1ns", None, Quiet())


def lacking(predictor: Predictor, missing: Callable[[str], bool]) -> Predictor:
    """The predictor of a device that cannot run some ops."""
    models = {
        w: replace(m, op_seconds={key: value for key, value in m.op_seconds.items() if not missing(key)})
        for w, m in predictor.models.items()
    }
    return replace(predictor, models=models)
