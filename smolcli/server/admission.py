"""How much is let in: one counter, asked once, before any work is done for a request."""

import threading
from http import HTTPStatus

from smolcli.server.errors import HttpError
from smolcli.types import ErrorCode

RETRY_AFTER_S = 2
REQUESTS_PER_SLOT = 4  # single queries that wait for each slot of the batch
MIN_REQUESTS = 64


def most_requests(most_slots: int, max_queue: int) -> int:
    """How many requests may be at work, each on a thread of its own: enough to fill the batch."""
    return min(max(REQUESTS_PER_SLOT * most_slots, MIN_REQUESTS), max_queue)


def unavailable(message: str) -> HttpError:
    """The refusal of a request that may be welcome later."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return HttpError(HTTPStatus.SERVICE_UNAVAILABLE, message, ErrorCode.OVERLOADED, headers=headers)


class AdmissionLimit:
    """Counts the requests and queries that are let in and not finished.

    Args:
        max_queries: the most queries at once.
        max_requests: the most requests at once.
    """

    def __init__(self, max_queries: int, max_requests: int) -> None:
        self._max_queries = max_queries
        self._max_requests = max_requests
        self._num_queries = 0
        self._num_requests = 0
        self._lock = threading.Lock()
        self.is_closed = False

    @property
    def is_full(self) -> bool:
        """Whether not one query more would be let in."""
        return self._num_queries >= self._max_queries or self._num_requests >= self._max_requests

    @property
    def num_requests(self) -> int:
        """Requests that are let in and not finished."""
        return self._num_requests

    def enter(self, num_queries: int) -> None:
        """Let a request in with its queries, all or none.

        Raises:
            HttpError: 503 where there is no room, or the server is about to stop.
        """
        with self._lock:
            if self.is_closed:
                raise unavailable("the server is about to stop; ask again in a moment")
            has_room = self._num_queries + num_queries <= self._max_queries
            if not has_room or self._num_requests >= self._max_requests:
                raise unavailable("the queue is full; ask again in a moment")
            self._num_queries += num_queries
            self._num_requests += 1

    def finish_queries(self, num_queries: int) -> None:
        """Make room for queries that are finished, while their request goes on."""
        with self._lock:
            self._num_queries -= num_queries

    def leave(self) -> None:
        """Make room for another request."""
        with self._lock:
            self._num_requests -= 1

    def close(self) -> None:
        """Let nothing in any more."""
        self.is_closed = True
