"""The queries of one request, from when they are let in until each has its result."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from queue import Empty, SimpleQueue

from smolcli.backends.base import Backend
from smolcli.errors import BackendError
from smolcli.server.admission import AdmissionLimit
from smolcli.server.errors import CLIENT_GONE, HttpError
from smolcli.types import ErrorCode, Query, Result, failure

POLL_S = 0.25  # how soon it is noticed that a client went away


class InFlightRequest:
    """Submits queries, and hands on what comes of them.

    `close` must be called, however the request ends: it cancels what is unfinished.

    Args:
        queries: by their place in the request.
        backend: answers them.
        gate: lets them in.
        timeout_s: what has no answer by then gets a `timeout`.
        is_client_gone: whether nobody waits any more.
        observe: is told of each result.

    Raises:
        HttpError: 503 where there is no room.
    """

    def __init__(
        self,
        queries: Mapping[int, Query],
        backend: Backend,
        gate: AdmissionLimit,
        timeout_s: float,
        is_client_gone: Callable[[], bool],
        observe: Callable[[Result], None],
    ) -> None:
        gate.enter(len(queries))
        self._gate = gate
        self._backend = backend
        self._queries = dict(queries)  # those that are unfinished
        self._futures: dict[int, Future[Result]] = {}
        self._events: SimpleQueue[tuple[int, str | None]] = SimpleQueue()
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._is_client_gone = is_client_gone
        self._observe = observe
        self._is_closed = False

    def submit(self, *, is_interactive: bool, with_text: bool) -> None:
        """Hand the queries to the backend."""
        for index, query in self._queries.items():
            on_text = self._putter(index) if with_text else None
            future = self._backend.submit(query, on_text, is_interactive=is_interactive)
            self._futures[index] = future
            future.add_done_callback(lambda _, index=index: self._events.put((index, None)))  # type: ignore[misc]

    def _putter(self, index: int) -> Callable[[str], None]:
        return lambda text: self._events.put((index, text))

    def events(self) -> Iterator[tuple[int, str | Result]]:
        """Yield pieces of answers, where they are wanted, and results, all with their place.

        Raises:
            HttpError: the client is gone.
        """
        while self._queries:
            if self._is_client_gone():
                raise HttpError(CLIENT_GONE, "the client is gone", ErrorCode.CANCELLED)
            if time.monotonic() >= self._deadline:
                message = f"there was no answer within {self._timeout_s:g} s"
                yield from self._give_up(message, ErrorCode.TIMEOUT)
            elif event := self._next_event():
                index, text = event
                yield index, self._settle(index) if text is None else text

    def results(self) -> Iterator[tuple[int, Result]]:
        """Yield results only."""
        for index, event in self.events():
            if isinstance(event, Result):
                yield index, event

    def close(self) -> None:
        """Cancel what is unfinished, and make room for others."""
        if not self._is_closed:
            self._is_closed = True
            for _ in self._give_up("the request was given up", ErrorCode.CANCELLED):
                pass
            self._gate.leave()

    def _next_event(self) -> tuple[int, str | None] | None:
        patience_s = max(min(self._deadline - time.monotonic(), POLL_S), 0.0)
        try:
            return self._events.get(timeout=patience_s)
        except Empty:
            return None

    def _give_up(self, message: str, code: ErrorCode) -> Iterator[tuple[int, Result]]:
        for index, query in list(self._queries.items()):
            future = self._futures.get(index)
            if future is not None and not future.cancel() and future.done():
                yield index, self._settle(index)
            else:
                yield index, self._finish(index, failure(query, message, code))

    def _settle(self, index: int) -> Result:
        return self._finish(index, _outcome(self._futures[index], self._queries[index]))

    def _finish(self, index: int, result: Result) -> Result:
        del self._queries[index]
        self._gate.finish_queries(1)
        self._observe(result)
        return result


def _outcome(future: Future[Result], query: Query) -> Result:
    try:
        return future.result()
    except (BackendError, CancelledError) as exc:
        reason = str(exc) or "the model was stopped"
        return failure(query, reason, ErrorCode.BACKEND_ERROR)
