"""How jobs are put to one server: as a batch, one by one, or as a stream."""

import asyncio
import time
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import httpx2 as httpx

from smolcli.backends.remote.http import Job, Unavailable, check_status, lines_of
from smolcli.backends.remote.upstream import Upstream
from smolcli.backends.remote.wire import (
    PASSING,
    Kind,
    Nonsense,
    answer,
    chat_body,
    completion_body,
    load_object,
    logprobs_of,
    read_batch,
    read_completion,
    read_error,
    read_record,
)
from smolcli.errors import BackendError, QueryError
from smolcli.types import Result, failure

NDJSON = "application/x-ndjson"
_NO_ENDPOINT = (404, 405, 501)
_NO_BATCH = (*_NO_ENDPOINT, 400, 413, 415, 422, 500)


class NoBatch(Exception):
    """These cannot be asked as one batch; `is_missing` where no others can be, either."""

    def __init__(self, is_missing: bool) -> None:
        super().__init__()
        self.is_missing = is_missing


async def ask(upstream: Upstream, jobs: list[Job], turns: asyncio.Semaphore) -> None:
    """Answer these jobs; each is given its result as soon as there is one.

    Args:
        upstream: is asked.
        jobs: one alone that is urgent, or that wants pieces, is not asked as a batch.
        turns: bounds the queries that are asked one by one.

    Raises:
        Unavailable: jobs that are still open need another try; the server rests.
    """
    jobs = [job for job in jobs if _has_words_for(upstream, job)]
    upstream.jobs.update(jobs)
    for job in jobs:
        job.sent_at = job.sent_at or time.perf_counter()
    try:
        if upstream.takes_batches and not _is_alone(jobs):
            await _try_batch(upstream, jobs)
        await _ask_each(upstream, [job for job in jobs if job.is_open], turns)
    finally:
        upstream.jobs.difference_update(jobs)


def _is_alone(jobs: list[Job]) -> bool:
    return not jobs or (len(jobs) == 1 and (jobs[0].is_interactive or jobs[0].on_text is not None))


def _has_words_for(upstream: Upstream, job: Job) -> bool:
    """Whether a query can be said to a server; one that cannot be has its result now."""
    try:
        chat_body(job.query, upstream.kind)
    except QueryError as exc:
        job.give(failure(job.query, str(exc), exc.code, exc.field))
        return False
    return True


async def _try_batch(upstream: Upstream, jobs: list[Job]) -> None:
    """Answer what can be answered as a batch, and remember where nothing can be."""
    try:
        await _ask_batch(upstream, jobs)
    except NoBatch as exc:
        if exc.is_missing:
            upstream.forget_batches()
    except Unavailable as exc:
        upstream.rest(exc)
        raise


async def _ask_batch(upstream: Upstream, jobs: list[Job]) -> None:
    body = {"queries": [chat_body(job.query, upstream.kind) for job in jobs]}
    async with upstream.post("/generate_batch", body, f"{NDJSON}, */*;q=0.5") as response:
        if response.status_code in _NO_BATCH:
            raise NoBatch(response.status_code in _NO_ENDPOINT)
        check_status(response, upstream.url)
        try:
            await _take_batch(upstream, response, jobs)
        except Nonsense as exc:
            raise NoBatch(is_missing=True) from exc
    if left := next((job for job in jobs if job.is_open), None):
        raise Unavailable(f"{upstream.url}: {left.fault}")


async def _take_batch(upstream: Upstream, response: httpx.Response, jobs: list[Job]) -> None:
    if response.headers.get("Content-Type", "").partition(";")[0] == NDJSON:
        async for line in lines_of(response):
            record = load_object(line)
            job = _at(jobs, record.pop("index", None))
            _settle(upstream, job, read_record(record, job.query, upstream.kind))
        return
    queries = [job.query for job in jobs]
    results = read_batch(load_object(await response.aread()), queries, upstream.kind)
    for job, result in zip(jobs, results, strict=True):
        _settle(upstream, job, result)


def _at(jobs: list[Job], index: object) -> Job:
    if not isinstance(index, int) or not 0 <= index < len(jobs):
        raise Nonsense("a result has no place in the batch")
    return jobs[index]


def _settle(upstream: Upstream, job: Job, result: Result) -> None:
    """Complete a job, unless its failure may pass."""
    if result.error_code in PASSING:
        job.fault = str(result.error)
    else:
        job.give(result)
        upstream.jobs.discard(job)


async def _ask_each(upstream: Upstream, jobs: list[Job], turns: asyncio.Semaphore) -> None:
    asking = (_ask_one(upstream, job, turns) for job in jobs)
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome


async def _ask_one(upstream: Upstream, job: Job, turns: asyncio.Semaphore) -> None:
    job.task = asyncio.current_task()
    try:
        async with _turn(upstream, job, turns):
            if not upstream.is_ready:  # one asked before it was told so
                raise Unavailable(upstream.reason)
            if job.is_open:
                job.give(await _result(upstream, job))
    except (BackendError, Nonsense) as exc:
        job.fail(BackendError(f"{upstream.url}: {exc}"))
    except Unavailable as exc:
        upstream.rest(exc)
        if not job.first_text_at:
            raise
        job.fail(BackendError(f"the answer broke off: {exc}"))
    finally:
        job.task = None
        upstream.jobs.discard(job)


def _turn(
    upstream: Upstream, job: Job, turns: asyncio.Semaphore
) -> AbstractAsyncContextManager[None]:
    """A stream from a server like this one waits for nobody, for that server bounds itself."""
    is_free = upstream.kind is Kind.SMOL and job.on_text is not None
    return nullcontext() if is_free else turns


async def _result(upstream: Upstream, job: Job) -> Result:
    """What becomes of one query that is asked alone."""
    is_stream = job.on_text is not None and upstream.kind is not Kind.PLAIN and job.query.n == 1
    if is_completion := is_stream or upstream.kind is Kind.OPENAI:
        body = completion_body(job.query, upstream.model, upstream.kind, is_stream)
    else:
        body = chat_body(job.query, upstream.kind)
    path = "/v1/chat/completions" if is_completion else "/chat"
    async with upstream.post(path, body) as response:
        check_status(response, upstream.url)
        if response.status_code in _NO_ENDPOINT:
            raise BackendError(f"{path} answered {response.status_code}; is it a model server?")
        if response.status_code != 200:
            result = read_error(await _error_body(response), job.query, response.status_code)
        elif is_stream:
            result = await _read_stream(response, job)
        elif is_completion:
            result = read_completion(load_object(await response.aread()), job.query)
        else:
            result = read_record(load_object(await response.aread()), job.query, upstream.kind)
    if result.error_code in PASSING:
        raise Unavailable(f"{upstream.url}: {result.error}")
    if not is_stream:
        job.show(result.response or "")
    return result


async def _error_body(response: httpx.Response) -> dict[str, Any]:
    try:
        body = load_object(await response.aread())
    except Nonsense:
        body = {}
    is_told = any(body.get(name) for name in ("error", "detail", "message"))
    return body if is_told else {"error": f"the upstream server answered {response.status_code}"}


async def _read_stream(response: httpx.Response, job: Job) -> Result:
    """Hand on the answer's pieces as they come."""
    pieces: list[str] = []
    logprobs: list[dict[str, Any]] = []
    finish_reason = usage = None
    is_whole = False
    try:
        async for line in lines_of(response):
            data = line.removeprefix(b"data:").strip()
            is_whole = is_whole or data == b"[DONE]"
            if is_whole or not line.startswith(b"data:"):
                continue
            chunk = load_object(data)
            if "error" in chunk:
                return read_error(chunk, job.query)
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                finish_reason = choice.get("finish_reason") or finish_reason
                logprobs += logprobs_of(choice)
                pieces.append(choice["delta"].get("content") or "")
                job.show(pieces[-1])
    except (LookupError, TypeError, AttributeError) as exc:
        raise Nonsense("the stream is none of chat completions") from exc
    if not is_whole:
        raise Unavailable("the stream ended before its time")
    text = "".join(pieces).strip()
    record = {"response": text, "finish_reason": finish_reason, "logprobs": logprobs}
    return answer(job.query, [record], usage)
