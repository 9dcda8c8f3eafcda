"""One query on its way to a server, and what can go wrong there, from HTTP's words to ours."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import httpx2 as httpx

from smolcli.backends.base import OnText, complete_future
from smolcli.errors import BackendError
from smolcli.types import Query, Result, Timings

PASSING_STATUSES = (429, 502, 503, 504)
_FAILED_CONNECTION = (httpx.NetworkError, httpx.ProtocolError, httpx.ConnectTimeout)


class Unavailable(Exception):
    """A server cannot answer now; asking again, or another one, may help.

    Args:
        reason: a sentence for people.
        is_gone: whether there is no connection to be had.
        retry_after_s: when it wants to be asked again.
    """

    def __init__(
        self, reason: str, *, is_gone: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.is_gone = is_gone
        self.retry_after_s = retry_after_s


@dataclass(eq=False, slots=True)
class Job:
    """One query on its way; its future is completed once, whoever comes first."""

    query: Query
    on_text: OnText | None
    is_interactive: bool
    future: Future[Result] = field(default_factory=Future)
    task: asyncio.Task[None] | None = None  # that works for this job alone
    submitted_at: float = field(default_factory=time.perf_counter)
    sent_at: float = 0.0
    first_text_at: float = 0.0
    fault: str = "the batch ended before its time"  # why there is no result yet

    @property
    def is_open(self) -> bool:
        """Whether somebody waits for it."""
        return not self.future.done()

    def show(self, text: str) -> None:
        """Hand on a piece of the answer."""
        if text:
            self.first_text_at = self.first_text_at or time.perf_counter()
            if self.on_text and self.is_open:
                self.on_text(text)

    def give(self, result: Result) -> None:
        """Complete the future, unless it was cancelled."""
        now = time.perf_counter()
        timings = Timings(
            queue_s=self.sent_at - self.submitted_at,
            first_token_s=(self.first_text_at or now) - self.submitted_at,
            total_s=now - self.submitted_at,
        )
        complete_future(self.future, replace(result, timings=timings))

    def fail(self, error: BackendError) -> None:
        """Tell that nobody can answer."""
        complete_future(self.future, error)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """What httpx raises, as ours.

    A connection that failed may be tried again, for an answer is only computed, and is the
    same the second time; a server that is silent may still be computing it, so it is not asked.

    Raises:
        Unavailable: where there is no connection.
        BackendError: where there is no answer.
    """
    try:
        yield
    except _FAILED_CONNECTION as exc:
        reason = str(exc) or type(exc).__name__
        raise Unavailable(f"{url} cannot be reached: {reason}", is_gone=True) from exc
    except httpx.TimeoutException as exc:
        raise BackendError(f"{url} was silent for too long") from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise BackendError(f"{url} cannot be asked: {exc}") from exc


def check_status(response: httpx.Response, url: str) -> None:
    """Sort out the statuses that say nothing of the query.

    Raises:
        Unavailable: for a while.
        BackendError: where the server does not want us.
    """
    status = response.status_code
    if status in PASSING_STATUSES:
        wait_s = _retry_after_s(response.headers.get("Retry-After"))
        raise Unavailable(f"{url} answered {status}", retry_after_s=wait_s)
    if status in (401, 403):
        raise BackendError(f"{url} answered {status}: it wants another API key")
    if 300 <= status < 400:
        raise BackendError(f"{url} answered {status}: it is somewhere else")


def _retry_after_s(value: str | None) -> float | None:
    """Seconds; a date is as good as nothing, for clocks differ."""
    return float(value) if value is not None and value.isdecimal() else None


async def lines_of(response: httpx.Response) -> AsyncIterator[bytes]:
    """The lines of a body; only \\n ends one, for a text may hold what else Unicode has."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.strip():
                yield line.strip()
    if rest.strip():
        yield rest.strip()
