"""Profiling a tiny space: cards, resuming, other machines, malformed files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from latency import OnnxRuntime, ProfileConfig, load_card, load_predictor
from latency.card import Card, open_card
from latency.predictor.design import model_design
from latency.profiling import load_prior, profile
from latency.runtimes.onnx_graphs import stack_graph
from latency.runtimes.onnxruntime import bind_workload
from latency.runtimes.protocol import random_weights
from space import Architecture, InputError, Layer, Space, Workload, genome, variation
from space.architecture import has_heads
from space.cost import params_cost
from space.mixers import MIXERS
from space.onnx.model import model_graph
from space.ops import Op, mixer_op
from space.shapes import model_shapes
from tests.contracts import change_mixer, tiny_space, unknown_operator
from tests.numerics import TOLERANCE, assert_close

QUICK = ProfileConfig(
    block_ms=0.5,
    min_rounds=2,
    max_rounds=2,
    max_noise=None,
    max_error=None,
    rss=False,
    optimal_models=5,
    random_models=3,
    held_out_models=4,
    repeated_models=2,
)


def space() -> Space:
    return tiny_space(
        mixer=["attention", "sliding", "linear"], window=[8], width=[16], heads=[1], depth=[1, 2, 3]
    )


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
def test_interrupted_profile_measures_only_what_is_missing(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    profile(space(), tmp_path, "this", QUICK, lambda what, share: seen.append((what, share)))
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    card = load_card(tmp_path, "this")
    models = card.table("models")
    assert (models["seconds"] > 0).all()
    assert set(models["role"]) == {"optimal", "random", "held_out", "repeat"}
    assert models[models["role"].isin(["optimal", "random"])]["key"].nunique() == 8
    path = card.predictor_path("tiny", "onnxruntime", 1, "fp32")
    predictor = load_predictor(path, space(), "formfit profile")
    assert predictor.models[Workload.parse("decode@64")].errors.test.held_out.models == 4

    # Half of the models are lost: only these are measured again.
    half = Card(card.folder, card.fingerprint)
    kept = models.iloc[: len(models) // 2]
    (card.folder / "models.parquet").unlink()
    half.append("models", kept.to_dict("records"))
    profile(space(), tmp_path, "this", QUICK)
    again = load_card(tmp_path, "this").table("models")
    merged = kept.merge(again, on=["key", "role", "workload"], suffixes=("", "_again"))
    assert len(again) >= len(models)
    assert (merged["seconds"] == merged["seconds_again"]).mean() > 0.7  # a doubtful one is measured again

    # A second space adds to the same card, and its fit sees the models of the first.
    other = tiny_space(mixer=["attention", "retnet"], width=[16], heads=[1], depth=[1, 2, 3])
    found = profile(other, tmp_path, "this", QUICK)
    assert len(load_card(tmp_path, "this").table("models")) > len(again)
    assert "sliding" in found.ops.kinds["prefill"]


def test_held_out_models_are_disjoint_from_the_fit() -> None:
    design = model_design(space(), QUICK.parsed(space()), QUICK.counts())
    chosen = design.choose(design.expected(), 5)
    fit = {a.key for a in (*chosen, *design.random)}
    held = {a.key for a in design.held_out}
    assert len(fit) == 8
    assert len(held) == 4
    assert not fit & held
    assert {a.key for a in design.repeat} <= held


def test_card_of_another_machine_is_refused(tmp_path: Path) -> None:
    here = OnnxRuntime().fingerprint()
    card = Card(tmp_path / "far", replace(here, cpu="Another"))
    card.save()
    with pytest.raises(InputError, match=r"another device \(cpu: card Another"):
        open_card(tmp_path, "far", here)
    with pytest.raises(InputError, match=r"there are far.*formfit profile --space SPACE --device near"):
        load_card(tmp_path, "near")
    with pytest.raises(InputError, match="there is none yet"):
        load_card(tmp_path / "nowhere", "near")


def test_truncated_card_is_refused(tmp_path: Path) -> None:
    card = Card(tmp_path / "d", OnnxRuntime().fingerprint())
    card.save()
    card.append("models", [{"key": "x", "seconds": 1.0, "half_width": 0.1, "timing": "{}"}])
    card.append("models", [{"key": "x", "seconds": 2.0, "half_width": 0.1, "timing": "{}"}])
    assert list(card.table("models")["seconds"]) == [2.0]
    for name in ("models.parquet", "device.json"):
        data = (card.folder / name).read_bytes()
        (card.folder / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match=name):
            load_card(tmp_path, "d").table("models")
        (card.folder / name).write_bytes(data)
    pd.DataFrame({"a": [1]}).to_parquet(card.folder / "models.parquet")
    with pytest.raises(InputError, match="not a device models file"):
        card.table("models")


def test_workloads_that_do_not_fit_the_space_are_refused() -> None:
    with pytest.raises(InputError, match="longer than the context 64"):
        ProfileConfig(workloads=("prefill@65",)).parsed(space())
    with pytest.raises(InputError, match="profiling runs on 1 threads"):
        ProfileConfig(workloads=("prefill@8,threads=2",)).parsed(space())
    assert [str(w) for w in ProfileConfig().parsed(space())] == ["prefill@64", "decode@64"]


def test_unsupported_mixer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    change_mixer(monkeypatch, "kda", write=unknown_operator)
    runtime, model_config, workload = (
        OnnxRuntime(),
        tiny_space().config,
        Workload(phase="prefill", length=8),
    )
    kda, linear = (Layer(mixer=mixer, heads=2, kv_heads=1) for mixer in ("kda", "linear"))
    message = r"^mixer kda: onnxruntime \S+ cannot run it .*Nowhere.*; leave it out of layer.mixer"
    with pytest.raises(InputError, match=message):
        runtime.stack(mixer_op(32, kda), 3, [workload], model_config)
    with pytest.raises(InputError, match=message):
        runtime.model(Architecture(32, (linear, kda, Layer(ffn=32))), [workload], model_config, 0)
    assert runtime.lacking([linear, kda, Layer(ffn=32)], 32, model_config) == ["kda"]
    runtime.model(Architecture(32, (linear,)), [workload], model_config, 0)


@pytest.mark.parametrize("kind", [*MIXERS, "ffn"])
def test_stack_of_two_applies_both_copies(kind: str) -> None:
    """A stack of two is the first copy followed by the second: no copy is optimised away."""
    model_config = tiny_space().config
    if kind == "ffn":
        op = Op(kind="ffn", width=32, ffn=48)
    elif not has_heads(kind):
        op = Op(kind=kind, width=32)
    else:
        op = Op(kind=kind, width=32, heads=2, kv_heads=1, window=8 if kind == "sliding" else 0)
    runtime = OnnxRuntime()
    one, two = (runtime.session(stack_graph(op, height, model_config)) for height in (1, 2))
    x = np.random.default_rng(0).standard_normal((1, 5, 32)).astype(np.float32)

    def feeds(session: object, slots: int) -> dict[str, np.ndarray]:
        values: dict[str, np.ndarray] = {"x": x, "position": np.array([0])}
        for item in session.get_inputs():  # type: ignore[attr-defined]
            if item.name.startswith("state"):
                values[item.name] = np.zeros(
                    [1, *(d if isinstance(d, int) else 0 for d in item.shape[1:])], np.float32
                )
        return {k: v for k, v in values.items() if k in {i.name for i in session.get_inputs()}}  # type: ignore[attr-defined]

    first = one.run(["out"], feeds(one, 1))[0]
    both = two.run(["out"], feeds(two, 2))[0]
    assert np.abs(both - first).max() > 1e-3
    assert np.abs(first - x).max() > 1e-3


def test_preallocated_caches_give_equal_logits() -> None:
    """A cache that is bound in place and longer than the past gives the logits of a plain call."""
    made = space()
    architecture = genome.largest(made)
    weights = random_weights(model_shapes(architecture, made.config), 0)
    session = OnnxRuntime().session(model_graph(architecture, made.config, weights))
    rng = np.random.default_rng(0)
    text = rng.integers(0, made.vocab_size, (1, 12))
    names = [o.name for o in session.get_outputs()]

    def call(tokens: np.ndarray, position: int, states: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        feeds = {"tokens": tokens, "position": np.array([position]), **states}
        return dict(zip(names, session.run(names, feeds), strict=True))

    empty = {i.name: np.zeros((1, 1, 0, 16), np.float32) for i in session.get_inputs() if "state" in i.name}
    before = call(text[:, :11], 0, empty)
    states = {n.removesuffix(".next"): v for n, v in before.items() if "state" in n}
    expected = call(text[:, 11:], 11, states)["logits"]
    roomy = {
        n: np.concatenate([v, 9 * np.ones((1, 1, 7, 16), np.float32)], axis=2) for n, v in states.items()
    }
    assert_close("logits", call(text[:, 11:], 11, roomy)["logits"], expected, TOLERANCE["float32"])
    run = bind_workload(
        session, Workload.parse("decode@12"), made.config, architecture.width, architecture.layers
    )
    run(3)


def test_known_device_serves_as_prior(tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"error": 9.0})
    profile(space(), tmp_path, "known", QUICK)
    source = load_prior(space(), tmp_path, "known", QUICK)
    predictor = profile(space(), tmp_path, "new", config, prior=source)
    assert all(len(model.processes) == 2 for model in predictor.ops.models.values())
    path = load_card(tmp_path, "new").predictor_path("tiny", "onnxruntime", 1, "fp32")
    again = load_predictor(path, space(), "formfit profile")
    rows = variation.sample(space(), np.random.default_rng(0), 20)
    for workload in QUICK.parsed(space()):
        assert (again.predict(rows, workload) == predictor.predict(rows, workload)).all()
    with pytest.raises(InputError, match="not usable as a prior"):
        load_prior(tiny_space(head_dim=32), tmp_path, "known", QUICK)
    with pytest.raises(InputError, match="there are known, new"):
        load_prior(space(), tmp_path, "moon", QUICK)


def test_memory_is_measured_with_latency(tmp_path: Path) -> None:
    predictor = profile(space(), tmp_path, "this", QUICK.model_copy(update={"rss": True, "rss_models": 2}))
    rows = variation.sample(space(), np.random.default_rng(0), 50)
    mean, upper = (predictor.memory_cost(Workload.parse("prefill@64"), c)(rows) for c in (None, 0.9))
    assert (mean > 4 * params_cost(space())(rows)).all()
    assert (upper >= mean).all()
    table = load_card(tmp_path, "this").table("memory")
    assert table["key"].nunique() == 8 + 2
    assert predictor.memory[Workload.parse("prefill@64")].errors.models == 2


def test_lengths_between_measured_ones_are_interpolated(tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"workloads": ("prefill@8", "prefill@64")})
    predictor = profile(space(), tmp_path, "this", config)
    rows = variation.sample(space(), np.random.default_rng(0), 20)
    between = predictor.predict(rows, Workload.parse("prefill@32"))
    assert (between > 0).all()
    for outside, expected in (
        ("prefill@4", "--workload prefill@64 --workload prefill@4` measures it too"),
        ("prefill@65", r"\(measured: prefill@8, prefill@64\)$"),  # beyond the context nothing measures it
        ("decode@32", "formfit profile"),
    ):
        with pytest.raises(InputError, match=f"outside what was measured.*{expected}"):
            predictor.predict(rows, Workload.parse(outside))
