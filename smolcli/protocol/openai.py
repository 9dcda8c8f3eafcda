"""OpenAI's chat completions: the parser of a request, and the format of its answers.

The pydantic models here are the only description of a request: they parse it, and /openapi.json is
generated from them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, Tag, ValidationError

from smolcli.errors import QueryError
from smolcli.protocol.fields import (
    ALLOWED_TOKEN_IDS,
    BAD_WORDS,
    EMPTY,
    FLAG,
    FLOAT_TO_INT,
    LOGIT_BIAS,
    MAX_ANSWERS,
    MAX_LOGPROBS,
    MIN_P,
    MIN_TOKENS,
    PENALTY,
    SEED,
    STOP_TOKEN_IDS,
    AllowedIds,
    BadWords,
    Choices,
    Count,
    Flag,
    Integer,
    Lenient,
    LogitBias,
    MinP,
    NumAnswers,
    Number,
    NumLogprobs,
    NumTokens,
    OutputPenalty,
    Penalty,
    Seed,
    Stop,
    Temperature,
    Text,
    TokenIds,
    TopP,
    did_you_mean,
)
from smolcli.protocol.query import (
    CHOICES_DESCRIPTION,
    FORMAT_DESCRIPTION,
    FORMAT_FIELDS,
    STRUCTURED_DESCRIPTION,
    ResponseFormat,
    SchemaOrText,
    StructuredOutputs,
    at_most_one,
    combinations,
    forbid_violations,
    json_path,
    parse_query,
)
from smolcli.protocol.strict_json import shorten
from smolcli.protocol.tool_fields import (
    CHOICE_DESCRIPTION,
    TOOLS_DESCRIPTION,
    CallFields,
    ToolChoice,
    ToolList,
    message_rules,
    tool_values,
)
from smolcli.settings import QueryDefaults
from smolcli.types import ErrorCode, FinishReason, Query, Result, Usage

M = TypeVar("M", bound=BaseModel)


class TextPart(Lenient):
    """One part of a message's content; only text is supported."""

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: dict[str, Any] | None = Field(
        None, description="an object; it has no effect"
    )
    cache_control: dict[str, Any] | None = Field(None, description="an object; it has no effect")


class RefusalPart(Lenient):
    """A refusal in an earlier answer; it counts as text."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        """See `TextPart`."""
        return self.refusal


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class ChatMessage(Lenient):
    """One message. Fields of an earlier answer that the official clients send back are accepted."""

    model_config = ConfigDict(
        json_schema_extra=message_rules(list(EMPTY), is_content_optional=True)
    )
    KEPT = frozenset({"content"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = Field(
        None, description="a string or a list of text parts; null only from the assistant"
    )
    name: Text | None = Field(None, description="a string; it has no effect")
    tool_calls: list[CallFields] | None = Field(
        None, description="the calls of an earlier answer, only from the assistant"
    )
    tool_call_id: Text | None = Field(
        None, description="the id of a call, in the message with its result"
    )
    refusal: Text | None = Field(None, description="a string; used as the content if that is null")
    annotations: list[Any] | None = Field(None, description="a list; it has no effect")
    parsed: Any = Field(None, description="any value; it has no effect")
    reasoning: Text | None = Field(None, description="a string; it has no effect")
    reasoning_content: Text | None = Field(None, description="a string; it has no effect")
    reasoning_details: list[Any] | None = Field(None, description="a list; it has no effect")
    provider_specific_fields: dict[str, Any] | None = Field(
        None, description="an object; it has no effect"
    )


class StreamOptions(Lenient):
    """What a stream reports besides the text."""

    include_usage: Flag = Field(False, description="true or false")
    include_obfuscation: Flag = Field(False, description="true or false; it has no effect")
    continuous_usage_stats: Flag = Field(
        False, description="true or false; usage is reported once, at the end"
    )


Zero = Annotated[Number, Field(ge=0, le=0)]
One = Annotated[Number, Field(ge=1, le=1)]

_STREAM: dict[str, Any] = {"required": ["stream"], "properties": {"stream": {"const": True}}}
STREAM_COMBINATIONS: list[Any] = [
    {"anyOf": [_STREAM, {"properties": {"stream_options": {"enum": [*EMPTY]}}}]},
    {"anyOf": [{"not": _STREAM}, {"properties": {"prompt_logprobs": {"enum": [*EMPTY]}}}]},
]  # fmt: skip

# Parameters for formats, and the members of `structured_outputs` that they stand for.
OTHER_FORMAT_FIELDS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "grammar": "grammar",
}

SHARED_COMBINATIONS: list[Any] = [
    *combinations(list(EMPTY), True),
    *at_most_one(
        (*FORMAT_FIELDS, *OTHER_FORMAT_FIELDS),
        list(EMPTY),
    ),
]
_CONTINUATION: dict[str, Any] = {
    "anyOf": [
        {"properties": {"add_generation_prompt": {"enum": [*EMPTY]}}},
        {
            "properties": {
                "add_generation_prompt": {"const": True},
                "continue_final_message": {"enum": [*EMPTY, False]},
            }
        },
        {
            "required": ["continue_final_message"],
            "properties": {
                "add_generation_prompt": {"const": False},
                "continue_final_message": {"const": True},
            },
        },
    ]
}

MODEL = "the name of the model, as listed by GET /v1/models; the default is the first one"
_ZERO = "0: it is not supported"
_FALSE = "false: it is not supported"
_NO_EFFECT = "a string; it has no effect"
_USE_TOOLS = "empty: use tools"
_UNSUPPORTED = "empty: it is not supported"


class GenerationFields(Lenient):
    """The parameters that requests for chat and text completions share; descriptions complete
    "<parameter> must be ...".

    Parameters of OpenAI and vLLM that smol does not support are listed with their neutral values.
    """

    model: Text | None = Field(None, description=MODEL)
    max_tokens: Count | None = Field(None, description="a positive integer")
    temperature: Temperature | None = Field(
        None,
        description="a number from 0 (greedy) to 100; the default is the server's, or else 0, "
        "and 1 if n is above 1",
    )
    top_p: TopP | None = Field(None, description="a number greater than 0 and at most 1")
    top_k: Annotated[int, Field(strict=True, ge=-1), FLOAT_TO_INT] | None = Field(
        None, description="a positive integer, or 0 or -1 to disable it; an extension"
    )
    repetition_penalty: Penalty | None = Field(
        None, description="a number greater than 0 and at most 100; an extension"
    )
    min_p: MinP | None = Field(None, description=f"{MIN_P}; an extension")
    presence_penalty: OutputPenalty | None = Field(None, description=PENALTY)
    frequency_penalty: OutputPenalty | None = Field(None, description=PENALTY)
    logit_bias: LogitBias | None = Field(None, description=LOGIT_BIAS)
    seed: Seed | None = Field(None, description=SEED)
    min_tokens: NumTokens | None = Field(None, description=f"{MIN_TOKENS}; an extension")
    ignore_eos: Flag | None = Field(None, description=f"{FLAG}; an extension")
    stop: Stop | None = Field(None, description="a non-empty string or a list of up to 16 of them")
    stop_token_ids: TokenIds | None = Field(None, description=f"{STOP_TOKEN_IDS}; an extension")
    include_stop_str_in_output: Flag | None = Field(None, description=f"{FLAG}; an extension")
    bad_words: BadWords | None = Field(None, description=f"{BAD_WORDS}; an extension")
    allowed_token_ids: AllowedIds | None = Field(
        None, description=f"{ALLOWED_TOKEN_IDS}; an extension"
    )
    stream: Flag | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(
        None, description="an object with include_usage, if stream is true"
    )
    n: NumAnswers | None = Field(None, description=f"an integer from 1 to {MAX_ANSWERS}")
    response_format: ResponseFormat | None = Field(None, description=FORMAT_DESCRIPTION)
    choices: Choices | None = Field(None, description=f"{CHOICES_DESCRIPTION}; an extension")
    structured_outputs: StructuredOutputs | None = Field(None, description=STRUCTURED_DESCRIPTION)
    guided_json: SchemaOrText | None = Field(None, description="a JSON Schema, also as text")
    guided_regex: Text | None = Field(None, description="a string")
    guided_choice: Choices | None = Field(None, description=CHOICES_DESCRIPTION)
    guided_grammar: Text | None = Field(None, description="a string")

    # llama.cpp's parameters.
    json_schema: SchemaOrText | None = Field(None, description="a JSON Schema, also as text")
    grammar: Text | None = Field(None, description="a string")
    cache_prompt: Flag | None = Field(None, description="true or false; it has no effect")

    # OpenAI's parameters without an effect here.
    user: Text | None = Field(None, description=_NO_EFFECT)

    # OpenAI's parameters that are not supported.

    # vLLM's parameters without an effect here.
    priority: Integer | None = Field(None, description="an integer; it has no effect")
    request_id: Text | None = Field(None, description=_NO_EFFECT)
    cache_salt: Text | None = Field(None, description=_NO_EFFECT)
    guided_decoding_backend: Text | None = Field(None, description=_NO_EFFECT)
    spaces_between_special_tokens: Flag | None = Field(
        None, description="true or false; it has no effect"
    )

    # vLLM's parameters that are not supported.
    best_of: One | None = Field(None, description="1: it is not supported")
    use_beam_search: Literal[False] | None = Field(None, description=_FALSE)
    early_stopping: Literal[False] | None = Field(None, description=_FALSE)
    length_penalty: One | None = Field(None, description="1: it is not supported")
    logits_processors: None = Field(None, description=_UNSUPPORTED)
    skip_special_tokens: Literal[True] | None = Field(
        None, description="true: special tokens are never part of an answer"
    )
    truncate_prompt_tokens: None = Field(None, description=_UNSUPPORTED)
    prompt_logprobs: NumLogprobs | None = Field(
        None,
        description=f"an integer from 0 to {MAX_LOGPROBS}, and absent if stream is true; "
        "an extension",
    )
    return_tokens_as_token_ids: Literal[False] | None = Field(None, description=_FALSE)
    return_token_ids: Literal[False] | None = Field(None, description=_FALSE)
    guided_whitespace_pattern: None = Field(None, description=_UNSUPPORTED)
    kv_transfer_params: None = Field(None, description=_UNSUPPORTED)
    vllm_xargs: None = Field(None, description=_UNSUPPORTED)


class CompletionFields(GenerationFields):
    """The parameters of a chat completion; see `GenerationFields`."""

    model_config = ConfigDict(
        json_schema_extra=forbid_violations(
            [*SHARED_COMBINATIONS, *STREAM_COMBINATIONS, _CONTINUATION]
        )
    )

    messages: Annotated[list[ChatMessage], Field(min_length=1)] = Field(
        description="a non-empty list of {role, content} with text content, ending with a user "
        "message or the result of a tool"
    )
    tools: ToolList | None = Field(None, description=TOOLS_DESCRIPTION)
    tool_choice: ToolChoice | None = Field(None, description=CHOICE_DESCRIPTION)
    parallel_tool_calls: Flag | None = Field(None, description="true or false")
    max_completion_tokens: Count | None = Field(None, description="a positive integer")
    logprobs: Flag | None = Field(None, description="true or false")
    top_logprobs: NumLogprobs | None = Field(
        None, description=f"an integer from 0 to {MAX_LOGPROBS}, and requires logprobs to be true"
    )

    # OpenAI's parameters without an effect here.
    safety_identifier: Text | None = Field(None, description=_NO_EFFECT)
    prompt_cache_key: Text | None = Field(None, description=_NO_EFFECT)
    prompt_cache_retention: Text | None = Field(None, description=_NO_EFFECT)
    prompt_cache_options: dict[str, Any] | None = Field(
        None, description="an object; it has no effect"
    )
    service_tier: Text | None = Field(None, description=_NO_EFFECT)
    metadata: dict[str, Any] | None = Field(None, description="an object; it has no effect")
    prediction: dict[str, Any] | None = Field(None, description="an object; it has no effect")

    # OpenAI's parameters that are not supported.
    store: Literal[False] | None = Field(None, description="false: nothing is stored")
    modalities: list[Literal["text"]] | None = Field(
        None, description='["text"]: others are not supported'
    )
    reasoning_effort: Literal["none"] | None = Field(
        None, description='"none": the model does not reason'
    )
    verbosity: Literal["medium"] | None = Field(
        None, description='"medium": others are not supported'
    )
    functions: None = Field(None, description=_USE_TOOLS)
    function_call: Literal["none", "auto"] | None = Field(
        None, description='"none" or "auto": use tool_choice'
    )
    audio: None = Field(None, description=_UNSUPPORTED)
    moderation: None = Field(None, description=_UNSUPPORTED)
    web_search_options: None = Field(None, description=_UNSUPPORTED)

    # vLLM's parameters.
    include_reasoning: Flag | None = Field(None, description="true or false; it has no effect")
    thinking_token_budget: Zero | None = Field(None, description="0: the model does not reason")
    echo: Literal[False] | None = Field(None, description=_FALSE)
    add_generation_prompt: Flag | None = Field(
        None, description="true, or false if and only if continue_final_message is true"
    )
    continue_final_message: Flag | None = Field(
        None,
        description="true or false: whether the answer continues the last message, which must be "
        "the assistant's",
    )
    add_special_tokens: Literal[False] | None = Field(None, description=_FALSE)
    documents: None = Field(None, description=_UNSUPPORTED)
    chat_template: None = Field(None, description="empty: the model's own template is used")
    chat_template_kwargs: None = Field(None, description=_UNSUPPORTED)
    mm_processor_kwargs: None = Field(None, description=_UNSUPPORTED)


@dataclass(frozen=True, slots=True)
class Completion:
    """A chat completion request, and the JSON of its responses."""

    query: Query
    model: str
    is_stream: bool
    includes_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, result: Result) -> dict[str, Any]:
        """The body of a complete response."""
        return self._head("chat.completion") | answer_fields(result)

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[Mapping[str, Any]] = (),
        finish_reason: FinishReason | None = None,
    ) -> dict[str, Any]:
        """One chunk of a streamed answer.

        Args:
            index: of the answer.
            delta: what is new in its message.
            logprobs: entries of tokens since its last chunk.
            finish_reason: why it ended, in its last chunk.
        """
        choice: dict[str, Any] = {"index": index, "delta": delta}
        choice["logprobs"] = {"content": list(logprobs)} if logprobs else None
        choice["finish_reason"] = finish_reason
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self.includes_usage else chunk

    def usage_chunk(self, usage: Usage | None) -> dict[str, Any]:
        """The final chunk, if usage was requested."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage_fields(usage)}

    def _head(self, kind: str) -> dict[str, Any]:
        name = self.query.chat_id
        return {"id": name, "object": kind, "created": self.created, "model": self.model}


def answer_fields(result: Result) -> dict[str, Any]:
    """The members of an answer that depend on the result: `choices` and `usage`."""
    choices = [
        {
            "index": index,
            "message": _answer_message(each),
            "logprobs": _logprobs(each),
            "finish_reason": each.finish_reason,
        }
        for index, each in enumerate((result, *result.alternatives))
    ]
    values: dict[str, Any] = {"choices": choices, "usage": usage_fields(result.usage)}
    if result.prompt_logprobs is not None:
        values["prompt_logprobs"] = rank_entries(result.prompt_logprobs)
    return values


def rank_entries(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
    """The log probabilities of a prompt in vLLM's format: null, then tokens by id.

    Args:
        entries: those of a result.
    """

    def ranked(entry: Mapping[str, Any], rank: int) -> dict[str, Any]:
        fields = {"logprob": entry["logprob"], "rank": rank, "decoded_token": entry["token"]}
        return {str(entry["token_id"]): fields}

    positions: list[dict[str, Any] | None] = [None]
    for entry in entries[1:]:
        position = ranked(entry, entry["rank"])
        for rank, each in enumerate(entry["top_logprobs"], 1):
            position |= ranked(each, rank)
        positions.append(position)
    return positions


def _answer_message(answer: Result) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.response}
    if answer.tool_calls:
        message["tool_calls"] = [call.record() for call in answer.tool_calls]
    return message


# OpenAI's clients recognize this code.
_OPENAI_CODES = {ErrorCode.PROMPT_TOO_LONG: "context_length_exceeded"}


def error_object(status: int, message: str, code: str, field: str | None) -> dict[str, Any]:
    """An error as OpenAI's clients read it.

    Args:
        status: HTTP status of the response.
        message: a sentence for people.
        code: an `ErrorCode`, which is translated if OpenAI has a code of its own, or another code.
        field: path of the parameter, if any.
    """
    kind = "invalid_request_error" if status < 500 else "server_error"
    openai_code = _OPENAI_CODES.get(code, code)  # type: ignore[call-overload]
    if field is None and code == ErrorCode.PROMPT_TOO_LONG:
        field = "messages"
    if field == "raw_prompt":
        field, message = "prompt", message.replace("raw_prompt", "prompt")
    return {"message": message, "type": kind, "param": field, "code": str(openai_code)}


def error_code(name: str) -> ErrorCode:
    """The error code of an error object: the inverse of `error_object`.

    Raises:
        ValueError: it is not an error code.
    """
    names = {openai_code: code for code, openai_code in _OPENAI_CODES.items()}
    return names.get(name) or ErrorCode(name)


def model_name(model: str) -> str:
    """The name that clients use for a model: its Hub id, or the name of its folder or file."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def parse_completion(
    value: object,
    defaults: QueryDefaults,
    chat_id: str,
    line: int | None = None,
    default_model: str = "",
) -> Completion:
    """Validate the body of a request.

    Args:
        value: the parsed JSON body.
        defaults: values for the parameters that it leaves out.
        chat_id: of the query.
        line: the line number that the query carries.
        default_model: the model's name if the body has none.

    Raises:
        QueryError: naming the first invalid parameter by its path.
    """
    fields = validated(CompletionFields, value)
    check_stream(fields, value)
    _check_continuation(fields)
    options = fields.stream_options
    values = _query(fields, defaults) | {"chat_id": chat_id}
    return Completion(
        query=parse_query(values, defaults, line, accepts_partial=True),
        model=fields.model or default_model,
        is_stream=bool(fields.stream),
        includes_usage=bool(options and options.include_usage),
    )


def _check_continuation(fields: CompletionFields) -> None:
    starts, continues = fields.add_generation_prompt, bool(fields.continue_final_message)
    if starts is not None and starts == continues:
        raise invalid_parameter("add_generation_prompt", CompletionFields)


def check_stream(fields: GenerationFields, value: object) -> None:
    """Reject parameters that contradict `stream`.

    Like OpenAI and vLLM, this rejects `stream_options` without a stream even if none is set.

    Args:
        fields: the validated parameters, which lack members without an effect.
        value: the JSON object that they come from.

    Raises:
        QueryError: naming the parameter.
    """
    if fields.stream and fields.prompt_logprobs is not None:
        raise invalid_parameter("prompt_logprobs", type(fields))
    if isinstance(value, dict) and value.get("stream_options") and not fields.stream:
        message = "stream_options is only allowed if stream is true"
        raise QueryError(message, ErrorCode.INVALID_VALUE, "stream_options")


_SAME_NAME = (
    *("temperature", "top_p", "repetition_penalty", "min_p", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "seed", "min_tokens", "ignore_eos", "stop"),
    *("stop_token_ids", "include_stop_str_in_output", "bad_words", "allowed_token_ids"),
    *("choices", "n", "prompt_logprobs"),
)


def _query(fields: CompletionFields, defaults: QueryDefaults) -> dict[str, Any]:
    """The query fields equivalent to a request."""
    return query_fields(fields, defaults) | {
        "messages": [_message(index, each) for index, each in enumerate(fields.messages)],
        "max_new_tokens": fields.max_completion_tokens or fields.max_tokens,
        "logprobs": fields.logprobs,
        "top_logprobs": fields.top_logprobs,
        "continue_final_message": fields.continue_final_message,
        **tool_values(fields.tools, fields.tool_choice, fields.parallel_tool_calls),
    }


def _other_format(fields: GenerationFields) -> dict[str, Any]:
    """The field that vLLM's older and llama.cpp's parameters for formats stand for.

    Raises:
        QueryError: there are several, or there is a newer one as well.
    """
    given = [name for name in OTHER_FORMAT_FIELDS if getattr(fields, name) is not None]
    others = [name for name in FORMAT_FIELDS if getattr(fields, name) is not None]
    if not given:
        return {}
    if both := [*given[1:], *others]:
        raise QueryError(f"{given[0]} cannot be combined with {both[0]}", field=given[0])
    return {"structured_outputs": {OTHER_FORMAT_FIELDS[given[0]]: getattr(fields, given[0])}}


def query_fields(fields: GenerationFields, defaults: QueryDefaults) -> dict[str, Any]:
    """The query fields equivalent to the parameters that all requests share."""
    values = {name: getattr(fields, name) for name in _SAME_NAME}
    if fields.temperature is None and (fields.n or 1) > 1:
        values["temperature"] = defaults.several_temperature
    if fields.response_format is not None:
        values["response_format"] = fields.response_format.model_dump(by_alias=True)
    if fields.structured_outputs is not None:
        values["structured_outputs"] = fields.structured_outputs.model_dump(by_alias=True)
    values |= _other_format(fields)
    return values | {"top_k": None if fields.top_k is None else max(fields.top_k, 0)}


def _message(index: int, message: ChatMessage) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    content = message.refusal if message.content is None else message.content
    if content is None and not message.tool_calls:
        if role != "assistant":
            path = f"messages[{index}].content"
            raise QueryError(f"{path} is required", ErrorCode.MISSING_FIELD, path)
        content = ""
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    calls = [call.model_dump(exclude_none=True) for call in message.tool_calls or ()]
    values = {"role": role, "content": content, "tool_call_id": message.tool_call_id}
    return values | {"tool_calls": calls}


def _logprobs(result: Result) -> dict[str, Any] | None:
    return None if result.logprobs is None else {"content": result.logprobs}


def usage_fields(usage: Usage | None) -> dict[str, Any] | None:
    """Token counts and their sum; null if an upstream server does not report them."""
    if usage is None:
        return None
    fields: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.cached_tokens is not None:
        fields["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return fields


def validated(model: type[M], value: object) -> M:
    """Validate the body of a request.

    Args:
        model: describes the parameters.
        value: the parsed JSON body.

    Raises:
        QueryError: naming the first invalid parameter by its path.
    """
    if not isinstance(value, dict):
        raise QueryError("the body must be a JSON object", ErrorCode.NOT_AN_OBJECT)
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        raise _parameter_error(exc, model) from None


def _parameter_error(exc: ValidationError, model: type[BaseModel]) -> QueryError:
    """The error for the first invalid parameter; unknown parameters come first.

    Args:
        exc: what validation raised.
        model: of the whole object.
    """
    errors = exc.errors(include_url=False, include_context=False)
    top = [f for f in errors if len(f["loc"]) == 1 and f["type"] == "extra_forbidden"] or errors
    same = [f for f in top if f["loc"][0] == top[0]["loc"][0]]
    # A union reports an error for each of its types; take the one that validated furthest.
    error = max(same, key=lambda f: _depth(_place(model, f["loc"])[0], f["type"]))
    location, members = _place(model, error["loc"])
    kind, given = error["type"], error["input"]
    if kind.startswith("union_tag") and isinstance(given, dict):  # the type of a response_format
        location.append("type")
        kind = "literal_error" if kind == "union_tag_invalid" else "missing"
        given = given.get("type")
    path = json_path(location)
    if kind == "missing":
        return QueryError(f"{path} is required", ErrorCode.MISSING_FIELD, path)
    if kind == "extra_forbidden":
        hint = did_you_mean(str(location[-1]), members)
        message = f"{path} is not supported{hint}"
        code = ErrorCode.UNKNOWN_FIELD if len(location) == 1 else ErrorCode.INVALID_VALUE
        return QueryError(message, code, path)
    if len(location) > 1 and kind == "literal_error" and isinstance(given, str):
        message = f"{path} {shorten(given)!r} is not supported"
        return QueryError(message, ErrorCode.INVALID_VALUE, path)
    return invalid_parameter(str(location[0]), model, path)


def _depth(location: list[int | str], kind: str) -> tuple[int, list[int]]:
    """How far into a value an error is: the length of its location, then its indices.

    A wrong type of a tagged union is inside of its object.
    """
    length = len(location) + kind.startswith("union_tag")
    return length, [step for step in location if isinstance(step, int)]


# The keys and indices of an error, and the members that the object at fault can have.
Place = tuple[list[int | str], list[str]]


def _place(model: type[BaseModel], location: Sequence[int | str]) -> Place:
    """Where an error is.

    Args:
        model: of the whole object.
        location: as pydantic reports it, with labels for the types of unions.
    """
    steps = [step for step in location if step != "[key]"]
    return next(_places(model, steps), ([location[0]], []))


def _places(kind: Any, steps: Sequence[int | str]) -> Iterator[Place]:
    """The places in a value of a type that a location may mean."""
    if not steps:
        yield [], []
    elif get_origin(kind) is Annotated:
        yield from _places(get_args(kind)[0], steps)
    elif get_origin(kind) in (Union, UnionType):
        kinds = [each for each in get_args(kind) if each is not NoneType]
        labeled = [each for each in kinds if steps[0] in _labels(each)]
        for each in labeled or kinds:
            yield from _places(each, steps if len(kinds) == 1 else steps[1:])
    elif get_origin(kind) in (list, dict):
        for path, members in _places(get_args(kind)[-1], steps[1:]):
            yield [steps[0], *path], members
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = {info.alias or name: info.annotation for name, info in kind.model_fields.items()}
        for path, members in _places(fields.get(str(steps[0])), steps[1:]):
            yield [steps[0], *path], members or list(fields)


def _labels(kind: Any) -> list[Any]:
    """The labels of a type in a tagged union."""
    metadata = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    tags = [each.tag for each in metadata if isinstance(each, Tag)]
    tag_field = getattr(kind, "model_fields", {}).get("type")
    return tags if tag_field is None else [*tags, *get_args(tag_field.annotation)]


def invalid_parameter(name: str, model: type[BaseModel], path: str | None = None) -> QueryError:
    """The error for a parameter whose value its description does not allow.

    Args:
        name: of the parameter.
        model: of the whole object.
        path: where in the parameter the error is; by default the parameter itself.
    """
    path = path or name
    description = model.model_fields[name].description
    where = f" (at {path})" if path != name else ""
    message = f"{name} must be {description}{where}"
    return QueryError(message, ErrorCode.INVALID_VALUE, path)
