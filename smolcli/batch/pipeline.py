"""The one loop: queries to a backend and results from it, in order and within bounds."""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue, SimpleQueue
from typing import TypeVar

from smolcli.backends.base import Backend
from smolcli.errors import BackendError
from smolcli.types import Query, Result

MAX_HELD_RESULTS = 10_000
MAX_HELD_BYTES = 64_000_000
MAX_READ_AHEAD = 64
WAKE_INTERVAL_S = 0.2  # a wait without an end cannot be interrupted on Windows

T = TypeVar("T")


def answer_all(items: Iterable[Query | Result | None], backend: Backend) -> Generator[Result]:
    """Yield the result of every item in order, as soon as those before it are there.

    Keeps `backend.window` queries unfinished, and up to MAX_HELD_RESULTS finished results or
    MAX_HELD_BYTES of them waiting behind a slow one. Whatever is unfinished when the caller
    stops is cancelled. An item None has no result: it stands for a moment without input, in
    which what is ready is handed on.

    Raises:
        BackendError: where the backend is gone.
    """
    places = _Places(backend)
    try:
        for item in items:
            if item is not None:
                places.add(item)
            yield from places.take_ready()
            while places.are_full:
                places.await_one()
                yield from places.take_ready()
        while places.are_open:
            places.await_one()
            yield from places.take_ready()
    finally:
        places.cancel()


def read_ahead(items: Iterable[T]) -> Iterator[T | None]:
    """Draw items in a thread, so that results need not wait for input that is slow to come.

    Yields None whenever none came for a while, and raises what drawing them raised.
    """
    drawn: Queue[T | _End] = Queue(MAX_READ_AHEAD)

    def draw() -> None:
        fault = None
        try:
            for item in items:
                drawn.put(item)
        except Exception as exc:
            fault = exc
        drawn.put(_End(fault))

    # A daemon, for nothing wakes a thread that waits for a terminal or a pipe.
    threading.Thread(target=draw, name="read-ahead", daemon=True).start()
    while True:
        try:
            item = drawn.get(timeout=WAKE_INTERVAL_S)
        except Empty:
            yield None
            continue
        if isinstance(item, _End):
            if item.fault is not None:
                raise item.fault
            return
        yield item


@dataclass(frozen=True, slots=True)
class _End:
    """The last that is drawn, with the reason where it came too early."""

    fault: Exception | None


class _Place:
    """One item's place in the order: its outcome, and what that weighs while it has to wait."""

    __slots__ = ("is_ready", "num_bytes", "outcome")

    def __init__(self, outcome: Future[Result] | Result) -> None:
        self.outcome = outcome
        self.is_ready = False
        self.num_bytes = 0


class _Places:
    """Everything that is on its way, in input order; only the caller's thread changes it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._order: deque[_Place] = deque()
        self._finished: SimpleQueue[_Place] = SimpleQueue()  # the backend's threads put here
        self._num_unfinished = 0
        self._held_bytes = 0

    @property
    def are_open(self) -> bool:
        """Whether any result is still to come."""
        return bool(self._order)

    @property
    def are_full(self) -> bool:
        """Whether no further item may be taken in."""
        return (
            self._num_unfinished >= self._backend.window
            or len(self._order) - self._num_unfinished >= MAX_HELD_RESULTS
            or self._held_bytes >= MAX_HELD_BYTES
        )

    def add(self, item: Query | Result) -> None:
        """Take in one item at the end of the order."""
        if isinstance(item, Result):
            self._order.append(place := _Place(item))
            self._settle(place)
        else:
            future = self._backend.submit(item)
            self._order.append(place := _Place(future))
            self._num_unfinished += 1
            future.add_done_callback(lambda _: self._finished.put(place))

    def await_one(self) -> None:
        """Wait until a query is finished."""
        while True:
            with suppress(Empty):
                return self._settle(self._finished.get(timeout=WAKE_INTERVAL_S))

    def take_ready(self) -> Iterator[Result]:
        """Hand on what is ready, up to the first that is not."""
        while not self._finished.empty():
            self._settle(self._finished.get())
        while self._order and self._order[0].is_ready:
            place = self._order.popleft()
            self._held_bytes -= place.num_bytes
            yield _result(place.outcome)

    def cancel(self) -> None:
        """Let go of all that is unfinished."""
        for place in self._order:
            if isinstance(place.outcome, Future):
                place.outcome.cancel()

    def _settle(self, place: _Place) -> None:
        place.is_ready = True
        if isinstance(place.outcome, Future):
            self._num_unfinished -= 1
        if place is not self._order[0]:
            place.num_bytes = _num_bytes(place.outcome)
            self._held_bytes += place.num_bytes


def _result(outcome: Future[Result] | Result) -> Result:
    if isinstance(outcome, Result):
        return outcome
    try:
        return outcome.result()
    except CancelledError as exc:
        raise BackendError("the backend was stopped before it was done") from exc


def _num_bytes(outcome: Future[Result] | Result) -> int:
    """About how much memory a result takes; a failed future none worth counting."""
    if isinstance(outcome, Future):
        if outcome.cancelled() or outcome.exception() is not None:
            return 0
        outcome = outcome.result()
    num_chars = outcome.num_chars
    if outcome.metadata is not None:
        num_chars += len(str(outcome.metadata))
    return 500 + num_chars
