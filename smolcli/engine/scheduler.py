"""Which sequences run in the next step, and how many tokens of each."""

import time
from collections import deque
from collections.abc import Callable

from smolcli.engine.sequence import ScheduledSequence, Sequence

RESERVED_DIVISOR = 8  # interactive sequences have 1 + 1/8 extra slots, and 1/8 of the KV cache
BATCH_DIVISOR = 4  # batch sequences may always hold 1/4 of the slots
INTERACTIVE_TURNS = 3  # admissions of waiting interactive sequences per waiting batch sequence
BATCH_STEP = 3  # while interactive sequences run, batch sequences take part in every third step


class Scheduler:
    """Admits sequences while slots and KV cache last, and divides each step among them.

    A sequence reserves KV cache for its full length when it is admitted, so every running sequence
    can finish. Each priority is served in order of arrival. Both are guaranteed a share
    when they compete, so neither can starve the other:

    - Admission: interactive sequences go first, but while batch sequences hold less than a quarter
      of `max_batch_size`, they get the next free slot and memory after at most INTERACTIVE_TURNS
      interactive admissions. The head of the batch queue then waits only for running sequences to
      end. The head of the interactive queue waits for at most one batch admission.
    - Reserve: interactive sequences have `1 + max_batch_size // 8` slots more and an eighth of the
      KV cache, which batch sequences beyond their quarter cannot take.
    - Steps: interactive sequences take part in every step, batch sequences at least in every third.
      In those, prompts of batch sequences get at least half of the prefill tokens.

    Args:
        max_batch_size: maximum number of running sequences, not counting the interactive reserve.
        max_step_tokens: maximum tokens per step; bounds how long a prompt delays other sequences.
        kv_cache_bytes: memory that running sequences may reserve.
        bytes_needed: the memory that a sequence reserves.
        allocate: called before a prompt's first chunk is planned; may set `num_cached`.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_step_tokens: int,
        kv_cache_bytes: int,
        bytes_needed: Callable[[Sequence], int],
        allocate: Callable[[Sequence], None],
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_step_tokens = max_step_tokens
        self.kv_cache_bytes = kv_cache_bytes
        self.reserved_bytes = 0
        self.running: list[Sequence] = []
        self._interactive: deque[Sequence] = deque()
        self._batch: deque[Sequence] = deque()
        self._num_interactive_turns = 0  # interactive admissions since a batch admission
        self._num_interactive_steps = 0  # steps since batch sequences last took part
        self._bytes_needed = bytes_needed
        self._allocate = allocate

    @property
    def num_waiting(self) -> int:
        """The number of sequences that have not been admitted yet."""
        return len(self._interactive) + len(self._batch)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        (self._interactive if sequence.is_interactive else self._batch).append(sequence)

    def plan(self) -> list[ScheduledSequence]:
        """Admit what fits and divide the step: decoding sequences first, then prompts."""
        while queue := self._next_queue():
            self._admit(queue.popleft())
        interactive = [s for s in self.running if s.is_interactive]
        batch = [s for s in self.running if not s.is_interactive]
        if interactive and batch:
            self._num_interactive_steps += 1
            if self._num_interactive_steps < BATCH_STEP:
                batch = []
        if batch or not interactive:
            self._num_interactive_steps = 0
        decoding = [
            ScheduledSequence(s, s.num_cached, len(s.token_ids))
            for s in (*interactive, *batch)
            if s.is_decoding
        ]
        num_tokens = max(self.max_step_tokens - len(decoding), 1)
        share = num_tokens // 2 if any(not s.is_decoding for s in batch) else num_tokens
        prompts = self._prefill(interactive, share)
        num_tokens -= sum(item.stop - item.start for item in prompts)
        return decoding + prompts + self._prefill(batch, num_tokens)

    def retire(self) -> list[Sequence]:
        """Free the slots of finished sequences and return those sequences."""
        finished = [s for s in self.running if s.is_finished]
        if finished:
            self.running = [s for s in self.running if not s.is_finished]
            self.reserved_bytes -= sum(map(self._bytes_needed, finished))
        return finished

    def withdraw(self, sequence: Sequence) -> None:
        """Remove a sequence from the queue if it is still waiting."""
        for queue in (self._interactive, self._batch):
            if sequence in queue:
                queue.remove(sequence)

    def _next_queue(self) -> deque[Sequence] | None:
        """The queue whose head is admitted next; None if that head has to wait."""
        is_batch_turn = self._num_interactive_turns >= INTERACTIVE_TURNS
        if self._batch and (is_batch_turn or not self._interactive):
            if self._fits_batch(self._batch[0]):
                return self._batch
            if is_batch_turn and not self._has_batch_share():
                return None  # the next free slot and memory are reserved for it
        if self._interactive and self._fits(self._interactive[0], self._num_slots):
            return self._interactive
        return None

    @property
    def _num_slots(self) -> int:
        return self.max_batch_size + 1 + self.max_batch_size // RESERVED_DIVISOR

    def _fits(self, sequence: Sequence, num_slots: int, kept_back: int = 0) -> bool:
        reserved = self.reserved_bytes + self._bytes_needed(sequence)
        return len(self.running) < num_slots and reserved <= self.kv_cache_bytes - kept_back

    def _fits_batch(self, sequence: Sequence) -> bool:
        if not self._has_batch_share():
            return self._fits(sequence, self._num_slots)
        kept_back = self.kv_cache_bytes // RESERVED_DIVISOR
        return self._fits(sequence, self.max_batch_size, kept_back)

    def _has_batch_share(self) -> bool:
        """Whether batch sequences hold the slots that they are guaranteed."""
        num_batch = sum(not s.is_interactive for s in self.running)
        return num_batch >= max(1, self.max_batch_size // BATCH_DIVISOR)

    def _admit(self, sequence: Sequence) -> None:
        sequence.admitted_at = time.perf_counter()
        self.reserved_bytes += self._bytes_needed(sequence)
        self.running.append(sequence)
        if sequence.is_interactive:
            self._num_interactive_turns += 1
        else:
            self._num_interactive_turns = 0

    def _prefill(self, sequences: list[Sequence], num_tokens: int) -> list[ScheduledSequence]:
        """Plan the next `num_tokens` tokens of prompts, first come, first served."""
        items = []
        for sequence in sequences:
            if num_tokens > 0 and not sequence.is_decoding:
                self._allocate(sequence)
                start = sequence.num_cached
                stop = min(start + num_tokens, len(sequence.token_ids))
                items.append(ScheduledSequence(sequence, start, stop))
                num_tokens -= stop - start
        return items
