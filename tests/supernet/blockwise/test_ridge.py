"""Ridge solutions against least squares on the tokens, and orders against brute force."""

from itertools import combinations

import pytest
import torch

from supernet.blockwise.ridge import Moments, best_output, elimination_order, solve
from tests.numerics import assert_close


def drawn(tokens: int, inputs: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features [tokens, inputs] and a noisy target [tokens, width]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    z = torch.randn(tokens, inputs, generator=generator) @ mixed
    weights = torch.randn(width, inputs, generator=generator)
    return z, z @ weights.T + 0.3 * torch.randn(tokens, width, generator=generator)


def summed(z: torch.Tensor, d: torch.Tensor) -> Moments:
    total = Moments.empty(z.shape[1], d.shape[1])
    for start in range(0, len(z), 64):
        total = total.plus(z[start : start + 64], d[start : start + 64])
    return total


def plain_error(z: torch.Tensor, d: torch.Tensor, output: torch.Tensor) -> float:
    z, d = z.double(), d.double()
    return float((z @ output.double().T - d).square().sum() / d.square().sum())


@pytest.mark.parametrize("penalty", [0.0, 1e-2])
def test_solution_equals_least_squares_on_the_tokens(penalty: float) -> None:
    z, d = drawn(300, 12, 5)
    found = solve(summed(z, d), penalty)
    rows = (penalty * z.double().square().mean(0).mean() * len(z)).sqrt() * torch.eye(12, dtype=torch.float64)
    augmented = torch.cat([z.double(), rows]), torch.cat([d.double(), torch.zeros(12, 5).double()])
    assert_close("output", found, torch.linalg.lstsq(*augmented).solution.T, 1e-5)


def test_errors_follow_from_moments() -> None:
    z, d = drawn(200, 8, 4)
    output = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    assert summed(z, d).error(output) == pytest.approx(plain_error(z, d, output), rel=1e-4)


def test_penalty_is_chosen_on_held_out_tokens() -> None:
    z, d = drawn(340, 24, 4)
    fitted, held_out = summed(z[:40], d[:40]), summed(z[40:], d[40:])
    output, error = best_output(fitted, held_out)
    assert error == pytest.approx(plain_error(z[40:], d[40:], output), rel=1e-3)
    assert error <= plain_error(z[40:], d[40:], solve(fitted, 1e-6))


def test_singular_features_are_solved() -> None:
    z, d = drawn(50, 6, 3)
    z = torch.cat([z, z, torch.zeros(50, 2)], 1)  # doubled and silent features
    output, error = best_output(summed(z, d), summed(z, d))
    assert torch.isfinite(output).all()
    assert error < 0.1


def refitted_error(moments: Moments, kept: list[int], size: int) -> float:
    places = torch.tensor([block * size + i for block in kept for i in range(size)])
    part = moments.leading(places)
    return part.error(solve(part, 1e-9))


@pytest.mark.parametrize("size", [1, 3])
def test_first_removal_is_the_best_of_all(size: int) -> None:
    z, d = drawn(400, 12, 5)
    moments = summed(z, d)
    full = solve(moments, 1e-9)
    exact = summed(z, z @ full.float().T)  # the target is the parent's own contribution
    blocks = 12 // size
    order = elimination_order(exact.gram, full, size)
    errors = {
        gone: refitted_error(exact, [b for b in range(blocks) if b != gone], size) for gone in range(blocks)
    }
    assert sorted(order) == list(range(blocks))
    assert order[-1] == min(errors, key=errors.__getitem__)


def test_greedy_order_is_near_the_best_subset() -> None:
    z, d = drawn(400, 8, 3)
    moments = summed(z, d)
    full = solve(moments, 1e-9)
    exact = summed(z, z @ full.float().T)
    kept = elimination_order(exact.gram, full)[:4]
    all_errors = sorted(refitted_error(exact, list(some), 1) for some in combinations(range(8), 4))
    assert refitted_error(exact, kept, 1) <= all_errors[2]


def test_groups_keep_as_many_blocks_each() -> None:
    z, d = drawn(300, 12, 5)
    moments = summed(z, d)
    groups = [0, 0, 0, 1, 1, 1]
    order = elimination_order(moments.gram, solve(moments, 1e-9), 2, groups, keep=2)
    assert sorted(groups[b] for b in order[:4]) == [0, 0, 1, 1]
    assert sorted(order) == list(range(6))
