"""smol's own API: /chat, /chat/batched and its alias /generate_batch."""

from collections.abc import Callable, Iterator
from contextlib import closing
from http import HTTPStatus
from itertools import chain
from typing import Any

from flask import Blueprint, Response, request

from smolcli.errors import QueryError
from smolcli.protocol.json_text import shorten
from smolcli.protocol.query import chat_id_of, parse_query
from smolcli.server.errors import HttpCode, HttpError, error_response, result_error
from smolcli.server.in_flight import InFlightRequest
from smolcli.server.service import (
    SEND_HEADERS,
    STREAM_HEADERS,
    Service,
    json_response,
    read_json,
    to_json,
)
from smolcli.settings import QueryDefaults
from smolcli.types import ErrorCode, Query, Result

NDJSON = "application/x-ndjson"
# The wire format of the service that smol replaces.
SOME_FAILED = "Some queries failed but others succeeded"
ALL_FAILED = "All queries failed"


def chat_routes(service: Service) -> Blueprint:
    """The routes of smol's own API."""
    routes = Blueprint("chat", __name__)

    @routes.post("/chat")
    def chat() -> Response:
        query = parse_query(read_json(), service.settings.defaults)
        with closing(service.start({0: query}, is_interactive=True)) as in_flight:
            _, result = next(in_flight.results())
        if result.is_error:
            return error_response(result_error(result))
        return json_response(result.record())

    @routes.post("/chat/batched")
    @routes.post("/generate_batch")
    def batch() -> Response:
        values = _read_batch(service.settings.max_batch_queries)
        items = [_parse(value, service.settings.defaults) for value in values]
        invalid = {index: item for index, item in enumerate(items) if isinstance(item, Result)}
        queries = {index: item for index, item in enumerate(items) if isinstance(item, Query)}
        in_flight = service.start(queries, is_interactive=False)
        for result in invalid.values():
            service.count(result)
        if request.accept_mimetypes.best_match(["application/json", NDJSON]) == NDJSON:
            return _stream(invalid, in_flight)
        with closing(in_flight):
            results = invalid | dict(in_flight.results())
        return json_response(_batch_body([results[index] for index in range(len(items))]))

    return routes


def _read_batch(max_queries: int) -> list[Any]:
    """Read the `queries` of the current request, without validating each one."""
    body = read_json()
    if not isinstance(body, dict):
        raise QueryError("a batch must be a JSON object", ErrorCode.NOT_AN_OBJECT)
    if unknown := [shorten(field) for field in body if field != "queries"]:
        raise QueryError(f"unknown field {unknown[0]!r}", ErrorCode.UNKNOWN_FIELD, unknown[0])
    values = body.get("queries")
    if not isinstance(values, list) or not values:
        code = ErrorCode.INVALID_VALUE if values else ErrorCode.MISSING_FIELD
        raise QueryError("queries array required and must be non-empty", code, "queries")
    if len(values) > max_queries:
        message = f"the batch has {len(values):,} queries, more than the limit of {max_queries:,}"
        raise HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, HttpCode.TOO_LARGE, "queries")
    return values


def _parse(value: object, defaults: QueryDefaults) -> Query | Result:
    try:
        return parse_query(value, defaults)
    except QueryError as exc:
        chat_id = chat_id_of(value)
        return Result(chat_id, error=str(exc), error_code=exc.code, field=exc.field)


def _batch_body(results: list[Result]) -> dict[str, Any]:
    body: dict[str, Any] = {"responses": [result.record() for result in results]}
    num_failed = sum(result.is_error for result in results)
    if num_failed:
        message = ALL_FAILED if num_failed == len(results) else SOME_FAILED
        body |= {"partial_success": True, "message": message}
    return body


def _stream(invalid: dict[int, Result], in_flight: InFlightRequest) -> Response:
    """Send the headers at once, and each result as a line of NDJSON when it is finished."""
    lines = _lines(invalid, in_flight, request.environ[SEND_HEADERS])
    response = Response(lines, headers=STREAM_HEADERS, mimetype=NDJSON)
    response.call_on_close(in_flight.close)
    return response


def _lines(
    invalid: dict[int, Result], in_flight: InFlightRequest, send_headers: Callable[[], None]
) -> Iterator[str]:
    send_headers()
    try:
        for index, result in chain(invalid.items(), in_flight.results()):
            yield to_json({"index": index} | result.record()) + "\n"
    except HttpError:
        return  # the client disconnected
