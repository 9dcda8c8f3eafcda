"""Queries that wait for company, and the batches in which they leave."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Collection, Iterator

from smolcli.backends.remote.http import Job
from smolcli.backends.remote.pool import Pool

MAX_CHUNK_CHARS = 1 << 20  # at most 4 MiB of UTF-8: half of what a server takes by default
LINGER_S, MAX_LINGER_S = 0.002, 0.1


class Gatherer:
    """Puts together what comes together; belongs to the event loop of its backend.

    Args:
        pool: whose batches are filled.
        jobs: all that are open, those that wait here included.
    """

    def __init__(self, pool: Pool, jobs: Collection[Job]) -> None:
        self._pool = pool
        self._jobs = jobs
        self._pending: deque[Job] = deque()
        self._arrived = asyncio.Event()

    def add(self, job: Job) -> None:
        """Have it wait."""
        self._pending.append(job)
        self._arrived.set()

    async def take(self) -> list[list[Job]]:
        """What waits, as soon as no more comes, spread over the servers in batches of theirs."""
        await self._arrived.wait()
        await self._linger()
        self._arrived.clear()
        return list(self._chunks())

    async def _linger(self) -> None:
        """Wait for more: a moment, or as long as the servers have enough to do anyway."""
        enough = self._pool.num_at_once
        until, num_seen = time.monotonic() + MAX_LINGER_S, 0
        while len(self._pending) < enough and time.monotonic() < until:
            num_sent = len(self._jobs) - len(self._pending)
            if num_seen == len(self._pending) and num_sent < 2 * enough:
                return
            num_seen = len(self._pending)
            await asyncio.sleep(LINGER_S)

    def _chunks(self) -> Iterator[list[Job]]:
        jobs = [job for job in self._pending if job.is_open]
        self._pending.clear()
        num_up = sum(upstream.is_up for upstream in self._pool.upstreams) or 1
        batch_size = self._pool.num_at_once // len(self._pool.upstreams)
        size = min(math.ceil(len(jobs) / num_up), batch_size)
        chunk: list[Job] = []
        num_chars = 0
        for job in jobs:
            own_chars = job.query.num_chars
            if chunk and (len(chunk) >= size or num_chars + own_chars > MAX_CHUNK_CHARS):
                yield chunk
                chunk, num_chars = [], 0
            chunk.append(job)
            num_chars += own_chars
        if chunk:
            yield chunk
