"""What the workers of a cluster have to do: one queue for all of them, and each one's share."""

import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from math import ceil

from smolcli.backends.base import OnText, complete_future
from smolcli.errors import BackendError, SmolError
from smolcli.types import Query, Result

MAX_TRIES = 5  # for one query, or to start one worker
WAKE_INTERVAL_S = 0.2


@dataclass(eq=False, slots=True)
class Job:
    """One query on its way, however many workers it takes."""

    query: Query
    on_text: OnText | None
    is_interactive: bool
    future: Future[Result] = field(default_factory=Future)
    num_losses: int = 0

    def give(self, result: Result) -> None:
        """Complete the future, unless somebody cancelled it."""
        if self.on_text and result.response and not self.future.cancelled():
            self.on_text(result.response)
        complete_future(self.future, result)

    def fail(self, error: BackendError) -> None:
        """Tell that there will be no result."""
        complete_future(self.future, error)


class Share:
    """What one worker has to do, by number; the thread that keeps the worker alone changes it."""

    def __init__(self) -> None:
        self.jobs: dict[int, Job] = {}
        self._numbers = count()

    def add(self, job: Job) -> int:
        """Take on a job; returns its number."""
        number = next(self._numbers)
        self.jobs[number] = job
        return number


class JobQueue:
    """Jobs that wait and jobs that workers have; safe to use from any thread.

    Futures are completed outside the lock: who waits for one may hold a lock that the
    submitter of another holds, too.
    """

    def __init__(self) -> None:
        self._pending: deque[Job] = deque()
        self._shares: list[Share] = []
        self._gone: SmolError | None = None
        self._changed = threading.Condition()  # guards all of these

    @property
    def num_pending(self) -> int:
        """How many no worker has."""
        return len(self._pending)

    @property
    def num_taken(self) -> int:
        """How many workers have."""
        return sum(len(share.jobs) for share in tuple(self._shares))

    @property
    def is_gone(self) -> bool:
        """Whether nothing is answered any more."""
        return self._gone is not None

    def check(self) -> None:
        """Raise when there is nothing to wait for any more."""
        if self._gone is not None:
            raise self._gone

    def put(self, job: Job) -> None:
        """Have a job wait for a worker, or fail where none will come."""
        with self._changed:
            gone = self._gone
            if gone is None:
                (self._pending.appendleft if job.is_interactive else self._pending.append)(job)
                self._changed.notify()
        if gone is not None:
            job.fail(BackendError(str(gone)))

    def join(self, share: Share) -> None:
        """Count in a worker that is ready."""
        with self._changed:
            self._shares.append(share)
            self._changed.notify_all()

    def take(self, share: Share, most: int) -> list[Job]:
        """The next jobs of a worker: what makes its share even, with no more than `most` in all.

        Waits while it has nothing to do.
        """
        with self._changed:
            while not (share.jobs or self._pending):
                self.check()
                self._changed.wait(WAKE_INTERVAL_S)
            self.check()
            even = ceil((len(self._pending) + self.num_taken) / len(self._shares))
            room = min(even, most) - len(share.jobs)
            jobs = [self._pending.popleft() for _ in range(min(room, len(self._pending)))]
        return [job for job in jobs if not job.future.cancelled()]

    def put_back(self, share: Share, reason: str) -> None:
        """Take over the jobs of a worker that is lost, but for those that met this too often."""
        again: list[Job] = []
        lost: list[Job] = []
        for job in share.jobs.values():
            job.num_losses += 1
            (lost if job.num_losses >= MAX_TRIES else again).append(job)
        with self._changed:
            if share in self._shares:
                self._shares.remove(share)
            self._pending.extendleft(reversed(again))
            self._changed.notify_all()
        _fail_all(lost, BackendError(f"{MAX_TRIES} workers were lost with it: {reason}"))

    def end(self, reason: SmolError) -> None:
        """Let everybody know that there are no workers any more, and why, the first time."""
        with self._changed:
            gone = self._gone = self._gone or reason
            shares = [job for share in self._shares for job in tuple(share.jobs.values())]
            jobs = [*self._pending, *shares]
            self._pending.clear()
            self._changed.notify_all()
        _fail_all(jobs, BackendError(str(gone)))


def _fail_all(jobs: Iterable[Job], error: BackendError) -> None:
    for job in jobs:
        job.fail(error)
