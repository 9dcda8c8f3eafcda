"""Who runs next, and how many tokens of each. Imports no torch."""

import time
from collections import deque
from collections.abc import Callable, Iterator

from smolcli.engine.sequence import ScheduledSequence, Sequence

URGENT_SHARE = 8  # urgent sequences have a slot of their own for every so many others
BULK_TURN = 3  # while urgent sequences run, the others take part in every third step


class Scheduler:
    """Admits sequences, first come first served, while slots and cache last.

    A sequence reserves the cache of its full length when it is admitted, so that what runs
    can always run to its end. Urgent sequences go first; while any runs, the others take
    turns, so that a flood of them makes an urgent one slower but never makes it wait.

    Args:
        max_batch_size: slots, the most sequences that run at once; urgent ones have a few more.
        max_step_tokens: the most tokens of one step; bounds how long a prompt holds up the others.
        cache_budget: bytes of cache that may be reserved.
        cost: the bytes that a sequence reserves.
        begin: called before a piece of a prompt is planned; may find some of it cached already.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_step_tokens: int,
        cache_budget: int,
        cost: Callable[[Sequence], int],
        begin: Callable[[Sequence], None],
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_step_tokens = max_step_tokens
        self.cache_budget = cache_budget
        self.reserved = 0
        self.running: list[Sequence] = []
        self._urgent: deque[Sequence] = deque()
        self._bulk: deque[Sequence] = deque()
        self._num_urgent_steps = 0
        self._cost = cost
        self._begin = begin

    @property
    def num_waiting(self) -> int:
        """Sequences that are not admitted yet."""
        return len(self._urgent) + len(self._bulk)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        (self._urgent if sequence.is_interactive else self._bulk).append(sequence)

    def plan(self) -> list[ScheduledSequence]:
        """Admit what fits, then share the step's tokens: running answers first, then prompts."""
        self._admit(self._urgent, self.max_batch_size + 1 + self.max_batch_size // URGENT_SHARE)
        if not self._urgent:
            self._admit(self._bulk, self.max_batch_size)
        chosen = list(self._in_turn())
        works = [
            ScheduledSequence(s, s.num_cached, len(s.token_ids)) for s in chosen if s.is_decoding
        ]
        room = max(self.max_step_tokens - len(works), 1)
        for sequence in chosen:
            if room > 0 and not sequence.is_decoding:
                self._begin(sequence)
                stop = min(sequence.num_cached + room, len(sequence.token_ids))
                works.append(ScheduledSequence(sequence, sequence.num_cached, stop))
                room -= stop - sequence.num_cached
        return works

    def retire(self) -> list[Sequence]:
        """Free the slots of finished sequences, and return these."""
        finished = [s for s in self.running if s.is_finished]
        if finished:
            self.running = [s for s in self.running if not s.is_finished]
            self.reserved -= sum(self._cost(s) for s in finished)
        return finished

    def withdraw(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue, if it still waits."""
        for queue in (self._urgent, self._bulk):
            if sequence in queue:
                queue.remove(sequence)

    def _admit(self, queue: deque[Sequence], num_slots: int) -> None:
        while queue and len(self.running) < num_slots:
            cost = self._cost(queue[0])
            if self.reserved + cost > self.cache_budget:
                break
            sequence = queue.popleft()
            sequence.admitted_at = time.perf_counter()
            self.reserved += cost
            self.running.append(sequence)

    def _in_turn(self) -> Iterator[Sequence]:
        """The sequences that take part in this step, urgent ones first."""
        urgent = [s for s in self.running if s.is_interactive]
        bulk = [s for s in self.running if not s.is_interactive]
        yield from urgent
        self._num_urgent_steps = self._num_urgent_steps + 1 if urgent and bulk else 0
        if self._num_urgent_steps % BULK_TURN == 0:
            yield from bulk
