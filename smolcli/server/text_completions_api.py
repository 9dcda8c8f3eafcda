"""OpenAI's text completions: POST /v1/completions."""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from http import HTTPStatus
from itertools import chain
from typing import Any

from flask import Blueprint, Response

from smolcli.protocol.text_completions import (
    TextCompletion,
    TextLogprobs,
    parse_text_completion,
    text_entries,
)
from smolcli.server.errors import HttpCode, HttpError, error_body, error_response, result_error
from smolcli.server.in_flight import InFlightRequest
from smolcli.server.service import STREAM_HEADERS, Service, json_response, read_json
from smolcli.server.sse import DONE, KEEP_ALIVE, KEEP_ALIVE_S, first_event, sse_line
from smolcli.types import Result, TextPiece

Event = tuple[int, str | Result] | None  # index of the choice; None while nothing happens


def text_completions_routes(service: Service) -> Blueprint:
    """The route of text completions."""
    routes = Blueprint("text_completions", __name__, url_prefix="/v1")

    @routes.post("/completions")
    def completions() -> Response:
        completion_id = f"cmpl-{uuid.uuid4().hex}"
        completion = parse_text_completion(read_json(), service.settings.defaults, completion_id)
        service.check_model(completion.model)
        _check_number(completion, service.settings.max_batch_queries)
        in_flight = service.start(
            dict(enumerate(completion.queries)),
            is_interactive=len(completion.queries) == completion.num_choices,
            with_text=completion.is_stream,
        )
        if completion.is_stream:
            return _stream(completion, in_flight)
        with closing(in_flight):
            results = dict(in_flight.results())
        in_order = [results[index] for index in range(len(results))]
        for index, result in enumerate(in_order):
            if result.is_error:
                return error_response(result_error(completion.error(index, result)))
        return json_response(completion.answer(in_order))

    return routes


def _check_number(completion: TextCompletion, limit: int) -> None:
    if (num_choices := len(completion.queries)) > limit:
        message = f"prompt and n ask for {num_choices:,} choices, more than the limit of {limit:,}"
        raise HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, HttpCode.TOO_LARGE, "prompt")


def _stream(completion: TextCompletion, in_flight: InFlightRequest) -> Response:
    """Stream the choices as server-sent events, each with its index."""
    events = in_flight.events()
    try:
        first: Event = first_event(events)
    except HttpError:
        in_flight.close()
        raise
    if first is not None and isinstance(first[1], Result) and first[1].is_error:
        in_flight.close()
        return error_response(result_error(completion.error(first[0], first[1])))
    lines = TextStream(completion).lines(chain([first], events))
    response = Response(lines, headers=STREAM_HEADERS, mimetype="text/event-stream")
    response.call_on_close(in_flight.close)
    return response


class TextStream:
    """The server-sent events of one request.

    The log probabilities of a choice come with their pieces of text. Those of an echoed prompt are
    known only at the end, so that all of the choice come with its last chunk.

    Args:
        completion: the request.
    """

    def __init__(self, completion: TextCompletion) -> None:
        self._completion = completion
        self._results: dict[int, Result] = {}
        self._num_sent = [0] * len(completion.queries)  # log probabilities of each choice
        self._lists = [TextLogprobs() for _ in completion.queries]

    def lines(self, events: Iterator[Event]) -> Iterator[str]:
        """The lines to send.

        Args:
            events: pieces and results of the choices, and None now and then.
        """
        sent_at = time.monotonic()
        try:
            for event in events:
                if event is not None:
                    yield sse_line(self._value(*event))
                elif time.monotonic() - sent_at >= KEEP_ALIVE_S:
                    yield KEEP_ALIVE
                else:
                    continue
                sent_at = time.monotonic()
                if event is not None and isinstance(event[1], Result) and event[1].is_error:
                    return  # without the other choices
        except HttpError:
            return  # the client disconnected
        if self._completion.includes_usage:
            in_order = [result for _, result in sorted(self._results.items())]
            yield sse_line(self._completion.usage_chunk(in_order))
        yield DONE

    def _value(self, index: int, event: str | Result) -> dict[str, Any]:
        query = self._completion.queries[index]
        if isinstance(event, str):
            is_late = query.echo and query.prompt_logprobs is not None
            entries = event.logprobs if isinstance(event, TextPiece) and not is_late else ()
            return self._completion.chunk(index, str(event), self._logprobs(index, entries))
        if event.is_error:
            error = result_error(self._completion.error(index, event))
            return error_body(error, is_openai=True)
        self._results[index] = event
        rest = [] if event.logprobs is None else text_entries(event)[self._num_sent[index] :]
        logprobs = self._logprobs(index, rest)
        return self._completion.chunk(index, "", logprobs, event.finish_reason)

    def _logprobs(self, index: int, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        self._num_sent[index] += len(entries)
        return self._lists[index].add(entries) if entries else None
