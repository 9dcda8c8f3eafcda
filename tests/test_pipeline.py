"""The pipeline between reader, backend and writer: ordered, bounded, prompt and cancellable."""

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from fakes import DyingBackend, EchoBackend, HeldBackend, SlowBackend, echo
from hypothesis import given, settings
from hypothesis import strategies as st

from smolcli.backends.base import OnText
from smolcli.batch.pipeline import answer_all, read_ahead
from smolcli.errors import BackendError, InputError, RunError
from smolcli.types import ErrorCode, Message, Query, Result

PATIENCE_S = 60.0  # for a busy machine


def query(number: int) -> Query:
    return Query(str(number), (Message("user", f"question {number}"),), line=number)


def bad(number: int) -> Result:
    return Result(str(number), error="bad", error_code=ErrorCode.INVALID_JSON, line=number)


@settings(max_examples=25)
@given(st.lists(st.booleans(), max_size=60), st.integers(1, 8))
def test_results_come_in_input_order(are_good: list[bool], window: int) -> None:
    items = [query(n) if good else bad(n) for n, good in enumerate(are_good)]
    backend = SlowBackend(window)
    results = list(answer_all(items, backend))
    backend.close()
    assert results == [echo(i) if isinstance(i, Query) else i for i in items]
    assert backend.most_unfinished <= window


def test_result_is_yielded_before_the_next_item_is_read() -> None:
    received: list[Result] = []

    def items() -> Iterator[Query | Result]:
        for number in range(6):
            assert len(received) == number
            yield query(number) if number % 2 else bad(number)

    for result in answer_all(items(), EchoBackend()):
        received.append(result)
    assert len(received) == 6


class SlowFirst(EchoBackend):
    """Answers the first query on demand, and all others at once with the same text."""

    def __init__(self, text: str) -> None:
        super().__init__(window=4)
        self.text = text
        self.first: Future[Result] = Future()

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        return super().submit(query) if query.line else self.first

    def answer(self, query: Query) -> Result:
        return Result(query.chat_id, self.text, line=query.line)


@pytest.mark.parametrize(("text", "most"), [("", 10_000), ("x" * 1_000_000, 64)])
def test_results_buffered_behind_a_slow_one_are_bounded(text: str, most: int) -> None:
    backend, asked = SlowFirst(text), itertools.count()
    items = (query(number) for number in asked)
    num_asked: list[int] = []

    def answer_first_once_the_buffer_is_full() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while backend.model_calls < most * 0.9 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # for an unbounded buffer to grow beyond `most`
        num_asked.append(backend.model_calls)
        backend.first.set_result(Result("0", "late", line=0))

    thread = threading.Thread(target=answer_first_once_the_buffer_is_full)
    results = answer_all(items, backend)
    thread.start()
    assert next(results).response == "late"
    thread.join()
    results.close()
    assert most * 0.9 <= num_asked[-1] <= most


def test_results_before_a_backend_failure_are_yielded_first() -> None:
    results = answer_all((query(n) for n in range(10)), DyingBackend(num_answers=5, window=4))
    assert [next(results).line for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(BackendError, match="the engine died"):
        next(results)


def test_query_cancelled_by_the_backend_is_a_backend_error() -> None:
    backend = HeldBackend(window=3)

    def items() -> Iterator[Query]:
        yield query(0)
        backend.futures[0].cancel()
        yield query(1)

    with pytest.raises(BackendError, match="stopped"):
        next(answer_all(items(), backend))


def test_in_flight_queries_are_cancelled_when_the_caller_stops() -> None:
    backend = HeldBackend()

    def items() -> Iterator[Query]:
        yield query(0)
        yield query(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(answer_all(items(), backend))
    assert [future.cancelled() for future in backend.futures] == [True, True]


def test_results_do_not_wait_for_slow_input() -> None:
    """A client that waits for each answer before sending the next query would deadlock."""
    received = threading.Event()

    def items() -> Iterator[Query]:
        yield query(0)
        assert received.wait(PATIENCE_S)
        yield query(1)

    backend = SlowBackend()
    results = answer_all(read_ahead(items()), backend)
    assert next(results) == echo(query(0))
    received.set()
    assert list(results) == [echo(query(1))]
    backend.close()


def test_input_error_is_raised_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise InputError("cut")

    drawn = read_ahead(items())
    assert next(drawn) == 1
    with pytest.raises(InputError, match="cut"):
        next(drawn)


def test_panic_while_reading_ends_the_run() -> None:
    """A Rust panic is a BaseException, which once killed the reading thread and hung the run."""

    class PanicError(BaseException):
        pass

    def items() -> Iterator[int]:
        yield 1
        raise PanicError("index out of bounds")

    read = read_ahead(items())
    assert next(read) == 1
    with pytest.raises(RunError, match=r"reading the input failed: PanicError: index out"):
        next(item for item in read if item is not None)
