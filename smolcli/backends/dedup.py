"""Deduplication: queries that must have the same answer are generated once."""

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import replace

from smolcli.backends.base import (
    AnswerSource,
    Backend,
    BackendWrapper,
    Counters,
    OnText,
    OpenBackend,
    PendingQuery,
    complete_future,
)
from smolcli.protocol.tools import with_call_ids
from smolcli.types import Query, Result, TextPiece, Timings

MAX_CACHED = 256
MAX_CACHED_CHARS = 20_000  # of a query and its answer; longer ones rarely repeat

Key = tuple[Query, bool, bool]  # canonical query, is interactive, is streamed


def deduplicated(open_backend: OpenBackend) -> OpenBackend:
    """Wrap an opener so that the backend it opens answers equal queries once."""
    return lambda settings: DedupBackend(open_backend(settings))


class Generation:
    """An answer being generated, its waiters, and its text so far."""

    def __init__(self, first: PendingQuery) -> None:
        self.first = first
        self.waiters = [first]
        self.inner: Future[Result] | None = None
        self._pieces: list[str] = []

    def join(self, waiter: PendingQuery) -> None:
        """Add a waiter; it receives the text generated so far at once."""
        self.waiters.append(waiter)
        waiter.show(TextPiece.joined(self._pieces))

    def extend(self, text: str) -> None:
        """Pass new text on to every waiter."""
        self._pieces.append(text)
        for waiter in tuple(self.waiters):  # a waiter whose callback fails is removed
            waiter.show(text)


class DedupBackend(BackendWrapper):
    """Answers equal queries of another backend once; see `Backend`.

    Queries are equal if they differ only in id, line and metadata. The seed matters only for
    sampled answers, and differs between ids unless the query sets it. An interactive or streamed
    query joins a generation only if that one is interactive or streamed too. The most recent
    answers of a verified model are cached; see `AnswerSource` for what may be shared.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._num_shared = 0
        self._lock = threading.RLock()  # an inner future may be done when `submit` returns it
        self._running: dict[Key, Generation] = {}
        self._cached: OrderedDict[Query, Result] = OrderedDict()
        self._source: AnswerSource | None = None  # of everything cached and running

    def counters(self) -> Counters:
        """See `Backend`."""
        return self._backend.counters() + Counters(shared_queries=self._num_shared)

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        """See `Backend`."""
        waiter = PendingQuery(query, on_text, is_interactive)
        canonical = _canonical(query)
        key = (canonical, is_interactive, on_text is not None)
        with self._lock:
            self._check_source()
            if not self._is_shareable(query):
                return self._backend.submit(query, on_text, is_interactive=is_interactive)
            if cached := self._cached.get(canonical):
                self._cached.move_to_end(canonical)
                self._num_shared += 1
                waiter.show(TextPiece.whole(cached))
                waiter.complete(_shared(cached, waiter))
                return waiter.future
            if generation := self._running.get(key):
                self._num_shared += 1
                generation.join(waiter)
            else:
                generation = self._start(key, waiter)
        waiter.future.add_done_callback(lambda _: self._leave(key, generation, waiter))
        return waiter.future

    def _start(self, key: Key, first: PendingQuery) -> Generation:
        generation = self._running[key] = Generation(first)

        def extend(text: str) -> None:
            with self._lock:
                generation.extend(text)

        try:
            inner = self._backend.submit(
                first.query, extend if first.on_text else None, is_interactive=first.is_interactive
            )
        except BaseException:
            del self._running[key]  # equal queries would wait forever for a result
            raise
        generation.inner = inner
        inner.add_done_callback(lambda future: self._finish(key, generation, future))
        return generation

    def _finish(self, key: Key, generation: Generation, inner: Future[Result]) -> None:
        with self._lock:
            self._check_source()
            is_current = self._running.get(key) is generation
            if is_current:
                del self._running[key]
            waiters = list(generation.waiters)
            error = None if inner.cancelled() else inner.exception()
            result = None if inner.cancelled() or error else inner.result()
            if is_current and result is not None and not result.is_error:
                self._cache(key[0], result)
        for waiter in waiters:
            if result is not None:
                waiter.complete(result if waiter is generation.first else _shared(result, waiter))
            elif error is not None:
                complete_future(waiter.future, error)
            else:
                waiter.future.cancel()

    def _check_source(self) -> None:
        """Forget all answers if another model may have taken over."""
        source = self._backend.answer_source()
        if source != self._source:
            self._cached.clear()
            self._running.clear()  # current waiters get their answer, but none may join them
            self._source = source

    def _is_shareable(self, query: Query) -> bool:
        source = self._source
        return source is not None and (source.is_verified or query.sampling.is_greedy)

    def _cache(self, canonical: Query, result: Result) -> None:
        source = self._source
        if source is None or not (source.is_verified and source.is_fixed):
            return
        if canonical.num_chars + result.num_chars <= MAX_CACHED_CHARS:
            self._cached[canonical] = result
            if len(self._cached) > MAX_CACHED:
                self._cached.popitem(last=False)

    def _leave(self, key: Key, generation: Generation, waiter: PendingQuery) -> None:
        """Cancel a generation when its last waiter leaves."""
        with self._lock:
            generation.waiters.remove(waiter)
            if not generation.waiters:
                if self._running.get(key) is generation:
                    del self._running[key]
                if generation.inner is not None:
                    generation.inner.cancel()


def _canonical(query: Query) -> Query:
    """The query without anything that does not affect its answer."""
    seed = 0 if query.sampling.is_greedy else query.sampling.seed
    sampling = replace(query.sampling, seed=seed)
    return replace(query, chat_id="", metadata=None, line=None, request_id=None, sampling=sampling)


def _shared(result: Result, waiter: PendingQuery) -> Result:
    """The result of one query as the result of an equal one."""
    query, total_s = waiter.query, time.perf_counter() - waiter.submitted_at
    usage = result.usage
    if usage is not None and usage.cached_tokens is not None:  # nothing of the prompt was computed
        usage = replace(usage, cached_tokens=usage.prompt_tokens)
    return replace(
        with_call_ids(result, query),
        usage=usage,
        chat_id=query.chat_id,
        metadata=query.metadata,
        line=query.line,
        timings=Timings(queue_s=0.0, first_token_s=total_s, total_s=total_s),
        is_deduplicated=True,
    )
