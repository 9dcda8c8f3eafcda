"""Sending queries to one server: as a batch, one by one, or as a stream."""

import asyncio
import codecs
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import httpx2 as httpx

from smolcli.backends.base import PendingQuery, complete_future
from smolcli.backends.remote.upstream import Unavailable, Upstream, check_status
from smolcli.backends.remote.wire import (
    Dialect,
    MalformedAnswer,
    StreamedAnswer,
    chat_body,
    completion_body,
    load_object,
    parse_batch,
    parse_completion,
    parse_error,
    parse_record,
)
from smolcli.errors import BackendError, QueryError
from smolcli.types import ErrorCode, Result, Timings, failure, is_blank

NDJSON = "application/x-ndjson"
MAX_REQUEST_ID_CHARS = 128  # the maximum that a smol server accepts
_NO_SUCH_ROUTE = (404, 405, 501)
_BATCH_FAILED = (*_NO_SUCH_ROUTE, 400, 413, 415, 422, 500)


@dataclass(eq=False)
class RemoteQuery(PendingQuery):
    """A query on its way to a server."""

    task: asyncio.Task[None] | None = None  # that serves this query alone
    sent_at: float = 0.0
    first_text_at: float = 0.0
    reason: str = "the batch ended early"  # why there is no result yet

    def show(self, text: str) -> None:
        """Pass on a piece of the answer, and remember when the first one came."""
        if not is_blank(text):
            self.first_text_at = self.first_text_at or time.perf_counter()
        super().show(text)

    def complete(self, result: Result) -> None:
        """Deliver the result, with timings as seen from here."""
        now = time.perf_counter()
        timings = Timings(
            queue_s=self.sent_at - self.submitted_at,
            first_token_s=(self.first_text_at or now) - self.submitted_at,
            total_s=now - self.submitted_at,
        )
        complete_future(self.future, replace(result, timings=timings))


class BatchFailed(Exception):
    """Queries that are still open must be sent one by one.

    Args:
        is_route_missing: whether the server does not support batches at all.
    """

    def __init__(self, is_route_missing: bool) -> None:
        super().__init__()
        self.is_route_missing = is_route_missing


async def send(upstream: Upstream, queries: list[RemoteQuery], slots: asyncio.Semaphore) -> None:
    """Have a server answer queries; each is completed as soon as its result arrives.

    Args:
        upstream: the server.
        queries: sent as one batch, unless there is only one and it is interactive or streamed.
        slots: bounds the number of queries that are sent one by one.

    Raises:
        Unavailable: queries that are still open need a retry; the server is backing off.
    """
    queries = [query for query in queries if _is_supported(upstream, query)]
    upstream.in_flight.update(queries)
    for query in queries:
        query.sent_at = query.sent_at or time.perf_counter()
    try:
        if upstream.takes_batches and not _is_single(queries):
            await _try_batch(upstream, queries)
        await _send_each(upstream, [query for query in queries if query.is_open], slots)
    finally:
        upstream.in_flight.difference_update(queries)


def _is_single(queries: list[RemoteQuery]) -> bool:
    if len(queries) == 1:
        return queries[0].is_interactive or queries[0].on_text is not None
    return not queries


def _is_supported(upstream: Upstream, pending: RemoteQuery) -> bool:
    """Whether the server's API can express a query; completes it with an error if not."""
    try:
        chat_body(pending.query, upstream.dialect)
    except QueryError as exc:
        pending.complete(failure(pending.query, str(exc), exc.code, exc.field))
        return False
    return True


async def _try_batch(upstream: Upstream, queries: list[RemoteQuery]) -> None:
    """Send queries as a batch, and remember if the server does not support batches."""
    try:
        await _send_batch(upstream, queries)
    except MalformedAnswer:
        pass  # the body cannot be decoded: send queries one by one
    except BatchFailed as exc:
        if exc.is_route_missing:
            upstream.mark_batch_route_missing()
    except Unavailable as exc:
        upstream.back_off(exc)
        raise


async def _send_batch(upstream: Upstream, queries: list[RemoteQuery]) -> None:
    body = {"queries": [chat_body(pending.query, upstream.dialect) for pending in queries]}
    accept = f"{NDJSON}, */*;q=0.5"
    async with upstream.post("/generate_batch", body, _request_id(queries), accept) as response:
        if response.status_code in _BATCH_FAILED:
            raise BatchFailed(response.status_code in _NO_SUCH_ROUTE)
        check_status(response, upstream.url)
        try:
            has_malformed = await _read_batch(upstream, response, queries)
        except MalformedAnswer as exc:
            raise BatchFailed(is_route_missing=True) from exc
    if has_malformed:
        raise BatchFailed(is_route_missing=False)
    if left := next((pending for pending in queries if pending.is_open), None):
        raise Unavailable(f"{upstream.url}: {left.reason}")


async def _read_batch(
    upstream: Upstream, response: httpx.Response, queries: list[RemoteQuery]
) -> bool:
    """Complete the queries of a batch; returns whether any result is malformed."""
    has_malformed = False
    if response.headers.get("Content-Type", "").partition(";")[0] == NDJSON:
        async for line in _lines(response):
            try:
                record = load_object(line)
                pending = _at(queries, record.pop("index", None))
                result = parse_record(record, pending.query, upstream.dialect)
            except MalformedAnswer:
                has_malformed = True
            else:
                _settle(upstream, pending, result)
        return has_malformed
    batch = [pending.query for pending in queries]
    results = parse_batch(await response.aread(), batch, upstream.dialect)
    for pending, parsed in zip(queries, results, strict=True):
        if parsed is not None:
            _settle(upstream, pending, parsed)
    return None in results


def _request_id(queries: list[RemoteQuery]) -> str:
    """The request ids of the queries, joined into one; ids beyond the length limit are left out."""
    request_ids = dict.fromkeys(pending.query.request_id or "" for pending in queries)
    joined = ""
    for request_id in filter(None, request_ids):
        longer = f"{joined},{request_id}" if joined else request_id
        if len(longer) > MAX_REQUEST_ID_CHARS:
            break
        joined = longer
    return joined


def _at(queries: list[RemoteQuery], index: object) -> RemoteQuery:
    if not isinstance(index, int) or not 0 <= index < len(queries):
        raise MalformedAnswer("a result has no valid index")
    return queries[index]


def _settle(upstream: Upstream, pending: RemoteQuery, result: Result) -> None:
    """Complete a query, unless its error is transient."""
    if result.error_code is not None and result.error_code.is_transient:
        pending.reason = str(result.error)
    else:
        pending.complete(result)
        upstream.in_flight.discard(pending)


async def _send_each(
    upstream: Upstream, queries: list[RemoteQuery], slots: asyncio.Semaphore
) -> None:
    sending = (_send_one(upstream, pending, slots) for pending in queries)
    outcomes = await asyncio.gather(*sending, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome


async def _send_one(upstream: Upstream, pending: RemoteQuery, slots: asyncio.Semaphore) -> None:
    pending.task = asyncio.current_task()
    try:
        async with _slot(upstream, pending, slots):
            if not upstream.is_ready:  # it became unavailable while this query waited
                raise Unavailable(upstream.reason)
            if pending.is_open:
                pending.complete(await _result(upstream, pending))
    except MalformedAnswer as exc:
        message = f"malformed answer from {upstream.url}: {exc}"
        pending.complete(failure(pending.query, message, ErrorCode.INTERNAL))
    except BackendError as exc:
        pending.fail(exc)
    except Unavailable as exc:
        upstream.back_off(exc)
        if not pending.first_text_at:
            raise
        pending.fail(BackendError(f"the answer was interrupted: {exc}"))
    finally:
        pending.task = None
        upstream.in_flight.discard(pending)


def _slot(
    upstream: Upstream, pending: RemoteQuery, slots: asyncio.Semaphore
) -> AbstractAsyncContextManager[None]:
    """A stream from a smol server needs no slot: that server limits itself."""
    is_exempt = upstream.dialect is Dialect.SMOL and pending.on_text is not None
    return nullcontext() if is_exempt else slots


async def _result(upstream: Upstream, pending: RemoteQuery) -> Result:
    """The result of a query that is sent alone."""
    query, dialect = pending.query, upstream.dialect
    is_stream = pending.on_text is not None and dialect is not Dialect.PLAIN and query.n == 1
    is_stream = is_stream and query.prompt_logprobs is None
    if is_completion := is_stream or dialect is Dialect.OPENAI:
        body = completion_body(query, upstream.model, dialect, is_stream)
    else:
        body = chat_body(query, dialect)
    completions = "/v1/chat/completions" if query.raw_prompt is None else "/v1/completions"
    path = completions if is_completion else "/chat"
    async with upstream.post(path, body, _request_id([pending])) as response:
        check_status(response, upstream.url)
        if response.status_code != 200:
            error = await _error_body(response)
            _check_route(upstream, path, response.status_code, error)
            result = parse_error(error, query, response.status_code)
        elif is_stream and not _is_json(response):
            result = await _read_stream(upstream, response, pending)
        elif is_completion:
            result = parse_completion(load_object(await response.aread()), query)
        else:
            result = parse_record(load_object(await response.aread()), query, dialect)
    if result.error_code is not None and result.error_code.is_transient:
        raise Unavailable(f"{upstream.url}: {result.error}")
    if not pending.first_text_at:
        pending.show(result.response or "")
    return result


def _is_json(response: httpx.Response) -> bool:
    """Whether the body is declared as one JSON value, which is how some servers answer streams."""
    content_type: str = response.headers.get("Content-Type", "")
    return content_type.partition(";")[0].strip().lower() == "application/json"


def _check_route(upstream: Upstream, path: str, status: int, body: dict[str, Any]) -> None:
    """Raise if a server has lost its model or never had this route.

    Raises:
        Unavailable: it serves another model now, which the next health check finds out.
        BackendError: it has no such route.
    """
    if status not in _NO_SUCH_ROUTE:
        return
    error = body.get("error")
    names_model = isinstance(error, dict) and (
        error.get("param") == "model" or error.get("code") == "model_not_found"
    )
    if names_model:
        reason = f"{upstream.url} no longer serves {upstream.model!r}"
        raise Unavailable(reason, is_unreachable=True)
    raise BackendError(f"{upstream.url}{path} returned status {status}; is it a model server?")


async def _error_body(response: httpx.Response) -> dict[str, Any]:
    try:
        body = load_object(await response.aread())
    except MalformedAnswer:
        body = {}
    has_reason = any(body.get(name) for name in ("error", "detail", "message"))
    if has_reason:
        return body
    return {"error": f"the upstream server returned status {response.status_code}"}


async def _read_stream(
    upstream: Upstream, response: httpx.Response, pending: RemoteQuery
) -> Result:
    """Pass on the pieces of an answer as they arrive."""
    answer = StreamedAnswer(pending.query)
    async for chunk in _chunks(upstream, response):
        if chunk.get("error"):
            return parse_error(chunk, pending.query)
        for piece in answer.add(chunk):
            pending.show(piece)
    return answer.result()


async def _chunks(upstream: Upstream, response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The chunks in the events of a stream. What follows the end mark is read, but ignored.

    Raises:
        MalformedAnswer: an event does not hold an object.
        Unavailable: the stream has no end mark.
    """
    is_done = False
    async for line in _lines(response):
        line = line.removeprefix(codecs.BOM_UTF8)
        data = line.removeprefix(b"data:").strip()
        is_done = is_done or data == b"[DONE]"
        if line.startswith(b"data:") and not is_done:
            yield load_object(data)
    if not is_done:
        raise Unavailable(f"{upstream.url}: the stream ended early")


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """The lines of a body. Only \\n ends a line: text may contain other Unicode line breaks."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.strip():
                yield line.strip()
    if rest.strip():
        yield rest.strip()
