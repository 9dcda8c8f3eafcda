"""Function calling: tools and calls as JSON in OpenAI's shape, and the ids of calls.

Without pydantic, which takes long to import; `tool_fields` parses what requests say.
"""

import hashlib
import json
from dataclasses import replace
from typing import Any

from smolcli.types import Function, Message, Query, Result, ToolCallDelta, ToolMode, Tools


def tools_record(tools: Tools | None) -> dict[str, Any]:
    """The query fields that offer tools: the inverse of `tool_fields.parse_tools`."""
    if tools is None:
        return {}
    return {
        "tools": [function_record(function) for function in tools.functions],
        "tool_choice": _choice(tools),
        "parallel_tool_calls": tools.is_parallel,
    }


def function_record(function: Function) -> dict[str, Any]:
    """A tool definition as a JSON object."""
    values: dict[str, Any] = {"name": function.name}
    if function.description:
        values["description"] = function.description
    if function.parameters:
        values["parameters"] = json.loads(function.parameters)
    if function.is_strict is not None:
        values["strict"] = function.is_strict
    return {"type": "function", "function": values}


def _choice(tools: Tools) -> Any:
    named = [{"type": "function", "function": {"name": name}} for name in tools.allowed]
    if not named:
        return str(tools.mode)
    if tools.mode is ToolMode.REQUIRED and len(named) == 1 and not tools.is_parallel:
        return named[0]
    return {"type": "allowed_tools", "allowed_tools": {"mode": str(tools.mode), "tools": named}}


def message_record(message: Message) -> dict[str, Any]:
    """A message as a JSON object."""
    record: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        record["content"] = message.content or None
        record["tool_calls"] = [call.record() for call in message.tool_calls]
    if message.tool_call_id:
        record["tool_call_id"] = message.tool_call_id
    return record


def call_id(query: Query, index: int, answer: int = 0) -> str:
    """The id of a call: the same in every run, and different in every turn of a conversation.

    Args:
        query: the query that the answer belongs to.
        index: position of the call in its answer.
        answer: position of the answer, if several were requested.
    """
    origin = (query.chat_id, query.sampling.seed, len(query.messages), answer, index)
    return f"call_{hashlib.blake2b(json.dumps(origin).encode(), digest_size=12).hexdigest()}"


def with_call_ids(result: Result, query: Query) -> Result:
    """A result with the ids that its calls have in the answer to `query`."""
    answers = (result, *result.alternatives)
    if not any(answer.tool_calls for answer in answers):
        return result
    first, *others = [
        replace(
            answer,
            tool_calls=tuple(
                replace(call, id=call_id(query, index, at))
                for index, call in enumerate(answer.tool_calls)
            ),
        )
        for at, answer in enumerate(answers)
    ]
    return replace(first, alternatives=tuple(others))


def delta_record(delta: ToolCallDelta, query: Query, answer: int) -> dict[str, Any]:
    """A piece of a call as a JSON object; the first one names the call.

    Args:
        delta: the piece.
        query: the query that the answer belongs to.
        answer: position of the answer, if several were requested.
    """
    if not delta.name:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    return {
        "index": delta.index,
        "id": call_id(query, delta.index, answer),
        "type": "function",
        "function": {"name": delta.name, "arguments": delta.arguments},
    }
