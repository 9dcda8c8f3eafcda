"""Function calls as text: how a prompt offers functions, and how a model writes calls."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from smolcli.protocol.json_text import parse_json
from smolcli.protocol.tools import function_record
from smolcli.types import Message, ToolCall, ToolCallDelta, ToolMode, Tools

MARKER = "<tool_call>"  # begins calls, in every syntax
NAME, ARGUMENTS, END = '{"name": "', '", "arguments": ', "}"  # around a name and its arguments


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How a model writes calls: MARKER, then this text around and between the calls.

    Args:
        opening: before the first call.
        separator: between two calls.
        closing: after the last call.
    """

    opening: str
    separator: str
    closing: str

    def write(self, calls: Sequence[ToolCall]) -> str:
        """Calls of an earlier answer as the model would have written them."""
        texts = [f"{NAME}{call.name}{ARGUMENTS}{_compact(call.arguments)}{END}" for call in calls]
        return f"{MARKER}{self.opening}{self.separator.join(texts)}{self.closing}"


# One list, as SmolLM2-1.7B was trained; and one tag per call, as in Hermes and Qwen templates.
LIST = CallSyntax("[", ", ", "]</tool_call>")
TAGS = CallSyntax("\n", f"\n</tool_call>\n{MARKER}\n", "\n</tool_call>")


def template_syntax(source: str) -> CallSyntax | None:
    """The syntax in which a chat template describes tools; None if it does not or is unknown."""
    names = set(re.findall(r"\w+", source))
    is_known = MARKER in source and {"tools", "tool_calls"} <= names
    return TAGS if is_known else None


def _compact(arguments: str) -> str:
    """Arguments as valid JSON: what is not JSON becomes a string."""
    return json.dumps(parsed_arguments(arguments), ensure_ascii=False)


def parsed_arguments(arguments: str) -> Any:
    """The value of a call's arguments; text that is not JSON is returned as it is."""
    try:
        return parse_json(arguments)
    except ValueError:
        return arguments


# Prompts for templates that do not know tools.

_INTRODUCTION = """You can call functions. These are available, described in JSON:
<tools>
{tools}
</tools>
"""
_FORM = """a list of calls in this form:
<tool_call>[{"name": "<function name>", "arguments": {"<argument>": <value>}}]</tool_call>"""
_AUTO = f"""If a function is needed to answer, reply only with {_FORM}
The results follow in <tool_response> tags. If no function is needed, reply with plain text."""
_REQUIRED = f"Reply only with {_FORM}"


def plain_messages(messages: Sequence[Message], tools: Tools | None) -> list[Message]:
    """A conversation without tools for templates that know only system, user and assistant.

    The system message describes the functions, calls become text of the assistant, and their
    results become user messages.

    Args:
        messages: the conversation.
        tools: functions to offer.
    """
    turns: list[Message] = []
    for message in messages:
        if message.role == "tool":
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if turns and turns[-1].tool_call_id:
                turns[-1] = replace(turns[-1], content=f"{turns[-1].content}\n{result}")
            else:
                turns.append(Message("user", result, tool_call_id=message.tool_call_id))
        elif message.tool_calls:
            calls = LIST.write(message.tool_calls)
            turns.append(Message(message.role, "\n".join(filter(None, (message.content, calls)))))
        else:
            turns.append(message)
    if tools is None or tools.mode is ToolMode.NONE:
        return turns
    system = [turns.pop(0).content] if turns and turns[0].role == "system" else []
    return [Message("system", "\n\n".join([*filter(None, system), _description(tools)])), *turns]


def _description(tools: Tools) -> str:
    functions = json.dumps([function_record(f) for f in tools.functions], ensure_ascii=False)
    rule = _REQUIRED if tools.mode is ToolMode.REQUIRED else _AUTO
    return _INTRODUCTION.replace("{tools}", functions) + rule


# Conversations for templates that know tools.


def template_message(message: Message, names: Mapping[str, str]) -> dict[str, Any]:
    """A message in the form that chat templates expect: arguments are values, not text.

    Args:
        message: the message.
        names: the name of the called function for each call id.
    """
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": parsed_arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        turn["tool_call_id"] = message.tool_call_id
        turn |= {"name": names[message.tool_call_id]} if message.tool_call_id in names else {}
    return turn


# Generated calls.


class CallReader:
    """Reads calls from the text after MARKER while it is generated.

    The grammar guarantees the form of the text, except that it may be cut off.
    """

    def __init__(self) -> None:
        self._text = ""  # not yet understood
        self._scanner: ArgumentScanner | None = None  # inside of arguments
        self._names: list[str] = []
        self._arguments: list[list[str]] = []

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls so far; they have no ids.

        The arguments of the last may be incomplete, but not empty: clients take no arguments for
        `{}`, and would execute the call.
        """
        pairs = zip(self._names, self._arguments, strict=True)
        return tuple(ToolCall("", name, "".join(pieces)) for name, pieces in pairs if pieces)

    def push(self, text: str) -> list[ToolCallDelta]:
        """Read the next piece of text; returns what it adds to the calls."""
        self._text += text
        deltas: list[ToolCallDelta] = []
        while (delta := self._next()) is not None:
            deltas.append(delta)
        return deltas

    def _next(self) -> ToolCallDelta | None:
        if self._scanner is not None:
            return self._read_arguments(self._scanner)
        _, found, rest = self._text.partition(NAME)
        name, is_named, rest = rest.partition(ARGUMENTS)
        if not (found and is_named):
            return None
        self._text, self._scanner = rest, ArgumentScanner()
        self._names.append(name)
        self._arguments.append([])
        return self._read_arguments(self._scanner)

    def _read_arguments(self, scanner: "ArgumentScanner") -> ToolCallDelta | None:
        if not self._text:
            return None
        end = scanner.find_end(self._text)
        piece = self._text if end is None else self._text[:end]
        self._text = self._text[len(piece) :]
        if end is not None:
            self._scanner = None
        is_first = not self._arguments[-1]
        self._arguments[-1].append(piece)
        return ToolCallDelta(len(self._names) - 1, self._names[-1] if is_first else "", piece)


class ArgumentScanner:
    """Finds the end of a JSON object in a stream of text."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_string = self._is_escape = False

    def find_end(self, piece: str) -> int | None:
        """Advance by a piece of text; returns where in it the object ends, or None."""
        for at, char in enumerate(piece):
            if self._is_escape:
                self._is_escape = False
            elif self._is_string:
                self._is_escape = char == "\\"
                self._is_string = char != '"'
            elif char == '"':
                self._is_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    return at + 1
        return None
