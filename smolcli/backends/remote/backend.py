"""The remote backend: queries go to other servers, in batches, from one event loop."""

import asyncio
import math
import re
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import httpx2 as httpx

import smolcli
from smolcli.backends.base import (
    AnswerSource,
    Counters,
    Health,
    OnText,
    fail_all,
    internal_error,
    start_thread,
)
from smolcli.backends.remote.dispatch import RemoteQuery, send
from smolcli.backends.remote.upstream import Unavailable, Upstream, UpstreamPool
from smolcli.errors import BackendError, UsageError, connection_reason
from smolcli.settings import RemoteSettings
from smolcli.types import Query, Result

POLL_S = 0.01
CONNECT_TIMEOUT_S, WRITE_TIMEOUT_S, KEEP_ALIVE_S = 5.0, 60.0, 30.0
MAX_BATCH_CHARS = 1 << 20  # at most 4 MiB of UTF-8, half of a server's default limit
LINGER_S, MAX_LINGER_S = 0.002, 0.1
_ROUTE = re.compile(r"/*(/v1(/(chat/)?completions|/models)?|/chat/batched)?/*$")


def open_remote(settings: RemoteSettings) -> "RemoteBackend":
    """Connect to the servers at `settings.urls`; returns once one of them is healthy.

    Raises:
        BackendError: no server can be reached, or none matches the settings.
        UsageError: a URL is invalid.
    """
    backend = RemoteBackend(settings, is_pinned=True)
    try:
        backend.connect()
    except BaseException:
        backend.close()
        raise
    return backend


def open_gateway(settings: RemoteSettings) -> "RemoteBackend":
    """Like `open_remote`, but for a long-lived server.

    It starts while no upstream server is healthy, and carries on when their model changes.

    Raises:
        UsageError: a URL is invalid.
    """
    return RemoteBackend(settings, is_pinned=False)


class RemoteBackend:
    """Answers queries with other servers; see `Backend`.

    Args:
        settings: which servers to use, and how.
        is_pinned: whether their model must never change.
    """

    def __init__(self, settings: RemoteSettings, *, is_pinned: bool) -> None:
        urls = [_base_url(url) for url in settings.urls]
        self._settings = settings
        self._client = _client(settings)
        upstreams = [Upstream(url, self._client) for url in urls]
        self._pool = UpstreamPool(upstreams, settings, is_pinned)
        self._slots = asyncio.Semaphore(settings.max_concurrency)
        self._open: set[RemoteQuery] = set()
        self._batcher = Batcher(self._pool, self._open)
        self._sending: dict[asyncio.Task[None], list[RemoteQuery]] = {}
        self._num_interactive = 0
        self._token_counters = Counters()
        self._stopping = asyncio.Event()
        self._lock = threading.Lock()
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = start_thread(self._run, "smol-remote")

    @property
    def window(self) -> int:
        """A few batches for each server."""
        return self._pool.window

    def counters(self) -> Counters:
        """Requests sent so far, and the tokens that the servers reported."""
        num_requests = sum(upstream.num_requests for upstream in self._pool.upstreams)
        return self._token_counters + Counters(num_requests)

    def identity(self) -> dict[str, Any]:
        """The servers' identity as they report it; empty until one has been healthy."""
        return dict(self._pool.identity)

    def answer_source(self) -> AnswerSource | None:
        """See `Backend`."""
        return self._pool.answer_source()

    def connect(self) -> None:
        """Wait until a server is healthy; each is checked at least once.

        Raises:
            BackendError: none is within the retry time.
        """
        deadline = time.monotonic() + self._settings.retry_s
        while not self._pool.is_healthy:
            is_late = self._pool.is_checked and time.monotonic() >= deadline
            if is_late or self._pool.is_permanently_unusable:
                raise BackendError(self._pool.reason)
            time.sleep(POLL_S)

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        """See `Backend`."""
        pending = RemoteQuery(query, on_text, is_interactive)
        with self._lock:
            if self._is_closed or not self._thread.is_alive():
                pending.fail(BackendError("the connection to the model is closed"))
            else:
                self._open.add(pending)
                self._loop.call_soon_threadsafe(self._accept, pending)
        return pending.future

    def health(self) -> Health:
        """See `Backend`."""
        num_running = sum(len(upstream.in_flight) for upstream in self._pool.upstreams)
        return Health(
            is_alive=self._thread.is_alive() and not self._is_closed,
            is_stuck=False,
            num_running=num_running,
            num_waiting=max(len(self._open) - num_running, 0),
            is_ready=self._pool.is_healthy,
        )

    def close(self) -> None:
        """See `Backend`."""
        with self._lock:
            self._is_closed = True
        with suppress(RuntimeError):  # the loop has already stopped
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        """Run the event loop until closed."""
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            with self._lock:
                self._is_closed = True
            fail_all(list(self._open), BackendError("the connection to the model is closed"))
            self._loop.close()

    async def _serve(self) -> None:
        watching = map(self._pool.watch, self._pool.upstreams)
        own = [self._send_batches(), self._stopping.wait(), *watching]
        tasks = [asyncio.ensure_future(work) for work in own]
        async with self._client:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            everything = [*tasks, *self._sending]
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)

    def _accept(self, pending: RemoteQuery) -> None:
        """Send a query alone if it is streamed or interactive, otherwise in a batch."""
        pending.future.add_done_callback(lambda _: self._finish(pending))
        if pending.on_text is not None:
            self._start([pending])
        elif pending.is_interactive and self._num_interactive < self._settings.max_concurrency:
            self._num_interactive += 1
            self._start([pending]).add_done_callback(lambda _: self._count_out())
        else:
            self._batcher.add(pending)

    def _count_out(self) -> None:
        self._num_interactive -= 1

    def _finish(self, pending: RemoteQuery) -> None:
        if pending.future.cancelled():  # on any thread; once the loop is closed nothing is left
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._drop, pending)
        else:
            self._open.discard(pending)
            if not pending.future.exception() and (usage := pending.future.result().usage):
                self._token_counters += Counters(
                    prompt_tokens=usage.prompt_tokens, generated_tokens=usage.completion_tokens
                )

    def _drop(self, pending: RemoteQuery) -> None:
        """End the request of a cancelled query, unless others depend on it."""
        self._open.discard(pending)
        if pending.task is not None:
            pending.task.cancel()
        for task, queries in self._sending.items():
            if pending in queries and not any(other.is_open for other in queries):
                task.cancel()

    async def _send_batches(self) -> None:
        while True:
            for batch in await self._batcher.take():
                self._start(batch)

    def _start(self, queries: list[RemoteQuery]) -> asyncio.Task[None]:
        task = self._loop.create_task(self._send_until_complete(queries))
        self._sending[task] = queries
        task.add_done_callback(lambda _: self._sending.pop(task))
        return task

    async def _send_until_complete(self, queries: list[RemoteQuery]) -> None:
        """Send queries, and retry, until each has its result or no server is left to try."""
        deadline = math.inf
        busy_deadline = time.monotonic() + self._settings.timeout_s
        try:
            while left := [pending for pending in queries if pending.is_open]:
                upstream = await self._pool.choose(deadline)
                try:
                    await send(upstream, left, self._slots)
                except Unavailable as exc:
                    if not all(pending.is_open for pending in left):  # some progress
                        deadline = math.inf
                        busy_deadline = time.monotonic() + self._settings.timeout_s
                    retry_deadline = time.monotonic() + self._settings.retry_s
                    if exc.retry_after_s is not None:  # reachable, but busy
                        retry_deadline = busy_deadline
                    deadline = min(deadline, retry_deadline)
        except BackendError as exc:
            fail_all(queries, exc)
        except Exception as exc:
            fail_all(queries, BackendError(internal_error(exc)))


class Batcher:
    """Collects queries that arrive together into batches. Belongs to the event loop.

    Args:
        pool: servers that the batches are meant for.
        open_queries: all that are open, including those that wait here.
    """

    def __init__(self, pool: UpstreamPool, open_queries: Collection[RemoteQuery]) -> None:
        self._pool = pool
        self._open = open_queries
        self._waiting: deque[RemoteQuery] = deque()
        self._arrived = asyncio.Event()

    def add(self, pending: RemoteQuery) -> None:
        """Add a query to the next batches."""
        self._waiting.append(pending)
        self._arrived.set()

    async def take(self) -> list[list[RemoteQuery]]:
        """Wait for queries, and return them as batches spread over the servers."""
        await self._arrived.wait()
        await self._linger()
        self._arrived.clear()
        return list(self._batches())

    async def _linger(self) -> None:
        """Wait a moment for more queries, and longer while the servers are busy anyway."""
        enough = self._pool.batch_size
        deadline, num_seen = time.monotonic() + MAX_LINGER_S, 0
        while len(self._waiting) < enough and time.monotonic() < deadline:
            num_sent = len(self._open) - len(self._waiting)
            if num_seen == len(self._waiting) and num_sent < 2 * enough:
                return
            num_seen = len(self._waiting)
            await asyncio.sleep(LINGER_S)

    def _batches(self) -> Iterator[list[RemoteQuery]]:
        queries = [pending for pending in self._waiting if pending.is_open]
        self._waiting.clear()
        num_healthy = sum(upstream.is_healthy for upstream in self._pool.upstreams) or 1
        size_each = self._pool.batch_size // len(self._pool.upstreams)
        max_size = min(math.ceil(len(queries) / num_healthy), size_each)
        batch: list[RemoteQuery] = []
        num_chars = 0
        for pending in queries:
            own_chars = pending.query.num_chars
            if batch and (len(batch) >= max_size or num_chars + own_chars > MAX_BATCH_CHARS):
                yield batch
                batch, num_chars = [], 0
            batch.append(pending)
            num_chars += own_chars
        if batch:
            yield batch


def _base_url(url: str) -> str:
    """The URL without the /v1 or the route that it may end with, as copied from a client."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as exc:
        reason = "" if "@" in url else f": {exc}"  # which may quote a part of the password
        raise UsageError(f"{url!r} is not a valid URL{reason}") from exc
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"{url!r} is not a server's URL; give one like http://host:8001")
    if parsed.port is not None and not 0 < parsed.port < 1 << 16:
        raise UsageError(f"{url!r} has port {parsed.port}; ports range from 1 to 65535")
    if parsed.query or parsed.fragment:
        raise UsageError(f"{url!r} must end with the path, without a query or fragment")
    return _ROUTE.sub("", url)


def _client(settings: RemoteSettings) -> httpx.AsyncClient:
    """The client for all servers.

    Raises:
        UsageError: the API key, or a proxy or certificate in the environment, cannot be used.
    """
    headers = {b"User-Agent": f"smol/{smolcli.__version__}".encode()}
    if key := (settings.api_key or "").strip():
        if not key.isprintable():
            raise UsageError("the API key for the servers contains control characters")
        headers[b"Authorization"] = f"Bearer {key}".encode()
    timeout = httpx.Timeout(
        settings.timeout_s, connect=CONNECT_TIMEOUT_S, write=WRITE_TIMEOUT_S, pool=None
    )
    limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S)
    try:
        return httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)
    except (ImportError, ValueError, OSError, httpx.InvalidURL) as exc:
        raise UsageError(f"cannot connect to servers: {connection_reason(exc)}") from exc
