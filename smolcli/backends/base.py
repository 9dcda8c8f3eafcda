"""The interface that all backends implement, and the code that they share."""

import logging
import operator
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from smolcli.errors import BackendError, PromptTooLong, QueryError, SmolError
from smolcli.settings import EngineSettings
from smolcli.types import ErrorCode, FinishReason, Query, Result, failure, is_blank

WAKE_INTERVAL_S = 0.2  # an unbounded wait cannot be interrupted on Windows
WINDOW_BATCHES = 3  # batches of unfinished queries that keep every slot of a backend busy

OnText = Callable[[str], None]

logger = logging.getLogger(__name__)


def complete_future(future: Future[Result], outcome: Result | BaseException) -> None:
    """Set a future's result or exception, unless it is already done or cancelled."""
    with suppress(InvalidStateError):
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def failed_result(query: Query, exc: BaseException) -> Result:
    """The error result of a query whose processing raised an exception."""
    if isinstance(exc, QueryError):
        is_raw = isinstance(exc, PromptTooLong) and query.raw_prompt is not None
        return failure(query, str(exc), exc.code, "raw_prompt" if is_raw else exc.field)
    is_debugging = logger.isEnabledFor(logging.DEBUG)
    logger.error(
        "query %.100r: %s",
        query.chat_id,
        internal_error(exc),
        exc_info=exc if is_debugging else None,
    )
    return failure(query, internal_error(exc), ErrorCode.INTERNAL)


def internal_error(exc: BaseException) -> str:
    """The error message of an unexpected exception, on one line."""
    first = (str(exc).splitlines() or [""])[0]
    return f"internal error: {type(exc).__name__}: {first}"


def incomplete_json(answer: Result, num_tokens: int) -> Result:
    """The error result of an answer that ended before it matched its format; keeps its text.

    Args:
        answer: what was generated.
        num_tokens: its length, in tokens.
    """
    how, advice = "was cut off", "allow more tokens, shorten the prompt or add limits to the schema"
    if answer.finish_reason is FinishReason.STOP:
        how, advice = "met a stop string or stop token", "choose one that the format cannot contain"
    when = f"after {num_tokens:,} tokens, before its JSON was complete"
    return replace(
        answer,
        error=f"the answer {how} {when}; {advice}",
        error_code=ErrorCode.INCOMPLETE_JSON,
        logprobs=None,
    )


def fail_all(queries: Iterable["PendingQuery"], error: SmolError) -> None:
    """Report to several queries that the backend has failed."""
    for query in queries:
        query.fail(error)


def start_thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread.

    Raises:
        BackendError: the process has reached its limit of threads.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as exc:
        raise BackendError(
            f"cannot start the thread {name!r}: {exc}; raise the limit on processes or threads"
        ) from exc
    return thread


@dataclass(eq=False)
class PendingQuery:
    """A submitted query whose result is awaited.

    `complete` and `fail` may race with each other and with a cancellation: the first one wins.
    """

    query: Query
    on_text: OnText | None
    is_interactive: bool = False
    future: Future[Result] = field(default_factory=Future)
    submitted_at: float = field(default_factory=time.perf_counter)

    @property
    def is_open(self) -> bool:
        """Whether the result is still awaited."""
        return not self.future.done()

    def show(self, text: str) -> None:
        """Pass on a piece of the answer. If the callback raises, only this query fails."""
        if self.on_text is None or is_blank(text) or not self.is_open:
            return
        try:
            self.on_text(text)
        except Exception as exc:
            self.complete(failed_result(self.query, exc))

    def complete(self, result: Result) -> None:
        """Deliver the result."""
        complete_future(self.future, result)

    def fail(self, error: SmolError) -> None:
        """Report that the backend has failed and there will be no result."""
        complete_future(self.future, error)


@dataclass(frozen=True, slots=True)
class Health:
    """The state of a backend.

    Args:
        is_alive: whether it can still answer queries, now or later.
        is_stuck: whether it has stopped making progress.
        num_running: queries being answered.
        num_waiting: queries waiting for a slot.
        is_ready: whether to send it work now. A backend that is alive but not ready recovers
            without help.
    """

    is_alive: bool
    is_stuck: bool
    num_running: int
    num_waiting: int
    is_ready: bool = True


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals since a backend was opened.

    Args:
        model_calls: forward passes or, for a remote backend, HTTP requests.
        cached_tokens: prompt tokens found in the prefix cache.
        shared_queries: deduplicated queries, which received the answer of an equal one.
        prompt_tokens: tokens of the prompts that were processed, cached ones included.
        generated_tokens: tokens generated, also for queries that were cancelled or failed later.
            A remote backend knows only what its servers report of complete answers.
        drafted_tokens: tokens that speculation computed before they were sampled.
        accepted_tokens: drafted tokens that became part of an answer.
    """

    model_calls: int = 0
    cached_tokens: int = 0
    shared_queries: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: "Counters") -> "Counters":
        return Counters(*map(operator.sub, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class AnswerSource:
    """Identifies the model behind a backend's answers at the moment.

    As long as it stays equal, equal queries may share an answer: any of them if the model is
    verified, otherwise only greedy ones, and only while they are in flight together.

    Args:
        key: changes when another model may have taken over.
        is_verified: whether the model is known by its revision, rather than by the name that a
            foreign server gives it, and honors seeds.
        is_fixed: whether the model cannot change unnoticed, so that finished answers may be cached.
    """

    key: str
    is_verified: bool
    is_fixed: bool = True


class Backend(Protocol):
    """Answers queries. Every method may be called from any thread."""

    @property
    def window(self) -> int:
        """Number of unfinished queries that keeps the backend busy."""
        ...

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        """Start to answer one query.

        Never raises for an invalid or failed query, whose `Result` carries the error.

        Args:
            query: what to answer.
            on_text: called with pieces of the answer as they are generated, on one of the
                backend's threads. They may be `TextPiece`s.
            is_interactive: whether a person is waiting for the answer; such queries have priority
                over batch work.

        Returns:
            The future result. Cancelling it frees whatever the query holds. It raises
            `BackendError` if the backend is gone.
        """
        ...

    def health(self) -> Health:
        """Current state; never blocks on a lock that is held during work."""
        ...

    def identity(self) -> dict[str, Any]:
        """What determines the answers: model, revision, source, dtype, versions. It is recorded in
        the manifest."""
        ...

    def answer_source(self) -> AnswerSource | None:
        """The current source of answers; None if it is unknown, so that no answer may be shared."""
        ...

    def counters(self) -> Counters:
        """Totals so far."""
        ...

    def close(self) -> None:
        """Stop at once and cancel unfinished futures."""
        ...


OpenBackend = Callable[[EngineSettings], Backend]


def stream(backend: Backend, query: Query) -> tuple[Iterator[str], Future[Result]]:
    """Submit a query for which a person is waiting.

    Returns:
        The pieces of the answer as they are generated, up to its end, and the future result.
    """
    pieces: SimpleQueue[str | None] = SimpleQueue()
    future = backend.submit(query, pieces.put, is_interactive=True)
    future.add_done_callback(lambda _: pieces.put(None))
    return _until_none(pieces), future


def _until_none(pieces: "SimpleQueue[str | None]") -> Iterator[str]:
    """The items of a queue up to the first None."""
    while True:
        with suppress(Empty):
            piece = pieces.get(timeout=WAKE_INTERVAL_S)
            if piece is None:
                return
            yield piece


class BackendWrapper:
    """Passes all calls on to another backend; the base class of backends that change some of them.

    Args:
        backend: the other one.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def window(self) -> int:
        """See `Backend`."""
        return self._backend.window

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        """See `Backend`."""
        return self._backend.submit(query, on_text, is_interactive=is_interactive)

    def health(self) -> Health:
        """See `Backend`."""
        return self._backend.health()

    def identity(self) -> dict[str, Any]:
        """See `Backend`."""
        return self._backend.identity()

    def answer_source(self) -> AnswerSource | None:
        """See `Backend`."""
        return self._backend.answer_source()

    def counters(self) -> Counters:
        """See `Backend`."""
        return self._backend.counters()

    def close(self) -> None:
        """See `Backend`."""
        self._backend.close()
