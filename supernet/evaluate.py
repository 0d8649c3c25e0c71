"""How good a sub-network is, always on the same tokens.

``loss`` is the mean over all held-out targets; ``recall_loss`` only over those that can be
recalled from the context (see :func:`supernet.corpus.recall_mask`), since a mean over all
tokens does not see what linear mixers lose.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from space import Architecture, Frame
from space.blocks import forward
from supernet.corpus import Corpus, held_out_windows, recall_mask


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What evaluation says of one architecture; losses in nats per token."""

    loss_nats: float
    recall_loss_nats: float

    @property
    def bits_per_token(self) -> float:
        """The loss in bits; bits per byte where bytes are the tokens."""
        return self.loss_nats / math.log(2)

    def to_json(self) -> dict[str, float]:
        """As a JSON value."""
        return asdict(self)


@dataclass(frozen=True)
class EvaluationSet:
    """Fixed held-out windows [N, L + 1] and which of their targets [N, L] can be recalled."""

    windows: NDArray[np.int64]
    recallable: NDArray[np.bool_]

    @property
    def recall_share(self) -> float:
        """The share of targets that count for ``recall_loss``."""
        return float(self.recallable.mean())


def evaluation_set(corpus: Corpus, windows: int, length: int) -> EvaluationSet:
    """The windows that every evaluation of a run uses."""
    tokens = held_out_windows(corpus.held_out, windows, length)
    return EvaluationSet(tokens, recall_mask(tokens, corpus.train))


@torch.inference_mode()
def evaluate(
    weights: Mapping[str, Tensor],
    architecture: Architecture,
    frame: Frame,
    data: EvaluationSet,
    batch: int = 4,
) -> Quality:
    """Evaluate weights (views or a plain model's own) in batches of a fixed shape.

    The batch shape is part of the result's identity: another one may round differently.
    """
    total = recalled = 0.0
    for start in range(0, len(data.windows), batch):
        window = torch.from_numpy(data.windows[start : start + batch])
        logits, _ = forward(weights, architecture, frame, window[:, :-1])
        losses = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten(), reduction="none")
        losses = losses.double()
        total += float(losses.sum())
        recalled += float(losses[torch.from_numpy(data.recallable[start : start + batch]).flatten()].sum())
    count = int(data.recallable.sum())
    return Quality(
        loss_nats=total / data.recallable.size, recall_loss_nats=recalled / count if count else math.nan
    )
