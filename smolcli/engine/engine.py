"""The cycle: schedule, run, sample, retire."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from smolcli.engine.interfaces import Model
from smolcli.engine.sampler import choose, score
from smolcli.engine.scheduler import Scheduler
from smolcli.engine.sequence import ScheduledSequence, Sequence
from smolcli.errors import BackendError, PromptTooLong
from smolcli.types import FinishReason

MOST_FAILED_STEPS = 5  # one after the other, then it is not the queries that are at fault


class Engine:
    """Generates for many sequences at once, with continuous batching (Yu et al. 2022, Orca).

    One thread at a time may use it.

    Args:
        model: computes logits.
        max_batch_size: the most sequences that run at once.
        kv_cache_bytes: the most memory for keys and values.
        prefix_cache_bytes: the most memory for the beginnings of prompts.
        max_step_tokens: the most tokens of one step.
    """

    def __init__(
        self,
        model: Model,
        max_batch_size: int,
        kv_cache_bytes: int,
        prefix_cache_bytes: int = 0,
        max_step_tokens: int = 256,
    ) -> None:
        self.model = model
        self.kv_cache = model.make_kv_cache(prefix_cache_bytes)
        self.scheduler = Scheduler(
            max_batch_size, max_step_tokens, kv_cache_bytes, self.kv_cache.bytes_needed, self._begin
        )
        self.max_length = self.kv_cache.max_length(kv_cache_bytes)
        self.num_steps = 0
        self._num_failed_steps = 0  # one after the other

    @property
    def has_work(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self.scheduler.running or self.scheduler.num_waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its room is clipped to what there is.

        Raises:
            PromptTooLong: there is no room for one new token.
        """
        if len(sequence.prompt_ids) >= self.max_length:
            raise PromptTooLong(len(sequence.prompt_ids), self.max_length - 1)
        sequence.max_tokens = min(sequence.max_tokens, self.max_length)
        self.scheduler.add(sequence)

    @torch.inference_mode()
    def stop(self, sequence: Sequence) -> None:
        """End a sequence now, wherever it is, and free what it holds."""
        if not sequence.is_finished:
            sequence.finish_reason = FinishReason.STOP
        self.scheduler.withdraw(sequence)
        self._retire()

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Advance all that run by one token, prompts by a piece.

        Returns:
            The sequences that got a token or failed; `error` says why.

        Raises:
            BackendError: every sequence of the batch fails, each on its own too, or steps of one
                sequence fail again and again.
        """
        planned = self.scheduler.plan()
        works = sorted(filter(self._has_room, planned), key=self.kv_cache.batch_key)
        advanced = [w.sequence for w in works if w.completes]
        self._run(works)
        failed = [w.sequence for w in planned if w.sequence.error]
        all_failed = bool(planned) and len(failed) == len(planned)
        self._num_failed_steps = self._num_failed_steps + 1 if all_failed else 0
        if all_failed and (len(planned) > 1 or self._num_failed_steps == MOST_FAILED_STEPS):
            raise BackendError(f"no step succeeds any more: {failed[0].error}") from failed[0].error
        self._retire()
        return advanced + [s for s in failed if s not in advanced]

    def _begin(self, sequence: Sequence) -> None:
        with _blamed_on(sequence):
            self.kv_cache.allocate(sequence)

    def _has_room(self, work: ScheduledSequence) -> bool:
        if work.sequence.error is None:
            with _blamed_on(work.sequence):
                self.kv_cache.ensure_capacity(work.sequence)
        return work.sequence.error is None

    def _run(self, works: list[ScheduledSequence]) -> None:
        """Compute the works together; halve a batch that fails until the culprit stands alone.

        Computing a token again writes the same keys and values to the same place.
        """
        if not works:
            return
        try:
            self._forward(works)
        except Exception as exc:
            if len(works) == 1:
                works[0].sequence.error = exc
                return
            middle = len(works) // 2
            self._run(works[:middle])
            self._run(works[middle:])

    def _forward(self, works: list[ScheduledSequence]) -> None:
        self.num_steps += 1
        hidden = self.model.forward(self.kv_cache.make_batch(works))
        ready = [w.sequence for w in works if w.completes]
        tokens = choose(self.model.head, hidden, ready) if ready else []
        scores = score(self.model.head, hidden, ready, tokens)
        for work in works:
            work.sequence.num_cached = work.stop
            if work.completes and not work.sequence.is_decoding:
                self.kv_cache.store_prefix(work.sequence)
        for sequence, token, its_score in zip(ready, tokens, scores, strict=True):
            sequence.append(token, self.model.config.eos_ids, its_score)

    def _retire(self) -> None:
        for sequence in self.scheduler.retire():
            self.kv_cache.free(sequence)


@contextmanager
def _blamed_on(sequence: Sequence) -> Iterator[None]:
    """Running out of memory for one sequence is that sequence's error."""
    try:
        yield
    except (RuntimeError, MemoryError) as exc:
        sequence.error = exc
