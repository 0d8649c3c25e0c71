"""AdamW on prefixes: equal to torch's on used parts, no change of the rest."""

import torch

from supernet.supernet import prefix
from supernet.training.optimiser import BETAS, PrefixAdamW
from tests.numerics import assert_close

SHAPES = {"matrix": (6, 10), "vector": (7,), "taps": (4, 3)}


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_update_of_whole_parameters_equals_torch() -> None:
    ours, theirs = drawn(0), drawn(0)
    optimiser = PrefixAdamW(ours, 0.1)
    for tensor in theirs.values():
        tensor.requires_grad_()
    groups = [
        {"params": [t for t in theirs.values() if t.ndim == 2], "weight_decay": 0.1},
        {"params": [t for t in theirs.values() if t.ndim != 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=BETAS)
    for step in range(5):
        gradients = drawn(step + 1)
        for name, tensor in theirs.items():
            tensor.grad = gradients[name].clone()
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.7)
        for group in reference.param_groups:
            group["lr"] = 0.1 / (step + 1)
        reference.step()
        optimiser.step(SHAPES, gradients, 0.1 / (step + 1), 0.7)
    for name, tensor in theirs.items():
        assert_close(name, ours[name], tensor.detach(), 1e-6)


def test_unused_prefixes_are_unchanged() -> None:
    """Weights and moments outside of a prefix; inside, all is as for a parameter of that size."""
    ours = drawn(0)
    parts = {"matrix": (3, 5), "vector": (2,)}
    small = {name: prefix(ours[name], shape).clone() for name, shape in parts.items()}
    whole, reference = PrefixAdamW(ours, 0.1), PrefixAdamW(small, 0.1)
    whole.step(SHAPES, drawn(1), 0.01, 1e9)
    before = {name: tensor.clone() for name, tensor in ours.items()}
    moments = {name: whole.state[name]["exp_avg"].clone() for name in SHAPES}
    gradients = drawn(2)
    whole.step(parts, gradients, 0.01, 1e9)
    assert torch.equal(ours["taps"], before["taps"])
    for name, shape in parts.items():
        unused = torch.ones(SHAPES[name], dtype=torch.bool)
        prefix(unused, shape).fill_(False)
        assert torch.equal(ours[name][unused], before[name][unused])
        assert torch.equal(whole.state[name]["exp_avg"][unused], moments[name][unused])
        assert (prefix(ours[name], shape) != prefix(before[name], shape)).all()
    reference.step(parts, drawn(1), 0.01, 1e9)
    reference.step(parts, drawn(2), 0.01, 1e9)
    for name, shape in parts.items():
        assert_close(name, prefix(ours[name], shape), small[name], 1e-6)
