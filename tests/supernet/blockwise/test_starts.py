"""First weights of blocks: nothing is lost that the parent has, and neutral values are better than noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from space import Layer, ModelConfig
from space.attention.rotary import rotate
from space.layer import Rope
from supernet.blockwise.block import Block
from supernet.blockwise.fit import Fitted, Recipe, Rows, fit, held_out_error, moments
from supernet.blockwise.ridge import Moments, elimination_order
from supernet.blockwise.start import (
    Measured,
    chosen_heads,
    constant_direction,
    inherited,
    mean_distances,
    start_ffn,
    start_mixer,
)
from supernet.data.corpus import Corpus
from supernet.extract import read_submodel
from tests.numerics import assert_close

RECURRENT = ["gated_deltanet", "kda", "mamba2", "gla", "retnet"]
NO_STEPS = Recipe(steps=0, batch=8, rate=1.2e-2, inherited_rate=4e-3)
PARENT = Layer(mixer="attention", heads=4, kv_heads=2)


class Slot:
    """A slot of the trained parent with inputs and targets of its blocks."""

    def __init__(self, folder: Path, corpus: Corpus, slot: int = 1, windows: int = 160) -> None:
        model = read_submodel(folder).model()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        self.config: ModelConfig = model.model_config
        self.mixer = {n.split(".")[-1]: p for n, p in weights.items() if n.startswith(f"layers.{slot}.mixer")}
        self.ffn = {n.split(".")[-1]: p for n, p in weights.items() if n.startswith(f"layers.{slot}.ffn")}
        tokens = np.asarray(corpus.train[: windows * 32], np.int64).reshape(windows, 32)
        x = F.embedding(torch.from_numpy(tokens), weights["embedding"])
        for below in range(slot):
            for part, layer in (("mixer", PARENT), ("ffn", Layer(ffn=64))):
                block = self.block(layer)
                x = x + block.contribution(
                    {n: weights[f"layers.{below}.{part}.{n}"] for n in block.shapes}, x
                )
        self.x = x
        self.parent = self.block(PARENT)
        target = self.parent.contribution(self.mixer, x)
        self.rows = Rows(x, target, windows // 5)
        after = x + target
        self.ffn_rows = Rows(after, self.block(Layer(ffn=64)).contribution(self.ffn, after), windows // 5)

    def block(self, layer: Layer) -> Block:
        return Block(layer, 32, self.config)

    def measured(self) -> Measured:
        hidden = F.rms_norm(self.x, (32,), self.mixer["pre_norm"], 1e-5).flatten(0, 1).double()
        square, mean = hidden.T @ hidden / len(hidden), hidden.mean(0)
        own = moments(self.parent, self.mixer, self.rows, slice(0, self.rows.fitted))
        distances = mean_distances(self.parent, self.mixer, self.x[:2])
        return Measured(constant_direction(square, mean), square, own, distances)


@pytest.fixture(scope="module")
def slot(parent_folder: Path, corpus: Corpus) -> Slot:
    with torch.no_grad():
        return Slot(parent_folder, corpus)


@pytest.fixture(scope="module")
def first_slot(parent_folder: Path, corpus: Corpus) -> Slot:
    with torch.no_grad():
        return Slot(parent_folder, corpus, 0)


def test_parents_own_sizes_are_taken_over_whole(slot: Slot) -> None:
    for mixer in ("attention", "sliding", "gated_deltanet"):
        layer = Layer(mixer=mixer, heads=4, kv_heads=2, window=32 if mixer == "sliding" else 0)
        weights, taken = start_mixer(
            slot.block(layer), slot.parent, slot.mixer, slot.measured(), torch.Generator()
        )
        assert taken >= set(slot.mixer)
        for name, value in slot.mixer.items():
            assert torch.equal(weights[name], value), (mixer, name)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (2, 2), (2, 1), (4, 1), (3, 3)])
def test_heads_attend_as_the_parents_heads_they_come_from(slot: Slot, heads: int, kv_heads: int) -> None:
    """With keys and values of the same parent's head, each head's output is the parent's."""
    block = slot.block(Layer(mixer="attention", heads=heads, kv_heads=kv_heads))
    chosen = chosen_heads(block, slot.parent, slot.measured().moments, slot.mixer["o"])  # type: ignore[arg-type]
    assert len(chosen) == heads
    assert chosen == sorted(set(chosen))
    weights = inherited(block, slot.parent, slot.mixer, chosen)
    assert {name: tuple(value.shape) for name, value in weights.items()} == block.shapes
    made = block.features(weights, slot.x[:2]).unflatten(-1, (heads, 16))
    parents = slot.parent.features(slot.mixer, slot.x[:2]).unflatten(-1, (4, 16))
    if (heads, kv_heads) in ((4, 4), (2, 2), (3, 3)):  # one kv head a head
        assert_close("heads", made, parents[:, :, chosen], 1e-5)
    if (heads, kv_heads) == (4, 1):
        assert_close("keys", weights["k"], slot.mixer["k"].view(2, 16, 32).mean(0), 1e-6)


def test_cut_heads_are_those_whose_loss_is_made_up_best(slot: Slot) -> None:
    own = slot.measured().moments
    assert own is not None
    block = slot.block(Layer(mixer="attention", heads=3, kv_heads=3))
    chosen = chosen_heads(block, slot.parent, own, slot.mixer["o"])
    errors = {}
    for gone in range(4):
        kept = [h for h in range(4) if h != gone]
        part = own.leading(torch.tensor([h * 16 + i for h in kept for i in range(16)]))
        gram = part.gram + 1e-8 * part.gram.diagonal().mean() * torch.eye(48)
        errors[gone] = part.error(torch.linalg.solve(gram, part.cross).T)
    assert set(range(4)) - set(chosen) == {min(errors, key=errors.__getitem__)}


def test_mean_distances_equal_a_plain_sum(slot: Slot) -> None:
    x = slot.x[:1]
    found = mean_distances(slot.parent, slot.mixer, x)
    hidden = F.rms_norm(x, (32,), slot.mixer["pre_norm"], 1e-5)
    q = rotate((hidden @ slot.mixer["q"].T).view(1, 32, 4, 16), 0, Rope())[0].double()
    k = rotate((hidden @ slot.mixer["k"].T).view(1, 32, 2, 16), 0, Rope())[0].double()
    for head in range(4):
        means = []
        for t in range(1, 32):
            scores = torch.stack([q[t, head] @ k[s, head // 2] / 4 for s in range(1, t + 1)])
            means.append(float((scores.softmax(0) * (t - torch.arange(1, t + 1))).sum()))
        assert float(found[head]) == pytest.approx(np.mean(means), rel=1e-4)


def test_constant_direction_is_nearly_one_at_every_token() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 8, generator=generator, dtype=torch.float64)
    hidden[:, 3] += 4
    found = constant_direction(hidden.T @ hidden / 500, hidden.mean(0))
    values = hidden.float() @ found
    assert abs(float(values.mean()) - 1) < 0.1
    assert float(values.std()) < 0.3


def started(slot: Slot, layer: Layer, **changes: Any) -> float:
    block = slot.block(layer)
    weights, taken = start_mixer(block, slot.parent, slot.mixer, slot.measured(), torch.Generator())
    return fit(
        block, {**weights, **changes}, taken, slot.rows, NO_STEPS, np.random.default_rng(0)
    ).start_error


@pytest.mark.parametrize("mixer", RECURRENT)
def test_neutral_gates_are_never_worse_than_random_ones(first_slot: Slot, mixer: str) -> None:
    layer = Layer(mixer=mixer, heads=4, kv_heads=2)
    neutral = started(first_slot, layer)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(64, 32, generator=generator) / 32**0.5
        # 1%: a sigmoid gate of random rows is nearly constant too, and held-out windows are few.
        assert neutral <= 1.01 * started(first_slot, layer, gate=random)
    assert neutral < 0.5


def test_sorted_channels_compute_the_same(slot: Slot) -> None:
    full = slot.block(Layer(ffn=64))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    weights = start_ffn(full, slot.ffn, order)
    assert_close("ffn", full.contribution(weights, slot.x), full.contribution(slot.ffn, slot.x), 1e-5)


def test_ranked_channels_beat_reversed_and_random_ones(slot: Slot) -> None:
    rows = slot.ffn_rows
    own = moments(slot.block(Layer(ffn=64)), slot.ffn, rows, slice(0, rows.fitted))
    order = elimination_order(own.gram, slot.ffn["down"])
    for size in (16, 32, 48):
        block = slot.block(Layer(ffn=size))

        def error(channels: list[int], block: Block = block) -> float:
            weights = start_ffn(block, slot.ffn, channels)
            return fit(block, weights, frozenset(), rows, NO_STEPS, np.random.default_rng(0)).start_error

        others = [order[::-1]] + [np.random.default_rng(s).permutation(64).tolist() for s in range(3)]
        assert error(order) < min(map(error, others))


@pytest.mark.parametrize(
    "layer",
    [Layer(mixer="gated_deltanet", heads=4, kv_heads=2), Layer(mixer="attention", heads=2, kv_heads=1),
     Layer(mixer="short_conv"), Layer(ffn=32)],
    ids=Layer.describe,
)  # fmt: skip
def test_errors_fall(slot: Slot, layer: Layer) -> None:
    block = slot.block(layer)
    rows = slot.rows if layer.ffn == 0 else slot.ffn_rows
    if layer.ffn:
        weights, taken = start_ffn(block, slot.ffn, list(range(64))), frozenset(block.shapes)
    else:
        weights, taken = start_mixer(block, slot.parent, slot.mixer, slot.measured(), torch.Generator())
    recipe = Recipe(steps=48, batch=8, rate=1.2e-2, inherited_rate=4e-3)
    found = fit(block, weights, taken, rows, recipe, np.random.default_rng(0))
    before = held_out_error(block, weights, rows)
    assert found.error < found.start_error <= before
    assert held_out_error(block, found.weights, rows) == pytest.approx(found.error, rel=1e-3)


def test_moments_given_equal_moments_computed(slot: Slot) -> None:
    block, full = slot.block(Layer(ffn=32)), slot.block(Layer(ffn=64))
    order = list(range(0, 64, 2))
    weights = start_ffn(block, slot.ffn, order)
    whole: Moments = moments(full, slot.ffn, slot.ffn_rows, slice(0, 8))
    part = moments(block, weights, slot.ffn_rows, slice(0, 8))
    assert_close("gram", whole.leading(torch.tensor(order)).gram, part.gram, 1e-5)
    assert_close("cross", whole.leading(torch.tensor(order)).cross, part.cross, 1e-5)


def test_rates_that_are_too_high_do_no_harm(slot: Slot) -> None:
    """A worse check returns to the best state at half the rate; after three, the fit ends early."""
    block = slot.block(Layer(mixer="gated_deltanet", heads=4, kv_heads=2))
    weights, taken = start_mixer(block, slot.parent, slot.mixer, slot.measured(), torch.Generator())

    def fitted(rate: float) -> Fitted:
        recipe = Recipe(steps=64, batch=4, rate=rate, inherited_rate=rate)
        return fit(block, weights, taken, slot.rows, recipe, np.random.default_rng(0))

    wild, high = fitted(100.0), fitted(0.2)
    assert wild.steps == 32  # at the fourth of eight checks
    assert wild.error <= wild.start_error
    assert high.error < high.start_error
    assert all(value.isfinite().all() for value in wild.weights.values())
