"""OpenAI's text completions: POST /v1/completions."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from http import HTTPStatus
from typing import Any

from flask import Blueprint, Response

from smolcli.protocol.text_completions import (
    TextCompletion,
    TextCompletionFields,
    TextLogprobs,
    parse_text_fields,
    text_completion,
    text_entries,
)
from smolcli.server.errors import HttpCode, HttpError, error_body, error_response, result_error
from smolcli.server.service import Service, json_response, read_json
from smolcli.server.sse import DONE, Event, event_lines, sse_line, stream_response
from smolcli.types import Result, TextPiece


def text_completions_routes(service: Service) -> Blueprint:
    """The route of text completions."""
    routes = Blueprint("text_completions", __name__, url_prefix="/v1")

    @routes.post("/completions")
    def completions() -> Response:
        fields = parse_text_fields(read_json())
        _check_num_choices(fields, service.settings.max_batch_queries)
        completion_id = f"cmpl-{uuid.uuid4().hex}"
        completion = text_completion(
            fields, service.settings.defaults, completion_id, service.model_names[0]
        )
        service.check_model(completion.model)

        def failed(index: int, result: Result) -> Response:
            return error_response(result_error(completion.error(index, result)))

        in_flight = service.start(
            dict(enumerate(completion.queries)),
            is_interactive=len(completion.queries) == completion.num_choices,
            with_text=completion.is_stream,
        )
        if completion.is_stream:
            return stream_response(in_flight, TextStream(completion).lines, failed)
        with closing(in_flight):
            results = dict(in_flight.results())
        in_order = [results[index] for index in range(len(results))]
        for index, result in enumerate(in_order):
            if result.is_error:
                return failed(index, result)
        return json_response(completion.answer(in_order))

    return routes


def _check_num_choices(fields: TextCompletionFields, limit: int) -> None:
    """Reject a request for too many choices, before it costs the time of parsing their prompts."""
    if (num_choices := len(fields.prompts) * fields.num_choices) > limit:
        message = f"prompt and n ask for {num_choices:,} choices, more than the limit of {limit:,}"
        raise HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, HttpCode.TOO_LARGE, "prompt")


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
        return event_lines(events, lambda *event: sse_line(self._value(*event)), self._end)

    def _end(self) -> str:
        if not self._completion.includes_usage:
            return DONE
        in_order = [result for _, result in sorted(self._results.items())]
        return sse_line(self._completion.usage_chunk(in_order)) + DONE

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
