"""Server-sent events, the format of OpenAI's streams."""

import time
from collections.abc import Iterator
from typing import Any, TypeVar

from smolcli.server.service import to_json

HEADERS_TIMEOUT_S = 1.0  # how long an error can still set the status of a stream
KEEP_ALIVE_S = 5.0  # silence after which a stream sends a comment
KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"

T = TypeVar("T")


def first_event(events: Iterator[T | None]) -> T | None:
    """Wait for the first event; None if there is none in time.

    An error that is the first event still gets its own HTTP status.

    Args:
        events: yields None several times a second while nothing happens.
    """
    deadline = time.monotonic() + HEADERS_TIMEOUT_S
    while (event := next(events)) is None and time.monotonic() < deadline:
        pass
    return event


def sse_line(value: dict[str, Any]) -> str:
    """A JSON object as an event."""
    return f"data: {to_json(value)}\n\n"
