"""The admission limit: how many requests and queries the server accepts at once."""

import random
import threading
import time
from http import HTTPStatus

from smolcli.server.errors import MIN_RETRY_AFTER_S, HttpError, retry_after
from smolcli.types import ErrorCode

MAX_RETRY_AFTER_S = 60
RATE_SMOOTHING = 0.1  # weight of the latest query in the mean time between finished queries
REQUESTS_PER_SLOT = 4  # in-flight requests for each slot of the batch
MIN_REQUESTS = 64
RESERVED_DIVISOR = 8  # each priority may always have 1/8 of each limit


def request_limit(max_slots: int, max_queue: int) -> int:
    """The number of requests in flight, each with its own thread, that keeps the batch full."""
    return min(max(REQUESTS_PER_SLOT * max_slots, MIN_REQUESTS), max_queue)


def reserved(limit: int) -> int:
    """How much of a limit one priority may use even if the other has reached the limit."""
    return limit // RESERVED_DIVISOR


def unavailable(message: str, retry_after_s: int = MIN_RETRY_AFTER_S) -> HttpError:
    """A 503 response that asks the client to retry.

    Args:
        message: why the request is rejected.
        retry_after_s: when to retry, in seconds.
    """
    headers = retry_after(retry_after_s)
    return HttpError(HTTPStatus.SERVICE_UNAVAILABLE, message, ErrorCode.OVERLOADED, headers=headers)


def spread_retry_s(num_queries: int, query_s: float, fraction: float) -> int:
    """When a rejected client should retry: at some moment while the queue drains.

    Args:
        num_queries: number of unfinished queries.
        query_s: mean time between two finished queries, in seconds.
        fraction: from 0 to 1, the moment to choose.

    Returns:
        A time in whole seconds, as `Retry-After` requires.
    """
    drain_s = num_queries * query_s
    return min(MIN_RETRY_AFTER_S + int(drain_s * fraction), MAX_RETRY_AFTER_S)


class AdmissionLimit:
    """Counts unfinished requests and queries, and rejects what exceeds the limits.

    Neither interactive nor batch requests can shut the other out: see `reserved`.

    Args:
        max_queries: the largest number of unfinished queries.
        max_requests: the largest number of unfinished requests.
    """

    def __init__(self, max_queries: int, max_requests: int) -> None:
        self._max_queries = max_queries
        self._max_requests = max_requests
        self._queries = dict.fromkeys((True, False), 0)  # by whether they are interactive
        self._requests = dict(self._queries)
        self._query_s = 0.0  # mean time between two finished queries
        self._last_finished_at = 0.0
        self._lock = threading.Lock()
        self.is_closed = False

    @property
    def is_full(self) -> bool:
        """Whether a request with a single query would be rejected."""
        return not self._has_room(1, is_interactive=True)

    @property
    def num_requests(self) -> int:
        """Number of unfinished requests."""
        return sum(self._requests.values())

    @property
    def retry_after_s(self) -> int:
        """When a rejected client should retry, chosen at random to spread the retries."""
        return spread_retry_s(sum(self._queries.values()), self._query_s, random.random())

    def enter(self, num_queries: int, *, is_interactive: bool = True) -> None:
        """Admit a request with all of its queries, or none of them.

        Args:
            num_queries: number of its queries.
            is_interactive: whether it has interactive rather than batch priority.

        Raises:
            HttpError: 503 if a limit is reached or the server is shutting down.
        """
        with self._lock:
            if self.is_closed:
                raise unavailable("the server is shutting down; retry later")
            if not self._has_room(num_queries, is_interactive=is_interactive):
                raise unavailable("the queue is full; retry later", self.retry_after_s)
            if not any(self._queries.values()):  # do not count the time spent idle
                self._last_finished_at = time.monotonic()
            self._queries[is_interactive] += num_queries
            self._requests[is_interactive] += 1

    def finish_query(self, *, is_interactive: bool = True) -> None:
        """Release one query of a request that is still in flight."""
        with self._lock:
            now = time.monotonic()
            elapsed_s = now - self._last_finished_at
            weight = RATE_SMOOTHING if self._query_s else 1.0
            self._query_s += weight * (elapsed_s - self._query_s)
            self._last_finished_at = now
            self._queries[is_interactive] -= 1

    def leave(self, *, is_interactive: bool = True) -> None:
        """Release a request, all of whose queries are finished."""
        with self._lock:
            self._requests[is_interactive] -= 1

    def _has_room(self, num_queries: int, *, is_interactive: bool) -> bool:
        """Whether both limits admit another request of a priority with this many queries."""
        return all(
            sum(used.values()) + num <= limit or used[is_interactive] + num <= reserved(limit)
            for used, num, limit in (
                (self._queries, num_queries, self._max_queries),
                (self._requests, 1, self._max_requests),
            )
        )

    def close(self) -> None:
        """Reject every request from now on."""
        self.is_closed = True
