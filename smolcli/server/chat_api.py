"""/chat, /chat/batched and /generate_batch: the wire format of the system smol replaces."""

from collections.abc import Iterator
from contextlib import closing
from http import HTTPStatus
from itertools import chain
from typing import Any

from flask import Blueprint, Response, request

from smolcli.errors import QueryError
from smolcli.protocol.query import chat_id_of, parse_query
from smolcli.server.errors import HttpCode, HttpError, error_response, result_error
from smolcli.server.in_flight import InFlightRequest
from smolcli.server.service import STREAM_HEADERS, Service, json_response, read_json, to_json
from smolcli.settings import QueryDefaults
from smolcli.types import ErrorCode, Query, Result

NDJSON = "application/x-ndjson"
SOME_FAILED = {
    "partial_success": True,
    "message": "Some queries failed but others succeeded",
}


def chat_views(service: Service) -> Blueprint:
    """The routes of this module."""
    views = Blueprint("chat", __name__)

    @views.post("/chat")
    def chat() -> Response:
        query = parse_query(read_json(), service.settings.defaults)
        with closing(service.start({0: query}, is_interactive=True)) as flight:
            _, result = next(flight.results())
        if result.is_error:
            return error_response(result_error(result))
        return json_response(result.record())

    @views.post("/chat/batched")
    @views.post("/generate_batch")
    def batch() -> Response:
        values = _read_batch(service.settings.max_batch_queries)
        items = [_parse(value, service.settings.defaults) for value in values]
        bad = {index: item for index, item in enumerate(items) if isinstance(item, Result)}
        queries = {index: item for index, item in enumerate(items) if isinstance(item, Query)}
        flight = service.start(queries, is_interactive=False)
        for result in bad.values():
            service.count(result)
        if request.accept_mimetypes.best_match(["application/json", NDJSON]) == NDJSON:
            return _stream(bad, flight)
        with closing(flight):
            results = bad | dict(flight.results())
        return json_response(_gathered([results[index] for index in range(len(items))]))

    return views


def _read_batch(max_queries: int) -> list[Any]:
    body = read_json()
    if not isinstance(body, dict):
        raise QueryError("a batch must be a JSON object", ErrorCode.NOT_AN_OBJECT)
    if unknown := [field[:100] for field in body if field != "queries"]:
        raise QueryError(f"unknown field {unknown[0]!r}", ErrorCode.UNKNOWN_FIELD, unknown[0])
    values = body.get("queries")
    if not isinstance(values, list) or not values:
        code = ErrorCode.INVALID_VALUE if values else ErrorCode.MISSING_FIELD
        raise QueryError("queries array required and must be non-empty", code, "queries")
    if len(values) > max_queries:
        message = f"a batch may hold {max_queries:,} queries; this one has {len(values):,}"
        raise HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, HttpCode.TOO_LARGE, "queries")
    return values


def _parse(value: object, defaults: QueryDefaults) -> Query | Result:
    try:
        return parse_query(value, defaults)
    except QueryError as exc:
        chat_id = chat_id_of(value)
        return Result(chat_id, error=str(exc), error_code=exc.code, field=exc.field)


def _gathered(results: list[Result]) -> dict[str, Any]:
    body: dict[str, Any] = {"responses": [result.record() for result in results]}
    return body | SOME_FAILED if any(result.is_error for result in results) else body


def _stream(bad: dict[int, Result], flight: InFlightRequest) -> Response:
    """Results as they finish, a line each."""
    response = Response(_lines(bad, flight), headers=STREAM_HEADERS, mimetype=NDJSON)
    response.call_on_close(flight.close)
    return response


def _lines(bad: dict[int, Result], flight: InFlightRequest) -> Iterator[str]:
    try:
        for index, result in chain(bad.items(), flight.results()):
            yield to_json({"index": index} | result.record()) + "\n"
    except HttpError:
        return  # the client is gone
