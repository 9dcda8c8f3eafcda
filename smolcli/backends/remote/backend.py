"""Models in other processes: queries go to servers over HTTP, in batches, from one event loop."""

import asyncio
import math
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import httpx2 as httpx

import smolcli
from smolcli.backends.base import Counters, Health, OnText
from smolcli.backends.remote.ask import ask
from smolcli.backends.remote.gather import Gatherer
from smolcli.backends.remote.http import Job, Unavailable
from smolcli.backends.remote.pool import Pool
from smolcli.backends.remote.upstream import Upstream
from smolcli.errors import BackendError, UsageError
from smolcli.settings import RemoteSettings
from smolcli.types import Query, Result

POLL_S = 0.01
CONNECT_S, WRITE_S, KEEP_ALIVE_S = 5.0, 60.0, 30.0


def open_remote(settings: RemoteSettings) -> "RemoteBackend":
    """A backend that answers with the servers at `settings.urls`, once one of them is up.

    Raises:
        BackendError: none is, or none is as expected.
        UsageError: a URL is none.
    """
    backend = RemoteBackend(settings, is_pinned=True)
    try:
        backend.connect()
    except BaseException:
        backend.close()
        raise
    return backend


def open_gateway(settings: RemoteSettings) -> "RemoteBackend":
    """The same for a server's life: it begins with none of them up, and goes on with new models.

    Raises:
        UsageError: a URL is none.
    """
    return RemoteBackend(settings, is_pinned=False)


class RemoteBackend:
    """Answers queries with other servers; see `backends.Backend`.

    Args:
        settings: which servers, and how to treat them.
        is_pinned: whether their model may never change.
    """

    def __init__(self, settings: RemoteSettings, *, is_pinned: bool) -> None:
        urls = [_base_url(url) for url in settings.urls]
        self._settings = settings
        self._client = _client(settings)
        self._pool = Pool([Upstream(url, self._client) for url in urls], settings, is_pinned)
        self._turns = asyncio.Semaphore(settings.max_concurrency)
        self._jobs: set[Job] = set()  # all that are open
        self._gatherer = Gatherer(self._pool, self._jobs)
        self._calls: dict[asyncio.Task[None], list[Job]] = {}
        self._num_alone = 0
        self._stopping = asyncio.Event()
        self._lock = threading.Lock()
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="smol-remote", daemon=True)
        self._thread.start()

    @property
    def window(self) -> int:
        """A few batches of each server."""
        return self._pool.window

    def counters(self) -> Counters:
        """Requests for answers so far; what the servers have counted is theirs."""
        return Counters(sum(upstream.num_calls for upstream in self._pool.upstreams))

    def identity(self) -> dict[str, Any]:
        """What the servers are, as far as they tell; nothing while none was ever up."""
        return dict(self._pool.identity)

    def connect(self) -> None:
        """Wait until a server is up.

        Raises:
            BackendError: there is none.
        """
        deadline = time.monotonic() + self._settings.retry_s
        while not self._pool.is_up:
            if time.monotonic() > deadline or self._pool.is_hopeless:
                raise BackendError(self._pool.reason)
            time.sleep(POLL_S)

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        """See `backends.Backend`."""
        job = Job(query, on_text, is_interactive)
        with self._lock:
            if self._is_closed or not self._thread.is_alive():
                job.fail(BackendError("the connection to the model is closed"))
            else:
                self._jobs.add(job)
                self._loop.call_soon_threadsafe(self._accept, job)
        return job.future

    def health(self) -> Health:
        """See `backends.Backend`."""
        num_running = sum(len(upstream.jobs) for upstream in self._pool.upstreams)
        return Health(
            is_alive=self._thread.is_alive() and not self._is_closed,
            is_stuck=False,
            num_running=num_running,
            num_waiting=max(len(self._jobs) - num_running, 0),
            is_ready=self._pool.is_up,
        )

    def close(self) -> None:
        """See `backends.Backend`."""
        with self._lock:
            self._is_closed = True
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        """The loop's thread: until closed."""
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            with self._lock:
                self._is_closed = True
            for job in list(self._jobs):
                job.fail(BackendError("the connection to the model is closed"))
            self._loop.close()

    async def _serve(self) -> None:
        watching = map(self._pool.watch, self._pool.upstreams)
        own = [self._send_batches(), self._stopping.wait(), *watching]
        tasks = [asyncio.ensure_future(work) for work in own]
        async with self._client:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            everything = [*tasks, *self._calls]
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)

    def _accept(self, job: Job) -> None:
        """Send a query off alone where it is urgent, else with those that come with it."""
        job.future.add_done_callback(lambda _: self._finish(job))
        if job.on_text is not None:
            self._start([job])
        elif job.is_interactive and self._num_alone < self._settings.max_concurrency:
            self._num_alone += 1
            self._start([job]).add_done_callback(lambda _: self._count_out())
        else:
            self._gatherer.add(job)

    def _count_out(self) -> None:
        self._num_alone -= 1

    def _finish(self, job: Job) -> None:
        if job.future.cancelled():  # in any thread, and where the loop is closed nothing is left
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._drop, job)
        else:
            self._jobs.discard(job)

    def _drop(self, job: Job) -> None:
        """Nobody waits for a job any more: end the request that was for it alone."""
        self._jobs.discard(job)
        if job.task is not None:
            job.task.cancel()
        for task, jobs in self._calls.items():
            if job in jobs and not any(other.is_open for other in jobs):
                task.cancel()

    async def _send_batches(self) -> None:
        while True:
            for chunk in await self._gatherer.take():
                self._start(chunk)

    def _start(self, jobs: list[Job]) -> asyncio.Task[None]:
        task = self._loop.create_task(self._carry(jobs))
        self._calls[task] = jobs
        task.add_done_callback(lambda _: self._calls.pop(task))
        return task

    async def _carry(self, jobs: list[Job]) -> None:
        """Ask until every job has its result, or nobody is left to be asked."""
        give_up_at = math.inf
        tries_until = time.monotonic() + self._settings.timeout_s
        try:
            while left := [job for job in jobs if job.is_open]:
                upstream = await self._pool.choose(give_up_at)
                try:
                    await ask(upstream, left, self._turns)
                except Unavailable as exc:
                    if not all(job.is_open for job in left):
                        give_up_at = math.inf  # it got on: this is another fault
                        tries_until = time.monotonic() + self._settings.timeout_s
                    until = time.monotonic() + self._settings.retry_s
                    if exc.retry_after_s is not None:  # it is there, and busy
                        until = tries_until
                    give_up_at = min(give_up_at, until)
        except BackendError as exc:
            _fail_all(jobs, exc)
        except Exception as exc:
            _fail_all(jobs, BackendError(f"internal error: {type(exc).__name__}: {exc}"))


def _fail_all(jobs: list[Job], error: BackendError) -> None:
    for job in jobs:
        job.fail(error)


def _base_url(url: str) -> str:
    """Without a slash at its end, or the /v1 that OpenAI's clients are given."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as exc:
        raise UsageError(f"{url!r} is no URL: {exc}") from exc
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"{url!r} is no URL of a server: give one like http://host:8001")
    if parsed.port is not None and not 0 < parsed.port < 1 << 16:
        raise UsageError(f"{url!r} has the port {parsed.port}; there are 1 to 65535")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _client(settings: RemoteSettings) -> httpx.AsyncClient:
    headers = {"User-Agent": f"smol/{smolcli.__version__}"}
    if settings.api_key:
        headers["Authorization"] = f"Bearer {settings.api_key}"
    return httpx.AsyncClient(
        headers=headers,
        timeout=httpx.Timeout(settings.timeout_s, connect=CONNECT_S, write=WRITE_S, pool=None),
        limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S),
    )
