"""Lines without ids: conversations and prompts as in data sets and fine-tuning files.

    {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}
    {"prompt": "Hi", "system": "Be brief."}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}

Other members are parameters of OpenAI's chat completions. Assistant messages at the end are the
reference answer: they are not part of the prompt.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from smolcli.errors import QueryError
from smolcli.protocol.chat_completions import CompletionFields, parse_completion
from smolcli.protocol.fields import decimal_id
from smolcli.protocol.json_text import shorten
from smolcli.settings import QueryDefaults
from smolcli.types import ErrorCode, Query

REFERENCE = "reference"  # the key of the reference answer in a result's metadata
CONTENTS = ("messages", "prompt", "conversations")

_IGNORED = ("id", "model", "stream", "stream_options")
_KNOWN = {*CompletionFields.model_fields, *_IGNORED}
_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
}


def is_bare(value: object) -> bool:
    """Whether a JSON value has the shape of such a line, valid or not."""
    return (
        isinstance(value, dict)
        and not {"chat_id", "custom_id"} & value.keys()
        and any(value.get(name) is not None for name in CONTENTS)
    )


def bare_id(value: object, line: str) -> str:
    """The id of a line: its `id`, or else the number of the line."""
    found = decimal_id(value.get("id")) if isinstance(value, dict) else None
    return found if isinstance(found, str) and found else line


def parse_bare(value: object, defaults: QueryDefaults, chat_id: str, line: int) -> Query:
    """Parse the JSON value of one line.

    Args:
        value: the JSON value.
        defaults: values for the parameters that it leaves out.
        chat_id: the id of the query.
        line: the line number that the query carries.

    Raises:
        QueryError: naming the first invalid member.
    """
    if not isinstance(value, dict):
        raise QueryError("a line must be a JSON object", ErrorCode.NOT_AN_OBJECT)
    for name, format in (("chat_id", "smol's own format"), ("custom_id", "OpenAI's batch format")):
        if name in value:
            raise QueryError(
                f"this line is in {format}, but the file has lines of messages or prompts without "
                f"{name}; a file cannot mix the two"
            )
    body, metadata = with_messages(value)
    given = body.pop("max_new_tokens", None)
    if given is not None and body.get("max_tokens") is None:
        body["max_tokens"] = given
    if defaults.extra_fields != "error":
        unknown = {name: item for name, item in body.items() if name not in _KNOWN}
        body = {name: item for name, item in body.items() if name in _KNOWN}
        metadata = (unknown if defaults.extra_fields == "keep" else {}) | metadata
    body = {name: item for name, item in body.items() if name not in _IGNORED}
    query = parse_completion(body, defaults, chat_id, line).query
    return replace(query, metadata=metadata or None)


def with_messages(value: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Bring a line's conversation into the form of `messages`.

    Args:
        value: the line.

    Returns:
        The line with `messages` in place of the members that make up the conversation, and its
        metadata, to which the reference answer is added.

    Raises:
        QueryError: the conversation is invalid.
    """
    body = {name: item for name, item in value.items() if item is not None}
    given = [name for name in CONTENTS if name in body]
    if not given:
        raise QueryError(
            "messages, prompt or conversations is required", ErrorCode.MISSING_FIELD, "messages"
        )
    if len(given) > 1:
        raise QueryError(f"{given[1]} cannot be combined with {given[0]}", field=given[1])
    content = body.pop(given[0])
    messages = _TO_MESSAGES[given[0]](content)
    metadata = body.pop("metadata", {})
    if not isinstance(metadata, dict):
        raise QueryError("metadata must be an object", field="metadata")
    references = [body.pop("completion")] if given[0] == "prompt" and "completion" in body else []
    if system := _system(body):
        messages = [{"role": "system", "content": system}, *messages]
    if not body.get("continue_final_message"):
        while messages and _is_answer(messages[-1]):
            references.insert(0, messages[-1].get("content"))
            messages = messages[:-1]
    if references:
        metadata = {REFERENCE: references[0] if len(references) == 1 else references} | metadata
    return body | {"messages": messages}, metadata


def _system(body: dict[str, Any]) -> str | None:
    """Take the system prompt out of a line."""
    names = [name for name in ("system", "system_prompt") if name in body]
    values = [body.pop(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            raise QueryError(f"{name} must be a string", field=name)
    return next(iter(values), None)


def _is_answer(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _of_messages(content: object) -> list[Any]:
    if not isinstance(content, list) or not content:
        raise QueryError("messages must be a non-empty list of {role, content}", field="messages")
    return [_without_weight(message) for message in content]


def _without_weight(message: object) -> object:
    """A message without the member that only fine-tuning reads."""
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if name != "weight"}


def _of_prompt(content: object) -> list[Any]:
    if isinstance(content, list) and content:
        return _of_messages(content)  # a prompt may be a conversation
    if not isinstance(content, str):
        raise QueryError("prompt must be a string or a list of {role, content}", field="prompt")
    if not content.strip():
        raise QueryError("prompt must not be blank", ErrorCode.MISSING_FIELD, "prompt")
    return [{"role": "user", "content": content}]


def _of_conversations(content: object) -> list[Any]:
    if not isinstance(content, list) or not content:
        raise QueryError(
            "conversations must be a non-empty list of {from, value}", field="conversations"
        )
    return [_turn(index, turn) for index, turn in enumerate(content)]


def _turn(index: int, turn: object) -> dict[str, str]:
    path = f"conversations[{index}]"
    if not isinstance(turn, dict):
        raise QueryError(f"{path} must be an object with from and value", field=path)
    sender, text = _member(turn, ("from", "role")), _member(turn, ("value", "content"))
    if not isinstance(sender, str) or not isinstance(text, str):
        raise QueryError(f"{path} must have two strings, from and value", field=path)
    if sender.casefold() not in _ROLES:
        raise QueryError(
            f"{path}.from {shorten(sender)!r} is not supported; it is one of "
            f"{', '.join(sorted(_ROLES))}",
            field=f"{path}.from",
        )
    return {"role": _ROLES[sender.casefold()], "content": text}


def _member(turn: dict[str, Any], names: Sequence[str]) -> object:
    return next((turn[name] for name in names if name in turn), None)


_TO_MESSAGES = {
    "messages": _of_messages,
    "prompt": _of_prompt,
    "conversations": _of_conversations,
}
