"""Queries and answers as JSON in the dialects that smol can speak to a server. No I/O."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from smolcli.errors import QueryError
from smolcli.protocol.query import format_fields
from smolcli.types import ErrorCode, FinishReason, Query, Result, Usage, failure

_TOO_LONG = ("context_length_exceeded", "maximum context length", "prompt_too_long")
_PLAIN_ROLES = (["user"], ["system", "user"])


class Dialect(StrEnum):
    """The API that a server implements. The values appear in manifests."""

    SMOL = "smol"
    PLAIN = "chat"  # POST /chat with prompts and no other fields
    OPENAI = "openai"


class MalformedAnswer(Exception):
    """A server's answer does not have the shape that its API promises."""


def chat_body(query: Query, dialect: Dialect) -> dict[str, Any]:
    """A query as the body of /chat, or an item of /generate_batch.

    Raises:
        QueryError: the dialect cannot express the query.
    """
    options = _options(query, dialect)
    if dialect is Dialect.PLAIN:
        return {"chat_id": query.chat_id} | plain_prompts(query)
    body = {"chat_id": query.chat_id, "messages": _messages(query)} | _sampling(query) | options
    return body | {"max_new_tokens": query.sampling.max_new_tokens, "seed": query.sampling.seed}


def plain_prompts(query: Query) -> dict[str, str]:
    """The prompts of a query that is not a conversation.

    Raises:
        QueryError: it is a conversation.
    """
    if [message.role for message in query.messages] not in _PLAIN_ROLES:
        raise QueryError("the upstream server does not support conversations", field="messages")
    return {f"{message.role}_prompt": message.content for message in query.messages}


def completion_body(query: Query, model: str, dialect: Dialect, is_stream: bool) -> dict[str, Any]:
    """A query as the body of /v1/chat/completions.

    Parameters that OpenAI's API lacks are sent to an OpenAI-compatible server only if they have
    an effect.

    Args:
        query: what to ask.
        model: the server's name for its model.
        dialect: OPENAI or SMOL.
        is_stream: whether to stream the answer.

    Raises:
        QueryError: the dialect cannot express the query.
    """
    body: dict[str, Any] = {"model": model, "messages": _messages(query)} | _sampling(query)
    if dialect is Dialect.OPENAI:
        neutral = {"top_k": 0, "repetition_penalty": 1.0}
        body = {name: value for name, value in body.items() if value != neutral.get(name)}
    body |= _options(query, dialect)
    body |= {"max_tokens": query.sampling.max_new_tokens, "seed": query.sampling.seed}
    return body | {"stream": True, "stream_options": {"include_usage": True}} if is_stream else body


def _messages(query: Query) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in query.messages]


def _sampling(query: Query) -> dict[str, Any]:
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    values: dict[str, Any] = {name: getattr(query.sampling, name) for name in names}
    return values | {"stop": list(query.stop)} if query.stop else values


def _options(query: Query, dialect: Dialect) -> dict[str, Any]:
    """What a query requests beyond a single free text.

    Raises:
        QueryError: the dialect cannot express it.
    """
    fields = format_fields(query.format)
    if query.format is None and dialect is Dialect.SMOL:
        fields["response_format"] = {"type": "text"}  # overrides the server's own --schema
    if query.n > 1:
        fields["n"] = query.n
    if query.top_logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": query.top_logprobs}
    unsupported = {
        Dialect.SMOL: set(),
        Dialect.OPENAI: {"choices"},
        Dialect.PLAIN: set(fields),
    }[dialect]
    for name in sorted(unsupported & fields.keys()):
        raise QueryError(f"the upstream server does not support {name}", field=name)
    return fields


def load_object(data: bytes | str) -> dict[str, Any]:
    """Parse a body or a line that holds one JSON object.

    Raises:
        MalformedAnswer: it does not.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise MalformedAnswer("the answer is not JSON") from exc
    if not isinstance(value, dict):
        raise MalformedAnswer("the answer is not a JSON object")
    return value


def parse_batch(body: Mapping[str, Any], queries: list[Query], dialect: Dialect) -> list[Result]:
    """The results in the body of a batch, in the order of its queries.

    Raises:
        MalformedAnswer: the body does not hold one result for each query.
    """
    records = body.get("responses")
    if not isinstance(records, list) or len(records) != len(queries):
        raise MalformedAnswer(f"the answer does not have the responses of {len(queries)} queries")
    return [parse_record(r, query, dialect) for r, query in zip(records, queries, strict=True)]


def parse_record(record: Any, query: Query, dialect: Dialect) -> Result:
    """The result in the body of /chat, or in an item of a batch.

    Raises:
        MalformedAnswer: there is none.
    """
    if not isinstance(record, dict):
        raise MalformedAnswer("a response is not an object")
    if "response" not in record and ("error" in record or "detail" in record):
        return parse_error(record, query)
    text, chat_id = record.get("response"), record.get("chat_id", query.chat_id)
    if not isinstance(text, str) or str(chat_id) != query.chat_id:
        raise MalformedAnswer("a response has no text or belongs to another query")
    if dialect is Dialect.PLAIN:
        record = {**record, "response": _without_prompt(text, query)}
    others = record.get("alternatives")
    records = [record, *others] if isinstance(others, list) else [record]
    return to_result(query, records, record.get("usage"))


def parse_completion(body: Mapping[str, Any], query: Query) -> Result:
    """The result in the body of /v1/chat/completions.

    Raises:
        MalformedAnswer: there is none.
    """
    try:
        records = [
            {
                "response": (choice["message"]["content"] or "").strip(),
                "finish_reason": choice.get("finish_reason"),
                "logprobs": logprobs_of(choice),
            }
            for choice in sorted(body["choices"], key=lambda choice: choice.get("index", 0))
        ]
        return to_result(query, records, body.get("usage"))
    except (LookupError, TypeError, AttributeError) as exc:
        raise MalformedAnswer("the answer is not a chat completion") from exc


def logprobs_of(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The log probabilities in a choice, or in a chunk of a stream."""
    return (choice.get("logprobs") or {}).get("content") or []


def to_result(query: Query, records: Sequence[Mapping[str, Any]], usage: object) -> Result:
    """The result of a query that a server answered.

    Args:
        query: what was asked.
        records: its answers, each in the shape of /chat.
        usage: tokens of all answers, as the server reported them; unknown if it did not.

    Raises:
        MalformedAnswer: a record is not an answer.
    """
    if len(records) < query.n:
        message = f"the upstream server gave {len(records)} of {query.n} answers"
        return failure(query, message, ErrorCode.INTERNAL, "n")
    try:
        first, *others = [_answer(query, record) for record in records[: query.n]]
    except (LookupError, TypeError, AttributeError) as exc:
        raise MalformedAnswer("an answer has no text") from exc
    if failed := next((each for each in (first, *others) if each.is_error), None):
        return failed
    return replace(first, alternatives=tuple(others), usage=_usage(usage))


def _answer(query: Query, record: Mapping[str, Any]) -> Result:
    text, is_cut_off = record["response"], record.get("finish_reason") == "length"
    if query.format is not None and query.format.schema and not _is_json(text):
        message = "the answer is not complete JSON" + (": it was cut off" if is_cut_off else "")
        return failure(query, message, ErrorCode.INCOMPLETE_JSON)
    return Result(
        chat_id=query.chat_id,
        response=text,
        finish_reason=FinishReason.LENGTH if is_cut_off else FinishReason.STOP,
        logprobs=None if query.top_logprobs is None else record.get("logprobs", []),
        metadata=query.metadata,
        line=query.line,
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def parse_error(body: Mapping[str, Any], query: Query, status: int = 500) -> Result:
    """The error in a body, in the shape of smol, OpenAI, vLLM or FastAPI.

    Args:
        body: holds the error.
        query: what was asked.
        status: the response's HTTP status, which tells whose fault it is if the body does not.
    """
    error = body.get("error", body)
    detail = error if isinstance(error, dict) else body
    message = error if isinstance(error, str) else detail.get("message", detail.get("detail"))
    code = _error_code(detail.get("error_code", detail.get("code")), str(message), status)
    field = detail.get("field", detail.get("param"))
    return failure(query, str(message), code, field if isinstance(field, str) else None)


def _error_code(code: object, message: str, status: int) -> ErrorCode:
    if any(sign in f"{code} {message}" for sign in _TOO_LONG):
        return ErrorCode.PROMPT_TOO_LONG
    if isinstance(code, str) and code in set(ErrorCode):
        return ErrorCode(code)
    return ErrorCode.INVALID_VALUE if 400 <= status < 500 else ErrorCode.INTERNAL


def _usage(usage: object) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(name) for name in Usage.__slots__]
    return Usage(*counts) if all(isinstance(n, int) for n in counts) else None  # type: ignore[arg-type]


def _without_prompt(text: str, query: Query) -> str:
    """The text after the prompts, which some servers repeat at the start of the response."""
    text = text.strip()
    for message in query.messages:
        text = text.removeprefix(message.content.strip()).strip()
    return text
