"""Supernets with private blocks: names, composites, and what an architecture does not use."""

import numpy as np
import pytest
import torch

from space import InputError, Layer, genome, variation
from space.blocks import Model, forward
from space.shapes import model_shapes
from supernet.extract import extract
from supernet.supernet import Supernet, block_choices, block_name, sources, supernet_shapes
from tests.contracts import scatter, tiny_space
from tests.numerics import assert_close

SPACE = tiny_space(
    sharing="block", width=[32], mixer=["attention", "sliding", "gated_deltanet", "short_conv", "none"],
    window=[8, 16], heads=[2, 4], kv_heads=[1, 2], ffn=[0, 16, 48], depth=[2, 3],
    ratios=["full", 1, "linear"],
)  # fmt: skip


def test_names_of_blocks() -> None:
    assert block_name(Layer(mixer="sliding", heads=9, kv_heads=3, window=256)) == "sliding-h9-k3-w256"
    assert block_name(Layer(mixer="short_conv")) == "short_conv"
    assert block_name(Layer(ffn=768)) == "ffn-768"


def test_every_choice_has_parameters_of_its_own() -> None:
    members = genome.decode(SPACE, variation.sample(SPACE, np.random.default_rng(0), 300))
    shapes, used = supernet_shapes(SPACE), set()
    for member in members:
        table = sources(SPACE, member)
        assert {name: shape for name, (_, shape) in table.items()} == model_shapes(member, SPACE.config)
        for source, shape in table.values():
            assert shapes[source] == shape  # whole, never a prefix
            used.add(source)
    assert used == set(shapes)


def test_forced_slots_have_full_mixers_only() -> None:
    space = tiny_space(sharing="block", width=[16], depth=[2], full_layers=[1])
    assert {layer.mixer for layer in block_choices(space, 1)} == {"attention", "none"}
    assert "linear" in {layer.mixer for layer in block_choices(space, 0)}


def test_composites_equal_extracted_models() -> None:
    supernet = Supernet(SPACE)
    scatter(supernet, 3)
    tokens = torch.arange(12)[None] % SPACE.vocab_size
    for member in genome.decode(SPACE, variation.sample(SPACE, np.random.default_rng(1), 6)):
        model = Model(member, SPACE.config)
        model.load_state_dict(extract(supernet, member))
        assert_close(member.key, supernet(tokens, member)[0], model(tokens)[0], 1e-6)


def test_a_block_changes_only_the_architectures_that_use_it() -> None:
    supernet = Supernet(SPACE)
    scatter(supernet, 3)
    tokens = torch.arange(12)[None] % SPACE.vocab_size
    members = genome.decode(SPACE, variation.sample(SPACE, np.random.default_rng(2), 12))
    before = [supernet(tokens, member)[0] for member in members]
    with torch.no_grad():
        dict(supernet.named_parameters())["layers.0.ffn-48.down"].mul_(2)
    for member, logits in zip(members, before, strict=True):
        same = torch.equal(supernet(tokens, member)[0], logits)
        assert same == (member.layers[0].ffn != 48)


def test_values_are_used_as_they_are() -> None:
    made = Supernet(SPACE)
    values = {name: p.detach() for name, p in made.named_parameters()}
    loaded = Supernet(SPACE, values=values)
    assert all(p.data_ptr() == values[name].data_ptr() for name, p in loaded.named_parameters())
    member = genome.largest(SPACE)
    tokens = torch.arange(5)[None]
    expected = forward(made.weights(member), member, SPACE.config, tokens)[0]
    assert torch.equal(loaded(tokens, member)[0], expected)
    values.pop("norm")
    with pytest.raises(ValueError, match=r"norm is None, expected .* \(1 differ\)"):
        Supernet(SPACE, values=values)


def test_several_widths_are_refused() -> None:
    with pytest.raises(InputError, match=r"sharing: block needs one width, width gives \[16, 32\]"):
        tiny_space(sharing="block")
