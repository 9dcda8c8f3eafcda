"""Server-sent events, the format of OpenAI's streams."""

import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from flask import Response

from smolcli.server.errors import HttpError
from smolcli.server.in_flight import InFlightRequest
from smolcli.server.service import STREAM_HEADERS, to_json
from smolcli.types import Result

HEADERS_TIMEOUT_S = 1.0  # how long an error can still set the status of a stream
KEEP_ALIVE_S = 5.0  # silence after which a stream sends a comment
KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"

Event = tuple[int, str | Result] | None  # index of the answer; None while nothing happens


def stream_response(
    in_flight: InFlightRequest,
    lines: Callable[[Iterator[Event]], Iterator[str]],
    failed: Callable[[int, Result], Response],
) -> Response:
    """Stream the answers of a request as server-sent events.

    An error within the first second, before any text, still gets its own HTTP status. After that,
    the stream begins even if the queries are waiting for a slot.

    Args:
        in_flight: the request, closed when the stream ends.
        lines: formats its events.
        failed: the response to an error that comes first.
    """
    events = in_flight.events()
    try:
        first = _first_event(events)
    except HttpError:
        in_flight.close()
        raise
    if first is not None and isinstance(first[1], Result) and first[1].is_error:
        in_flight.close()
        return failed(first[0], first[1])
    rest = lines(chain([first], events))
    response = Response(rest, headers=STREAM_HEADERS, mimetype="text/event-stream")
    response.call_on_close(in_flight.close)
    return response


def event_lines(
    events: Iterator[Event],
    render: Callable[[int, str | Result], str],
    end: Callable[[], str] | None = None,
) -> Iterator[str]:
    """The lines of events, with comments during silence; an error is the last one.

    Also yields "" several times a second while there is nothing to send.

    Args:
        events: yields None several times a second while nothing happens.
        render: formats a piece or a result of an answer.
        end: the lines after the last result, unless there was an error.
    """
    sent_at = time.monotonic()
    try:
        for event in events:
            if event is not None:
                yield render(*event)
            elif time.monotonic() - sent_at >= KEEP_ALIVE_S:
                yield KEEP_ALIVE
            else:
                yield ""
                continue
            sent_at = time.monotonic()
            if event is not None and isinstance(event[1], Result) and event[1].is_error:
                return  # without the other answers
    except HttpError:
        return  # the client disconnected
    if end is not None:
        yield end()


def joined(start: str, lines: Iterator[str]) -> Iterator[str]:
    """Lines after a start that is sent together with the first of them."""
    yield start + next(lines, "")
    yield from lines


def _first_event(events: Iterator[Event]) -> Event:
    """Wait for the first event; None if there is none in time."""
    deadline = time.monotonic() + HEADERS_TIMEOUT_S
    while (event := next(events)) is None and time.monotonic() < deadline:
        pass
    return event


def sse_line(value: dict[str, Any]) -> str:
    """A JSON object as an event."""
    return f"data: {to_json(value)}\n\n"
