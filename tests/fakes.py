"""Backends without a model, for tests of everything above the backend interface."""

import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from smolcli.backends.base import AnswerSource, Counters, Health, OnText
from smolcli.errors import BackendError
from smolcli.settings import EngineSettings
from smolcli.types import FinishReason, Query, Result, Timings, Usage


def echo(query: Query) -> Result:
    """An answer that depends on the prompt and the seed, as a real one does."""
    words = query.last_text.split()
    return Result(
        chat_id=query.chat_id,
        response=f"{' '.join(words)} ({query.sampling.seed})",
        finish_reason=FinishReason.STOP,
        usage=Usage(prompt_tokens=len(query.messages), completion_tokens=len(words)),
        metadata=query.metadata,
        line=query.line,
        timings=Timings(0.0, 0.01, 0.02),
    )


class EchoBackend:
    """Answers at once, on the caller's thread."""

    def __init__(self, settings: EngineSettings | None = None, window: int = 64) -> None:
        self.settings = settings or EngineSettings()
        self.window = window
        self.model_calls = 0
        self.is_closed = False

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        self.model_calls += 1
        future: Future[Result] = Future()
        result = self.answer(query)
        if on_text is not None and result.response is not None:
            for word in result.response.partition(" "):
                on_text(word)
        future.set_result(result)
        return future

    def answer(self, query: Query) -> Result:
        return echo(query)

    def identity(self) -> dict[str, Any]:
        return {
            "model": self.settings.model,
            "revision": "1",
            "source": "test",
            "dtype": "float32",
            "threads": self.settings.threads,
            "versions": {"torch": "0"},
        }

    def answer_source(self) -> AnswerSource | None:
        return AnswerSource(self.settings.model, is_verified=True)

    def health(self) -> Health:
        return Health(not self.is_closed, is_stuck=False, num_running=0, num_waiting=0)

    def counters(self) -> Counters:
        return Counters(self.model_calls)

    def close(self) -> None:
        self.is_closed = True


class SlowBackend(EchoBackend):
    """Answers out of order, from other threads, after random delays."""

    def __init__(self, window: int = 16, max_delay_s: float = 0.002) -> None:
        super().__init__(window=window)
        self.max_delay_s = max_delay_s
        self.most_unfinished = 0
        self._num_unfinished = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(window)

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        with self._lock:
            self._num_unfinished += 1
            self.most_unfinished = max(self.most_unfinished, self._num_unfinished)
        return self._pool.submit(self._work, query)

    def _work(self, query: Query) -> Result:
        time.sleep(random.random() * self.max_delay_s)
        with self._lock:
            self._num_unfinished -= 1
        return self.answer(query)

    def close(self) -> None:
        super().close()
        self._pool.shutdown(cancel_futures=True)


class HeldBackend(EchoBackend):
    """Answers when the test completes its `futures`, which are in the order of submission."""

    def __init__(self, window: int = 64) -> None:
        super().__init__(window=window)
        self.futures: list[Future[Result]] = []

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        self.futures.append(Future())
        return self.futures[-1]


class DyingBackend(EchoBackend):
    """Answers `num_answers` queries and then fails."""

    def __init__(self, num_answers: int, window: int = 64) -> None:
        super().__init__(window=window)
        self.num_answers = num_answers

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        if self.model_calls < self.num_answers:
            return super().submit(query, on_text)
        future: Future[Result] = Future()
        future.set_exception(BackendError("the engine died"))
        return future
