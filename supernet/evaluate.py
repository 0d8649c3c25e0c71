"""Evaluation of sub-networks on a fixed set of sequences.

``loss`` is the mean over all held-out targets. ``recall_loss`` is the mean over the targets that can be
recalled from the context (see :mod:`supernet.data.recall`); it shows the recall that linear mixers lose and
that a mean over all tokens hides. ``kl`` compares a sub-network with its parent, see :class:`Parent`. MQAR
accuracy is a control: compare it only in settings where softmax attention reaches 0.99. Further qualities are
functions of the logits; see :data:`QualityFunction`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from space import Architecture, ModelConfig
from space.blocks import forward, hidden_states, output_logits
from space.io.artefact import digest
from supernet.data.corpus import Corpus, held_out_windows, window_starts
from supernet.data.mqar import IGNORED, default_pairs, evaluation_generator, mqar
from supernet.data.recall import PIECE_ORDER, PIECE_RARE, recall_mask

MAX_LOGITS = 2**23  # computed at once: 32 MiB; a batch of a vocabulary of 49152 would take 400 MiB
KL = "kl"  # the name of the mean KL divergence among the extra qualities


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Qualities of one architecture; lower is better.

    Attributes:
        loss_nats: mean loss over all targets, in nats per token.
        recall_loss_nats: mean loss over the targets that can be recalled from the context; NaN without any.
        bits_per_byte: loss per byte of the text that the tokens stand for; None if the number of bytes is
            unknown, as for MQAR sequences and for tokenizers that do not decode to the original text.
        extra: results of further quality functions, by name.
    """

    loss_nats: float
    recall_loss_nats: float
    bits_per_byte: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, float | None]:
        """The qualities as one JSON object; extra qualities stand beside the losses."""
        return {
            "loss_nats": self.loss_nats,
            "recall_loss_nats": self.recall_loss_nats,
            "bits_per_byte": self.bits_per_byte,
            **self.extra,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationSet:
    """Fixed sequences with their targets.

    Attributes:
        tokens: token ids [N, L].
        targets: token ids [N, L]; -100 is ignored.
        recallable: mask [N, L] of the targets that can be recalled from the context.
        text_bytes: bytes of text that all targets stand for; None if unknown.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    recallable: NDArray[np.bool_]
    text_bytes: int | None = None

    @property
    def windows(self) -> NDArray[np.int64]:
        """Each sequence followed by its last target [N, L + 1]; for text, consecutive tokens."""
        return np.concatenate([self.tokens, self.targets[:, -1:]], axis=1)

    @property
    def count(self) -> int:
        """Number of targets that are not ignored."""
        return int((self.targets != IGNORED).sum())

    @property
    def recall_share(self) -> float:
        """Share of the targets that count for ``recall_loss``."""
        return float(self.recallable.sum() / self.count)

    def bits_per_byte(self, loss_nats: float) -> float | None:
        """Convert a mean loss per token to bits per byte of text.

        Args:
            loss_nats: mean loss over all targets, in nats per token.

        Returns:
            Bits per byte; None if the number of bytes is unknown.
        """
        return loss_nats / math.log(2) * self.count / self.text_bytes if self.text_bytes else None


QualityFunction = Callable[[Callable[[Tensor], Tensor], EvaluationSet], float]
"""Quality of one sub-network, minimised.

The first argument maps token ids [B, T] (int64) to logits [B, T, V], without gradients; the second holds the
sequences of the evaluation. The function must be deterministic: equal weights and sequences, equal result.
"""
NO_EXTRA: Mapping[str, QualityFunction] = MappingProxyType({})


def evaluation_set(corpus: Corpus, windows: int, length: int) -> EvaluationSet:
    """The sequences that every evaluation of a run uses: held-out text, or MQAR for a corpus of MQAR only.

    Args:
        corpus: source of the sequences.
        windows: number of sequences.
        length: tokens per sequence.

    Raises:
        InputError: the held-out text is too short for that many windows.
    """
    if corpus.recall == 1:
        return recall_set(corpus.vocab_size, windows, length, corpus.pairs)
    held_out = held_out_windows(corpus.held_out, windows, length)
    if corpus.is_bytes:
        recallable = recall_mask(held_out, corpus.train)
        text_bytes: int | None = recallable.size
    else:
        recallable = recall_mask(held_out, corpus.train, PIECE_ORDER, rare_per_million=PIECE_RARE)
        text_bytes = None
        if corpus.held_out_bytes is not None:
            starts = window_starts(len(corpus.held_out), windows, length)
            text_bytes = int(corpus.held_out_bytes[starts[:, None] + np.arange(1, length + 1)].sum())
    return EvaluationSet(
        tokens=held_out[:, :-1], targets=held_out[:, 1:], recallable=recallable, text_bytes=text_bytes
    )


def recall_set(
    vocab_size: int, count: int, length: int, pairs: int | None = None, seed: int = 0
) -> EvaluationSet:
    """MQAR sequences that training never draws; every label is a target and can be recalled.

    Args:
        vocab_size: number of distinct tokens.
        count: number of sequences.
        length: tokens per sequence.
        pairs: key-value pairs per sequence; None is an eighth of the length.
        seed: of the sequences.

    Raises:
        InputError: the pairs do not fit the length or the vocabulary.
    """
    rng = evaluation_generator(seed)
    tokens, labels = mqar(rng, count, vocab_size, length, pairs or default_pairs(length))
    return EvaluationSet(tokens=tokens, targets=labels, recallable=labels != IGNORED)


@dataclass(frozen=True, kw_only=True, eq=False)
class Parent:
    """The model that others are compared with, and its final hidden states on the sequences of an evaluation.

    Logits are recomputed from the states a few tokens at a time: with a large vocabulary they would take a
    hundred times as much memory.

    Attributes:
        weights: the parent's, of which embedding and head are used.
        hidden: normed residual stream of every token [N, L, W].
    """

    weights: Mapping[str, Tensor]
    hidden: Tensor


@torch.inference_mode()
def run_parent(
    weights: Mapping[str, Tensor],
    architecture: Architecture,
    model_config: ModelConfig,
    data: EvaluationSet,
    batch: int = 4,
) -> Parent:
    """Run the parent of :func:`evaluate` on the sequences of an evaluation.

    Args:
        weights: the parent's.
        architecture: the parent's.
        model_config: the constants of its space.
        data: the sequences.
        batch: sequences per forward pass, as in :func:`evaluate`: then the parent's own KL is exactly 0.
    """
    hidden = [
        hidden_states(
            weights, architecture, model_config, torch.from_numpy(data.tokens[start : start + batch])
        )[0]
        for start in range(0, len(data.tokens), batch)
    ]
    return Parent(weights=weights, hidden=torch.cat(hidden))


@torch.inference_mode()
def evaluate(
    weights: Mapping[str, Tensor],
    architecture: Architecture,
    model_config: ModelConfig,
    data: EvaluationSet,
    extra: Mapping[str, QualityFunction] = NO_EXTRA,
    batch: int = 4,
    parent: Parent | None = None,
) -> Quality:
    """Evaluate a sub-network or a plain model.

    Batches have a fixed shape. The shape is part of the result's identity: another one may round differently.

    Args:
        weights: views of a supernet's weights, or a plain model's own, named as in :mod:`space.shapes`.
        architecture: the model's architecture.
        model_config: the constants of its space.
        data: sequences and targets.
        extra: further quality functions by name, called after the losses are computed.
        batch: sequences per forward pass.
        parent: if given, the extra quality ``kl`` is the mean of KL(parent || model) over all targets, in
            nats per token.
    """
    total = recalled = divergence = 0.0
    tokens_at_once = max(1, MAX_LOGITS // model_config.vocab_size)
    for start in range(0, len(data.tokens), batch):
        rows = slice(start, start + batch)
        hidden, _ = hidden_states(weights, architecture, model_config, torch.from_numpy(data.tokens[rows]))
        targets = torch.from_numpy(data.targets[rows]).flatten()
        recallable = torch.from_numpy(data.recallable[rows]).flatten()
        for first in range(0, len(targets), tokens_at_once):
            some = slice(first, first + tokens_at_once)
            logits = output_logits(weights, model_config, hidden.flatten(0, 1)[some]).float()
            losses = F.cross_entropy(logits, targets[some], ignore_index=IGNORED, reduction="none").double()
            total += float(losses.sum())
            recalled += float(losses[recallable[some]].sum())
            if parent:
                states = parent.hidden[rows].flatten(0, 1)[some]
                expected = output_logits(parent.weights, model_config, states).float()
                divergence += float(kl_divergence(expected, logits)[targets[some] != IGNORED].sum())
    recall_count = int(data.recallable.sum())
    loss = total / data.count

    def model(tokens: Tensor) -> Tensor:
        return forward(weights, architecture, model_config, tokens)[0]

    found = {name: float(function(model, data)) for name, function in extra.items()}
    if parent:
        found[KL] = max(0.0, divergence / data.count)  # rounding may leave -1e-9
    return Quality(
        loss_nats=loss,
        recall_loss_nats=recalled / recall_count if recall_count else math.nan,
        bits_per_byte=data.bits_per_byte(loss),
        extra=found,
    )


def kl_divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) in nats of each token [T], in fp64; p and q are computed in fp32.

    Args:
        expected: logits of p [T, V].
        logits: logits of q [T, V].
    """
    log_p, log_q = F.log_softmax(expected, dim=-1), F.log_softmax(logits, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).double()


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
    """MQAR accuracy: the share of labels that get the highest logit, on sequences fixed by a seed.

    Args:
        weights: views of a supernet's weights, or a plain model's own.
        architecture: the model's architecture.
        model_config: the constants of its space.
        length: tokens per sequence.
        pairs: key-value pairs per sequence; None is an eighth of the length.
        vocab_size: number of distinct tokens in the sequences; None is the model's vocabulary.
        sequences: number of sequences.
        seed: of the sequences, which training never draws.
        batch: sequences per forward pass.

    Raises:
        InputError: the pairs do not fit the length or the vocabulary.
    """
    data = recall_set(vocab_size or model_config.vocab_size, sequences, length, pairs, seed)
    correct = 0
    for start in range(0, sequences, batch):
        rows = slice(start, start + batch)
        logits, _ = forward(weights, architecture, model_config, torch.from_numpy(data.tokens[rows]))
        correct += int((logits.argmax(-1).numpy() == data.targets[rows]).sum())
    return correct / data.count


Losses = dict[str, float | None]


def loss_name(quality: str) -> str:
    """The name of a quality among :func:`losses`.

    Args:
        quality: ``loss``, ``recall_loss`` or ``kl``.
    """
    return quality if quality == KL else f"{quality}_nats"


def losses(quality: Quality) -> Losses:
    """Losses in nats per token and extra qualities as a JSON object; an undefined recall loss is null.

    Args:
        quality: an evaluation's result.
    """
    optional = {"recall_loss_nats": quality.recall_loss_nats, **quality.extra}
    undefined_as_null = {name: None if math.isnan(value) else value for name, value in optional.items()}
    return {"loss_nats": quality.loss_nats, **undefined_as_null}


def evaluation_digest(data: EvaluationSet) -> str:
    """The sha256 of an evaluation's tokens, targets and mask, as 64 hexadecimal digits.

    Args:
        data: the evaluation.
    """
    return digest(b"".join(array.tobytes() for array in (data.tokens, data.targets, data.recallable)))
