"""Whatever computes answers, behind one seam."""

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from smolcli.errors import BackendError
from smolcli.types import Query, Result

OnText = Callable[[str], None]


def complete_future(future: Future[Result], end: Result | BackendError) -> None:
    """Complete a future with a result or an error, unless it is complete or cancelled already."""
    with suppress(InvalidStateError):
        if isinstance(end, BackendError):
            future.set_exception(end)
        else:
            future.set_result(end)


@dataclass(frozen=True, slots=True)
class Health:
    """How a backend is: whether it still computes, and what it has before it.

    One that is alive and not ready will be, by itself; no work should come to it until then.
    """

    is_alive: bool
    is_stuck: bool
    num_running: int
    num_waiting: int
    is_ready: bool = True


@dataclass(frozen=True, slots=True)
class Counters:
    """What a backend has done so far.

    `model_calls`: forward passes or, over HTTP, requests; `cached_tokens`: tokens of prompts
    whose keys and values were there already; `shared_queries`: those that got the answer of
    an equal one.
    """

    model_calls: int = 0
    cached_tokens: int = 0
    shared_queries: int = 0

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(
            self.model_calls + other.model_calls,
            self.cached_tokens + other.cached_tokens,
            self.shared_queries + other.shared_queries,
        )


class Backend(Protocol):
    """Answers queries; safe to call from any thread."""

    @property
    def window(self) -> int:
        """How many unfinished queries keep it busy."""
        ...

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        """Start one query; never raises for the query's own fault, which is a `Result` too.

        `on_text` is called with pieces of the answer as they come, from a thread of the
        backend's. Cancelling the future frees what the query holds. An urgent query goes
        before those that are not. The future raises `BackendError` when the backend itself
        is gone.
        """
        ...

    def health(self) -> Health:
        """How it is; takes no lock that work could hold."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides the answers: model, revision, source, dtype, versions; for the manifest."""
        ...

    def counters(self) -> Counters:
        """What it has done so far."""
        ...

    def close(self) -> None:
        """Stop at once; unfinished futures are cancelled."""
        ...
