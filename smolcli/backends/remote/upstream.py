"""One server that answers: what it is, how it is, and the way to it."""

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2 as httpx

from smolcli.backends.remote.http import Job, Unavailable, translated
from smolcli.backends.remote.wire import Kind

logger = logging.getLogger(__name__)

MISSING_FOR_S = 60.0
PROBE_S = 5.0
FIRST_REST_S, LONGEST_REST_S = 0.2, 5.0
LONGEST_RETRY_AFTER_S = 60.0


class Upstream:
    """One server; belongs to the event loop of its backend.

    Args:
        url: without a slash at its end.
        client: shared by all, for its connections.
    """

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self.url = url
        self.kind = Kind.PLAIN
        self.model = ""
        self.window = 0  # as the server has it
        self.jobs: set[Job] = set()
        self.num_calls = 0
        self.is_up = False
        self.is_hopeless = False  # no waiting will help
        self.down_since = time.monotonic()
        self.reason = f"{url} has not answered yet"
        self.fell = asyncio.Event()  # wakes whoever looks after it
        self._client = client
        self._num_failures = 0
        self._rests_until = 0.0
        self._no_batch_until = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether it may be asked now."""
        return self.is_up and time.monotonic() >= self._rests_until

    @property
    def takes_batches(self) -> bool:
        """Whether /generate_batch is there, as far as is known."""
        return self.kind is not Kind.OPENAI and time.monotonic() >= self._no_batch_until

    @property
    def rest_s(self) -> float:
        """How long to leave it alone: longer each time, and never for all clients the same."""
        longest_s = min(FIRST_REST_S * 2.0 ** min(self._num_failures, 10), LONGEST_REST_S)
        return longest_s * random.uniform(0.5, 1.0)

    def forget_batches(self) -> None:
        """It has no /generate_batch; it may have one later."""
        self._no_batch_until = time.monotonic() + MISSING_FOR_S

    def rise(self) -> None:
        """It answers as it should."""
        self.is_up, self.is_hopeless = True, False
        self._num_failures = 0

    def fall(self, reason: str, *, is_hopeless: bool = False) -> None:
        """It does not answer, or not as it should."""
        if self.is_up:
            logger.warning("down: %s", reason)
            self.down_since = time.monotonic()
        self.is_up, self.is_hopeless, self.reason = False, is_hopeless, reason
        self._num_failures += 1
        self.fell.set()

    def rest(self, fault: Unavailable) -> None:
        """Leave it alone for as long as is due and as it says; without a connection it is down.

        Of many faults at once the first counts, and the longest time that the server wants.
        """
        now = time.monotonic()
        if self.is_ready and fault.is_gone:
            self.fall(str(fault))
        elif self.is_ready:
            self.reason = str(fault)
            self._rests_until = now + self.rest_s
            self._num_failures += 1
        wanted_s = min(fault.retry_after_s or 0.0, LONGEST_RETRY_AFTER_S)
        self._rests_until = max(self._rests_until, now + wanted_s)

    async def get(self, path: str) -> httpx.Response:
        """What lies at a path.

        Raises:
            Unavailable: or BackendError: where there is no answer.
        """
        with translated(self.url):
            try:
                return await self._client.get(self.url + path, timeout=PROBE_S)
            except httpx.TimeoutException as exc:  # nothing is computed here: it may be asked again
                raise Unavailable(f"{self.url} is silent at {path}", is_gone=True) from exc

    @asynccontextmanager
    async def post(
        self, path: str, body: Any, accept: str = "*/*"
    ) -> AsyncIterator[httpx.Response]:
        """Send JSON; the answer's body is still to be read.

        Raises:
            Unavailable: or BackendError: where there is no answer.
        """
        content = json.dumps(body, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json", "Accept": accept}
        url = self.url + path
        self.num_calls += 1
        with translated(self.url):
            async with self._client.stream("POST", url, content=content, headers=headers) as answer:
                yield answer
