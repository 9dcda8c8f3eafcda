"""The queries of one request, from admission until each of them has a result."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from queue import Empty, SimpleQueue

from smolcli.backends.base import Backend
from smolcli.errors import BackendError
from smolcli.server.admission import AdmissionLimit
from smolcli.server.errors import CLIENT_DISCONNECTED, HttpError
from smolcli.types import ErrorCode, Query, Result, failure

POLL_S = 0.25  # how often to check whether the client has disconnected


class InFlightRequest:
    """Submits the queries of a request and yields their results.

    The caller must call `close`, which cancels whatever is unfinished.

    Args:
        queries: the queries by their index in the request.
        backend: answers the queries.
        admission: counts them until they are finished.
        timeout_s: time after which unfinished queries fail with `timeout`.
        is_disconnected: returns whether the client has disconnected.
        observe: called with every result.
        is_interactive: whether the queries have interactive rather than batch priority.

    Raises:
        HttpError: 503 if the queries exceed the admission limit.
    """

    def __init__(
        self,
        queries: Mapping[int, Query],
        backend: Backend,
        admission: AdmissionLimit,
        timeout_s: float,
        is_disconnected: Callable[[], bool],
        observe: Callable[[Result], None],
        *,
        is_interactive: bool,
    ) -> None:
        admission.enter(len(queries), is_interactive=is_interactive)
        self._is_interactive = is_interactive
        self._admission = admission
        self._backend = backend
        self._queries = dict(queries)  # the unfinished ones
        self._futures: dict[int, Future[Result]] = {}
        # Pieces of text, and None when a query's future is done.
        self._events: SimpleQueue[tuple[int, str | None]] = SimpleQueue()
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._is_disconnected = is_disconnected
        self._observe = observe
        self._is_closed = False

    def submit(self, *, with_text: bool) -> None:
        """Submit all queries to the backend.

        Args:
            with_text: whether `events` also yields the text as it is generated.
        """
        for index, query in self._queries.items():
            on_text = self._text_callback(index) if with_text else None
            future = self._backend.submit(query, on_text, is_interactive=self._is_interactive)
            self._futures[index] = future
            future.add_done_callback(self._done_callback(index))

    def _text_callback(self, index: int) -> Callable[[str], None]:
        return lambda text: self._events.put((index, text))

    def _done_callback(self, index: int) -> Callable[[Future[Result]], None]:
        return lambda _: self._events.put((index, None))

    def events(self) -> Iterator[tuple[int, str | Result] | None]:
        """Yield pieces of text, if requested, and results, each with its query's index.

        Also yields None several times a second while nothing happens.

        Raises:
            HttpError: the client has disconnected.
        """
        while self._queries:
            if self._is_disconnected():
                raise HttpError(CLIENT_DISCONNECTED, "the client disconnected", ErrorCode.CANCELLED)
            if time.monotonic() >= self._deadline:
                message = f"no answer within {self._timeout_s:g} s"
                yield from self._abandon(message, ErrorCode.TIMEOUT)
            elif event := self._next_event():
                index, text = event
                yield index, self._settle(index) if text is None else text
            else:
                yield None

    def results(self) -> Iterator[tuple[int, Result]]:
        """Yield results in the order in which they finish, each with its query's index.

        Raises:
            HttpError: the client has disconnected.
        """
        for event in self.events():
            if event is not None and isinstance(event[1], Result):
                yield event[0], event[1]

    def close(self) -> None:
        """Cancel what is unfinished and release the request's place in the admission limit."""
        if not self._is_closed:
            self._is_closed = True
            for _ in self._abandon("the request was cancelled", ErrorCode.CANCELLED):
                pass
            self._admission.leave(is_interactive=self._is_interactive)

    def _next_event(self) -> tuple[int, str | None] | None:
        timeout_s = max(min(self._deadline - time.monotonic(), POLL_S), 0.0)
        try:
            return self._events.get(timeout=timeout_s)
        except Empty:
            return None

    def _abandon(self, message: str, code: ErrorCode) -> Iterator[tuple[int, Result]]:
        """Cancel every unfinished query; one that has just finished keeps its result."""
        for index, query in list(self._queries.items()):
            future = self._futures.get(index)
            if future is not None and not future.cancel() and future.done():
                yield index, self._settle(index)
            else:
                yield index, self._finish(index, failure(query, message, code))

    def _settle(self, index: int) -> Result:
        return self._finish(index, self._outcome(self._futures[index], self._queries[index]))

    def _outcome(self, future: Future[Result], query: Query) -> Result:
        """The result of a finished future; a backend that is gone becomes the query's error."""
        try:
            return future.result()
        except (BackendError, CancelledError) as exc:
            if self._admission.is_closed:  # the server has closed the backend
                message = "the server shut down before the answer was complete; retry later"
                return failure(query, message, ErrorCode.OVERLOADED)
            message = str(exc) or "the model was shut down"
            return failure(query, message, ErrorCode.BACKEND_ERROR)

    def _finish(self, index: int, result: Result) -> Result:
        del self._queries[index]
        self._admission.finish_query(is_interactive=self._is_interactive)
        self._observe(result)
        return result
