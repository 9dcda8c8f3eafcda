"""One generation: its tokens and how far it has come. Imports no torch."""

from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from smolcli.types import FinishReason, Sampling


class Constraint(Protocol):
    """Decides which tokens may come next in one answer."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether nothing more can come."""
        ...

    def mask(self) -> bytes:
        """One bit for each token, from the lowest of the first byte on: 1 where it is allowed."""
        ...

    def accept(self, token_id: int) -> None:
        """Take the next token, which the mask allows."""
        ...


@dataclass(frozen=True, slots=True)
class TokenScore:
    """How likely a token was, and the likeliest ones instead of it, as natural logarithms."""

    token_id: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(eq=False, slots=True)
class Sequence:
    """The prompt, the tokens generated so far, and why it ended if it has.

    `token_ids[:num_cached]` have their keys and values in the cache. Somebody sits and waits for
    an urgent sequence. `scores` has one for each token but the end's, where `top_logprobs` is set.
    """

    prompt_ids: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    is_interactive: bool = False
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    token_ids: list[int] = field(init=False)
    max_tokens: int = field(init=False)
    num_cached: int = field(init=False, default=0)
    finish_reason: FinishReason | None = field(init=False, default=None)
    error: Exception | None = field(init=False, default=None)
    random: Random = field(init=False)
    scores: list[TokenScore] = field(init=False, default_factory=list)
    admitted_at: float | None = field(init=False, default=None)
    _uniform: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        assert self.prompt_ids, "a sequence starts from at least one token"
        self.token_ids = list(self.prompt_ids)
        self.max_tokens = len(self.prompt_ids) + self.sampling.max_new_tokens
        self.random = Random(self.sampling.seed)

    @property
    def output_ids(self) -> list[int]:
        """The tokens generated so far, the end token included."""
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def num_output(self) -> int:
        """How many tokens are generated so far."""
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def is_decoding(self) -> bool:
        """Whether the prompt is behind it."""
        return self.num_output > 0

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    def draw(self) -> float:
        """A random number for the next token: the same one until there is that token."""
        if self._uniform is None:
            self._uniform = self.random.random()
        return self._uniform

    def append(
        self, token_id: int, eos_ids: frozenset[int], score: TokenScore | None = None
    ) -> None:
        """Take the next token, and end where it says so, or nothing can or may follow."""
        self.token_ids.append(token_id)
        self._uniform = None
        if self.constraint is not None:
            self.constraint.accept(token_id)
        if score is not None and token_id not in eos_ids:
            self.scores.append(score)
        if token_id in eos_ids or (self.constraint is not None and self.constraint.is_over):
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = FinishReason.LENGTH


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens `start` to `stop` of one sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def completes(self) -> bool:
        """Whether the step yields the sequence's next token."""
        return self.stop == len(self.sequence.token_ids)
