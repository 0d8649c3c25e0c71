"""Text from an exported model: greedy, sampled, or speculative with a smaller draft model.

Speculative decoding (Leviathan et al. 2023): the draft proposes several tokens, the model reads them in one
call, and the longest prefix that the model would have chosen itself is accepted. Linear states cannot be
truncated, so the state before the proposals is kept, and accepted tokens are read again together with the
next proposals.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.submodel.decoder import Decoder, State
from supernet.data.tokenizer import BYTE_SEPARATOR, Tokenizer

BYTES = 256  # vocabulary size if bytes are the tokens
REPLACEMENT = "\ufffd"  # what an incomplete character is decoded to
MAX_CHARACTER_TOKENS = 4  # of a character in UTF-8
CONTEXT_TOKENS = 6  # of a prompt that decide how its continuation is decoded
# Logits this close may swap places if several tokens are read in one call: in fp32 by the rounding of another
# shape, in int8 by that of activations. int8-dynamic is missing because its ranges depend on the tokens read.
NEAR_TIE = {"fp32": 1e-4, "int8": 0.05}
MAX_REREAD_TOKENS = 8  # accepted tokens read again per call before the state is advanced without proposals
Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Rule by which the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: only the most likely tokens that make up this probability are drawn from (Holtzman et al.
            2020).
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def probabilities(logits: Logits, sampling: Sampling) -> NDArray[np.float64]:
    """The distribution that tokens are drawn from at a temperature above 0: [vocab_size].

    Args:
        logits: [vocab_size].
        sampling: temperature and top_p.
    """
    below = logits.astype(np.float64) - logits.max()
    with np.errstate(over="ignore"):  # at tiny temperatures, all but the most likely overflow to -inf
        weights = np.exp(below / sampling.temperature)
    weights /= weights.sum()
    if sampling.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= sampling.top_p]] = 0.0
        weights /= weights.sum()
    return np.asarray(weights)


def choose(logits: Logits, sampling: Sampling, rng: np.random.Generator) -> int:
    """The next token.

    Args:
        logits: [vocab_size].
        sampling: the rule.
        rng: used at a temperature above 0.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(rng.choice(len(logits), p=probabilities(logits, sampling)))


def generate(
    decoder: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_id: int | None,
) -> Iterator[int]:
    """New tokens one by one, up to ``max_new_tokens``, ``max_seq_len`` or the end-of-sequence token.

    Args:
        decoder: the model.
        prompt: at least one token.
        max_new_tokens: upper bound on the number of new tokens.
        sampling: the rule.
        eos_token_id: ends the text and is not given; None for no such token.
    """
    rng = np.random.default_rng(sampling.seed)
    logits, state = decoder.read(prompt, decoder.start())
    for i in range(max_new_tokens):
        token = choose(logits, sampling, rng)
        if token == eos_token_id:
            return
        yield token
        if i + 1 == max_new_tokens or state.position >= decoder.model_config.max_seq_len:
            return
        step_logits, state = decoder(np.array([[token]]), state)
        logits = step_logits[0, -1]


@dataclass
class DraftStatistics:
    """Counts of speculative decoding.

    Attributes:
        near: distance of two logits below which they count as tied; see :data:`NEAR_TIE`.
        proposed: tokens that the draft proposed.
        accepted: proposals that were the model's own choice.
        rounds: calls of the model that checked proposals.
        near_ties: tokens whose logit another's came within ``near`` of: without a draft the model may choose
            the other.
    """

    near: float = NEAR_TIE["fp32"]
    proposed: int = 0
    accepted: int = 0
    rounds: int = 0
    near_ties: int = 0


@dataclass
class _Target:
    """The model with its state and the tokens it has yet to read, which come after that state."""

    decoder: Decoder
    state: State
    unread: list[int]

    @property
    def free(self) -> int:
        """Tokens that fit into the context after those yet to read."""
        return self.decoder.model_config.max_seq_len - self.state.position - len(self.unread)

    def check(self, proposals: list[int]) -> tuple[Logits, State]:
        """Logits [1 + len(proposals), vocab_size] from the last unread token on, and the state after all."""
        logits, state = self.decoder(np.array([[*self.unread, *proposals]]), self.state)
        return logits[0, len(self.unread) - 1 :], state

    def accept(self, proposals: list[int], accepted: int, token: int, state: State) -> None:
        """Go on after some of the proposals.

        Args:
            proposals: all that were checked.
            accepted: how many of them count.
            token: the model's own choice after these.
            state: after all proposals.
        """
        if accepted == len(proposals):
            self.state, self.unread = state, [token]
        elif self.decoder.is_rewindable:
            position = self.state.position + len(self.unread) + accepted
            self.state, self.unread = self.decoder.rewind(state, position), [token]
        else:
            self.unread = [*self.unread, *proposals[:accepted], token]
            if len(self.unread) > MAX_REREAD_TOKENS:
                self.state = self.decoder(np.array([self.unread[:-1]]), self.state)[1]
                self.unread = self.unread[-1:]


@dataclass
class _Draft:
    """The draft with its state and the tokens it has yet to read.

    ``max_seq_len`` is 0 if the prompt alone is too long for it.
    """

    decoder: Decoder
    state: State
    unread: list[int]
    max_seq_len: int

    @property
    def free(self) -> int:
        """Tokens that fit into the context after those yet to read."""
        return self.max_seq_len - self.state.position - len(self.unread)

    def propose(self, count: int) -> tuple[list[int], list[State]]:
        """The most likely next tokens; states after the unread ones and after each token but the last."""
        if not count:
            return [], []
        logits, state = self.decoder.read(self.unread, self.state)
        proposals, states = [int(logits.argmax())], [state]
        while len(proposals) < count:
            step_logits, state = self.decoder(np.array([proposals[-1:]]), state)
            proposals.append(int(step_logits[0, -1].argmax()))
            states.append(state)
        return proposals, states

    def accept(self, proposals: list[int], accepted: int, token: int, states: list[State]) -> None:
        """Go on after some of the proposals and the model's own choice; see :meth:`_Target.accept`."""
        if not proposals:
            self.unread = [*self.unread, token]
        elif accepted == len(proposals):  # the draft has not read its own last proposal
            self.state, self.unread = states[-1], [proposals[-1], token]
        else:
            self.state, self.unread = states[accepted], [token]


def _prefill(decoder: Decoder, draft: Decoder, prompt: Sequence[int]) -> tuple[_Target, _Draft]:
    """Both models after the prompt but its last token."""
    before, last = prompt[:-1], [prompt[-1]]
    target = _Target(decoder, decoder.read(before, decoder.start())[1] if before else decoder.start(), last)
    drafting = _Draft(draft, draft.start(), last, draft.model_config.max_seq_len)
    if before and len(prompt) <= drafting.max_seq_len:
        drafting.state = draft.read(before, drafting.state)[1]
    elif before:
        drafting.max_seq_len = 0
    return target, drafting


def speculate(
    decoder: Decoder,
    draft: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    eos_token_id: int | None,
    num_draft_tokens: int,
    statistics: DraftStatistics,
) -> Iterator[int]:
    """Greedy tokens of a model, the same as :func:`generate` gives, with a draft that proposes some of them.

    Beyond the draft's context the model continues without it.

    Args:
        decoder: the model.
        draft: a smaller one with the same vocabulary; its ``num_kept_states`` is at least
            ``num_draft_tokens``.
        prompt: at least one token.
        max_new_tokens: upper bound on the number of new tokens.
        eos_token_id: ends the text and is not given; None for no such token.
        num_draft_tokens: proposals in each round.
        statistics: updated in place.
    """
    target, drafting = _prefill(decoder, draft, prompt)
    given = 0
    while given < max_new_tokens:
        free = min(target.free, drafting.free)
        count = max(0, min(num_draft_tokens, free, max_new_tokens - given - 1))
        proposals, states = drafting.propose(count)
        logits, state = target.check(proposals)
        chosen = logits.argmax(-1).tolist()
        accepted = next((i for i, token in enumerate(proposals) if chosen[i] != token), count)
        statistics.proposed += count
        statistics.accepted += accepted
        statistics.rounds += bool(count)
        for i, token in enumerate(chosen[: accepted + 1]):
            if token == eos_token_id:
                return
            statistics.near_ties += near_tie(logits[i], statistics.near)
            yield token
        given += accepted + 1
        if target.free <= accepted:
            return
        target.accept(proposals, accepted, chosen[accepted], state)
        drafting.accept(proposals, accepted, chosen[accepted], states)


def near_tie(logits: Logits, threshold: float = NEAR_TIE["fp32"]) -> bool:
    """True if the two largest logits are closer than a threshold.

    Args:
        logits: [vocab_size].
        threshold: see :data:`NEAR_TIE`.
    """
    first, second = np.partition(logits, -2)[-2:][::-1]
    return bool(first - second < threshold)


class StreamingTokenizer:
    """Text to tokens and, token by token, back to text.

    A piece of text is what decoding gives for the last tokens with a new one more than without it. The
    library's own stream ends with an error if a token changes text that was given before.

    Args:
        tokenizer: None if bytes are the tokens.

    Attributes:
        separator: the token between documents.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer, self._library = tokenizer, tokenizer.library if tokenizer else None
        self.separator = tokenizer.separator if tokenizer else BYTE_SEPARATOR
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._given: list[int] = []  # the last tokens whose text was given, as context
        self._open: list[int] = []  # tokens whose text was not given

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that begins a document; :meth:`feed` continues from it.

        Args:
            text: the prompt.
        """
        if self.tokenizer is None:
            return [self.separator, *text.encode()]
        ids = self.tokenizer.encode_prompt(text)
        # The first piece of a text loses its space, and a continuation is not the first.
        self._given = ids[1:][-CONTEXT_TOKENS:]
        return ids

    def feed(self, token: int) -> str:
        """The text that one more token adds; empty until a character is complete.

        Args:
            token: the next one.
        """
        if self.tokenizer is None:
            return self._bytes.decode(bytes([token])) if token < BYTES else ""
        self._open.append(token)
        text = self._new_text()
        is_open = not text or text.endswith(REPLACEMENT)
        if is_open and len(self._open) < MAX_CHARACTER_TOKENS:
            return ""
        if not is_open:  # broken bytes would break what follows them too
            self._given = self._open
        self._open = []
        return text

    def end(self) -> str:
        """The text of tokens that :meth:`feed` waited with; an incomplete character is replaced."""
        if self.tokenizer is None:
            return self._bytes.decode(b"", True)
        text, self._open = self._new_text(), []
        return text

    def _new_text(self) -> str:
        """The text of the open tokens."""
        before, after = (self._decode(ids) for ids in (self._given, self._given + self._open))
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._library.decode(ids, skip_special_tokens=True)) if self._library else ""
