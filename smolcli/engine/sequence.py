"""One generation: its token ids, settings and progress."""

from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from smolcli.engine.token_filter import TokenFilter
from smolcli.types import FinishReason, Sampling


class Constraint(Protocol):
    """Decides which tokens may come next in one answer (constrained decoding)."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether no further token is possible."""
        ...

    def mask(self) -> bytes:
        """The allowed tokens as a bit mask: bit i % 8 of byte i // 8 is 1 if token i is allowed."""
        ...

    def accept(self, token_id: int) -> None:
        """Advance by one token, which the mask must allow."""
        ...


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log probability (natural logarithm) of a token and of the most likely ones.

    Args:
        token_id: the token.
        logprob: its log probability.
        rank: its position among all tokens by probability, from 1.
        alternatives: (token id, log probability) of the most likely tokens, in that order.
    """

    token_id: int
    logprob: float
    rank: int
    alternatives: tuple[tuple[int, float], ...]


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt, the tokens generated so far, and the reason the generation ended, if it has.

    Args:
        prompt_ids: token ids of the prompt, at least one.
        sampling: how tokens are sampled.
        is_interactive: whether it takes priority over batch work.
        constraint: restricts the next token; None allows every token.
        top_logprobs: how many alternatives to list for each generated token; None for no log
            probabilities.
        top_prompt_logprobs: the same for the tokens of the prompt.
        bad_words: sequences of token ids that must not occur in the answer.

    Attributes:
        token_filter: set by the engine if the settings exclude tokens.
        token_ids: the prompt and the answer so far.
        max_tokens: maximum number of tokens of both together.
        num_cached: how many of `token_ids`, from the start, have keys and values in the KV cache.
        num_reused: how many of those came from the prefix cache.
        finish_reason: why the answer ended; None if it has not.
        error: why it failed, if it has.
        random: draws the random numbers of this answer.
        logprobs: one entry per generated token, except the one that ends the answer.
        prompt_logprobs: one entry per computed prompt token, except the first, which nothing
            predicts.
        admitted_at: when it was admitted to the batch, in `time.perf_counter` seconds.
        verified: tokens that a step sampled beyond the next one because they had been drafted;
            their keys and values are in the KV cache.
    """

    prompt_ids: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    is_interactive: bool = False
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    top_prompt_logprobs: int | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    token_filter: TokenFilter | None = field(init=False, default=None)
    token_ids: list[int] = field(init=False)
    max_tokens: int = field(init=False)
    num_cached: int = field(init=False, default=0)
    num_reused: int = field(init=False, default=0)
    finish_reason: FinishReason | None = field(init=False, default=None)
    error: Exception | None = field(init=False, default=None)
    random: Random = field(init=False)
    logprobs: list[TokenLogprob] = field(init=False, default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(init=False, default_factory=list)
    admitted_at: float | None = field(init=False, default=None)
    verified: deque[tuple[int, TokenLogprob | None]] = field(init=False, default_factory=deque)
    _uniform: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        assert self.prompt_ids, "a sequence starts with at least one token"
        self.token_ids = list(self.prompt_ids)
        self.max_tokens = len(self.prompt_ids) + self.sampling.max_new_tokens
        self.random = Random(self.sampling.seed % 2**64)  # Random(-1) equals Random(1)

    @property
    def output_ids(self) -> list[int]:
        """The generated tokens, including the end token."""
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def num_output(self) -> int:
        """The number of tokens generated so far."""
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def is_decoding(self) -> bool:
        """Whether the prompt has been prefilled."""
        return self.num_output > 0

    @property
    def wants_token(self) -> bool:
        """Whether there is room for another token; never for a sequence that is only scored."""
        return len(self.token_ids) < self.max_tokens

    @property
    def takes_best(self) -> bool:
        """Whether the next token is the most likely one, no matter what came before.

        Then tokens can be sampled before those that precede them have been appended.
        """
        is_free = self.constraint is None and self.token_filter is None
        return self.sampling.is_plain and is_free

    @property
    def reusable_ids(self) -> list[int]:
        """The part of the prompt that may come from the prefix cache.

        It is empty if the prompt is scored: the cache holds no hidden states.
        """
        return self.prompt_ids if self.top_prompt_logprobs is None else []

    @property
    def storable_ids(self) -> list[int]:
        """The tokens that may be added to the prefix cache: all that have keys and values.

        It is empty if the prompt is scored.
        """
        return self.token_ids[: self.num_cached] if self.top_prompt_logprobs is None else []

    @property
    def is_finished(self) -> bool:
        """Whether generation has ended or failed."""
        return self.finish_reason is not None or self.error is not None

    def mask(self) -> bytes | None:
        """The tokens that may come next, see `Constraint.mask`; None allows every token.

        Raises:
            QueryError: there are none.
        """
        mask = self.constraint.mask() if self.constraint is not None else None
        if self.token_filter is None:
            return mask
        return self.token_filter.mask(self.token_ids, self.num_output, mask)

    def draw_uniform(self) -> float:
        """The random number for the next token, in [0, 1).

        Repeated calls return the same number until `append`, so a step that is retried samples
        the same token.
        """
        if self._uniform is None:
            self._uniform = self.random.random()
        return self._uniform

    def append(
        self, token_id: int, eos_ids: frozenset[int], logprob: TokenLogprob | None = None
    ) -> None:
        """Add the next token and set `finish_reason` if it is the last one.

        Args:
            token_id: the token.
            eos_ids: the model's end tokens.
            logprob: the token's log probability, if it was requested.
        """
        self.token_ids.append(token_id)
        self._uniform = None
        if self.constraint is not None:
            self.constraint.accept(token_id)
        is_end = self._is_end(token_id, eos_ids)
        if logprob is not None and not is_end:
            self.logprobs.append(logprob)
        if is_end or (self.constraint is not None and self.constraint.is_over):
            self.finish_reason = FinishReason.STOP
        elif not self.wants_token:
            self.finish_reason = FinishReason.LENGTH

    def append_verified(self, eos_ids: frozenset[int]) -> None:
        """Add the next of the `verified` tokens.

        Args:
            eos_ids: the model's end tokens.
        """
        token_id, logprob = self.verified.popleft()
        self.num_cached += 1
        self.append(token_id, eos_ids, logprob)

    def _is_end(self, token_id: int, eos_ids: frozenset[int]) -> bool:
        """Whether a token ends the answer; a constrained one ends where its grammar allows it."""
        ignores_eos = self.sampling.ignore_eos and self.constraint is None
        is_eos = token_id in eos_ids and not ignores_eos
        return is_eos or token_id in self.sampling.stop_token_ids


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens `start` to `stop` of a sequence, to be computed in one step.

    `drafts` are computed after them, at the positions that follow. Only decoding sequences have
    any.
    """

    sequence: Sequence
    start: int
    stop: int
    drafts: tuple[int, ...] = ()

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute, drafts included."""
        return [*self.sequence.token_ids[self.start : self.stop], *self.drafts]

    @property
    def num_rows(self) -> int:
        """The number of tokens to compute, drafts included."""
        return self.stop - self.start + len(self.drafts)

    @property
    def completes(self) -> bool:
        """Whether the step computes the sequence's last token, which yields the next one."""
        return self.stop == len(self.sequence.token_ids)

    @property
    def num_hidden(self) -> int:
        """How many hidden states the step returns: those of the last tokens."""
        if self.sequence.top_prompt_logprobs is not None and not self.sequence.is_decoding:
            return self.stop - self.start
        return int(self.completes) + len(self.drafts)
