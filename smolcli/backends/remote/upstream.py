"""Upstream servers: their identity, their health, and HTTP requests to them."""

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx2 as httpx

from smolcli.backends.base import WINDOW_BATCHES, AnswerSource, PendingQuery
from smolcli.backends.remote.wire import Dialect, MalformedAnswer, load_object
from smolcli.errors import BackendError, connection_reason
from smolcli.settings import RemoteSettings

MIN_BACKOFF_S, MAX_BACKOFF_S = 0.2, 5.0
MAX_RETRY_AFTER_S = 60.0
BATCH_ROUTE_RETRY_S = 60.0  # how long to wait before trying a missing /generate_batch again
HEALTH_CHECK_INTERVAL_S, HEALTH_CHECK_TIMEOUT_S = 5.0, 5.0
POLL_S = 0.02
DEFAULT_BATCH_SIZE = 64  # of a server that does not report its window
RETRIED_STATUSES = (408, 425, 429, 502, 503, 504, 529)  # 529: overloaded, at some providers
DECIDING = ("api", "model", "revision", "dtype", "system_prompt")  # what servers must agree on

_FAILED_CONNECTION = (httpx.NetworkError, httpx.ProtocolError, httpx.ConnectTimeout)

logger = logging.getLogger(__name__)


class Unavailable(Exception):
    """A server cannot answer now; a retry, or another server, may succeed.

    Args:
        reason: human-readable.
        is_unreachable: whether the connection failed.
        retry_after_s: when the server asks to be retried, in seconds from now.
    """

    def __init__(
        self, reason: str, *, is_unreachable: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.is_unreachable = is_unreachable
        self.retry_after_s = retry_after_s


class Upstream:
    """One server. Belongs to the event loop of its backend.

    Args:
        url: base URL without a trailing slash, maybe with a user name and password.
        client: shared by all servers.
    """

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        parts = urlsplit(url)
        self.url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # for messages
        self.dialect = Dialect.PLAIN
        self.model = ""
        self.identity: dict[str, Any] = {}  # as the server last reported it
        self.window = 0  # as the server reports it
        self.in_flight: set[PendingQuery] = set()
        self.num_requests = 0
        self.retry_at = 0.0  # when to send it queries again, in `time.monotonic` seconds
        self.num_transitions = 0  # between healthy and unhealthy
        self.is_healthy = False
        self.is_checked = False  # whether the first health check is over
        self.is_permanently_unusable = False  # retrying will not help
        self.unhealthy_since = time.monotonic()
        self.reason = f"{self.url} has not answered yet"
        self.became_unhealthy = asyncio.Event()  # wakes the health check
        self._client = client
        self._address = url
        self._num_failures = 0
        self._reported = ""  # the reason that was logged last
        self._batch_route_retry_at = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether queries may be sent to it now."""
        return self.is_healthy and time.monotonic() >= self.retry_at

    @property
    def takes_batches(self) -> bool:
        """Whether it has /generate_batch, as far as is known."""
        return self.dialect is not Dialect.OPENAI and time.monotonic() >= self._batch_route_retry_at

    @property
    def backoff_s(self) -> float:
        """How long to back off, in seconds: exponential, with jitter."""
        longest_s = min(MIN_BACKOFF_S * 2.0 ** min(self._num_failures, 10), MAX_BACKOFF_S)
        return longest_s * random.uniform(0.5, 1.0)

    def mark_batch_route_missing(self) -> None:
        """Send queries one by one for a while: it has no /generate_batch."""
        self._batch_route_retry_at = time.monotonic() + BATCH_ROUTE_RETRY_S

    def mark_healthy(self) -> None:
        """A health check succeeded."""
        self.num_transitions += not self.is_healthy
        self.is_healthy, self.is_permanently_unusable = True, False
        self._num_failures = 0
        self._reported = ""

    def mark_unhealthy(self, reason: str, *, is_permanent: bool = False) -> None:
        """Stop sending queries to it until a health check succeeds.

        Args:
            reason: human-readable.
            is_permanent: whether retrying will not help.
        """
        was_healthy = self.is_healthy
        self.is_healthy, self.is_permanently_unusable = False, is_permanent
        self.reason = reason
        self._num_failures += 1
        if was_healthy:
            self.num_transitions += 1
            self.unhealthy_since = time.monotonic()
            self.report()
        self.became_unhealthy.set()

    def report(self) -> None:
        """Log why it is unhealthy, unless that was logged already."""
        if self.reason != self._reported:
            self._reported = self.reason
            logger.warning("upstream unhealthy: %s", self.reason)

    def back_off(self, error: Unavailable) -> None:
        """Back off, at least for its Retry-After; mark it unhealthy if it is unreachable.

        Of several simultaneous errors, only the first and the longest Retry-After count.
        """
        now = time.monotonic()
        if self.is_ready and error.is_unreachable:
            self.mark_unhealthy(str(error))
        elif self.is_ready:
            self.reason = str(error)
            self.retry_at = now + self.backoff_s
            self._num_failures += 1
        wanted_s = min(error.retry_after_s or 0.0, MAX_RETRY_AFTER_S)
        self.retry_at = max(self.retry_at, now + wanted_s)

    async def get(self, path: str) -> httpx.Response:
        """Fetch a path.

        Raises:
            Unavailable: the server cannot be reached or does not respond.
            BackendError: the request cannot be made.
        """
        with _translated_errors(self.url):
            try:
                return await self._client.get(self._address + path, timeout=HEALTH_CHECK_TIMEOUT_S)
            except httpx.TimeoutException as exc:  # computes nothing, so it is safe to retry
                reason = f"{self.url} does not respond to {path}"
                raise Unavailable(reason, is_unreachable=True) from exc

    @asynccontextmanager
    async def post(
        self, path: str, body: Any, request_id: str = "", accept: str = "*/*"
    ) -> AsyncIterator[httpx.Response]:
        """Send JSON; the body of the response is still to be read.

        Args:
            path: the route's path.
            body: JSON value to send.
            request_id: sent as X-Request-Id unless empty.
            accept: media types that the response may have, as in the Accept header.

        Raises:
            Unavailable: the connection failed.
            BackendError: the server does not respond.
        """
        content = json.dumps(body, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json", "Accept": accept}
        if request_id:
            headers["X-Request-Id"] = request_id
        url = self._address + path
        self.num_requests += 1
        with _translated_errors(self.url):
            async with self._client.stream(
                "POST", url, content=content, headers=headers
            ) as response:
                yield response


class UpstreamPool:
    """Servers that run the same model. Belongs to the event loop of its backend.

    Args:
        upstreams: at least one.
        settings: what the servers must be.
        is_pinned: whether their model must never change.
    """

    def __init__(
        self, upstreams: list[Upstream], settings: RemoteSettings, is_pinned: bool
    ) -> None:
        self.upstreams = upstreams
        self.identity: dict[str, Any] = {}
        self._settings = settings
        self._is_pinned = is_pinned

    @property
    def is_healthy(self) -> bool:
        """Whether any server is healthy."""
        return any(upstream.is_healthy for upstream in self.upstreams)

    @property
    def is_permanently_unusable(self) -> bool:
        """Whether retrying will not help with any server."""
        return all(upstream.is_permanently_unusable for upstream in self.upstreams)

    @property
    def is_checked(self) -> bool:
        """Whether the first health check of every server is over."""
        return all(upstream.is_checked for upstream in self.upstreams)

    @property
    def reason(self) -> str:
        """Why no server answers."""
        return "; ".join(upstream.reason for upstream in self.upstreams)

    def answer_source(self) -> AnswerSource | None:
        """See `Backend`. Only a smol server identifies its model and honors seeds.

        A server that was unhealthy may have been replaced, whatever it reports. One may also be
        replaced between two health checks, which only a pinned pool takes for an error.
        """
        identities = [u.identity for u in self.upstreams if u.is_healthy]
        apis = {identity.get("api", Dialect.SMOL) for identity in identities}
        if not identities or Dialect.PLAIN in apis:
            return None
        state = [(u.url, u.is_healthy, u.num_transitions, u.identity) for u in self.upstreams]
        is_verified = apis == {Dialect.SMOL} and all(each.get("revision") for each in identities)
        return AnswerSource(json.dumps(state, sort_keys=True), is_verified, self._is_pinned)

    @property
    def window(self) -> int:
        """Number of unfinished queries that keeps all servers busy."""
        least = max(WINDOW_BATCHES * DEFAULT_BATCH_SIZE, 2 * self._settings.max_concurrency)
        return sum(upstream.window or least for upstream in self.upstreams)

    @property
    def batch_size(self) -> int:
        """How many queries all servers together answer at once."""
        return self.window // WINDOW_BATCHES

    async def choose(self, deadline: float) -> Upstream:
        """Wait for a server that is ready, and return the one with the fewest in-flight queries.

        Args:
            deadline: when to give up, in `time.monotonic` seconds.

        Raises:
            BackendError: the deadline has passed, or all servers have been unhealthy for longer
                than the retry time.
        """
        while True:
            now = time.monotonic()
            ready = [upstream for upstream in self.upstreams if upstream.is_ready]
            if ready and now < deadline:
                return min(ready, key=lambda upstream: len(upstream.in_flight))
            if now >= min(deadline, self._unhealthy_deadline()):
                raise BackendError(self.reason)
            await asyncio.sleep(POLL_S)

    async def watch(self, upstream: Upstream) -> None:
        """Check the health of one server forever."""
        while True:
            await self._check_health(upstream)
            upstream.is_checked = True
            upstream.became_unhealthy.clear()
            try:
                healthy = upstream.is_healthy
                async with asyncio.timeout(
                    HEALTH_CHECK_INTERVAL_S if healthy else upstream.backoff_s
                ):
                    await upstream.became_unhealthy.wait()
                await asyncio.sleep(upstream.backoff_s)
            except TimeoutError:
                pass

    def _unhealthy_deadline(self) -> float:
        """When to give up on servers that are all unhealthy."""
        if self.is_healthy:
            return float("inf")
        return max(u.unhealthy_since for u in self.upstreams) + self._settings.retry_s

    async def _check_health(self, upstream: Upstream) -> None:
        """Check once, and mark the server accordingly."""
        was_healthy = upstream.is_healthy
        try:
            self._admit(upstream, await self._identify(upstream))
        except (Unavailable, BackendError, MalformedAnswer) as exc:
            upstream.mark_unhealthy(str(exc), is_permanent=not isinstance(exc, Unavailable))
            if self.is_healthy or not self._is_pinned:  # otherwise, an error will report it
                upstream.report()
            return
        upstream.mark_healthy()
        if not was_healthy:
            logger.info("upstream healthy: %s", upstream.url)

    async def _identify(self, upstream: Upstream) -> dict[str, Any]:
        """The identity of a server that is ready; also sets its dialect, model and window."""
        await _check_ready(upstream)
        response = await upstream.get("/v1/models")
        check_status(response, upstream.url)
        if response.status_code != 200:
            if self._settings.api == "openai":
                raise BackendError(f"{upstream.url} has no /v1/models")
            upstream.dialect = Dialect.PLAIN
            return {"api": Dialect.PLAIN, "model": "unknown", "revision": None, "dtype": None}
        try:
            listed = self._listed_model(upstream, load_object(response.content))
        except MalformedAnswer as exc:
            raise BackendError(
                f"{upstream.url} does not list its models at /v1/models; is it a model server?"
            ) from exc
        upstream.model = listed["id"]
        reported = listed.get("smol") or ({} if self._settings.api == "smol" else None)
        if isinstance(reported, dict) and self._settings.api != "openai":
            upstream.dialect = Dialect.SMOL
            upstream.window = _window(reported)
            return {"model": listed["id"]} | {k: v for k, v in reported.items() if k != "window"}
        upstream.dialect = Dialect.OPENAI
        return {"api": Dialect.OPENAI, "model": listed["id"], "revision": None, "dtype": None}

    def _listed_model(self, upstream: Upstream, body: Mapping[str, Any]) -> dict[str, Any]:
        """The requested one of a server's models, or else the first."""
        models = body.get("data")
        if not isinstance(models, list) or not all(_is_model(model) for model in models):
            raise MalformedAnswer("no list of models")
        if not models:
            raise BackendError(f"{upstream.url} has no model yet")
        return next((m for m in models if m["id"] == self._settings.model), dict(models[0]))

    def _admit(self, upstream: Upstream, identity: dict[str, Any]) -> None:
        """Accept a server that matches the settings and the other servers."""
        if self._settings.model is not None and identity.get("api") is Dialect.PLAIN:
            raise BackendError(
                f"{upstream.url} does not say which model it has, so smol cannot confirm that it "
                f"is {self._settings.model!r}; leave out --model and SMOL_MODEL"
            )
        for name, wanted in (("model", self._settings.model), ("dtype", self._settings.dtype)):
            if wanted not in (None, "auto", identity.get(name)) and identity.get(name):
                _reject(upstream, name, identity[name], wanted)
        others_are_healthy = any(u.is_healthy for u in self.upstreams if u is not upstream)
        if not self.identity or not (self._is_pinned or others_are_healthy):
            self.identity = identity
        for name in DECIDING:
            if identity.get(name) != self.identity.get(name):
                _reject(upstream, name, identity.get(name), self.identity.get(name))
        upstream.identity = identity


def check_status(response: httpx.Response, url: str) -> None:
    """Raise for statuses that do not concern the query.

    Raises:
        Unavailable: the server cannot answer for now.
        BackendError: the server rejects this client.
    """
    status = response.status_code
    if status in RETRIED_STATUSES:
        wait_s = _retry_after_s(response.headers.get("Retry-After"))
        raise Unavailable(f"{url} returned status {status}", retry_after_s=wait_s)
    if status in (401, 403):
        raise BackendError(f"{url} returned status {status}: check the API key")
    if 300 <= status < 400:
        target = response.headers.get("Location", "another address")
        raise BackendError(
            f"{url} redirects to {target} (status {status}); give the address of the server itself"
        )


@contextmanager
def _translated_errors(url: str) -> Iterator[None]:
    """Raise httpx's errors as ours.

    A failed connection may be retried, because answers have no side effects and are the same the
    second time. A server that does not respond may still be computing, so it is not retried.

    Raises:
        Unavailable: the connection failed.
        MalformedAnswer: the response does not match its Content-Encoding.
        BackendError: the server does not respond, or the request cannot be made.
    """
    try:
        yield
    except _FAILED_CONNECTION as exc:
        reason = f"{url} cannot be reached: {connection_reason(exc)}"
        raise Unavailable(reason, is_unreachable=True) from exc
    except httpx.DecodingError as exc:
        raise MalformedAnswer(f"the answer cannot be decoded: {exc}") from exc
    except httpx.TimeoutException as exc:
        raise BackendError(f"{url} did not respond in time") from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise BackendError(f"the request to {url} failed: {exc}") from exc


def _retry_after_s(value: str | None) -> float | None:
    """Retry-After in seconds; a date is ignored, because clocks differ."""
    return float(value) if value is not None and value.isdecimal() else None


def _reject(upstream: Upstream, name: str, value: object, wanted: object) -> NoReturn:
    raise BackendError(f"{upstream.url} has the {name} {value!r}, not {wanted!r}")


def _is_model(model: object) -> bool:
    return isinstance(model, dict) and isinstance(model.get("id"), str)


def _window(reported: Mapping[str, Any]) -> int:
    window = reported.get("window")
    return window if isinstance(window, int) and window >= WINDOW_BATCHES else 0


async def _check_ready(upstream: Upstream) -> None:
    """Check that a smol server accepts work, or is full; other servers have no /ready.

    Raises:
        Unavailable: it does not.
    """
    response = await upstream.get("/ready")
    try:
        status = load_object(response.content).get("status")
    except MalformedAnswer:
        return
    if response.status_code == 503 and status != "full":
        raise Unavailable(f"{upstream.url} is not ready: {status}")
