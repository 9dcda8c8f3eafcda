"""OpenAI's chat completions as smol understands them: the request's parser, the answers' shapes."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smolcli.errors import QueryError
from smolcli.protocol.query import (
    CHOICES_DESCRIPTION,
    FORMAT_DESCRIPTION,
    MAX_ANSWERS,
    MAX_LOGPROBS,
    Choices,
    Count,
    Flag,
    NumAnswers,
    Number,
    Penalty,
    ResponseFormat,
    Seed,
    StopString,
    StopStrings,
    Temperature,
    Text,
    TopK,
    TopP,
    Whole,
    parse_query,
)
from smolcli.settings import QueryDefaults
from smolcli.types import ErrorCode, Query, Result, Usage

Zero = Annotated[Number, Field(ge=0, le=0)]
UNTOLD = Usage(0, 0)  # an upstream server may keep the tokens to itself


class TextPart(BaseModel):
    """A piece of a message; only text is understood."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: Flag = False


class CompletionFields(BaseModel):
    """The parameters that are understood, and of others the values that ask for nothing."""

    model_config = ConfigDict(extra="forbid")

    model: Text = Field(description="the name of the model, as GET /v1/models has it")
    messages: Annotated[list[ChatMessage], Field(min_length=1)] = Field(
        description="a non-empty list of {role, content} with text contents, the last from the user"
    )
    max_tokens: Count | None = Field(None, description="a whole number from 1")
    max_completion_tokens: Count | None = Field(None, description="a whole number from 1")
    temperature: Temperature | None = Field(
        None,
        description="a number from 0 (greedy) to 100; without one it is the server's, "
        "or where that has none 0, and 1 for n above 1",
    )
    top_p: TopP | None = Field(None, description="a number above 0 and up to 1")
    top_k: TopK | None = Field(None, description="a whole number from 0 (off); smol's own")
    repetition_penalty: Penalty | None = Field(
        None, description="a number above 0 and up to 100; smol's own"
    )
    seed: Seed | None = Field(None, description="a whole number from 0 to 2^63 - 1")
    stop: StopString | StopStrings | None = Field(
        None, description="a non-empty string or a list of up to 16 of them"
    )
    stream: Flag | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(
        None, description="an object with include_usage, where stream is true"
    )
    user: Text | None = Field(None, description="a string; it changes nothing")
    n: NumAnswers | None = Field(
        None, description=f"a whole number from 1 to {MAX_ANSWERS}, and 1 where stream is true"
    )
    presence_penalty: Zero | None = Field(None, description="0: it is not supported")
    frequency_penalty: Zero | None = Field(None, description="0: it is not supported")
    logprobs: Flag | None = Field(None, description="true or false")
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description=f"a whole number from 0 to {MAX_LOGPROBS}, where logprobs is true"
    )
    response_format: ResponseFormat | None = Field(None, description=FORMAT_DESCRIPTION)
    choices: Choices | None = Field(None, description=f"{CHOICES_DESCRIPTION}; smol's own")


@dataclass(frozen=True, slots=True)
class Completion:
    """One request for a completion, and the shapes of what answers it."""

    query: Query
    model: str
    is_stream: bool
    includes_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, result: Result) -> dict[str, Any]:
        """The whole answer."""
        return self._head("chat.completion") | answer_fields(result)

    def chunk(self, delta: dict[str, str], result: Result | None = None) -> dict[str, Any]:
        """A piece of an answer that is streamed; the last one has its result."""
        choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": None}
        choice["finish_reason"] = None
        if result is not None:
            choice |= {"logprobs": _logprobs(result), "finish_reason": result.finish_reason}
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self.includes_usage else chunk

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last piece, where the tokens are to be told."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": _usage(usage)}

    def _head(self, kind: str) -> dict[str, Any]:
        name = self.query.chat_id
        return {"id": name, "object": kind, "created": self.created, "model": self.model}


def answer_fields(result: Result) -> dict[str, Any]:
    """What a whole answer says, without its head."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": each.response},
            "logprobs": _logprobs(each),
            "finish_reason": each.finish_reason,
        }
        for index, each in enumerate((result, *result.alternatives))
    ]
    return {"choices": choices, "usage": _usage(result.usage or UNTOLD)}


def error_object(status: int, message: str, code: str, field: str | None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": field, "code": code}


def model_name(model: str) -> str:
    """What clients call the model: its name on the Hub, or that of its folder or file."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def parse_completion(
    value: object, defaults: QueryDefaults, chat_id: str, line: int | None = None
) -> Completion:
    """Check the body of a request; its query gets `chat_id`, and the line it stands on.

    Raises:
        QueryError: naming the first parameter at fault.
    """
    if not isinstance(value, dict):
        raise QueryError("the body must be a JSON object", ErrorCode.NOT_AN_OBJECT)
    try:
        fields = CompletionFields.model_validate(value)
    except ValidationError as exc:
        raise parameter_error(exc, CompletionFields) from None
    if fields.stream_options and not fields.stream:
        raise _refused("stream_options")
    if fields.stream and (fields.n or 1) > 1:
        raise _refused("n")
    return Completion(
        query=parse_query(_query(fields, defaults) | {"chat_id": chat_id}, defaults, line),
        model=fields.model,
        is_stream=bool(fields.stream),
        includes_usage=bool(fields.stream_options and fields.stream_options.include_usage),
    )


_AS_THEY_ARE = (
    *("temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop"),
    *("choices", "n", "logprobs", "top_logprobs"),
)


def _query(fields: CompletionFields, defaults: QueryDefaults) -> dict[str, Any]:
    values = {name: getattr(fields, name) for name in _AS_THEY_ARE}
    if fields.temperature is None and (fields.n or 1) > 1:
        values["temperature"] = defaults.several_temperature
    if fields.response_format is not None:
        values["response_format"] = fields.response_format.model_dump(by_alias=True)
    return values | {
        "messages": [_turn(message) for message in fields.messages],
        "max_new_tokens": fields.max_completion_tokens or fields.max_tokens,
    }


def _turn(message: ChatMessage) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    return {"role": role, "content": "".join(part.text for part in message.content)}


def _logprobs(result: Result) -> dict[str, Any] | None:
    return None if result.logprobs is None else {"content": result.logprobs}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def parameter_error(exc: ValidationError, model: type[BaseModel]) -> QueryError:
    """The first parameter at fault; one that is not known comes before the others."""
    faults = exc.errors(include_url=False, include_context=False)
    fault = next((f for f in faults if len(f["loc"]) == 1 and _is_unknown(f["type"])), faults[0])
    name = str(fault["loc"][0])[:100]
    if fault["type"] == "missing" and len(fault["loc"]) == 1:
        return QueryError(f"{name} is required", ErrorCode.MISSING_FIELD, name)
    if name not in model.model_fields:
        return QueryError(f"{name!r} is not supported here", ErrorCode.UNKNOWN_FIELD, name)
    return _refused(name, model)


def _is_unknown(kind: str) -> bool:
    return kind == "extra_forbidden"


def _refused(name: str, model: type[BaseModel] = CompletionFields) -> QueryError:
    description = model.model_fields[name].description
    return QueryError(f"{name} must be {description}", ErrorCode.INVALID_VALUE, name)
