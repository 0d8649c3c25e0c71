"""Fits one block to the contribution of the parent's block on captured inputs.

The output matrix is solved by ridge regression, all weights take steps of Adam on the squared error, and the
output matrix is solved again. Of the states after each of these, and at every check between the steps, the
one with the least error on held-out windows is kept, so that no part can do harm: a check that finds a higher
error returns to the best state and halves the rates.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from supernet.blockwise.block import Block, Weights
from supernet.blockwise.ridge import Moments, best_output

BATCH_TOKENS = 2048  # at a time where no gradient is needed
START_TOKENS = 16384  # of the moments before the first step; those after the last step are of all tokens
WARMUP = 0.1  # of the steps, in which the learning rate rises: the solved output matrix is a narrow optimum
CHECKS = 8  # of the held-out error, evenly over the steps
MAX_RETURNS = 3  # to the best state, at half the rate each time; the next failed check ends the fit
VECTOR_RATE_FACTOR = 10.0  # of vectors that start at zero, and the greatest of any parameter


@dataclass(frozen=True, eq=False)
class Rows:
    """Windows of a block's inputs and the parent's contributions.

    Attributes:
        x: the residual stream before the block [N, T, W], fp32 or bf16.
        target: what the parent's block adds to it [N, T, W], fp32.
        held_out: number of last windows that are not fitted.
    """

    x: Tensor
    target: Tensor
    held_out: int

    @property
    def fitted(self) -> int:
        """Number of windows that are fitted."""
        return len(self.x) - self.held_out


@dataclass(frozen=True)
class Recipe:
    """Settings of a fit.

    Attributes:
        steps: Adam's steps.
        batch: windows per step.
        rate: peak learning rate of a block's own parameters, for a block with an error of 1 before the first
            step; less in proportion to that error. It falls linearly to 0.
        inherited_rate: the same of the parameters that were taken over from the parent.
        dtype: type of large matrices in Adam's steps.
    """

    steps: int
    batch: int
    rate: float
    inherited_rate: float
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted block.

    Attributes:
        weights: by name, fp32.
        error: their error on held-out windows: squared error over the contribution's mean square.
        start_error: the same before the first step, with the first solved output matrix.
        steps: Adam's steps that were taken.
    """

    weights: dict[str, Tensor]
    error: float
    start_error: float
    steps: int


def batches(x: Tensor) -> Iterator[slice]:
    """Windows [N, T, ...] in parts of about ``BATCH_TOKENS`` tokens.

    Args:
        x: the windows.
    """
    size = max(1, BATCH_TOKENS // x.shape[1])
    return (slice(start, start + size) for start in range(0, len(x), size))


@torch.no_grad()
def moments(block: Block, weights: Weights, rows: Rows, windows: slice) -> Moments:
    """Moments of a block's features on some windows.

    Args:
        block: the block.
        weights: of the block.
        rows: its inputs and targets.
        windows: which of them.
    """
    total = Moments.empty(block.shapes[block.output][1], block.width)
    x, target = rows.x[windows], rows.target[windows]
    for part in batches(x):
        total = total.plus(block.features(weights, x[part].float()), target[part])
    return total


@torch.no_grad()
def held_out_error(block: Block, weights: Weights, rows: Rows) -> float:
    """Squared error on the held-out windows over the square of the parent's contribution.

    Args:
        block: the block.
        weights: of the block.
        rows: its inputs and targets.
    """
    error = energy = 0.0
    x, targets = rows.x[rows.fitted :], rows.target[rows.fitted :]
    for part in batches(x):
        target = targets[part]
        found = block.contribution(weights, x[part].float())
        error += float((found - target).double().square().sum())
        energy += float(target.double().square().sum())
    return error / energy


def fit(
    block: Block,
    weights: Weights,
    inherited: frozenset[str],
    rows: Rows,
    recipe: Recipe,
    rng: np.random.Generator,
    report: Callable[[float], None] = lambda share: None,
    held_out: Moments | None = None,
    fitted: Moments | None = None,
) -> Fitted:
    """Fit a block.

    Args:
        block: the block.
        weights: its first weights.
        inherited: names of those that were taken over from the parent.
        rows: its inputs and targets.
        recipe: the settings.
        rng: draws the batches.
        report: called with the share that is done.
        held_out: moments of the first weights on the held-out windows; None to compute them.
        fitted: moments of the first weights on fitted windows; None to compute them.
    """
    start_windows = min(rows.fitted, max(2, START_TOKENS // rows.x.shape[1]))
    apart = slice(rows.fitted, None)
    start = _solved(
        block,
        weights,
        fitted or moments(block, weights, rows, slice(0, start_windows)),
        held_out or moments(block, weights, rows, apart),
    )
    if not recipe.steps:
        return Fitted(*start, start.error, 0)
    best, taken = _trained(block, start, inherited | {block.output}, rows, recipe, rng, report)
    everything = moments(block, best.weights, rows, slice(0, rows.fitted))
    solved = _solved(block, best.weights, everything, moments(block, best.weights, rows, apart))
    return Fitted(*min(best, solved, key=lambda state: state.error), start.error, taken)


class _State(NamedTuple):
    """Weights of a block, and their error on the held-out windows."""

    weights: dict[str, Tensor]
    error: float


def _trained(
    block: Block,
    start: _State,
    solved: frozenset[str],
    rows: Rows,
    recipe: Recipe,
    rng: np.random.Generator,
    report: Callable[[float], None],
) -> tuple[_State, int]:
    """The best state of Adam's steps, at the latest the start, and the number of steps that were taken."""
    best, returns, order = start, 0, list[int]()
    current = {name: value.clone().requires_grad_() for name, value in start.weights.items()}
    optimiser = _optimiser(current, solved, recipe, start.error)
    energy = rows.target[: rows.fitted].square().mean()
    checks = {round(recipe.steps * (i + 1) / CHECKS) for i in range(CHECKS)}
    warmup = max(1, round(WARMUP * recipe.steps))
    for step in range(recipe.steps):
        share = min((step + 1) / warmup, 1 - step / recipe.steps) / 2**returns
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * share
        if len(order) < recipe.batch:
            order += rng.permutation(rows.fitted).tolist()
        drawn, order = order[: recipe.batch], order[recipe.batch :]
        found = block.contribution(block.cast(current, recipe.dtype), rows.x[drawn].float())
        loss = (found - rows.target[drawn]).square().mean() / energy
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step + 1 in checks:
            report((step + 1) / recipe.steps)
            error = held_out_error(block, current, rows)
            if error < best.error:
                best = _State({name: value.detach().clone() for name, value in current.items()}, error)
            elif returns == MAX_RETURNS:
                return best, step + 1
            else:
                returns += 1
                _restore(current, best.weights, optimiser)
    return best, recipe.steps


def _solved(block: Block, weights: Weights, fitted: Moments, held_out: Moments) -> _State:
    """The weights with the better of the given and the solved output matrix."""
    output, error = best_output(fitted, held_out)
    given = held_out.error(weights[block.output])
    if not error < given:
        return _State(dict(weights), given)
    return _State({**weights, block.output: output}, error)


def _restore(current: Mapping[str, Tensor], best: Weights, optimiser: torch.optim.Optimizer) -> None:
    """Return to the best weights, without the momentum that led away from them."""
    with torch.no_grad():
        for name, value in current.items():
            value.copy_(best[name])
            optimiser.state[value]["exp_avg"].zero_()


def _optimiser(
    weights: Mapping[str, Tensor], solved: frozenset[str], recipe: Recipe, start_error: float
) -> torch.optim.Optimizer:
    """Adam with a peak rate for each parameter; what was taken over or solved has a lower one.

    Adam moves every number by about the rate, so a rate fits one scale of numbers: that of a matrix whose
    rows have norm 1. It is scaled to the numbers that a parameter starts with, and to the error that is left:
    the best rate of blocks from an error of 0.08 (sliding attention) to 0.57 (recurrences) was proportional
    to it.
    """
    groups = []
    for name, value in weights.items():
        size = float(value.detach().square().mean().sqrt()) * value.shape[-1] ** 0.5
        scale = size or (1.0 if value.ndim > 1 else VECTOR_RATE_FACTOR)
        peak = (recipe.inherited_rate if name in solved else recipe.rate) * min(start_error, 1.0)
        groups.append({"params": [value], "peak": peak * min(scale, VECTOR_RATE_FACTOR)})
    return torch.optim.Adam(groups, lr=recipe.rate, betas=(0.9, 0.98), eps=1e-10)
