"""The queue of queries that all workers of a cluster draw from."""

import threading
from collections import deque
from dataclasses import dataclass
from itertools import count
from math import ceil

from smolcli.backends.base import WAKE_INTERVAL_S, PendingQuery, complete_future, fail_all
from smolcli.errors import BackendError, SmolError
from smolcli.types import Result, TextPiece

MAX_WORKERS_LOST = 5  # while they held the same query, which then fails


@dataclass(eq=False)
class ClusterQuery(PendingQuery):
    """A query in progress on a cluster, on one worker after another if they die."""

    num_workers_lost: int = 0

    def complete(self, result: Result) -> None:
        """Deliver the result, and its text in one piece if it is streamed."""
        self.show(TextPiece.whole(result))
        complete_future(self.future, result)


class WorkerLoad:
    """The queries that one worker holds, by number; only that worker's thread changes it."""

    def __init__(self) -> None:
        self.queries: dict[int, ClusterQuery] = {}
        self._numbers = count()

    def add(self, query: ClusterQuery) -> int:
        """Assign a query to the worker; returns its number."""
        number = next(self._numbers)
        self.queries[number] = query
        return number


class WorkQueue:
    """Queries that wait for a worker and those that workers hold. Usable from any thread.

    Futures are completed outside the lock, because their callbacks may wait for a lock that a
    submitter holds.
    """

    def __init__(self) -> None:
        self._waiting: deque[ClusterQuery] = deque()
        self._loads: list[WorkerLoad] = []
        self._closed_by: SmolError | None = None
        self._changed = threading.Condition()  # guards all of these

    @property
    def num_waiting(self) -> int:
        """Queries that no worker holds."""
        return len(self._waiting)

    @property
    def num_held(self) -> int:
        """Queries that workers hold."""
        return sum(len(load.queries) for load in tuple(self._loads))

    @property
    def is_closed(self) -> bool:
        """Whether the queue no longer accepts queries."""
        return self._closed_by is not None

    def check(self) -> None:
        """Raise the reason if the queue is closed.

        Raises:
            SmolError: the reason given to `close`.
        """
        if self._closed_by is not None:
            raise self._closed_by

    def put(self, query: ClusterQuery) -> None:
        """Queue a query for the next free worker; fail it if the queue is closed."""
        with self._changed:
            closed_by = self._closed_by
            if closed_by is None:
                append = self._waiting.appendleft if query.is_interactive else self._waiting.append
                append(query)
                self._changed.notify()
        if closed_by is not None:
            query.fail(BackendError(str(closed_by)))

    def join(self, load: WorkerLoad) -> None:
        """Register a worker that is ready."""
        with self._changed:
            self._loads.append(load)
            self._changed.notify_all()

    def take(self, load: WorkerLoad, max_held: int) -> list[ClusterQuery]:
        """The next queries for a worker. Blocks while there is nothing for it to do.

        Args:
            load: what the worker holds.
            max_held: maximum number of queries that it may hold.

        Returns:
            As many queries as make its load equal to that of the other workers.
        """
        with self._changed:
            while not (load.queries or self._waiting):
                self.check()
                self._changed.wait(WAKE_INTERVAL_S)
            self.check()
            equal = ceil((len(self._waiting) + self.num_held) / len(self._loads))
            room = min(equal, max_held) - len(load.queries)
            queries = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        return [query for query in queries if not query.future.cancelled()]

    def put_back(self, load: WorkerLoad, reason: str) -> None:
        """Requeue the queries of a lost worker, ahead of all others.

        A query that has lost too many workers fails.

        Args:
            load: what the worker held.
            reason: why it was lost.
        """
        requeued: list[ClusterQuery] = []
        given_up: list[ClusterQuery] = []
        for query in load.queries.values():
            query.num_workers_lost += 1
            is_given_up = query.num_workers_lost >= MAX_WORKERS_LOST
            (given_up if is_given_up else requeued).append(query)
        with self._changed:
            if load in self._loads:
                self._loads.remove(load)
            self._waiting.extendleft(reversed(requeued))
            self._changed.notify_all()
        fail_all(
            given_up,
            BackendError(
                f"{MAX_WORKERS_LOST} workers were lost while they held this query: {reason}"
            ),
        )

    def close(self, reason: SmolError) -> None:
        """Fail all current and future queries; the first reason given is kept."""
        with self._changed:
            closed_by = self._closed_by = self._closed_by or reason
            held = [query for load in self._loads for query in tuple(load.queries.values())]
            queries = [*self._waiting, *held]
            self._waiting.clear()
            self._changed.notify_all()
        fail_all(queries, BackendError(str(closed_by)))
