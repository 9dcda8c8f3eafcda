"""The fields of requests that concern function calling: tools, choices and earlier calls."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from smolcli.errors import QueryError
from smolcli.protocol.fields import Flag, Integer, Items, Lenient, Text, did_you_mean
from smolcli.protocol.json_text import shorten
from smolcli.types import ErrorCode, Function, ToolCall, ToolMode, Tools

MAX_TOOLS = 128

# JSON Schema's portable way to say "end of text" is a lookahead, which pydantic does not support.
FunctionName = Annotated[
    str,
    Field(
        strict=True,
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        json_schema_extra={"pattern": r"^[A-Za-z0-9_-]{1,64}(?![\s\S])"},
    ),
]


class FunctionFields(Lenient):
    """A function that the model may call."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="a JSON Schema of type object; empty if the function takes no arguments"
    )
    strict: Flag | None = Field(None, description="no effect: arguments always follow the schema")


class ToolFields(Lenient):
    """A tool; functions are the only kind that is supported."""

    type: Literal["function"]
    function: FunctionFields


class FunctionRef(Lenient):
    """The name of one of the functions."""

    name: Text


class NamedTool(Lenient):
    """One of the tools, by name."""

    type: Literal["function"]
    function: FunctionRef


class AllowedTools(Lenient):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[Items[NamedTool], Field(min_length=1)]


class AllowedToolsChoice(Lenient):
    """Restricts the answer to some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolList = Annotated[list[ToolFields], Field(max_length=MAX_TOOLS)]
ChoiceObject = Annotated[NamedTool | AllowedToolsChoice, Field(discriminator="type")]
ToolChoice = Literal["none", "auto", "required"] | ChoiceObject

TOOLS_DESCRIPTION = (
    f"a list of up to {MAX_TOOLS} functions, "
    '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}, '
    "with names of up to 64 letters, digits, underscores and dashes"
)
CHOICE_DESCRIPTION = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'


class CalledFunction(Lenient):
    """What an earlier answer called; `arguments` is JSON text."""

    KEPT = frozenset({"arguments"})

    name: Text
    arguments: Text
    parsed_arguments: Any = Field(None, description="any value; it has no effect")


class CallFields(Lenient):
    """A call in an earlier answer."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Integer | None = Field(None, description="an integer; it has no effect")


def parse_tools(
    tools: Sequence[ToolFields] | None,
    choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice | None,
    is_parallel: bool | None,
) -> Tools | None:
    """What a query says about tools; None if it has none.

    Args:
        tools: the field of that name.
        choice: the field `tool_choice`.
        is_parallel: the field `parallel_tool_calls`.

    Raises:
        QueryError: the fields contradict each other.
    """
    if not tools:
        if choice in (None, "none", "auto"):
            return None
        raise QueryError("tool_choice requires tools", field="tool_choice")
    functions = tuple(_function(tool.function) for tool in tools)
    _reject_duplicates(functions)
    parallel = True if is_parallel is None else is_parallel
    match choice:
        case NamedTool():
            name = _known(choice.function.name, functions, "tool_choice.function.name")
            return Tools(functions, ToolMode.REQUIRED, (name,), is_parallel=False)
        case AllowedToolsChoice(allowed_tools=allowed):
            path = "tool_choice.allowed_tools.tools[{}].function.name"
            names = [
                _known(tool.function.name, functions, path.format(at))
                for at, tool in enumerate(allowed.tools)
            ]
            return Tools(functions, ToolMode(allowed.mode), tuple(dict.fromkeys(names)), parallel)
        case _:
            return Tools(functions, ToolMode(choice or "auto"), is_parallel=parallel)


def tool_values(
    tools: Sequence[ToolFields] | None,
    choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice | None,
    is_parallel: bool | None,
) -> dict[str, Any]:
    """Parsed fields as the JSON that `parse_query` takes; see `parse_tools` for the arguments."""
    return {
        "tools": [tool.model_dump(exclude_none=True) for tool in tools or ()],
        "tool_choice": choice if isinstance(choice, str | None) else choice.model_dump(),
        "parallel_tool_calls": is_parallel,
    }


def _function(fields: FunctionFields) -> Function:
    return Function(
        fields.name,
        fields.description or "",
        json.dumps(fields.parameters, ensure_ascii=False) if fields.parameters else "",
        fields.strict,
    )


def _reject_duplicates(functions: Sequence[Function]) -> None:
    seen: dict[str, int] = {}
    for at, function in enumerate(functions):
        first = seen.setdefault(function.name, at)
        if first != at:
            path = f"tools[{at}].function.name"
            raise QueryError(f"{path} {function.name!r} is the name of tools[{first}]", field=path)


def _known(name: str, functions: Sequence[Function], path: str) -> str:
    names = [function.name for function in functions]
    if name not in names:
        message = f"{path} {shorten(name)!r} is not in tools{did_you_mean(name, names)}"
        raise QueryError(message, field=path)
    return name


def parse_calls(calls: Sequence[CallFields] | None) -> tuple[ToolCall, ...]:
    """The calls of an earlier answer."""
    return tuple(
        ToolCall(call.id, call.function.name, call.function.arguments) for call in calls or ()
    )


def check_calls(
    role: str, calls: Sequence[CallFields] | None, call_id: str | None, path: str
) -> None:
    """Check that the members of a message that concern calls fit its role.

    Args:
        role: the message's role.
        calls: its `tool_calls`.
        call_id: its `tool_call_id`.
        path: the message's path in the request.

    Raises:
        QueryError: they do not.
    """
    if calls and role != "assistant":
        path = f"{path}.tool_calls"
        raise QueryError(f"{path} requires the role 'assistant', not {role!r}", field=path)
    path = f"{path}.tool_call_id"
    if call_id and role != "tool":
        raise QueryError(f"{path} requires the role 'tool', not {role!r}", field=path)
    if role == "tool" and not call_id:
        message = f"{path} is required: it names the call that this message is the result of"
        raise QueryError(message, ErrorCode.MISSING_FIELD, path)


def message_rules(absent: list[Any], *, is_content_optional: bool) -> dict[str, Any]:
    """What `check_calls` requires of a message, as a JSON Schema.

    Args:
        absent: values of an optional member that count as absent.
        is_content_optional: whether the assistant's content may be absent without calls.
    """
    has_content: dict[str, Any] = {
        "required": ["content"],
        "properties": {"content": {"type": ["string", "array"]}},
    }
    has_calls: dict[str, Any] = {
        "required": ["tool_calls"],
        "properties": {"tool_calls": {"type": "array", "minItems": 1}},
    }
    has_id: dict[str, Any] = {
        "required": ["tool_call_id"],
        "properties": {"tool_call_id": {"type": "string", "minLength": 1}},
    }
    no_calls: dict[str, Any] = {"properties": {"tool_calls": {"enum": [*absent, []]}}}
    no_id: dict[str, Any] = {"properties": {"tool_call_id": {"enum": [*absent, ""]}}}
    content_or_calls = [] if is_content_optional else [{"anyOf": [has_content, has_calls]}]

    def role(*names: str) -> dict[str, Any]:
        return {"properties": {"role": {"enum": list(names)}}}

    return {
        "anyOf": [
            {"allOf": [role("system", "developer", "user"), has_content, no_calls, no_id]},
            {"allOf": [role("assistant"), no_id, *content_or_calls]},
            {"allOf": [role("tool"), has_content, no_calls, has_id]},
        ]
    }
