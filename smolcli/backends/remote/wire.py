"""Queries and answers as the servers that smol can ask have them; nothing is sent from here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from smolcli.errors import QueryError
from smolcli.protocol.query import format_fields
from smolcli.types import ErrorCode, FinishReason, Query, Result, Usage, failure

# These befell the server, not the query: another time, or another server, may do better.
PASSING = frozenset(
    {ErrorCode.OVERLOADED, ErrorCode.TIMEOUT, ErrorCode.CANCELLED, ErrorCode.BACKEND_ERROR}
)
_TOO_LONG = ("context_length_exceeded", "maximum context length", "prompt_too_long")
_PLAIN_ROLES = (["user"], ["system", "user"])


class Kind(StrEnum):
    """How a server wants to be asked."""

    SMOL = "smol"
    PLAIN = "chat"  # POST /chat with a prompt, and no field besides
    OPENAI = "openai"


class Nonsense(Exception):
    """A server's answer is not of the shape that its kind has."""


def chat_body(query: Query, kind: Kind) -> dict[str, Any]:
    """A query as /chat and /generate_batch take it.

    Raises:
        QueryError: where the server has no words for it.
    """
    wishes = _wishes(query, kind)
    if kind is Kind.PLAIN:
        return {"chat_id": query.chat_id} | plain_prompts(query)
    body = {"chat_id": query.chat_id, "messages": _messages(query)} | _sampling(query) | wishes
    return body | {"max_new_tokens": query.sampling.max_new_tokens, "seed": query.sampling.seed}


def plain_prompts(query: Query) -> dict[str, str]:
    """The prompts of a query that is no conversation.

    Raises:
        QueryError: where it is one.
    """
    if [message.role for message in query.messages] not in _PLAIN_ROLES:
        raise QueryError("the upstream server takes no conversations", field="messages")
    return {f"{message.role}_prompt": message.content for message in query.messages}


def completion_body(query: Query, model: str, kind: Kind, is_stream: bool) -> dict[str, Any]:
    """A query as /v1/chat/completions takes it; of what is not OpenAI's, only what is asked for."""
    body: dict[str, Any] = {"model": model, "messages": _messages(query)} | _sampling(query)
    if kind is Kind.OPENAI:
        idle = {"top_k": 0, "repetition_penalty": 1.0}
        body = {name: value for name, value in body.items() if value != idle.get(name)}
    body |= _wishes(query, kind)
    body |= {"max_tokens": query.sampling.max_new_tokens, "seed": query.sampling.seed}
    return body | {"stream": True, "stream_options": {"include_usage": True}} if is_stream else body


def _messages(query: Query) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in query.messages]


def _sampling(query: Query) -> dict[str, Any]:
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    values: dict[str, Any] = {name: getattr(query.sampling, name) for name in names}
    return values | {"stop": list(query.stop)} if query.stop else values


def _wishes(query: Query, kind: Kind) -> dict[str, Any]:
    """What is asked for beside one text, where anything is.

    Raises:
        QueryError: where the server has no words for it.
    """
    fields = format_fields(query.format)
    if query.format is None and kind is Kind.SMOL:
        fields["response_format"] = {"type": "text"}  # whatever --schema the server has
    if query.n > 1:
        fields["n"] = query.n
    if query.top_logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": query.top_logprobs}
    unknown = {Kind.SMOL: set(), Kind.OPENAI: {"choices"}, Kind.PLAIN: set(fields)}[kind]
    for name in sorted(unknown & fields.keys()):
        raise QueryError(f"the upstream server has no {name}", field=name)
    return fields


def load_object(data: bytes | str) -> dict[str, Any]:
    """The JSON object in a body or a line.

    Raises:
        Nonsense: where it is none.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise Nonsense("the answer is not JSON") from exc
    if not isinstance(value, dict):
        raise Nonsense("the answer is not a JSON object")
    return value


def read_batch(body: Mapping[str, Any], queries: list[Query], kind: Kind) -> list[Result]:
    """The results of a whole batch, in the order of its queries.

    Raises:
        Nonsense: where they are not that.
    """
    records = body.get("responses")
    if not isinstance(records, list) or len(records) != len(queries):
        raise Nonsense(f"the answer has not the responses of {len(queries)} queries")
    return [read_record(r, query, kind) for r, query in zip(records, queries, strict=True)]


def read_record(record: Any, query: Query, kind: Kind) -> Result:
    """What became of one query, from the body of /chat, or an item of a batch.

    Raises:
        Nonsense: where it does not say.
    """
    if not isinstance(record, dict):
        raise Nonsense("a response is not an object")
    if "response" not in record and ("error" in record or "detail" in record):
        return read_error(record, query)
    text, chat_id = record.get("response"), record.get("chat_id", query.chat_id)
    if not isinstance(text, str) or str(chat_id) != query.chat_id:
        raise Nonsense("a response has no text, or is another query's")
    if kind is Kind.PLAIN:
        record = {**record, "response": _without_prompt(text, query)}
    others = record.get("alternatives")
    records = [record, *others] if isinstance(others, list) else [record]
    return answer(query, records, record.get("usage"))


def read_completion(body: Mapping[str, Any], query: Query) -> Result:
    """The answer in a body of /v1/chat/completions.

    Raises:
        Nonsense: where there is none.
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
        return answer(query, records, body.get("usage"))
    except (LookupError, TypeError, AttributeError) as exc:
        raise Nonsense("the answer is no chat completion") from exc


def logprobs_of(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries for the tokens of a choice, or of a piece of one."""
    return (choice.get("logprobs") or {}).get("content") or []


def answer(query: Query, records: Sequence[Mapping[str, Any]], usage: object) -> Result:
    """The result of a query that was answered; who tells no usage leaves it out.

    Args:
        query: that was asked.
        records: its answers, each as /chat has it.
        usage: of all of them.

    Raises:
        Nonsense: where they are none.
    """
    if len(records) < query.n:
        message = f"the upstream server gave {len(records)} of {query.n} answers"
        return failure(query, message, ErrorCode.INTERNAL, "n")
    try:
        first, *others = [_answer(query, record) for record in records[: query.n]]
    except (LookupError, TypeError, AttributeError) as exc:
        raise Nonsense("an answer has no text") from exc
    if failed := next((each for each in (first, *others) if each.is_error), None):
        return failed
    return replace(first, alternatives=tuple(others), usage=_usage(usage))


def _answer(query: Query, record: Mapping[str, Any]) -> Result:
    text, is_cut = record["response"], record.get("finish_reason") == "length"
    if query.format is not None and query.format.schema and not _is_json(text):
        message = "the answer is no whole JSON" + (": it was cut off" if is_cut else "")
        return failure(query, message, ErrorCode.INCOMPLETE_JSON)
    return Result(
        chat_id=query.chat_id,
        response=text,
        finish_reason=FinishReason.LENGTH if is_cut else FinishReason.STOP,
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


def read_error(body: Mapping[str, Any], query: Query, status: int = 500) -> Result:
    """The failure that a server tells of, in smol's words, OpenAI's, vLLM's or FastAPI's."""
    error = body.get("error", body)
    detail = error if isinstance(error, dict) else body
    message = error if isinstance(error, str) else detail.get("message", detail.get("detail"))
    code = _code(detail.get("error_code", detail.get("code")), str(message), status)
    field = detail.get("field", detail.get("param"))
    return failure(query, str(message), code, field if isinstance(field, str) else None)


def _code(code: object, message: str, status: int) -> ErrorCode:
    if any(sign in f"{code} {message}" for sign in _TOO_LONG):
        return ErrorCode.PROMPT_TOO_LONG
    known = isinstance(code, str) and code in set(ErrorCode)
    unknown = ErrorCode.INVALID_VALUE if 400 <= status < 500 else ErrorCode.INTERNAL
    return ErrorCode(str(code)) if known else unknown


def _usage(usage: object) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(name) for name in Usage.__slots__]
    return Usage(*counts) if all(isinstance(n, int) for n in counts) else None  # type: ignore[arg-type]


def _without_prompt(text: str, query: Query) -> str:
    """The text behind the prompts, which some servers repeat before they answer."""
    text = text.strip()
    for message in query.messages:
        text = text.removeprefix(message.content.strip()).strip()
    return text
