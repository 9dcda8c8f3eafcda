"""OpenAI's API under /v1: chat completions and the list of models."""

import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from typing import Any

from flask import Blueprint, Response

from smolcli.protocol.openai import Completion, parse_completion
from smolcli.server.errors import HttpError, error_body, error_response, result_error
from smolcli.server.in_flight import InFlightRequest
from smolcli.server.service import STREAM_HEADERS, Service, json_response, read_json, to_json
from smolcli.types import Result

HEADERS_TIMEOUT_S = 1.0  # how long an error can still set the status of a stream
KEEP_ALIVE_S = 5.0  # silence after which a stream sends a comment

Event = str | Result | None


def openai_routes(service: Service) -> Blueprint:
    """The routes under /v1."""
    routes = Blueprint("openai", __name__, url_prefix="/v1")
    created = int(time.time())

    def model_object(name: str) -> dict[str, Any]:
        model: dict[str, Any] = {"id": name, "object": "model"}
        model |= {"created": created, "owned_by": "smol"}
        identity = {k: v for k, v in service.loader.identity().items() if k != "model"}
        if identity and (system_prompt := service.settings.defaults.system_prompt):
            identity["system_prompt"] = system_prompt
        return model | {"smol": identity} if identity else model

    @routes.post("/chat/completions")
    def completions() -> Response:
        completion_id = f"chatcmpl-{uuid.uuid4().hex}"
        completion = parse_completion(read_json(), service.settings.defaults, completion_id)
        service.check_model(completion.model)
        in_flight = service.start(
            {0: completion.query}, is_interactive=True, with_text=completion.is_stream
        )
        if completion.is_stream:
            return _stream(completion, in_flight)
        with closing(in_flight):
            _, result = next(in_flight.results())
        if result.is_error:
            return error_response(result_error(result))
        return json_response(completion.answer(result))

    @routes.get("/models")
    def models() -> Response:
        names = service.model_names
        return json_response({"object": "list", "data": [model_object(name) for name in names]})

    @routes.get("/models/<path:name>")
    def model(name: str) -> Response:
        service.check_model(name)
        return json_response(model_object(name))

    return routes


def _stream(completion: Completion, in_flight: InFlightRequest) -> Response:
    """Stream the answer as server-sent events.

    An error within the first second, before any text, still gets its own HTTP status. After that,
    the stream begins even if the query is waiting for a slot.
    """
    events = (event and event[1] for event in in_flight.events())
    try:
        first = _first_event(events)
    except HttpError:
        in_flight.close()
        raise
    if isinstance(first, Result) and first.is_error:
        in_flight.close()
        return error_response(result_error(first))
    lines = _sse_lines(completion, chain([first], events))
    response = Response(lines, headers=STREAM_HEADERS, mimetype="text/event-stream")
    response.call_on_close(in_flight.close)
    return response


def _first_event(events: Iterator[Event]) -> Event:
    """Wait for the first event; None if there is none in time."""
    deadline = time.monotonic() + HEADERS_TIMEOUT_S
    while (event := next(events)) is None and time.monotonic() < deadline:
        pass
    return event


def _sse_lines(completion: Completion, events: Iterator[Event]) -> Iterator[str]:
    yield _sse_line(completion.chunk({"role": "assistant", "content": ""}))
    sent_at = time.monotonic()
    try:
        for event in events:
            if event is None:
                if time.monotonic() - sent_at < KEEP_ALIVE_S:
                    continue
                yield ": keep-alive\n\n"
            elif isinstance(event, str):
                yield _sse_line(completion.chunk({"content": event}))
            else:
                yield _final_lines(completion, event)
            sent_at = time.monotonic()
    except HttpError:
        return  # the client disconnected


def _final_lines(completion: Completion, result: Result) -> str:
    if result.is_error:
        return _sse_line(error_body(result_error(result), is_openai=True))
    lines = _sse_line(completion.chunk({}, result))
    if completion.includes_usage:
        lines += _sse_line(completion.usage_chunk(result.usage))
    return lines + "data: [DONE]\n\n"


def _sse_line(value: dict[str, Any]) -> str:
    return f"data: {to_json(value)}\n\n"
