"""OpenAI's Responses API: /v1/responses, without stored state."""

import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from typing import Any

from flask import Blueprint, Response

from smolcli.protocol.responses import (
    ResponseEvents,
    ResponseRequest,
    own_paths,
    parse_response_request,
)
from smolcli.server.errors import HttpError, error_response, result_error
from smolcli.server.in_flight import InFlightRequest
from smolcli.server.service import STREAM_HEADERS, Service, json_response, read_json, to_json
from smolcli.server.sse import KEEP_ALIVE, KEEP_ALIVE_S, first_event
from smolcli.types import Result

Event = tuple[int, str | Result] | None


def responses_routes(service: Service) -> Blueprint:
    """The route /v1/responses."""
    routes = Blueprint("responses", __name__, url_prefix="/v1")

    @routes.post("/responses")
    def responses() -> Response:
        response_id = f"resp_{uuid.uuid4().hex}"
        asked = parse_response_request(read_json(), service.settings.defaults, response_id)
        service.check_model(asked.fields.model)
        in_flight = service.start({0: asked.query}, is_interactive=True, with_text=asked.is_stream)
        if asked.is_stream:
            return _stream(asked, in_flight)
        with closing(in_flight):
            _, result = next(in_flight.results())
        return _failed(result) if result.is_error else json_response(asked.response(result))

    return routes


def _failed(result: Result) -> Response:
    error = result_error(result)
    path = own_paths(error.field) if error.field else None
    message = own_paths(str(error))
    return error_response(HttpError(error.status, message, error.code, path, error.headers))


def _stream(asked: ResponseRequest, in_flight: InFlightRequest) -> Response:
    """Stream the response; an error that comes first still gets its own HTTP status."""
    events = in_flight.events()
    try:
        first: Event = first_event(events)
    except HttpError:
        in_flight.close()
        raise
    if first is not None and isinstance(first[1], Result) and first[1].is_error:
        in_flight.close()
        return _failed(first[1])
    lines = _lines(ResponseEvents(asked), chain([first], events))
    response = Response(lines, headers=STREAM_HEADERS, mimetype="text/event-stream")
    response.call_on_close(in_flight.close)
    return response


def _lines(stream: ResponseEvents, events: Iterator[Event]) -> Iterator[str]:
    yield _events(stream.start())
    sent_at = time.monotonic()
    try:
        for event in events:
            if event is not None:
                piece = event[1]
                values = stream.end(piece) if isinstance(piece, Result) else stream.piece(piece)
                yield _events(values)
            elif time.monotonic() - sent_at >= KEEP_ALIVE_S:
                yield KEEP_ALIVE
            else:
                continue
            sent_at = time.monotonic()
    except HttpError:
        return  # the client disconnected


def _events(values: list[dict[str, Any]]) -> str:
    return "".join(f"event: {value['type']}\ndata: {to_json(value)}\n\n" for value in values)
