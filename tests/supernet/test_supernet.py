"""Sub-networks are views of the supernet and equal their extracted plain models."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from space import Space, genome, variation
from space.blocks import Model, forward
from space.mixers import MIXERS
from space.shapes import model_shapes
from supernet.extract import extract
from supernet.supernet import Supernet, add_gradients, leaves, sources, supernet_shapes
from supernet.training.precision import cast_matrices
from tests.contracts import scatter, tiny_space
from tests.numerics import TOLERANCE, assert_close

WIDE: dict[str, Any] = {
    "width": [32, 48],
    "depth": [1, 2, 3],
    "mixer": [*MIXERS, "none"],
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
    architectures = genome.decode(space, variation.sample(space, rng, 20))
    architectures += [genome.largest(space), genome.smallest(space)]
    text = torch.from_numpy(rng.integers(0, space.vocab_size, (2, 21)))
    for architecture in architectures:
        plain = Model(architecture, space.config)
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
    for architecture in genome.decode(space, variation.sample(space, np.random.default_rng(1), 10)):
        shapes = model_shapes(architecture, space.config)
        copies = extract(supernet, architecture)
        for name, view in supernet.weights(architecture).items():
            assert view.shape == shapes[name]
            assert view.untyped_storage().data_ptr() in owned
            assert view.stride(-1) == 1
            assert view.storage_offset() == 0
            assert torch.equal(copies[name], view)
            assert copies[name].untyped_storage().data_ptr() not in owned


def test_projections_are_shared_only_with_sharing_qkvo() -> None:
    shared, private = (supernet_shapes(tiny_space(**WIDE, sharing=sharing)) for sharing in ("qkvo", "none"))
    assert "layers.0.shared.q" in shared
    assert "layers.0.retnet.q" not in shared
    assert "layers.0.retnet.gate" in shared
    assert "layers.0.shared.q" not in private
    assert private["layers.2.retnet.q"] == (4 * 16, 48)


def test_prefix_gradients_equal_autograd(space: Space) -> None:
    rng = np.random.default_rng(2)
    text = torch.from_numpy(rng.integers(0, space.vocab_size, (2, 17)))
    architectures = genome.decode(space, variation.sample(space, rng, 6))
    ours, theirs = Supernet(space), Supernet(space)
    for supernet in (ours, theirs):
        scatter(supernet)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for architecture in architectures:

        def loss_of(logits: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())

        table = sources(space, architecture)
        slices = leaves(parameters, table)
        loss = loss_of(forward(slices, architecture, space.config, text)[0])
        loss.backward()
        add_gradients(slices, table, totals)
        other = loss_of(theirs(text, architecture)[0])
        other.backward()
        assert_close("loss", loss, other, TOLERANCE["float32"])
    for name, parameter in theirs.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close(name, totals[name], expected, TOLERANCE["float32"])


class Copies(TorchDispatchMode):
    """Records every op that copies a tensor of given storages into a new one."""

    COPYING = ("clone", "contiguous", "copy", "_to_copy", "cat", "stack", "index_select", "empty_like")

    def __init__(self, owned: set[int]) -> None:
        super().__init__()
        self.owned, self.found = owned, set[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.__name__.split(".")[0]
        if any(name.startswith(copying) for copying in self.COPYING):
            flat = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
            for x in flat:
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in self.owned:
                    self.found.add(f"{name} of {tuple(x.shape)}")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_copies_no_weight(space: Space, dtype: torch.dtype) -> None:
    """Matrices are cast once a step and then sliced only; small gates and taps stay fp32."""
    supernet = Supernet(space)
    weights = cast_matrices(dict(supernet.named_parameters()), dtype)
    owned = {w.untyped_storage().data_ptr() for w in weights.values() if w.ndim == 2 and min(w.shape) > 16}
    text = torch.zeros(2, 33, dtype=torch.int64)
    architectures = genome.decode(space, variation.sample(space, np.random.default_rng(3), 40))
    met = {mixer for architecture in architectures for mixer in architecture.pattern}
    assert met >= set(MIXERS)
    with Copies(owned) as copies:
        for architecture in architectures:
            forward(leaves(weights, sources(space, architecture)), architecture, space.config, text)
        assert not copies.found
        weights["embedding"][:, :16].contiguous()  # what it would notice
    assert copies.found
