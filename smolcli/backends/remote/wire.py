"""Queries and answers as JSON in the dialects of upstream servers. No I/O."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from typing import Any, TypeGuard

from smolcli.backends.base import incomplete_json
from smolcli.errors import QueryError
from smolcli.protocol.answer_formats import format_fields
from smolcli.protocol.json_text import load_json, parse_json
from smolcli.protocol.text_completions import entries_of
from smolcli.protocol.tools import message_record, tools_record, with_call_ids
from smolcli.types import (
    ErrorCode,
    FinishReason,
    Query,
    Result,
    Sampling,
    TextPiece,
    ToolCall,
    ToolCallDelta,
    Usage,
    failure,
)

MAX_ERROR_CHARS = 1000
MAX_COUNT = 2**53  # tokens; larger counts fit neither a table nor every JSON parser
_TOO_LONG = ("context_length_exceeded", "maximum context length", "prompt_too_long")
_WITH_OPTION = ("min_p", "presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos")
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
        _reject_extensions(query)
        return {"chat_id": query.chat_id} | plain_prompts(query)
    body = {"chat_id": query.chat_id} | _prompt(query) | _sampling(query) | options
    return body | {"max_new_tokens": query.sampling.max_new_tokens, "seed": query.sampling.seed}


def plain_prompts(query: Query) -> dict[str, str]:
    """The prompts of a query that is not a conversation.

    Raises:
        QueryError: it is a conversation or a raw prompt.
    """
    if query.raw_prompt is not None:
        raise QueryError("the upstream server does not support raw_prompt", field="raw_prompt")
    if [message.role for message in query.messages] not in _PLAIN_ROLES:
        raise QueryError("the upstream server does not support conversations", field="messages")
    return {f"{message.role}_prompt": message.content for message in query.messages}


def completion_body(query: Query, model: str, dialect: Dialect, is_stream: bool) -> dict[str, Any]:
    """A query as the body of /v1/chat/completions, or of /v1/completions if it has a raw prompt.

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
    prompt = _prompt(query)
    if query.raw_prompt is not None:
        prompt["prompt"] = prompt.pop("raw_prompt")
    if query.continues:
        prompt["add_generation_prompt"] = False
    body: dict[str, Any] = {"model": model} | prompt | _sampling(query)
    if dialect is Dialect.OPENAI:
        neutral = asdict(Sampling())
        core = ("temperature", "top_p")
        body = {k: v for k, v in body.items() if k in core or v != neutral.get(k)}
    body |= _options(query, dialect)
    if query.raw_prompt is not None and query.top_logprobs is not None:
        body["logprobs"] = body.pop("top_logprobs")
    body |= {"max_tokens": query.sampling.max_new_tokens, "seed": query.sampling.seed}
    return body | {"stream": True, "stream_options": {"include_usage": True}} if is_stream else body


def _prompt(query: Query) -> dict[str, Any]:
    """The fields of smol's own format that hold the prompt."""
    if query.raw_prompt is None:
        return {"messages": _messages(query)} | _continuation(query)
    echo = {"echo": True} if query.echo else {}
    return {"raw_prompt": query.raw_prompt} | echo


def _continuation(query: Query) -> dict[str, bool]:
    """The field that says whether an assistant's last message is continued."""
    is_assistants = query.messages[-1].role == "assistant"
    return {"continue_final_message": query.continues} if is_assistants else {}


def _messages(query: Query) -> list[dict[str, Any]]:
    return [message_record(message) for message in query.messages]


def _sampling(query: Query) -> dict[str, Any]:
    """Sampling parameters: those that a server may have options for, and others if they are set."""
    sampling = query.sampling
    names = ("temperature", "top_p", "top_k", "repetition_penalty", *_WITH_OPTION)
    values: dict[str, Any] = {name: getattr(sampling, name) for name in names}
    return values | ({"stop": list(query.stop)} if query.stop else {}) | _extensions(query)


def _extensions(query: Query) -> dict[str, Any]:
    """The parameters that no server has options for, if they are set."""
    sampling = query.sampling
    values = {
        "logit_bias": {str(token_id): bias for token_id, bias in sampling.logit_bias},
        "stop_token_ids": list(sampling.stop_token_ids),
        "allowed_token_ids": list(sampling.allowed_token_ids),
        "include_stop_str_in_output": query.include_stop,
        "bad_words": list(query.bad_words),
    }
    return {name: value for name, value in values.items() if value}


def _reject_extensions(query: Query) -> None:
    """Reject what a server that only takes prompts would ignore.

    It ignores the oldest parameters too, which is how the service that smol replaces works.

    Raises:
        QueryError: a parameter is set.
    """
    values = {name: getattr(query.sampling, name) for name in _WITH_OPTION} | _extensions(query)
    if name := next((name for name, value in values.items() if value), None):
        raise QueryError(f"the upstream server does not support {name}", field=name)


def _options(query: Query, dialect: Dialect) -> dict[str, Any]:
    """Request fields for everything beyond a single unconstrained text.

    Raises:
        QueryError: the dialect cannot express it.
    """
    fields = format_fields(query.format) | tools_record(query.tools)
    if query.format is None and dialect is Dialect.SMOL:
        fields["response_format"] = {"type": "text"}  # overrides the server's own --schema
    if query.n > 1:
        fields["n"] = query.n
    if query.top_logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": query.top_logprobs}
    if query.prompt_logprobs is not None:
        fields["prompt_logprobs"] = query.prompt_logprobs
    unsupported = {
        Dialect.SMOL: set(),
        Dialect.OPENAI: {"choices", "structured_outputs", "prompt_logprobs"},
        Dialect.PLAIN: set(fields),
    }[dialect]
    for name in sorted(unsupported & fields.keys()):
        raise QueryError(f"the upstream server does not support {name}", field=name)
    return fields


def load_object(data: bytes) -> dict[str, Any]:
    """Parse a body or a line that holds one JSON object, without NaN or lone surrogates.

    Raises:
        MalformedAnswer: it does not.
    """
    try:
        value = load_json(data)
    except QueryError as exc:
        raise MalformedAnswer(f"the answer is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise MalformedAnswer("the answer is not a JSON object")
    return value


def parse_batch(data: bytes, queries: list[Query], dialect: Dialect) -> list[Result | None]:
    """The results in the body of a batch, in the order of its queries.

    Args:
        data: the body.
        queries: the queries of the batch.
        dialect: the API of the server.

    Returns:
        One result for each query; None for a query whose result is malformed.

    Raises:
        MalformedAnswer: the body does not hold one response for each query.
    """
    try:
        body = parse_json(data)  # lenient, so that one bad response does not affect the others
        records = body["responses"]
        if not isinstance(records, list) or len(records) != len(queries):
            raise ValueError
    except (ValueError, LookupError, TypeError) as exc:
        message = f"the answer does not have the responses of {len(queries)} queries"
        raise MalformedAnswer(message) from exc
    pairs = zip(records, queries, strict=True)
    return [_parse_item(record, query, dialect) for record, query in pairs]


def _parse_item(record: object, query: Query, dialect: Dialect) -> Result | None:
    try:
        return parse_record(load_object(json.dumps(record).encode()), query, dialect)
    except (MalformedAnswer, RecursionError):
        return None


def parse_record(record: Any, query: Query, dialect: Dialect) -> Result:
    """The result in the body of /chat, or in an item of a batch.

    Args:
        record: the parsed body or item.
        query: what was asked.
        dialect: the API of the server.

    Raises:
        MalformedAnswer: there is none.
    """
    if not isinstance(record, dict):
        raise MalformedAnswer("a response is not an object")
    has_answer = record.get("response") is not None or record.get("tool_calls")
    if not has_answer and (record.get("error") or record.get("detail")):
        return parse_error(record, query)
    if record.get("error_code") == ErrorCode.INCOMPLETE_JSON:
        return _incomplete(record, query)
    if "response" not in record:
        raise MalformedAnswer("a response has no text")
    text, chat_id = record["response"], record.get("chat_id", query.chat_id)
    if str(chat_id) != query.chat_id:
        raise MalformedAnswer("a response belongs to another query")
    if dialect is Dialect.PLAIN and isinstance(text, str):
        record = {**record, "response": _without_prompt(text, query)}
    others = record.get("alternatives")
    records = [record, *others] if isinstance(others, list) else [record]
    return to_result(query, records, record.get("usage"))


def _incomplete(record: Mapping[str, Any], query: Query) -> Result:
    """The result of an answer that a smol server reports as incomplete, with its text."""
    result = to_result(replace(query, n=1), [record], record.get("usage"))
    if query.accepts_partial:
        return result
    error = str(record.get("error"))[:MAX_ERROR_CHARS]
    return replace(result, error=error, error_code=ErrorCode.INCOMPLETE_JSON)


def parse_completion(body: Mapping[str, Any], query: Query) -> Result:
    """The result in the body of /v1/chat/completions.

    Raises:
        MalformedAnswer: there is none.
    """
    if not body.get("choices") and body.get("error"):
        return parse_error(body, query)
    is_raw = query.raw_prompt is not None
    try:
        records = [
            {
                "response": choice["text"] if is_raw else choice["message"].get("content"),
                "tool_calls": None if is_raw else choice["message"].get("tool_calls"),
                "finish_reason": choice.get("finish_reason"),
                "logprobs": logprobs_of(choice),
            }
            for choice in sorted(body["choices"], key=lambda choice: choice.get("index", 0))
        ]
        return to_result(query, records, body.get("usage"))
    except (LookupError, TypeError, AttributeError, ValueError) as exc:
        kind = "text" if is_raw else "chat"
        raise MalformedAnswer(f"the answer is not a {kind} completion") from exc


def logprobs_of(choice: Mapping[str, Any]) -> Any:
    """The log probabilities in a choice, or in a chunk of a stream; None if it has none.

    Raises:
        LookupError, TypeError, ValueError: those of a text completion are not in OpenAI's format.
    """
    logprobs = choice.get("logprobs") or {}
    return entries_of(logprobs) if "tokens" in logprobs else logprobs.get("content")


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
        message = f"the upstream server returned {len(records)} of {query.n} answers"
        return failure(query, message, ErrorCode.INTERNAL, "n")
    try:
        first, *others = [_answer(query, record) for record in records[: query.n]]
    except (LookupError, TypeError, AttributeError) as exc:
        raise MalformedAnswer("an answer is not an object") from exc
    if failed := next((each for each in (first, *others) if each.is_error), None):
        failed = replace(failed, usage=_usage(usage) if query.n == 1 else None)
        if failed.usage and failed.finish_reason is FinishReason.LENGTH:
            return incomplete_json(failed, failed.usage.completion_tokens)
        return failed
    result = replace(first, alternatives=tuple(others), usage=_usage(usage))
    return with_call_ids(result, query)


def _answer(query: Query, record: Mapping[str, Any]) -> Result:
    text, finish_reason = record["response"], _finish_reason(record.get("finish_reason"))
    calls = _calls(record.get("tool_calls")) if query.tools else ()
    if text is None and not calls:
        message = "the upstream server returned no text"
        if finish_reason is not None:
            message += f" (finish_reason {str(finish_reason)!r})"
        return failure(query, message, ErrorCode.INTERNAL)
    if not isinstance(text, str | None):
        raise MalformedAnswer("the text of an answer is not a string")
    text = text or ""
    text = text if query.keeps_space else text.strip()
    logprobs, prompt_logprobs = record.get("logprobs"), record.get("prompt_logprobs")
    is_cut_off = finish_reason is FinishReason.LENGTH
    has_schema = query.format is not None and bool(query.format.schema)
    json_text = calls[-1].arguments if calls and is_cut_off else text
    is_json_expected = is_cut_off if calls else has_schema
    is_whole = not is_json_expected or query.accepts_partial or _is_json(json_text)
    message = "the answer is not complete JSON" + (": it was cut off" if is_cut_off else "")
    return Result(
        chat_id=query.chat_id,
        response=None if calls and not text else text,
        tool_calls=calls,
        finish_reason=finish_reason,
        logprobs=_logprobs(logprobs) if query.top_logprobs is not None else None,
        prompt_logprobs=_logprobs(prompt_logprobs) if query.prompt_logprobs is not None else None,
        echo=query.echo if query.raw_prompt is not None else None,
        error=None if is_whole else message,
        error_code=None if is_whole else ErrorCode.INCOMPLETE_JSON,
        metadata=query.metadata,
        line=query.line,
    )


def _calls(value: object) -> tuple[ToolCall, ...]:
    """The calls of an answer, as the server wrote them: they may not follow their schemas."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise MalformedAnswer("the calls of an answer are not a list")
    calls = []
    for call in value:
        name, arguments = call["function"]["name"], call["function"].get("arguments") or "{}"
        if not (isinstance(name, str) and isinstance(arguments, str)):
            raise MalformedAnswer("a call has no name, or its arguments are not text")
        calls.append(ToolCall("", name, arguments))
    return tuple(calls)


class StreamedAnswer:
    """Puts a streamed answer together.

    Args:
        query: the query that it answers, which asks for one answer.
    """

    def __init__(self, query: Query) -> None:
        self._query = query
        self._texts: list[str] = []
        self._calls = _StreamedCalls()
        self._logprobs: list[Any] | None = None
        self._num_passed = 0  # log probabilities that went out with a piece
        self._finish_reason: object = None
        self._has_refusal = False
        self._usage: object = None

    def add(self, chunk: Mapping[str, Any]) -> list[TextPiece]:
        """Add a chunk of the stream; returns the pieces of the answer in it.

        Raises:
            MalformedAnswer: it is not a completion chunk.
        """
        try:
            self._usage = chunk.get("usage") or self._usage
            pieces = [self._piece(choice) for choice in chunk.get("choices") or []]
        except (LookupError, TypeError, AttributeError, ValueError) as exc:
            raise MalformedAnswer("the stream does not consist of completion chunks") from exc
        return [piece for piece in pieces if piece is not None]

    def _piece(self, choice: Mapping[str, Any]) -> TextPiece | None:
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        if entries := logprobs_of(choice):
            self._logprobs = [*(self._logprobs or []), *entries]
        delta = choice.get("delta") or {}
        self._has_refusal = self._has_refusal or bool(delta.get("refusal"))
        calls = self._calls.add(delta.get("tool_calls") or [])
        text = delta.get("content") or choice.get("text") or ""
        if not (text or calls):
            return None
        self._texts.append(text + "")  # a TypeError unless it is a string
        logprobs = (self._logprobs or [])[self._num_passed :]
        self._num_passed += len(logprobs)
        return TextPiece(text, logprobs, calls)

    def result(self) -> Result:
        """The result, once the stream has ended.

        Raises:
            MalformedAnswer: the chunks do not make up an answer.
        """
        is_empty_answer = self._finish_reason in ("stop", "length") and not self._has_refusal
        text = "".join(self._texts)
        record = {
            "response": text if text or is_empty_answer else None,
            "tool_calls": self._calls.records() or None,
            "finish_reason": self._finish_reason,
            "logprobs": self._logprobs,
        }
        return to_result(self._query, [record], self._usage)


class _StreamedCalls:
    """Puts the calls of a streamed answer together."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._arguments: dict[int, list[str]] = {}

    def add(self, deltas: Sequence[Mapping[str, Any]]) -> list[ToolCallDelta]:
        """Add the `tool_calls` of one chunk; returns what they add.

        Raises:
            LookupError, TypeError, AttributeError: they do not have OpenAI's shape.
        """
        added = []
        for delta in deltas:
            index, function = delta.get("index", 0), delta.get("function") or {}
            name, arguments = function.get("name") or "", function.get("arguments") or ""
            self._names[index] = self._names.get(index, "") + name
            # A TypeError unless they are numbers and strings.
            self._arguments.setdefault(index + 0, []).append(arguments + "")
            added.append(ToolCallDelta(index, name, arguments))
        return added

    def records(self) -> list[dict[str, Any]]:
        """The calls in the shape of a complete answer."""
        return [
            {"function": {"name": name, "arguments": "".join(self._arguments[index])}}
            for index, name in sorted(self._names.items())
        ]


def _finish_reason(value: object) -> FinishReason | None:
    """Why an answer ended; None if the server reports no reason, or an unknown one."""
    is_known = isinstance(value, str) and value in set(FinishReason)
    return FinishReason(str(value)) if is_known else None


def _logprobs(value: object) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise MalformedAnswer("the log probabilities of an answer are not a list of objects")
    return value


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def parse_error(body: Mapping[str, Any], query: Query, status: int = 500) -> Result:
    """The error in a body, in the shape of smol, OpenAI, vLLM or FastAPI.

    Args:
        body: holds the error.
        query: what was asked.
        status: the response's HTTP status, which determines the code if the body has none.
    """
    if body.get("error_code") == ErrorCode.INCOMPLETE_JSON and body.get("response") is not None:
        return _incomplete(body, query)
    error = body.get("error", body)
    detail = error if isinstance(error, dict) else body
    reason = error if isinstance(error, str) else detail.get("message", detail.get("detail"))
    message = reason if isinstance(reason, str) else json.dumps(detail, ensure_ascii=False)
    code = _error_code(detail.get("error_code", detail.get("code")), message, status)
    field = detail.get("field", detail.get("param"))
    field = field if isinstance(field, str) else None
    if code is ErrorCode.PROMPT_TOO_LONG:  # OpenAI's API names the whole prompt
        field = None if query.raw_prompt is None else "raw_prompt"
    return failure(query, message[:MAX_ERROR_CHARS], code, field)


def _error_code(code: object, message: str, status: int) -> ErrorCode:
    if any(sign in f"{code} {message}" for sign in _TOO_LONG):
        return ErrorCode.PROMPT_TOO_LONG
    if isinstance(code, str) and code in set(ErrorCode):
        return ErrorCode(code)
    return ErrorCode.INVALID_VALUE if 400 <= status < 500 else ErrorCode.INTERNAL


def _usage(usage: object) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    prompt_tokens, completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (_is_count(prompt_tokens) and _is_count(completion_tokens)):
        return None
    details = usage.get("prompt_tokens_details")
    cached_tokens = details.get("cached_tokens") if isinstance(details, dict) else None
    is_known = _is_count(cached_tokens) and cached_tokens <= prompt_tokens
    return Usage(prompt_tokens, completion_tokens, cached_tokens if is_known else None)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _without_prompt(text: str, query: Query) -> str:
    """The text after the prompts, which some servers repeat at the start of the response."""
    text = text.strip()
    for message in query.messages:
        text = text.removeprefix(message.content.strip()).strip()
    return text
