"""The engine's cycle: schedule, compute, sample, retire."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import accumulate, islice, takewhile

from smolcli.engine.interfaces import Hidden, Model, select_rows
from smolcli.engine.sampler import sample, score
from smolcli.engine.scheduler import Scheduler
from smolcli.engine.sequence import ScheduledSequence, Sequence, TokenLogprob
from smolcli.engine.speculation import Speculation
from smolcli.engine.token_filter import token_filter
from smolcli.errors import BackendError, PromptTooLong, QueryError
from smolcli.types import FinishReason, PromptLimit, Sampling


class Engine:
    """Generates for many sequences at once with continuous batching (Yu et al. 2022, Orca).

    Not thread-safe: one thread at a time may use it.

    Args:
        model: computes hidden states and logits.
        max_batch_size: maximum number of running sequences; interactive ones have a few more slots.
        kv_cache_bytes: memory for the keys and values of running sequences.
        prefix_cache_bytes: memory for the prefix cache; 0 disables it.
        max_step_tokens: maximum number of tokens to compute in one step.
        speculation: drafts tokens; None drafts none. Answers stay the same
            if the model is batch-invariant.
    """

    def __init__(
        self,
        model: Model,
        max_batch_size: int,
        kv_cache_bytes: int,
        prefix_cache_bytes: int = 0,
        max_step_tokens: int = 256,
        speculation: Speculation | None = None,
    ) -> None:
        self.model = model
        self.kv_cache = model.make_kv_cache(prefix_cache_bytes)
        self.scheduler = Scheduler(
            max_batch_size,
            max_step_tokens,
            kv_cache_bytes,
            self.kv_cache.bytes_needed,
            self._allocate,
        )
        self.max_length = self.kv_cache.max_length(kv_cache_bytes)
        self.num_steps = 0
        self.speculation = speculation
        self._prefilled: dict[Sequence, None] = {}  # not in the prefix cache yet, in order
        self._vocab_size = model.config.vocab_size

    @property
    def has_work(self) -> bool:
        """Whether any sequence is running or waiting."""
        return bool(self.scheduler.running or self.scheduler.num_waiting)

    def prompt_limit(self, sampling: Sampling) -> PromptLimit:
        """The longest prompt that leaves the model room for a new token, if any is wanted.

        The KV cache may have less room.
        """
        return PromptLimit.of(self.model.config.max_positions, sampling)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; clips `max_tokens` to what the model and the KV cache allow.

        Raises:
            PromptTooLong: the prompt leaves no room for a single new token, if any is wanted.
            QueryError: the prompt or the sampling settings contain a token id that the model does
                not have.
        """
        num_tokens, limit = len(sequence.prompt_ids), self.prompt_limit(sequence.sampling)
        if num_tokens > limit.num_tokens:
            raise PromptTooLong(num_tokens, limit)
        limit = PromptLimit.of(self.max_length, sequence.sampling)
        if num_tokens > limit.num_tokens:
            raise PromptTooLong(num_tokens, limit, is_kv_cache=True)
        for token_id in (min(sequence.prompt_ids), max(sequence.prompt_ids)):
            if not 0 <= token_id < self._vocab_size:
                raise QueryError(
                    f"the prompt contains token id {token_id}, but the model's vocabulary has "
                    f"{self._vocab_size} tokens: the tokenizer does not belong to this model"
                )
        sequence.token_filter = token_filter(
            sequence.sampling, sequence.bad_words, self._vocab_size, self.model.config.eos_ids
        )
        sequence.max_tokens = min(sequence.max_tokens, self.max_length)
        self.scheduler.add(sequence)

    def stop(self, sequence: Sequence) -> None:
        """End a sequence now, whatever its state, and free its memory."""
        if not sequence.is_finished:
            sequence.finish_reason = FinishReason.STOP
        self.scheduler.withdraw(sequence)
        self._retire()

    def step(self) -> list[Sequence]:
        """Advance decoding sequences by one token each and prompts by a chunk.

        Tokens that an earlier step has verified are added without computing anything, one per call
        and sequence, so that a caller sees every answer grow by single tokens.

        Returns:
            The sequences that got a token, finished or failed; a failed one has `error` set.

        Raises:
            BackendError: the step failed for every sequence, and so did a trivial sequence of the
                engine's own.
        """
        self._store_prompts()
        if verified := [s for s in self.scheduler.running if s.verified]:
            self._append_verified(verified)
            return verified
        planned = self._with_drafts(self.scheduler.plan())
        items = sorted(filter(self._has_capacity, planned), key=self.kv_cache.batch_key)
        advanced = [item.sequence for item in items if item.completes]
        self._run(items)
        failed = [item.sequence for item in planned if item.sequence.error]
        if failed and len(failed) == len(planned):
            self._check_model()
        self._retire()
        return advanced + [s for s in failed if s not in advanced]

    def _append_verified(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.append_verified(self.model.config.eos_ids)
        assert self.speculation is not None
        self.speculation.num_accepted += len(sequences)
        self._retire()

    def _with_drafts(self, planned: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """Add drafts to a step, unless it computes prompts, which make it long anyway."""
        if self.speculation is None or not all(item.sequence.is_decoding for item in planned):
            return planned
        drafts = self.speculation.drafts([item.sequence for item in planned])
        return [replace(item, drafts=draft) for item, draft in zip(planned, drafts, strict=True)]

    def _allocate(self, sequence: Sequence) -> None:
        with _blamed_on(sequence):
            self.kv_cache.allocate(sequence)

    def _has_capacity(self, item: ScheduledSequence) -> bool:
        if item.sequence.error is None:
            with _blamed_on(item.sequence):
                self.kv_cache.ensure_capacity(item.sequence)
        return item.sequence.error is None

    def _run(self, items: list[ScheduledSequence]) -> None:
        """Compute a batch; if it fails, bisect it until each faulty sequence is isolated.

        Recomputing a token writes the same keys and values to the same place.
        """
        if not items:
            return
        try:
            self._forward(items)
        except Exception as exc:
            if len(items) == 1 and items[0].drafts:
                self._run([replace(items[0], drafts=())])
                return
            if len(items) == 1:
                items[0].sequence.error = exc
                return
            middle = len(items) // 2
            self._run(items[:middle])
            self._run(items[middle:])

    def _forward(self, items: list[ScheduledSequence]) -> None:
        self.num_steps += 1
        hidden = self.model.forward(self.kv_cache.make_batch(items))
        ends = list(accumulate(item.num_hidden for item in items))
        scored = [self._scores(item, hidden, end) for item, end in zip(items, ends, strict=True)]
        ready = [
            (item, end)
            for item, end in zip(items, ends, strict=True)
            if item.completes and item.sequence.wants_token
        ]
        sampled = iter(self._sample(hidden, ready))
        for item, scores in zip(items, scored, strict=True):
            item.sequence.num_cached = item.stop
            item.sequence.prompt_logprobs += scores
            if item.completes and not item.sequence.is_decoding:
                self._prefilled[item.sequence] = None
            if item.completes and not item.sequence.wants_token:
                item.sequence.finish_reason = FinishReason.LENGTH
        for item, _ in ready:
            (token, logprob), *further = islice(sampled, 1 + len(item.drafts))
            item.sequence.verified.extend(further[: _num_correct(item.drafts, token, further)])
            item.sequence.append(token, self.model.config.eos_ids, logprob)

    def _sample(
        self, hidden: Hidden, ready: list[tuple[ScheduledSequence, int]]
    ) -> list[tuple[int, TokenLogprob | None]]:
        """Sample the next token of each item, and after each of its drafts the one that follows.

        Args:
            hidden: the hidden states of the step.
            ready: the items that yield tokens, and where the hidden states of each end.
        """
        rows = [row for item, end in ready for row in range(end - 1 - len(item.drafts), end)]
        sequences = [item.sequence for item, _ in ready for _ in range(1 + len(item.drafts))]
        return sample(self.model.head, select_rows(hidden, rows), sequences) if rows else []

    def _scores(self, item: ScheduledSequence, hidden: Hidden, end: int) -> list[TokenLogprob]:
        """The log probabilities of the prompt tokens that an item's hidden states predict.

        Args:
            item: what was computed.
            hidden: the hidden states of the step.
            end: index after the item's last hidden state.
        """
        sequence = item.sequence
        if sequence.top_prompt_logprobs is None or sequence.is_decoding:
            return []
        targets = sequence.prompt_ids[item.start + 1 : item.stop + 1]
        start = end - item.num_hidden
        states = hidden[start : start + len(targets)]
        return score(self.model.head, states, targets, sequence.top_prompt_logprobs)

    def _check_model(self) -> None:
        """Compute a one-token sequence, to tell a broken model from bad queries.

        Raises:
            BackendError: it fails, so the engine can no longer compute anything.
        """
        trivial = Sequence([0])
        trivial.max_tokens = 2
        try:
            self.kv_cache.allocate(trivial)
            self.kv_cache.ensure_capacity(trivial)
            batch = self.kv_cache.make_batch([ScheduledSequence(trivial, 0, 1)])
            self.model.head.best(self.model.forward(batch))
        except Exception as exc:
            raise BackendError(
                f"the model can no longer compute even a single token: {exc}"
            ) from exc
        finally:
            with suppress(Exception):  # the memory of a lost GPU cannot be freed
                self.kv_cache.free(trivial)

    def _store_prompts(self) -> None:
        """Copy prompts to the prefix cache: one step late, so that first tokens do not wait for it.

        Those that end their answer do: `_retire` copies the prompt before the memory is freed.
        """
        prefilled, self._prefilled = self._prefilled, {}
        for sequence in prefilled:
            self._store_prefix(sequence)

    def _store_prefix(self, sequence: Sequence) -> None:
        if sequence.error is None:
            with suppress(RuntimeError, MemoryError):  # out of memory: it is only a cache
                self.kv_cache.store_prefix(sequence)

    def _retire(self) -> None:
        for sequence in self.scheduler.retire():
            # The answer of a chat is part of the prompt that follows it.
            is_chat = sequence.is_interactive and sequence.is_decoding
            if is_chat or sequence in self._prefilled:
                self._prefilled.pop(sequence, None)
                self._store_prefix(sequence)
            self.kv_cache.free(sequence)
            if self.speculation is not None:
                self.speculation.forget(sequence)


def _num_correct(
    drafts: tuple[int, ...], token: int, further: list[tuple[int, TokenLogprob | None]]
) -> int:
    """How many drafts were sampled, each after the ones before it.

    Args:
        drafts: the drafted tokens.
        token: sampled where the first of them was drafted.
        further: sampled after each of them.
    """
    sampled = [token, *(each for each, _ in further)]
    pairs = zip(drafts, sampled, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@contextmanager
def _blamed_on(sequence: Sequence) -> Iterator[None]:
    """Record an out-of-memory error as the error of one sequence."""
    try:
        yield
    except (RuntimeError, MemoryError) as exc:
        sequence.error = exc
