"""The supernet's sub-networks: views, not copies; equal to the plain models taken out of them."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from space import Space, genome
from space.blocks import Model, forward
from space.shapes import model_shapes
from supernet.extract import extract
from supernet.supernet import Supernet, supernet_shapes
from tests.contracts import scatter, tiny_space
from tests.numerics import TOLERANCE, assert_close

WIDE: dict[str, Any] = {
    "width": [32, 48],
    "depth": [1, 2, 3],
    "mixer": ["attention", "sliding", "linear", "retnet", "gated_deltanet", "none"],
    "heads": [2, 4],
    "kv_heads": [1, 2],
    "ffn": [0, 32, 64],
    "window": [8, 16],
    "ratios": ["full", 1, "linear"],
}


@pytest.fixture(params=["qkvo", "none"])
def space(request: pytest.FixtureRequest) -> Space:
    return tiny_space(**WIDE, sharing=request.param)


def test_subnetwork_equals_submodel(space: Space) -> None:
    supernet = Supernet(space)
    scatter(supernet)
    rng = np.random.default_rng(0)
    architectures = genome.decode(space, genome.sample(space, rng, 20))
    architectures += [genome.largest(space), genome.smallest(space)]
    text = torch.from_numpy(rng.integers(0, space.vocabulary, (2, 21)))
    for architecture in architectures:
        plain = Model(architecture, space.frame)
        plain.load_state_dict(extract(supernet, architecture))
        with torch.no_grad():
            found, states = supernet(text, architecture)
            expected, expected_states = plain(text)
        assert_close("logits", found, expected, TOLERANCE["float32"])
        for slot, state in expected_states.items():
            for name, value in state.items():
                assert_close(f"{slot}.{name}", states[slot][name], value, TOLERANCE["float32"])


def test_weights_are_prefix_views_and_extraction_copies(space: Space) -> None:
    supernet = Supernet(space)
    scatter(supernet)
    owned = {p.untyped_storage().data_ptr() for p in supernet.parameters()}
    for architecture in genome.decode(space, genome.sample(space, np.random.default_rng(1), 10)):
        shapes = model_shapes(architecture, space.frame)
        copies = extract(supernet, architecture)
        for name, view in supernet.weights(architecture).items():
            assert view.shape == shapes[name]
            assert view.untyped_storage().data_ptr() in owned
            assert view.stride(-1) == 1
            assert view.storage_offset() == 0
            assert torch.equal(copies[name], view)
            assert copies[name].untyped_storage().data_ptr() not in owned


def test_layers_share_projections_only_where_the_space_says_so() -> None:
    shared, private = (supernet_shapes(tiny_space(**WIDE, sharing=sharing)) for sharing in ("qkvo", "none"))
    assert "layers.0.shared.q" in shared
    assert "layers.0.retnet.q" not in shared
    assert "layers.0.retnet.gate" in shared
    assert "layers.0.shared.q" not in private
    assert private["layers.2.retnet.q"] == (4 * 16, 48)


def test_gradients_land_in_prefixes_as_autograd_would_put_them(space: Space) -> None:
    rng = np.random.default_rng(2)
    text = torch.from_numpy(rng.integers(0, space.vocabulary, (2, 17)))
    architectures = genome.decode(space, genome.sample(space, rng, 6))
    ours, theirs = Supernet(space), Supernet(space)
    for supernet in (ours, theirs):
        scatter(supernet)
    for parameter in ours.parameters():
        parameter.grad = torch.zeros_like(parameter)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    for architecture in architectures:

        def loss_of(logits: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())

        loss = ours.accumulate(
            architecture,
            parameters,
            lambda leaves, a=architecture: loss_of(forward(leaves, a, space.frame, text)[0]),
        )
        other = loss_of(theirs(text, architecture)[0])
        other.backward()
        assert_close("loss", loss, other, TOLERANCE["float32"])
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close(name, mine[name].grad, expected, TOLERANCE["float32"])
