"""Text from an exported model: greedy or sampled, and with a smaller model that runs ahead.

Speculative decoding (Leviathan et al. 2023): the draft proposes some tokens, the model reads them all at
once, and those that it would have chosen itself are kept. Linear states cannot be cut back, so the model's
state from before the proposals is kept, and what was accepted is read again together with the next ones.
"""

import codecs
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.submodel.decoder import Decoder, State
from supernet.data.tokenizer import Tokenizer

BYTES = 256  # the vocabulary where bytes are the tokens
BYTE_SEPARATOR = 0  # before and after every document, where bytes are the tokens
# Logits this close may change places where several tokens are read at once: in fp32 by the rounding of
# another shape, in int8 by that of activations. int8-dynamic is not here: it has other ranges then.
NEAR = {"fp32": 1e-4, "int8": 0.05}
REPLAY = 8  # accepted tokens that are read again at most, before the state moves on without proposals
Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest.
        top_p: only the likeliest tokens that make up this share are drawn from (Holtzman et al. 2020).
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def probabilities(logits: Logits, sampling: Sampling) -> NDArray[np.float64]:
    """What is drawn from at a temperature above 0: [vocabulary]."""
    below = logits.astype(np.float64) - logits.max()
    with np.errstate(over="ignore"):  # at the least temperatures, all but the likeliest are infinitely below
        weights = np.exp(below / sampling.temperature)
    weights /= weights.sum()
    if sampling.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= sampling.top_p]] = 0.0
        weights /= weights.sum()
    return np.asarray(weights)


def choose(logits: Logits, sampling: Sampling, rng: np.random.Generator) -> int:
    """The next token from logits [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(rng.choice(len(logits), p=probabilities(logits, sampling)))


def generate(
    decoder: Decoder, prompt: Sequence[int], most: int, sampling: Sampling, stop: int | None
) -> Iterator[int]:
    """New tokens one by one: at most so many, to the context's end, or before the stop token."""
    rng = np.random.default_rng(sampling.seed)
    logits, state = decoder.read(prompt, decoder.start())
    for i in range(most):
        token = choose(logits, sampling, rng)
        if token == stop:
            return
        yield token
        if i + 1 == most or state.position >= decoder.model_config.max_seq_len:
            return
        found, state = decoder(np.array([[token]]), state)
        logits = found[0, -1]


@dataclass
class Draft:
    """What came of a draft.

    Attributes:
        proposed: tokens that it proposed.
        accepted: how many of them were the model's own choice.
        rounds: calls of the model that judged proposals.
        near_ties: tokens whose logit another's came within ``near`` of: the model alone may choose that.
        near: see :data:`NEAR`.
    """

    near: float = NEAR["fp32"]
    proposed: int = 0
    accepted: int = 0
    rounds: int = 0
    near_ties: int = 0


def speculate(
    decoder: Decoder,
    draft: Decoder,
    prompt: Sequence[int],
    most: int,
    stop: int | None,
    ahead: int,
    found: Draft,
) -> Iterator[int]:
    """Greedy tokens of a model, as :func:`generate` gives them, with a draft that proposes ``ahead`` a round.

    Where the draft's context ends the model goes on alone.

    Args:
        decoder: the model.
        draft: a smaller one of the same tokens; its ``kept`` is at least ``ahead``.
        prompt: at least one token.
        most: new tokens at most.
        stop: the token that ends the text.
        ahead: how many tokens are proposed at a time.
        found: counts what happens.
    """
    max_seq_len, shorter = decoder.model_config.max_seq_len, draft.model_config.max_seq_len
    state = decoder.read(prompt[:-1], decoder.start())[1] if prompt[1:] else decoder.start()
    theirs = draft.start()
    if prompt[1:] and len(prompt) <= shorter:
        theirs = draft.read(prompt[:-1], theirs)[1]
    elif prompt[1:]:
        shorter = 0
    known = [prompt[-1]]  # what the model has yet to read
    unread = [prompt[-1]]  # what the draft has
    given = 0
    while given < most:
        room = min(max_seq_len - state.position - len(known), shorter - theirs.position - len(unread))
        count = max(0, min(ahead, room, most - given - 1))
        proposals, after = _propose(draft, theirs, unread, count) if count else ([], [])
        read = [*known, *proposals]
        logits, ahead_state = decoder(np.array([read]), state)
        chosen = logits[0, len(known) - 1 :].argmax(-1).tolist()
        right = next((i for i, token in enumerate(proposals) if chosen[i] != token), count)
        found.proposed += count
        found.accepted += right
        found.rounds += bool(count)
        for i, token in enumerate(chosen[: right + 1]):
            if token == stop:
                return
            found.near_ties += near_tie(logits[0, len(known) - 1 + i], found.near)
            yield token
        given += right + 1
        if state.position + len(known) + right >= max_seq_len:
            return
        last = chosen[right]
        if right == count:
            state, known = ahead_state, [last]
        elif decoder.is_rewindable:
            state, known = decoder.back(ahead_state, state.position + len(known) + right), [last]
        else:
            known = [*known, *proposals[:right], last]
            if len(known) > REPLAY:
                state, known = decoder(np.array([known[:-1]]), state)[1], known[-1:]
        if count and right == count:  # the draft has not read its own last proposal
            theirs, unread = after[-1], [proposals[-1], last]
        elif count:
            theirs, unread = after[right], [last]
        else:
            unread = [*unread, last]


def _propose(
    draft: Decoder, state: State, unread: Sequence[int], count: int
) -> tuple[list[int], list[State]]:
    """A draft's likeliest next tokens, and its states: after what was unread, and after each but the last."""
    logits, state = draft.read(unread, state)
    proposals, states = [int(logits.argmax())], [state]
    while len(proposals) < count:
        found, state = draft(np.array([proposals[-1:]]), state)
        proposals.append(int(found[0, -1].argmax()))
        states.append(state)
    return proposals, states


def near_tie(logits: Logits, near: float = NEAR["fp32"]) -> bool:
    """Whether the two likeliest tokens are as good as equal."""
    first, second = np.partition(logits, -2)[-2:][::-1]
    return bool(first - second < near)


class Text:
    """Text to tokens and, piece by piece, back: bytes, or a tokenizer's."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.separator = tokenizer.separator if tokenizer else BYTE_SEPARATOR
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        if tokenizer:
            self._stream = importlib.import_module("tokenizers.decoders").DecodeStream(
                skip_special_tokens=True
            )

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that begins a document; what is fed goes on from it."""
        if self.tokenizer is None:
            return [self.separator, *text.encode()]
        ids = self.tokenizer.library.encode(text, add_special_tokens=False).ids
        for token in ids:  # a first piece loses its space, and what goes on is not the first
            self._stream.step(self.tokenizer.library, token)
        return [self.separator, *ids]

    def feed(self, token: int) -> str:
        """What a further token adds to the text; nothing while a character is not whole."""
        if self.tokenizer is None:
            return self._bytes.decode(bytes([token])) if token < BYTES else ""
        return self._stream.step(self.tokenizer.library, token) or ""

    def end(self) -> str:
        """What stands for a character that was begun and never became whole."""
        return self._bytes.decode(b"", True) if self.tokenizer is None else ""
