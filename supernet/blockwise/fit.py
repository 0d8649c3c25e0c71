"""Fits one block to the contribution of the parent's block on captured inputs.

The output matrix is solved by ridge regression, all weights take steps of Adam on the squared error, and the
output matrix is solved again. Of the states after each of these, and at every check between the steps, the
one with the least error on held-out windows is kept, so that no part can do harm.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from supernet.blockwise.block import Block, Weights
from supernet.blockwise.ridge import Moments, best_output

START_TOKENS = 16384  # of the moments before the first step; those after the last step are of all tokens
CHECKS = 6  # of the held-out error, evenly over the steps
PATIENCE = 2  # checks without a lower error
VECTOR_RATE_FACTOR = 10.0  # decays, biases and taps are few and have far to go


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
        rate: initial learning rate of a block's own parameters; it falls linearly to 0.
        inherited_rate: of the parameters that were taken over from the parent.
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
        start_error: held-out error with the first output matrix: squared error over the contribution's
            mean square.
        error: held-out error of the weights.
        steps: Adam's steps that were taken.
    """

    weights: dict[str, Tensor]
    start_error: float
    error: float
    steps: int


@torch.no_grad()
def moments(block: Block, weights: Weights, rows: Rows, windows: slice, batch: int) -> Moments:
    """Moments of a block's features on some windows.

    Args:
        block: the block.
        weights: of the block.
        rows: its inputs and targets.
        windows: which of them.
        batch: windows at a time.
    """
    total = Moments.empty(block.shapes[block.output][1], block.width)
    x, target = rows.x[windows], rows.target[windows]
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        total = total.plus(block.features(weights, x[part].float()), target[part])
    return total


@torch.no_grad()
def held_out_error(block: Block, weights: Weights, rows: Rows, batch: int) -> float:
    """Squared error on the held-out windows over the square of the parent's contribution.

    Args:
        block: the block.
        weights: of the block.
        rows: its inputs and targets.
        batch: windows at a time.
    """
    error = energy = 0.0
    for start in range(rows.fitted, len(rows.x), batch):
        part = slice(start, start + batch)
        target = rows.target[part]
        found = block.contribution(weights, rows.x[part].float())
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
    batch = recipe.batch
    start_windows = min(rows.fitted, max(batch, START_TOKENS // rows.x.shape[1]))
    apart = slice(rows.fitted, None)
    current = {name: value.clone() for name, value in weights.items()}
    best = _solved(
        block,
        current,
        fitted or moments(block, current, rows, slice(0, start_windows), batch),
        held_out or moments(block, current, rows, apart, batch),
    )
    start_error = best[1]
    current = {name: value.clone().requires_grad_() for name, value in best[0].items()}
    optimiser = _optimiser(current, inherited | {block.output}, recipe)
    energy = rows.target[: rows.fitted].square().mean()
    checks = {round(recipe.steps * (i + 1) / CHECKS) for i in range(CHECKS)}
    order: list[int] = []
    misses = taken = 0
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * (1 - step / recipe.steps)
        if len(order) < batch:
            order += rng.permutation(rows.fitted).tolist()
        drawn, order = order[:batch], order[batch:]
        x, target = rows.x[drawn].float(), rows.target[drawn]
        found = block.contribution(block.cast(current, recipe.dtype), x)
        loss = (found - target).square().mean() / energy
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        taken = step + 1
        if taken in checks:
            error = held_out_error(block, current, rows, batch)
            misses = 0 if error < best[1] else misses + 1
            if error < best[1]:
                best = ({name: value.detach().clone() for name, value in current.items()}, error)
            if misses >= PATIENCE:
                break
            report(taken / recipe.steps)
    if recipe.steps:
        everything = moments(block, best[0], rows, slice(0, rows.fitted), batch)
        best = min(
            best,
            _solved(block, best[0], everything, moments(block, best[0], rows, apart, batch)),
            key=lambda state: state[1],
        )
    return Fitted(best[0], start_error, best[1], taken)


def _solved(
    block: Block, weights: Weights, fitted: Moments, held_out: Moments
) -> tuple[dict[str, Tensor], float]:
    """The weights with the better of the given and the solved output matrix, and their held-out error."""
    output, error = best_output(fitted, held_out)
    given = held_out.error(weights[block.output])
    if not error < given:
        return dict(weights), given
    return {**weights, block.output: output}, error


def _optimiser(
    weights: Mapping[str, Tensor], solved: frozenset[str], recipe: Recipe
) -> torch.optim.Optimizer:
    """Adam with a peak rate for each parameter; what was taken over or solved has a lower one."""
    groups = []
    for name, value in weights.items():
        small = value.ndim == 1 or value.shape[-1] <= 4  # vectors and taps
        if name in solved:
            peak = recipe.inherited_rate
        else:
            peak = recipe.rate * (VECTOR_RATE_FACTOR if small else 1.0)
        groups.append({"params": [value], "peak": peak, "lr": peak})
    return torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-10)
