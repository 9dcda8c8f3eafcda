"""Keeps a backend busy with queries and yields their results in input order."""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue, SimpleQueue
from typing import TypeVar

from smolcli.backends.base import WAKE_INTERVAL_S, Backend
from smolcli.errors import BackendError, RunError
from smolcli.types import Query, Result

MAX_HELD_RESULTS = 10_000
MAX_HELD_BYTES = 64_000_000
MAX_READ_AHEAD = 64

T = TypeVar("T")


def answer_all(items: Iterable[Query | Result | None], backend: Backend) -> Generator[Result]:
    """Yield the result of each item in order, as soon as all earlier ones are done.

    Keeps `backend.window` queries in flight and buffers up to MAX_HELD_RESULTS finished results
    or MAX_HELD_BYTES behind a slow one. When the caller stops iterating, queries still in flight
    are cancelled.

    Args:
        items: queries to answer, and results to pass on in their place. None means that no item
            is available yet; finished results are yielded meanwhile.
        backend: answers the queries.

    Raises:
        BackendError: the backend is gone.
    """
    buffer = _ReorderBuffer(backend)
    try:
        for item in items:
            if item is not None:
                buffer.add(item)
            yield from buffer.take_ready()
            while buffer.is_full:
                buffer.wait_for_one()
                yield from buffer.take_ready()
        while not buffer.is_empty:
            buffer.wait_for_one()
            yield from buffer.take_ready()
    finally:
        buffer.cancel()


def read_ahead(items: Iterable[T]) -> Iterator[T | None]:
    """Read items in a background thread, so that slow input does not delay finished results.

    Yields None whenever no item arrives within WAKE_INTERVAL_S. An exception from `items` is
    raised after the items before it.

    Raises:
        RunError: reading failed with an exception that is not an `Exception`, such as a panic in
            a native library.
    """
    received: Queue[T | _End] = Queue(MAX_READ_AHEAD)

    def read() -> None:
        error = None
        try:
            for item in items:
                received.put(item)
        except BaseException as exc:  # the caller must learn of any end, or it waits forever
            error = exc
        received.put(_End(error))

    # A daemon thread, because a blocking read of a terminal or pipe cannot be interrupted.
    threading.Thread(target=read, name="read-ahead", daemon=True).start()
    while True:
        try:
            item = received.get(timeout=WAKE_INTERVAL_S)
        except Empty:
            yield None
            continue
        if isinstance(item, _End):
            if isinstance(item.error, Exception):
                raise item.error
            if item.error is not None:
                reason = f"{type(item.error).__name__}: {item.error}"
                raise RunError(f"reading the input failed: {reason}") from item.error
            return
        yield item


@dataclass(frozen=True, slots=True)
class _End:
    """Marks the end of the items, with the exception that ended them, if any."""

    error: BaseException | None


class _Pending:
    """An item whose result has not been yielded yet.

    `num_bytes` is its share of the buffer's memory, counted only while it waits for an earlier one.
    """

    __slots__ = ("is_ready", "num_bytes", "outcome")

    def __init__(self, outcome: Future[Result] | Result) -> None:
        self.outcome = outcome
        self.is_ready = False
        self.num_bytes = 0


class _ReorderBuffer:
    """Results in flight and finished ones, in input order; used by the caller's thread only."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._order: deque[_Pending] = deque()
        self._finished: SimpleQueue[_Pending] = SimpleQueue()  # filled by the backend's threads
        self._num_in_flight = 0
        self._held_bytes = 0

    @property
    def is_empty(self) -> bool:
        """Whether every result has been yielded."""
        return not self._order

    @property
    def is_full(self) -> bool:
        """Whether no further item may be added."""
        return (
            self._num_in_flight >= self._backend.window
            or len(self._order) - self._num_in_flight >= MAX_HELD_RESULTS
            or self._held_bytes >= MAX_HELD_BYTES
        )

    def add(self, item: Query | Result) -> None:
        """Append one item and submit it if it is a query."""
        if isinstance(item, Result):
            self._order.append(pending := _Pending(item))
            self._settle(pending)
        else:
            future = self._backend.submit(item)
            self._order.append(pending := _Pending(future))
            self._num_in_flight += 1
            future.add_done_callback(lambda _: self._finished.put(pending))

    def wait_for_one(self) -> None:
        """Block until a query finishes."""
        while True:
            with suppress(Empty):
                return self._settle(self._finished.get(timeout=WAKE_INTERVAL_S))

    def take_ready(self) -> Iterator[Result]:
        """Yield finished results up to the first unfinished one."""
        while not self._finished.empty():
            self._settle(self._finished.get())
        while self._order and self._order[0].is_ready:
            pending = self._order.popleft()
            self._held_bytes -= pending.num_bytes
            yield _result(pending.outcome)

    def cancel(self) -> None:
        """Cancel every query in flight."""
        for pending in self._order:
            if isinstance(pending.outcome, Future):
                pending.outcome.cancel()

    def _settle(self, pending: _Pending) -> None:
        pending.is_ready = True
        if isinstance(pending.outcome, Future):
            self._num_in_flight -= 1
        if pending is not self._order[0]:
            pending.num_bytes = _num_bytes(pending.outcome)
            self._held_bytes += pending.num_bytes


def _result(outcome: Future[Result] | Result) -> Result:
    if isinstance(outcome, Result):
        return outcome
    try:
        return outcome.result()
    except CancelledError as exc:
        raise BackendError("the backend stopped before it finished its queries") from exc


def _num_bytes(outcome: Future[Result] | Result) -> int:
    """Approximate memory of a result; a failed future counts as nothing."""
    if isinstance(outcome, Future):
        if outcome.cancelled() or outcome.exception() is not None:
            return 0
        outcome = outcome.result()
    num_chars = outcome.num_chars
    if outcome.metadata is not None:
        num_chars += len(str(outcome.metadata))
    return 500 + num_chars
