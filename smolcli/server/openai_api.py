"""OpenAI's API under /v1: chat completions and the list of models."""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from flask import Blueprint, Response

from smolcli.backends.alternatives import merged
from smolcli.protocol.chat_completions import Completion, parse_completion
from smolcli.protocol.prompt import split_answers
from smolcli.protocol.tools import delta_record
from smolcli.server.errors import error_body, error_response, result_error
from smolcli.server.service import Service, json_response, read_json
from smolcli.server.sse import DONE, Event, event_lines, joined, sse_line, stream_response
from smolcli.types import Result, TextPiece, ToolCallDelta, whole_calls


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
        completion = parse_completion(
            read_json(),
            service.settings.defaults,
            completion_id,
            default_model=service.model_names[0],
        )
        service.check_model(completion.model)
        if completion.is_stream:
            queries = dict(enumerate(split_answers(completion.query)))
            in_flight = service.start(queries, is_interactive=True, with_text=True)
            return stream_response(
                in_flight,
                CompletionStream(completion).lines,
                lambda _, result: error_response(result_error(result)),
            )
        in_flight = service.start({0: completion.query}, is_interactive=True)
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


class CompletionStream:
    """The server-sent events of one request.

    Args:
        completion: the request.
    """

    def __init__(self, completion: Completion) -> None:
        self._completion = completion
        self._results: dict[int, Result] = {}
        self._num_logprobs = [0] * completion.query.n  # sent for each answer
        self._has_calls = [False] * completion.query.n  # whether any were sent

    def lines(self, events: Iterator[Event]) -> Iterator[str]:
        """The lines to send.

        Args:
            events: pieces and results of the answers, and None now and then.
        """
        start = {"role": "assistant", "content": ""}
        starts = [self._chunk(index, start) for index in range(self._completion.query.n)]
        yield from joined("".join(starts), event_lines(events, self._event, self._end))

    def _event(self, index: int, event: str | Result) -> str:
        if isinstance(event, str):
            entries = event.logprobs if isinstance(event, TextPiece) else ()
            self._num_logprobs[index] += len(entries)
            calls = event.calls if isinstance(event, TextPiece) else ()
            content = {"content": str(event)} if event or not calls else {}
            return self._chunk(index, content | self._calls(index, calls), entries)
        if event.is_error:
            return sse_line(error_body(result_error(event), is_openai=True))
        self._results[index] = event
        rest = (event.logprobs or ())[self._num_logprobs[index] :]
        last = self._chunk(index, {}, rest, event.finish_reason)
        if event.tool_calls and not self._has_calls[index]:  # a backend that does not stream them
            return self._chunk(index, self._calls(index, whole_calls(event))) + last
        return last

    def _calls(self, index: int, deltas: Sequence[ToolCallDelta]) -> dict[str, Any]:
        """The member of a delta that holds pieces of calls, if there are any."""
        if not deltas:
            return {}
        self._has_calls[index] = True
        query = self._completion.query
        return {"tool_calls": [delta_record(each, query, index) for each in deltas]}

    def _end(self) -> str:
        lines = DONE
        if self._completion.includes_usage:
            result = merged([each for _, each in sorted(self._results.items())])
            lines = sse_line(self._completion.usage_chunk(result.usage)) + lines
        return lines

    def _chunk(self, *parts: Any) -> str:
        return sse_line(self._completion.chunk(*parts))
