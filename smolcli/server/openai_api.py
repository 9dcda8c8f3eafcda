"""/v1: OpenAI's API, as far as it asks for what smol can do."""

import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from http import HTTPStatus
from itertools import chain
from typing import Any

from flask import Blueprint, Response

from smolcli.protocol.openai import UNTOLD, Completion, parse_completion
from smolcli.server.errors import (
    HttpCode,
    HttpError,
    error_body,
    error_response,
    result_error,
)
from smolcli.server.in_flight import InFlightRequest
from smolcli.server.service import STREAM_HEADERS, Service, json_response, read_json, to_json
from smolcli.types import Result


def openai_views(service: Service) -> Blueprint:
    """The routes of this module."""
    views = Blueprint("openai", __name__, url_prefix="/v1")
    created = int(time.time())

    def listed() -> dict[str, Any]:
        named: dict[str, Any] = {"id": service.model_name, "object": "model"}
        named |= {"created": created, "owned_by": "smol"}
        identity = {k: v for k, v in service.holder.identity().items() if k != "model"}
        if identity and (system_prompt := service.settings.defaults.system_prompt):
            identity["system_prompt"] = system_prompt
        return named | {"smol": identity} if identity else named

    @views.post("/chat/completions")
    def completions() -> Response:
        name = f"chatcmpl-{uuid.uuid4().hex}"
        asked = parse_completion(read_json(), service.settings.defaults, name)
        _check_model(asked.model, service.model_name)
        flight = service.start({0: asked.query}, is_interactive=True, with_text=asked.is_stream)
        if asked.is_stream:
            return _stream(asked, flight)
        with closing(flight):
            _, result = next(flight.results())
        return _whole(asked, result)

    @views.get("/models")
    def models() -> Response:
        return json_response({"object": "list", "data": [listed()]})

    @views.get("/models/<path:name>")
    def one_model(name: str) -> Response:
        _check_model(name, service.model_name)
        return json_response(listed())

    return views


def _check_model(name: str, model: str) -> None:
    if name != model:
        raise HttpError(
            HTTPStatus.NOT_FOUND,
            f"there is no model {name[:100]!r} here; the one there is is {model!r}",
            HttpCode.NOT_FOUND,
            "model",
        )


def _whole(asked: Completion, result: Result) -> Response:
    if result.is_error:
        return error_response(result_error(result))
    return json_response(asked.answer(result))


def _stream(asked: Completion, flight: InFlightRequest) -> Response:
    """The answer as server-sent events; a fault before its first word has a status of its own."""
    events = (event for _, event in flight.events())
    try:
        first = next(events)
    except HttpError:
        flight.close()
        raise
    if isinstance(first, Result) and first.is_error:
        flight.close()
        return error_response(result_error(first))
    lines = _lines(asked, chain([first], events))
    response = Response(lines, headers=STREAM_HEADERS, mimetype="text/event-stream")
    response.call_on_close(flight.close)
    return response


def _lines(asked: Completion, events: Iterator[str | Result]) -> Iterator[str]:
    yield _line(asked.chunk({"role": "assistant", "content": ""}))
    try:
        for event in events:
            if isinstance(event, str):
                yield _line(asked.chunk({"content": event}))
            else:
                yield _last_lines(asked, event)
    except HttpError:
        return  # the client is gone


def _last_lines(asked: Completion, result: Result) -> str:
    if result.is_error:
        return _line(error_body(result_error(result), is_openai=True))
    lines = _line(asked.chunk({}, result))
    if asked.includes_usage:
        lines += _line(asked.usage_chunk(result.usage or UNTOLD))
    return lines + "data: [DONE]\n\n"


def _line(value: dict[str, Any]) -> str:
    return f"data: {to_json(value)}\n\n"
