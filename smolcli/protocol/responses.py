"""OpenAI's Responses API, without stored state: requests, responses and the events of a stream.

The pydantic models here are the only description of a request: they parse it, and /openapi.json is
generated from them.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from smolcli.errors import QueryError
from smolcli.protocol.answer_formats import (
    FlatJsonSchemaFormat,
    JsonObjectFormat,
    TextFormat,
)
from smolcli.protocol.field_rules import forbid_violations, tool_choice_rule
from smolcli.protocol.fields import (
    EMPTY,
    MAX_LOGPROBS,
    NOT_BLANK,
    Count,
    Flag,
    Integer,
    Items,
    Lenient,
    NumLogprobs,
    Temperature,
    Text,
    TopP,
    is_empty,
)
from smolcli.protocol.openai import MODEL, NO_EFFECT, RefusalPart
from smolcli.protocol.parameters import validated
from smolcli.protocol.query import parse_query
from smolcli.protocol.tool_fields import MAX_TOOLS, FunctionName, FunctionRef
from smolcli.protocol.tools import call_id
from smolcli.settings import QueryDefaults
from smolcli.types import FinishReason, Query, Result, TextPiece, whole_calls

Prompt = Annotated[str, Field(strict=True, json_schema_extra={"pattern": NOT_BLANK})]

Logprobs = Sequence[Mapping[str, Any]]  # one entry per token, as in a result

_LOGPROBS = "message.output_text.logprobs"
_NO_STATE = "empty: nothing is stored, so send the whole conversation as input"


# Input items.


class InputPart(Lenient):
    """A part of a message's content: text of the user, or of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: list[Any] | None = Field(None, description="a list; it has no effect")
    logprobs: list[Any] | None = Field(None, description="a list; it has no effect")


Part = Annotated[InputPart | RefusalPart, Field(discriminator="type")]


class ItemFields(Lenient):
    """What all items may have."""

    id: Text | None = Field(None, description=NO_EFFECT)
    status: Text | None = Field(None, description=NO_EFFECT)


class MessageItem(ItemFields):
    """A message; the ids and statuses of an earlier answer are accepted."""

    KEPT: ClassVar[frozenset[str]] = frozenset({"content"})

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Items[Part]
    phase: Text | None = Field(None, description=NO_EFFECT)


class CallItem(ItemFields):
    """A call of a function in an earlier answer."""

    type: Literal["function_call"]
    call_id: Annotated[Text, Field(min_length=1)]
    name: Text
    arguments: Text


class CallOutputItem(ItemFields):
    """The result of a function."""

    type: Literal["function_call_output"]
    call_id: Annotated[Text, Field(min_length=1)]
    output: Text | Items[InputPart]


def _item_type(value: object) -> str | None:
    """The type of an item; messages may omit it."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if is_empty(kind):
        return "message"
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")],
    Discriminator(_item_type),
]


# Tools and formats, which are flat here.


class FlatTool(Lenient):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="a JSON Schema of type object; empty if the function takes no arguments"
    )
    strict: Flag | None = Field(None, description="no effect: arguments always follow the schema")


class FlatNamedTool(FunctionRef):
    """One of the tools, by name."""

    type: Literal["function"]


class FlatAllowedTools(Lenient):
    """Restricts the answer to some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[Items[FlatNamedTool], Field(min_length=1)]


class TextOptions(Lenient):
    """What the text of the answer is."""

    format: (
        Annotated[TextFormat | JsonObjectFormat | FlatJsonSchemaFormat, Field(discriminator="type")]
        | None
    ) = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Lenient):
    """Options for reasoning, which the model does not do."""

    effort: Literal["none"] | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class ResponseStreamOptions(Lenient):
    """Options of a stream."""

    include_obfuscation: Flag | None = Field(None, description="true or false; it has no effect")


class ResponsesFields(Lenient):
    """The parameters of a request; descriptions complete "<parameter> must be ..."."""

    model_config = ConfigDict(json_schema_extra=forbid_violations([tool_choice_rule(list(EMPTY))]))

    model: Text | None = Field(None, description=MODEL)
    input: Prompt | Annotated[Items[Item], Field(min_length=1)] = Field(
        description="a non-blank string, or a list of messages, function calls and their outputs "
        "that ends with a message of the user or an output"
    )
    instructions: Text | None = Field(None, description="a string")
    max_output_tokens: Count | None = Field(None, description="a positive integer")
    temperature: Temperature | None = Field(None, description="a number from 0 (greedy) to 100")
    top_p: TopP | None = Field(None, description="a number greater than 0 and at most 1")
    stream: Flag | None = Field(None, description="true or false")
    stream_options: ResponseStreamOptions | None = Field(
        None, description="an object with include_obfuscation"
    )
    text: TextOptions | None = Field(
        None,
        description='{"format": {"type": "text"}}, {"format": {"type": "json_object"}} or '
        '{"format": {"type": "json_schema", "name": ..., "schema": {...}}}',
    )
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] | None = Field(
        None,
        description=f"a list of up to {MAX_TOOLS} functions, "
        '{"type": "function", "name": ..., "description": ..., "parameters": {...}}, '
        "with names of up to 64 letters, digits, underscores and dashes",
    )
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[FlatNamedTool | FlatAllowedTools, Field(discriminator="type")]
        | None
    ) = Field(None, description='"none", "auto", "required" or {"type": "function", "name": ...}')
    parallel_tool_calls: Flag | None = Field(None, description="true or false")
    top_logprobs: NumLogprobs | None = Field(
        None, description=f"an integer from 0 to {MAX_LOGPROBS}"
    )
    metadata: dict[str, Text] | None = Field(
        None, description="an object of strings, which the response repeats"
    )

    # Without an effect here.
    user: Text | None = Field(None, description=NO_EFFECT)
    safety_identifier: Text | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: Text | None = Field(None, description=NO_EFFECT)
    prompt_cache_retention: Text | None = Field(None, description=NO_EFFECT)
    service_tier: Text | None = Field(None, description=NO_EFFECT)
    include: (
        Items[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None
    ) = Field(
        None,
        description='a list that may contain "message.output_text.logprobs"; '
        "nothing else can be included",
    )
    reasoning: Reasoning | None = Field(None, description="empty: the model does not reason")

    # Not supported.
    previous_response_id: None = Field(None, description=_NO_STATE)
    conversation: None = Field(None, description=_NO_STATE)
    store: Literal[False] | None = Field(None, description="false: nothing is stored")
    background: Literal[False] | None = Field(None, description="false: it is not supported")
    prompt: None = Field(None, description="empty: there are no stored prompts")
    truncation: Literal["disabled"] | None = Field(
        None, description='"disabled": prompts are not truncated'
    )
    max_tool_calls: Integer | None = Field(
        None, description="an integer; it has no effect, because there are no built-in tools"
    )


# Requests.


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """A request, and the JSON of its responses.

    Args:
        query: the query to answer.
        fields: the parameters, some of which the response repeats.
        model: the requested model.
        created: creation time in seconds since 1970.
    """

    query: Query
    fields: ResponsesFields
    model: str
    created: float = field(default_factory=lambda: float(int(time.time())))

    @property
    def is_stream(self) -> bool:
        """Whether to stream the response."""
        return bool(self.fields.stream)

    def response(self, result: Result | None = None) -> dict[str, Any]:
        """The response; without a result, as it is when generation begins."""
        fields, query = self.fields, self.query
        values: dict[str, Any] = {
            "id": query.chat_id,
            "object": "response",
            "created_at": self.created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "model": self.model,
            "output": [],
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": query.sampling.temperature,
            "text": {"format": _dumped(fields.text and fields.text.format) or {"type": "text"}},
            "tool_choice": _dumped(fields.tool_choice) or "auto",
            "tools": [_tool_record(tool) for tool in fields.tools or ()],
            "top_logprobs": query.top_logprobs or 0,
            "top_p": query.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": fields.user,
            "metadata": fields.metadata or {},
        }
        return values if result is None else values | self._outcome(result)

    def _outcome(self, result: Result) -> dict[str, Any]:
        if result.is_error:
            error = {"code": "server_error", "message": to_own_paths(str(result.error))}
            return {"status": "failed", "error": error}
        is_cut_off = result.finish_reason is FinishReason.LENGTH
        status = "incomplete" if is_cut_off else "completed"
        details = {"reason": "max_output_tokens"} if is_cut_off else None
        output: list[dict[str, Any]] = []
        if result.response is not None:
            output.append(self.message(result.response, status, result.logprobs))
        for index, call in enumerate(result.tool_calls):
            is_last = index == len(result.tool_calls) - 1
            item = self.call(index, call.name, call.arguments, status if is_last else "completed")
            output.append(item)
        return {
            "status": status,
            "incomplete_details": details,
            "output": output,
            "usage": _usage(result),
        }

    def message(self, text: str, status: str, logprobs: Logprobs | None = None) -> dict[str, Any]:
        """The output item of the answer's text.

        Args:
            text: the text so far.
            status: the item's status.
            logprobs: log probabilities of the text's tokens, if requested.
        """
        return {
            "id": f"msg_{self.query.chat_id.removeprefix('resp_')}",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [text_part(text, logprobs)],
        }

    def call(self, index: int, name: str, arguments: str, status: str) -> dict[str, Any]:
        """The output item of a call.

        Args:
            index: position of the call in the answer.
            name: the function's name.
            arguments: the JSON text so far.
            status: the item's status.
        """
        return {
            "id": f"fc_{index}_{self.query.chat_id.removeprefix('resp_')}",
            "type": "function_call",
            "call_id": call_id(self.query, index),
            "name": name,
            "arguments": arguments,
            "status": status,
        }


def text_part(text: str, logprobs: Logprobs | None = None) -> dict[str, Any]:
    """The only part of a message; see `ResponseRequest.message`."""
    logprobs = list(logprobs or ())
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _usage(result: Result) -> dict[str, Any] | None:
    """The token counts; None if an upstream server does not report them."""
    if (usage := result.usage) is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens or 0,
            "cache_write_tokens": 0,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _dumped(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True, exclude_none=True)
    return value


def _tool_record(tool: FlatTool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters or {},
        "strict": bool(tool.strict),
    }


def parse_response_request(
    value: object, defaults: QueryDefaults, response_id: str, default_model: str = ""
) -> ResponseRequest:
    """Validate the body of a request.

    Args:
        value: the parsed JSON body.
        defaults: values for the parameters that it leaves out.
        response_id: the response's id.
        default_model: the model's name if the body has none.

    Raises:
        QueryError: naming the first invalid parameter by its path.
    """
    fields = validated(ResponsesFields, value)
    try:
        values = {"chat_id": response_id} | _query_values(fields)
        query = parse_query(values, defaults, accepts_partial=True)
    except QueryError as exc:
        path = to_own_paths(exc.field) if exc.field else None
        raise QueryError(to_own_paths(str(exc)), exc.code, path) from None
    return ResponseRequest(query, fields, fields.model or default_model)


def to_own_paths(text: str) -> str:
    """Translate a parameter's path, or a message that names it, to this API's parameters.

    Queries are parsed by the names of chat completions: `messages[0]` is `input[0]` here.
    """
    text = re.sub(r"\b(tools\[\d+\])\.function\b", r"\1", text)
    text = text.replace("tool_choice.function.name", "tool_choice.name")
    text = re.sub(
        r"\btool_choice\.allowed_tools\.tools(\[\d+\])\.function", r"tool_choice.tools\1", text
    )
    text = re.sub(r"^messages\b", "input", text)
    return re.sub(r"^response_format\b", "text.format", text)


def _query_values(fields: ResponsesFields) -> dict[str, Any]:
    """The query fields equivalent to a request."""
    values: dict[str, Any] = {
        "messages": _messages(fields),
        "max_new_tokens": fields.max_output_tokens,
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "tools": [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in fields.tools or ()
        ],
        "tool_choice": _choice(fields.tool_choice),
        "parallel_tool_calls": fields.parallel_tool_calls,
        "logprobs": bool(fields.top_logprobs) or _LOGPROBS in (fields.include or ()),
        "top_logprobs": fields.top_logprobs,
    }
    match fields.text and fields.text.format:
        case FlatJsonSchemaFormat(definition=schema):
            values["response_format"] = {"type": "json_schema", "schema": schema}
        case TextFormat() | JsonObjectFormat() as form:
            values["response_format"] = form.model_dump()
        case None:
            pass
    return values


def _choice(choice: Any) -> Any:
    def named(tool: FlatNamedTool) -> dict[str, Any]:
        return {"type": "function", "function": {"name": tool.name}}

    match choice:
        case FlatNamedTool():
            return named(choice)
        case FlatAllowedTools(mode=mode, tools=tools):
            allowed = {"mode": mode, "tools": [named(tool) for tool in tools]}
            return {"type": "allowed_tools", "allowed_tools": allowed}
        case _:
            return choice


def _messages(fields: ResponsesFields) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if fields.instructions:
        messages.append({"role": "system", "content": fields.instructions})
    if isinstance(fields.input, str):
        return [*messages, {"role": "user", "content": fields.input}]
    for item in fields.input:
        match item:
            case MessageItem():
                role = "system" if item.role == "developer" else item.role
                messages.append({"role": role, "content": _text(item.content)})
            case CallItem():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                if not (messages and messages[-1]["role"] == "assistant"):
                    messages.append({"role": "assistant", "content": None})
                messages[-1].setdefault("tool_calls", []).append(call)
            case CallOutputItem():
                output = {"role": "tool", "tool_call_id": item.call_id}
                messages.append(output | {"content": _text(item.output)})
    return messages


def _text(content: str | Sequence[InputPart | RefusalPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


# Streams.


class ResponseEvents:
    """The events of one stream, in the order and shape that the official clients parse.

    Args:
        request: the request that the stream answers.
    """

    def __init__(self, request: ResponseRequest) -> None:
        self._request = request
        self._number = -1
        self._text: list[str] | None = None  # of the message; None before it
        self._logprobs: list[Mapping[str, Any]] = []  # of the message's tokens so far
        self._is_message_open = False
        self._calls: list[tuple[str, list[str]]] = []
        self._is_call_open = False

    def start(self) -> list[dict[str, Any]]:
        """The events that begin the stream."""
        response = self._request.response()
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=response) for kind in kinds]

    def piece(self, piece: str) -> list[dict[str, Any]]:
        """The events of a piece of the answer."""
        logprobs = piece.logprobs if isinstance(piece, TextPiece) else ()
        events = list(self._text_events(str(piece), logprobs)) if piece else []
        for delta in piece.calls if isinstance(piece, TextPiece) else ():
            events += self._call_events(delta.name, delta.arguments)
        return events

    def end(self, result: Result) -> list[dict[str, Any]]:
        """The events that end the stream."""
        events: list[dict[str, Any]] = []
        if not result.is_error:
            if not self._calls:  # of a backend that does not stream them
                for delta in whole_calls(result):
                    events += self._call_events(delta.name, delta.arguments)
            if result.response is not None:
                text = result.response if self._text is None else ""
                rest = (result.logprobs or ())[len(self._logprobs) :]
                if self._text is None or (rest and self._is_message_open):
                    events += self._text_events(text, rest)
            status = "incomplete" if result.finish_reason is FinishReason.LENGTH else "completed"
            events += [*self._close_message(status), *self._close_call(status)]
        response = self._request.response(result)
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def _text_events(self, text: str, logprobs: Logprobs) -> Iterator[dict[str, Any]]:
        item = self._request.message("", "in_progress") | {"content": []}
        at = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        if self._text is None:
            self._text, self._is_message_open = [], True
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._event("response.content_part.added", part=text_part(""), **at)
        self._text.append(text)
        self._logprobs += logprobs
        if text or logprobs:
            delta = {"delta": text, "logprobs": list(logprobs)}
            yield self._event("response.output_text.delta", **delta, **at)

    def _close_message(self, status: str) -> Iterator[dict[str, Any]]:
        if not self._is_message_open:
            return
        self._is_message_open = False
        text = "".join(self._text or ())
        item = self._request.message(text, status, self._logprobs)
        at = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        done = {"text": text, "logprobs": self._logprobs}
        yield self._event("response.output_text.done", **done, **at)
        part = text_part(text, self._logprobs)
        yield self._event("response.content_part.done", part=part, **at)
        yield self._event("response.output_item.done", output_index=0, item=item)

    def _call_events(self, name: str, arguments: str) -> Iterator[dict[str, Any]]:
        if name:
            yield from self._close_message("completed")
            yield from self._close_call("completed")
            self._calls.append((name, []))
            self._is_call_open = True
            item = self._call_item("in_progress")
            yield self._event("response.output_item.added", item=item, **self._call_at())
        self._calls[-1][1].append(arguments)
        at = self._call_at() | {"item_id": self._call_item("in_progress")["id"]}
        yield self._event("response.function_call_arguments.delta", delta=arguments, **at)

    def _close_call(self, status: str) -> Iterator[dict[str, Any]]:
        if not self._is_call_open:
            return
        self._is_call_open = False
        item = self._call_item(status)
        at = self._call_at()
        done = {"item_id": item["id"], "name": item["name"], "arguments": item["arguments"]} | at
        yield self._event("response.function_call_arguments.done", **done)
        yield self._event("response.output_item.done", item=item, **at)

    def _call_item(self, status: str) -> dict[str, Any]:
        name, pieces = self._calls[-1]
        return self._request.call(len(self._calls) - 1, name, "".join(pieces), status)

    def _call_at(self) -> dict[str, Any]:
        return {"output_index": len(self._calls) - 1 + (self._text is not None)}

    def _event(self, kind: str, **members: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **members}
