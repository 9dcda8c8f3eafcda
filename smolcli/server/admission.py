"""The admission limit: how many requests and queries the server accepts at once."""

import threading
from http import HTTPStatus

from smolcli.server.errors import HttpError
from smolcli.types import ErrorCode

RETRY_AFTER_S = 2
REQUESTS_PER_SLOT = 4  # in-flight requests for each slot of the batch
MIN_REQUESTS = 64


def request_limit(max_slots: int, max_queue: int) -> int:
    """The number of requests in flight, each with its own thread, that keeps the batch full."""
    return min(max(REQUESTS_PER_SLOT * max_slots, MIN_REQUESTS), max_queue)


def unavailable(message: str) -> HttpError:
    """A 503 response that asks the client to retry."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return HttpError(HTTPStatus.SERVICE_UNAVAILABLE, message, ErrorCode.OVERLOADED, headers=headers)


class AdmissionLimit:
    """Counts unfinished requests and queries, and rejects what exceeds the limits.

    Args:
        max_queries: the largest number of unfinished queries.
        max_requests: the largest number of unfinished requests.
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
        """Whether a request with a single query would be rejected."""
        return self._num_queries >= self._max_queries or self._num_requests >= self._max_requests

    @property
    def num_requests(self) -> int:
        """Number of unfinished requests."""
        return self._num_requests

    def enter(self, num_queries: int) -> None:
        """Admit a request with all of its queries, or none of them.

        Raises:
            HttpError: 503 if a limit is reached or the server is shutting down.
        """
        with self._lock:
            if self.is_closed:
                raise unavailable("the server is shutting down; retry later")
            has_room = self._num_queries + num_queries <= self._max_queries
            if not has_room or self._num_requests >= self._max_requests:
                raise unavailable("the queue is full; retry later")
            self._num_queries += num_queries
            self._num_requests += 1

    def finish_query(self) -> None:
        """Release one query of a request that is still in flight."""
        with self._lock:
            self._num_queries -= 1

    def leave(self) -> None:
        """Release a request, all of whose queries are finished."""
        with self._lock:
            self._num_requests -= 1

    def close(self) -> None:
        """Reject every request from now on."""
        self.is_closed = True
