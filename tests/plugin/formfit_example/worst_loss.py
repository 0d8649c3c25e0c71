"""The objective ``worst_loss``: the loss of the held-out sequence that a sub-network predicts worst."""

from __future__ import annotations

from typing import TYPE_CHECKING

from search.problem.objective import register_objective

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from supernet.evaluate import EvaluationSet


def worst_loss(model: Callable[[Tensor], Tensor], data: EvaluationSet) -> float:
    """The greatest loss of a sequence, in nats per token."""
    import torch
    import torch.nn.functional as F

    worst = 0.0
    for tokens, targets in zip(data.tokens, data.targets, strict=True):
        logits_TV = model(torch.from_numpy(tokens)[None])[0].float()
        worst = max(worst, float(F.cross_entropy(logits_TV, torch.from_numpy(targets))))
    return worst


register_objective("worst_loss", worst_loss)
