"""Least squares of an output matrix on its inputs, from moments that are summed once.

A block's contribution is ``Z O^T``: its output matrix O [W, P] times what it computes, Z [tokens, P]. For
fixed Z the best O is a ridge regression, which needs only ``Z^T Z`` and ``Z^T d`` with the parent's
contribution d [tokens, W]. Errors of any O follow from the same moments, so a penalty is chosen on held-out
moments without another pass over the tokens.

Removing inputs is judged by the same moments: :func:`elimination_order` removes, again and again, the inputs
whose loss can be made up best by the others (optimal brain surgeon, Hassibi and Stork 1992, by blocks as in
ZipLM, Kurtic et al. 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)  # times the mean square of an input
ROUNDS = 96  # of an elimination of single inputs; more rounds remove fewer at a time, and change little


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over tokens of products of a block's features and the parent's contribution, in fp64.

    Attributes:
        gram: Z^T Z [P, P].
        cross: Z^T d [P, W].
        energy: sum of squares of d.
    """

    gram: Tensor
    cross: Tensor
    energy: float

    @classmethod
    def empty(cls, inputs: int, width: int) -> "Moments":
        """Moments of no tokens.

        Args:
            inputs: number of features P.
            width: of the residual stream W.
        """
        gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        return cls(gram, torch.zeros(inputs, width, dtype=torch.float64), 0.0)

    def plus(self, features: Tensor, target: Tensor) -> "Moments":
        """The moments with further tokens; the sums are updated in place.

        Args:
            features: Z of the tokens [..., P].
            target: the parent's contribution [..., W].
        """
        z, d = features.flatten(0, -2).float(), target.flatten(0, -2)
        self.gram.add_(z.T @ z)
        self.cross.add_(z.T @ d)
        return Moments(self.gram, self.cross, self.energy + float(d.double().square().sum()))

    def leading(self, order: Tensor) -> "Moments":
        """The moments of some features.

        Args:
            order: indices of the features.
        """
        return Moments(self.gram[order][:, order], self.cross[order], self.energy)

    def error(self, output: Tensor) -> float:
        """Squared error of an output matrix, as a share of the contribution's energy.

        Args:
            output: the matrix [W, P].
        """
        o = output.double()
        return float((self.energy - 2 * (o.T * self.cross).sum() + ((o @ self.gram) * o).sum()) / self.energy)


def solve(moments: Moments, penalty: float) -> Tensor:
    """The output matrix [W, P] of a ridge regression, in fp64.

    Args:
        moments: of the features and the target.
        penalty: of the squared weights, relative to the mean square of a feature.
    """
    gram = moments.gram.clone()
    scale = float(gram.diagonal().mean()) or 1.0
    gram.diagonal().add_(penalty * scale)
    factor, info = torch.linalg.cholesky_ex(gram)
    if info:  # not positive definite at this penalty
        return torch.full_like(moments.cross.T, torch.nan)
    return torch.cholesky_solve(moments.cross, factor).T


def best_output(moments: Moments, held_out: Moments) -> tuple[Tensor, float]:
    """The output matrix [W, P] of the penalty that is best on held-out tokens, in fp32, with its error there.

    Args:
        moments: of the tokens that are fitted.
        held_out: of the held-out tokens.
    """
    outputs = [solve(moments, penalty).float() for penalty in PENALTIES]
    errors = [held_out.error(output) for output in outputs]
    finite = [i for i, error in enumerate(errors) if error == error]
    best = min(finite, key=errors.__getitem__)
    return outputs[best].contiguous(), errors[best]


def elimination_order(
    gram: Tensor, output: Tensor, size: int = 1, groups: Sequence[int] | None = None, keep: int = 0
) -> list[int]:
    """Blocks of features, the most important first.

    A block's score is the error that its removal adds when all remaining weights are refitted. Blocks are
    removed from the lowest score up; after each round the inverse and the weights are updated, so that later
    scores count what was removed before.

    Args:
        gram: Z^T Z [P, P].
        output: the output matrix [W, P].
        size: features of a block: 1 for channels, the head dimension for heads.
        groups: the group of each block; each group keeps ``keep`` blocks to the end, and these come first.
        keep: blocks that each group keeps.
    """
    count = len(gram) // size
    gram = gram.double().clone()
    gram.diagonal().add_(PENALTIES[1] * float(gram.diagonal().mean()))
    inverse, weights = torch.linalg.inv(gram), output.double().clone()
    left, removed = list(range(count)), []
    step = max(1, count // ROUNDS)

    def places(blocks: Sequence[int]) -> Tensor:  # in the matrices, which keep only what is left
        at = torch.tensor([position[block] for block in blocks])
        return (at[:, None] * size + torch.arange(size)).flatten()

    while left:
        position = {block: i for i, block in enumerate(left)}
        per_group = {g: sum(groups[b] == g for b in left) for g in set(groups)} if groups else {}
        free = [b for b in left if not groups or per_group[groups[b]] > keep]
        candidates = free or left
        scores = _scores(inverse, weights, places(candidates).view(-1, size))
        ranked = [candidates[i] for i in scores.argsort(stable=True).tolist()]
        gone = ranked[: step if not groups else 1]
        cut = places(gone)
        stays = torch.ones(len(inverse), dtype=torch.bool)
        stays[cut] = False
        kept = stays.nonzero()[:, 0]
        # The Gram matrix of what is left, inverted: a Schur complement of the inverse.
        update = torch.linalg.solve(inverse[cut][:, cut], inverse[cut][:, kept])  # [cut, kept]
        weights = weights[:, kept] - weights[:, cut] @ update
        inverse = inverse[kept][:, kept] - inverse[kept][:, cut] @ update
        left = [block for block in left if block not in set(gone)]
        removed += gone
    return removed[::-1]


def _scores(inverse: Tensor, weights: Tensor, blocks: Tensor) -> Tensor:
    """The error that the removal of each block [n, size] adds: tr(W_b (H_bb)^-1 W_b^T)."""
    if blocks.shape[1] == 1:
        at = blocks[:, 0]
        return weights[:, at].square().sum(0) / inverse.diagonal()[at]
    own = inverse[blocks[:, :, None], blocks[:, None, :]]  # [n, size, size]
    columns = weights[:, blocks].movedim(1, 0)  # [n, W, size]
    solved: Tensor = torch.linalg.solve(own, columns.mT)  # [n, size, W]
    return (columns * solved.mT).sum((1, 2))
