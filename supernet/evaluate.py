"""How good a sub-network is, always on the same tokens.

``loss`` is the mean over all held-out targets; ``recall_loss`` only over those that can be
recalled from the context (see :mod:`supernet.data.recall`), since a mean over all tokens does not
see what linear mixers lose. MQAR accuracy is a control beside them: its number counts where
softmax attention reaches 0.99.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from space import Architecture, ModelConfig
from space.blocks import forward
from space.io.artefact import digest
from supernet.data.corpus import Corpus, held_out_windows, window_starts
from supernet.data.mqar import IGNORED, default_pairs, evaluation_generator, mqar
from supernet.data.recall import PIECE_ORDER, PIECE_RARE, recall_mask


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What evaluation says of one architecture; losses in nats per token.

    ``bits_per_byte`` is the loss per byte of the text that the tokens stand for; None where that is
    unknown, as for MQAR sequences and for a tokenizer that does not give a text back.
    """

    loss_nats: float
    recall_loss_nats: float
    bits_per_byte: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """As a JSON value."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationSet:
    """Fixed sequences and what is asked of them.

    Attributes:
        tokens: [N, L].
        targets: [N, L], -100 where nothing is asked.
        recallable: which targets can be recalled from the context [N, L].
        text_bytes: how many bytes of text all targets together stand for; None where unknown.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    recallable: NDArray[np.bool_]
    text_bytes: int | None = None

    @property
    def windows(self) -> NDArray[np.int64]:
        """Each sequence with its last target [N, L + 1]: the text, where it is one."""
        return np.concatenate([self.tokens, self.targets[:, -1:]], axis=1)

    @property
    def count(self) -> int:
        """How many targets there are."""
        return int((self.targets != IGNORED).sum())

    @property
    def recall_share(self) -> float:
        """The share of targets that count for ``recall_loss``."""
        return float(self.recallable.sum() / self.count)

    def bits_per_byte(self, loss_nats: float) -> float | None:
        """A mean loss per token as bits per byte of text; None where the bytes are unknown."""
        return loss_nats / math.log(2) * self.count / self.text_bytes if self.text_bytes else None


def evaluation_set(corpus: Corpus, windows: int, length: int) -> EvaluationSet:
    """The sequences that every evaluation of a run uses: held-out text, or MQAR where that is all.

    Raises:
        InputError: the held-out text is too short for so many windows.
    """
    if corpus.recall == 1:
        return recall_set(corpus.vocab_size, windows, length, corpus.pairs)
    found = held_out_windows(corpus.held_out, windows, length)
    if corpus.is_bytes:
        recallable = recall_mask(found, corpus.train)
        size: int | None = recallable.size
    else:
        recallable = recall_mask(found, corpus.train, PIECE_ORDER, rare_per_million=PIECE_RARE)
        size = None
        if corpus.held_out_bytes is not None:
            starts = window_starts(len(corpus.held_out), windows, length)
            size = int(corpus.held_out_bytes[starts[:, None] + np.arange(1, length + 1)].sum())
    return EvaluationSet(tokens=found[:, :-1], targets=found[:, 1:], recallable=recallable, text_bytes=size)


def recall_set(
    vocab_size: int, count: int, length: int, pairs: int | None = None, seed: int = 0
) -> EvaluationSet:
    """MQAR sequences that no training draws: every label is a target, and can be recalled."""
    rng = evaluation_generator(seed)
    tokens, labels = mqar(rng, count, vocab_size, length, pairs or default_pairs(length))
    return EvaluationSet(tokens=tokens, targets=labels, recallable=labels != IGNORED)


@torch.inference_mode()
def evaluate(
    weights: Mapping[str, Tensor],
    architecture: Architecture,
    model_config: ModelConfig,
    data: EvaluationSet,
    batch: int = 4,
) -> Quality:
    """Evaluate weights (views or a plain model's own) in batches of a fixed shape.

    The batch shape is part of the result's identity: another one may round differently.
    """
    total = recalled = 0.0
    for start in range(0, len(data.tokens), batch):
        part = slice(start, start + batch)
        logits, _ = forward(weights, architecture, model_config, torch.from_numpy(data.tokens[part]))
        targets = torch.from_numpy(data.targets[part]).flatten()
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="none"
        ).double()
        total += float(losses.sum())
        recalled += float(losses[torch.from_numpy(data.recallable[part]).flatten()].sum())
    count = int(data.recallable.sum())
    loss = total / data.count
    return Quality(
        loss_nats=loss,
        recall_loss_nats=recalled / count if count else math.nan,
        bits_per_byte=data.bits_per_byte(loss),
    )


@torch.inference_mode()
def mqar_accuracy(
    weights: Mapping[str, Tensor],
    architecture: Architecture,
    model_config: ModelConfig,
    *,
    length: int = 64,
    pairs: int | None = None,
    vocab_size: int | None = None,
    sequences: int = 256,
    seed: int = 0,
    batch: int = 64,
) -> float:
    """The share of MQAR's labels that are the likeliest token, on the fixed sequences of a seed.

    Args:
        weights: views, or a plain model's own.
        architecture: what to run.
        model_config: what its space fixes.
        length: tokens in a sequence.
        pairs: of key and value in it; None is an eighth of the length.
        vocab_size: of the sequences' tokens; None is all that the frame has.
        sequences: how many there are.
        seed: of the sequences, which no training draws.
        batch: sequences run at a time.

    Raises:
        InputError: the pairs do not fit the length or the vocabulary.
    """
    data = recall_set(vocab_size or model_config.vocab_size, sequences, length, pairs, seed)
    right = 0
    for start in range(0, sequences, batch):
        part = slice(start, start + batch)
        logits, _ = forward(weights, architecture, model_config, torch.from_numpy(data.tokens[part]))
        right += int((logits.argmax(-1).numpy() == data.targets[part]).sum())
    return right / data.count


Losses = dict[str, float | None]


def losses(quality: Quality) -> Losses:
    """Losses in nats per token, as a JSON value; null where nothing can be recalled."""
    recall = quality.recall_loss_nats
    return {"loss_nats": quality.loss_nats, "recall_loss_nats": None if math.isnan(recall) else recall}


def evaluation_digest(data: EvaluationSet) -> str:
    """The hash of the sequences of an evaluation and of what is asked of them."""
    return digest(b"".join(part.tobytes() for part in (data.tokens, data.targets, data.recallable)))
