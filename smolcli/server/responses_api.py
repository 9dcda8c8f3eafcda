"""OpenAI's Responses API: /v1/responses, without stored state."""

import uuid
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

from flask import Blueprint, Response

from smolcli.protocol.responses import (
    ResponseEvents,
    parse_response_request,
    to_own_paths,
)
from smolcli.server.errors import HttpError, error_response, result_error
from smolcli.server.service import Service, json_response, read_json, to_json
from smolcli.server.sse import Event, event_lines, joined, stream_response
from smolcli.types import ErrorCode, Result


def responses_routes(service: Service) -> Blueprint:
    """The route /v1/responses."""
    routes = Blueprint("responses", __name__, url_prefix="/v1")

    @routes.post("/responses")
    def responses() -> Response:
        response_id = f"resp_{uuid.uuid4().hex}"
        asked = parse_response_request(
            read_json(), service.settings.defaults, response_id, service.model_names[0]
        )
        service.check_model(asked.model)
        in_flight = service.start({0: asked.query}, is_interactive=True, with_text=asked.is_stream)
        if asked.is_stream:
            lines = partial(_lines, ResponseEvents(asked))
            return stream_response(in_flight, lines, lambda _, result: _failed(result))
        with closing(in_flight):
            _, result = next(in_flight.results())
        return _failed(result) if result.is_error else json_response(asked.response(result))

    return routes


def _failed(result: Result) -> Response:
    error = result_error(result)
    is_too_long = error.code == ErrorCode.PROMPT_TOO_LONG
    path = "input" if is_too_long else error.field and to_own_paths(error.field)
    message = to_own_paths(str(error))
    return error_response(HttpError(error.status, message, error.code, path, error.headers))


def _lines(stream: ResponseEvents, events: Iterator[Event]) -> Iterator[str]:
    def render(_: int, event: str | Result) -> str:
        return _events(stream.end(event) if isinstance(event, Result) else stream.piece(event))

    return joined(_events(stream.start()), event_lines(events, render))


def _events(values: list[dict[str, Any]]) -> str:
    return "".join(f"event: {value['type']}\ndata: {to_json(value)}\n\n" for value in values)
