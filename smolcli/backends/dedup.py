"""Queries that must have the same answer, answered once."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from smolcli.backends.base import Backend, Counters, Health, OnText
from smolcli.settings import EngineSettings
from smolcli.types import Query, Result, Timings

MAX_KEPT = 256
MAX_KEPT_CHARS = 20_000  # of one question and its answer; longer ones are rarely asked twice

OpenBackend = Callable[[EngineSettings], Backend]
Key = tuple[Query, bool, bool]  # the question itself, whether it is urgent, whether it streams


@dataclass(eq=False, slots=True)
class Follower:
    """One of those who wait for an answer."""

    query: Query
    on_text: OnText | None
    future: Future[Result] = field(default_factory=Future)
    submitted_at: float = field(default_factory=time.perf_counter)

    def take(self, result: Result) -> None:
        """Complete the future with the answer to a question that is the same."""
        query, total_s = self.query, time.perf_counter() - self.submitted_at
        timings = Timings(queue_s=0.0, first_token_s=total_s, total_s=total_s)
        self.give(
            replace(
                result,
                chat_id=query.chat_id,
                metadata=query.metadata,
                line=query.line,
                timings=timings,
            )
        )

    def give(self, result: Result) -> None:
        """Complete the future with the answer to this very query."""
        with suppress(InvalidStateError):
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Tell that the backend is gone."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Generation:
    """An answer that is on its way, those who wait for it, and its text so far."""

    def __init__(self, first: Follower) -> None:
        self.first = first
        self.followers = [first]
        self.inner: Future[Result] | None = None
        self._pieces: list[str] = []

    def join(self, follower: Follower) -> None:
        """Wait for the answer too; what there is of its text comes at once."""
        self.followers.append(follower)
        if follower.on_text and self._pieces:
            follower.on_text("".join(self._pieces))

    def extend(self, piece: str) -> None:
        """Hand on a piece of text."""
        self._pieces.append(piece)
        for follower in self.followers:
            if follower.on_text:
                follower.on_text(piece)


class DedupBackend:
    """Answers equal questions of another backend once; see `backends.Backend`.

    Equal are those that nothing but their id, line and metadata tells apart; a drawn answer's
    seed counts, and is another for each id unless the query gives one. The latest answers are
    kept. A question that is urgent or streams joins only those that are so too.
    """

    def __init__(self, backend: Backend) -> None:
        self._num_shared = 0
        self._backend = backend
        self._lock = threading.RLock()  # an inner future may be finished when it is returned
        self._running: dict[Key, Generation] = {}
        self._kept: OrderedDict[Query, Result] = OrderedDict()
        self._kept_from: dict[str, Any] = {}  # the identity of what gave the kept answers

    @property
    def window(self) -> int:
        """See `backends.Backend`."""
        return self._backend.window

    def counters(self) -> Counters:
        """See `backends.Backend`."""
        return self._backend.counters() + Counters(shared_queries=self._num_shared)

    def identity(self) -> dict[str, Any]:
        """See `backends.Backend`."""
        return self._backend.identity()

    def health(self) -> Health:
        """See `backends.Backend`."""
        return self._backend.health()

    def close(self) -> None:
        """See `backends.Backend`."""
        self._backend.close()

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        """See `backends.Backend`."""
        follower = Follower(query, on_text)
        key = (_question(query), is_interactive, on_text is not None)
        with self._lock:
            self._forget_others()
            if kept := self._kept.get(key[0]):
                self._kept.move_to_end(key[0])
                self._num_shared += 1
                if on_text and kept.response:
                    on_text(kept.response)
                follower.take(kept)
            elif generation := self._running.get(key):
                self._num_shared += 1
                generation.join(follower)
            else:
                self._start(key, follower)
        follower.future.add_done_callback(lambda future: self._leave(key, follower, future))
        return follower.future

    def _start(self, key: Key, first: Follower) -> None:
        generation = self._running[key] = Generation(first)

        def extend(piece: str) -> None:
            with self._lock:
                generation.extend(piece)

        inner = self._backend.submit(
            first.query, extend if first.on_text else None, is_interactive=key[1]
        )
        generation.inner = inner
        inner.add_done_callback(lambda future: self._finish(key, generation, future))

    def _finish(self, key: Key, generation: Generation, inner: Future[Result]) -> None:
        with self._lock:
            is_current = self._running.get(key) is generation
            if is_current:
                del self._running[key]
            followers = list(generation.followers)
            fault = None if inner.cancelled() else inner.exception()
            result = None if inner.cancelled() or fault else inner.result()
            if is_current and result is not None and not result.is_error:
                self._keep(key[0], result)
        for follower in followers:
            if result is not None:
                (follower.give if follower is generation.first else follower.take)(result)
            elif fault is not None:
                follower.fail(fault)
            else:
                follower.future.cancel()

    def _forget_others(self) -> None:
        """A service that came back as another one answers otherwise."""
        identity = self._backend.identity()
        if identity != self._kept_from:
            self._kept.clear()
            self._running.clear()  # who waits gets what he asked; nobody joins him
            self._kept_from = identity

    def _keep(self, question: Query, result: Result) -> None:
        if question.num_chars + result.num_chars <= MAX_KEPT_CHARS:
            self._kept[question] = result
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)

    def _leave(self, key: Key, follower: Follower, future: Future[Result]) -> None:
        """Nobody waits any more: nothing is generated for nobody."""
        if not future.cancelled():
            return
        with self._lock:
            generation = self._running.get(key)
            if generation is None or follower not in generation.followers:
                return
            generation.followers.remove(follower)
            if not generation.followers:
                del self._running[key]
                if generation.inner is not None:
                    generation.inner.cancel()


def shared(open_backend: OpenBackend) -> OpenBackend:
    """Opens what `open_backend` does, so that it answers equal questions once."""
    return lambda settings: DedupBackend(open_backend(settings))


def _question(query: Query) -> Query:
    """The query without what does not decide its answer."""
    seed = 0 if query.sampling.is_greedy else query.sampling.seed
    sampling = replace(query.sampling, seed=seed)
    return replace(query, chat_id="", metadata=None, line=None, sampling=sampling)
