"""The fields of a query, and its parser: a JSON value to `Query`.

The pydantic models are the only description of a query: they parse it, and /openapi.json is
generated from them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smolcli.errors import QueryError
from smolcli.protocol.answer_formats import (
    CHOICES_DESCRIPTION,
    FORMAT_DESCRIPTION,
    FORMAT_FIELDS,
    STRUCTURED_DESCRIPTION,
    ResponseFormat,
    StructuredOutputs,
    answer_format,
)
from smolcli.protocol.field_rules import (
    ECHOES,
    at_most_one,
    combination_rules,
    forbid_violations,
    zero_tokens_rule,
)
from smolcli.protocol.fields import (
    ALLOWED_TOKEN_IDS,
    BAD_WORDS,
    FLAG,
    LOGIT_BIAS,
    MAX_ANSWERS,
    MAX_LOGPROBS,
    MIN_P,
    MIN_TOKENS,
    NOT_BLANK,
    PENALTY,
    SEED,
    STOP_TOKEN_IDS,
    AllowedIds,
    BadWords,
    ChatId,
    Choices,
    Flag,
    Items,
    LogitBias,
    MinP,
    NumAnswers,
    NumLogprobs,
    NumTokens,
    OutputPenalty,
    Penalty,
    RawPrompt,
    Seed,
    Stop,
    Temperature,
    Text,
    TokenIds,
    TopK,
    TopP,
    decimal_id,
    did_you_mean,
)
from smolcli.protocol.json_text import shorten
from smolcli.protocol.parameters import json_path
from smolcli.protocol.prompt import derived_seed, with_system_prompt
from smolcli.protocol.tool_fields import (
    CHOICE_DESCRIPTION,
    TOOLS_DESCRIPTION,
    CallFields,
    ToolChoice,
    ToolList,
    check_calls,
    message_rules,
    parse_calls,
    parse_tools,
)
from smolcli.settings import DEFAULT_SEED, QueryDefaults
from smolcli.types import ErrorCode, Message, Query, Sampling

SAMPLING_FIELDS = (
    *("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "min_p"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "ignore_eos"),
    *("stop_token_ids", "allowed_token_ids"),
)

_NULL: dict[str, Any] = {"type": "null"}
_WAYS_TO_ASK: list[Any] = [
    {
        "required": ["user_prompt"],
        "properties": {"user_prompt": {"type": "string", "pattern": NOT_BLANK}}
        | dict.fromkeys(("messages", "raw_prompt"), _NULL),
    },
    {
        "required": ["messages"],
        "properties": {"messages": {"type": "array"}}
        | dict.fromkeys(("user_prompt", "system_prompt", "raw_prompt"), _NULL),
    },
    {
        "required": ["raw_prompt"],
        "properties": {"raw_prompt": {"type": ["string", "array"]}}
        | dict.fromkeys(("user_prompt", "system_prompt", "messages"), _NULL),
    },
]
_IS_RAW: dict[str, Any] = {
    "required": ["raw_prompt"],
    "properties": {"raw_prompt": {"type": ["string", "array"]}},
}
_COMBINATIONS: list[Any] = [
    *combination_rules([None], default_temperature=False),
    *at_most_one(FORMAT_FIELDS, [None]),
    {"anyOf": [{"not": ECHOES}, _IS_RAW]},
    {"anyOf": [{"not": _IS_RAW}, {"properties": {"tools": {"enum": [None, []]}}}]},
    zero_tokens_rule("max_new_tokens"),
]


class MessageFields(BaseModel):
    """One message of `messages`."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra=message_rules([None], is_content_optional=False)
    )
    __pydantic_extra__: dict[str, None] = Field(init=False)

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    tool_calls: Items[CallFields] | None = None
    tool_call_id: Text | None = None


class QueryFields(BaseModel):
    """The fields of a query; descriptions complete "<field> must be ..."."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "anyOf": _WAYS_TO_ASK,
            **forbid_violations(_COMBINATIONS),
        },
    )

    chat_id: ChatId = Field(description="a non-empty string or an integer")
    user_prompt: Text | None = Field(None, description="a non-blank string")
    system_prompt: Text | None = Field(
        None, description="a string; an empty one omits the default system prompt"
    )
    messages: Annotated[Items[MessageFields], Field(min_length=1)] | None = Field(
        None,
        description="a non-empty list of {role, content}, ending with a user message or the result "
        "of a tool",
    )
    continue_final_message: Flag | None = Field(
        None,
        description="true or false: whether the answer continues the last message, which must be "
        "the assistant's",
    )
    raw_prompt: RawPrompt | None = Field(
        None, description="a non-empty string or a non-empty list of token ids"
    )
    echo: Flag | None = Field(None, description="true or false, and requires raw_prompt")
    max_new_tokens: NumTokens | None = Field(
        None, description="a positive integer, or 0 if prompt_logprobs or echo is given"
    )
    temperature: Temperature | None = Field(None, description="a number from 0 (greedy) to 100")
    top_p: TopP | None = Field(None, description="a number greater than 0 and at most 1")
    top_k: TopK | None = Field(None, description="a non-negative integer; 0 disables it")
    repetition_penalty: Penalty | None = Field(
        None, description="a number greater than 0 and at most 100"
    )
    min_p: MinP | None = Field(None, description=MIN_P)
    presence_penalty: OutputPenalty | None = Field(None, description=PENALTY)
    frequency_penalty: OutputPenalty | None = Field(None, description=PENALTY)
    logit_bias: LogitBias | None = Field(None, description=LOGIT_BIAS)
    seed: Seed | None = Field(None, description=SEED)
    min_tokens: NumTokens | None = Field(None, description=MIN_TOKENS)
    ignore_eos: Flag | None = Field(None, description=FLAG)
    stop: Stop | None = Field(None, description="a non-empty string or a list of up to 16 of them")
    stop_token_ids: TokenIds | None = Field(None, description=STOP_TOKEN_IDS)
    include_stop_str_in_output: Flag | None = Field(None, description=FLAG)
    bad_words: BadWords | None = Field(None, description=BAD_WORDS)
    allowed_token_ids: AllowedIds | None = Field(None, description=ALLOWED_TOKEN_IDS)
    response_format: ResponseFormat | None = Field(None, description=FORMAT_DESCRIPTION)
    choices: Choices | None = Field(None, description=CHOICES_DESCRIPTION)
    structured_outputs: StructuredOutputs | None = Field(None, description=STRUCTURED_DESCRIPTION)
    tools: ToolList | None = Field(None, description=TOOLS_DESCRIPTION)
    tool_choice: ToolChoice | None = Field(None, description=CHOICE_DESCRIPTION)
    parallel_tool_calls: Flag | None = Field(None, description="true or false")
    n: NumAnswers | None = Field(None, description=f"an integer from 1 to {MAX_ANSWERS}")
    logprobs: Flag | None = Field(None, description="true or false")
    top_logprobs: NumLogprobs | None = Field(
        None, description=f"an integer from 0 to {MAX_LOGPROBS}, and requires logprobs to be true"
    )
    prompt_logprobs: NumLogprobs | None = Field(
        None, description=f"an integer from 0 to {MAX_LOGPROBS}"
    )
    metadata: dict[str, Any] | None = Field(None, description="an object")


FIELDS = QueryFields.model_fields


def chat_id_of(value: object) -> str | None:
    """The id of a query that may be invalid; None if it has none."""
    chat_id = decimal_id(value.get("chat_id")) if isinstance(value, dict) else None
    return chat_id if isinstance(chat_id, str) else None


def parse_query(
    value: object,
    defaults: QueryDefaults,
    line: int | None = None,
    *,
    accepts_partial: bool = False,
) -> Query:
    """Validate a parsed JSON value and complete it with the defaults.

    Args:
        value: the JSON value.
        defaults: values for the fields that it leaves out.
        line: the line number that the query carries.
        accepts_partial: see `Query`.

    Raises:
        QueryError: naming the first invalid field. Unknown fields come first, because a
            misspelled field is often why a required one is missing.
    """
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}.get(
            type(value), "a number"
        )
        raise QueryError(f"a query must be a JSON object, not {kind}", ErrorCode.NOT_AN_OBJECT)
    extra: dict[str, Any] = {}
    if defaults.extra_fields != "error":
        extra = {key: item for key, item in value.items() if key not in FIELDS}
        value = {key: item for key, item in value.items() if key in FIELDS}
    try:
        fields = QueryFields.model_validate(value)
    except ValidationError as exc:
        raise _query_error(exc) from None
    answers = answer_format(
        fields.response_format, fields.choices, fields.structured_outputs, defaults.format
    )
    tools = parse_tools(fields.tools, fields.tool_choice, fields.parallel_tool_calls)
    messages = _messages(fields, defaults.system_prompt)
    query = Query(
        chat_id=fields.chat_id,
        messages=messages,
        sampling=_sampling(fields, defaults.sampling),
        stop=tuple(fields.stop or ()),
        include_stop=bool(fields.include_stop_str_in_output),
        bad_words=tuple(fields.bad_words or ()),
        format=answers,
        tools=tools,
        continues=_continues(fields, messages),
        accepts_partial=accepts_partial and not (answers is None and tools is None),
        n=fields.n or 1,
        top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        raw_prompt=_raw_prompt(fields.raw_prompt),
        echo=bool(fields.echo),
        prompt_logprobs=fields.prompt_logprobs,
        metadata=_metadata(fields.metadata, extra if defaults.extra_fields == "keep" else {}),
        line=line,
    )
    _check_combination(fields, query)
    return query


def _raw_prompt(prompt: str | list[int] | None) -> str | tuple[int, ...] | None:
    return tuple(prompt) if isinstance(prompt, list) else prompt


def _messages(fields: QueryFields, system_prompt: str | None) -> tuple[Message, ...]:
    if fields.raw_prompt is not None:
        for other in ("user_prompt", "system_prompt", "messages"):
            if getattr(fields, other) is not None:
                raise QueryError(f"{other} cannot be combined with raw_prompt", field=other)
        return ()
    if fields.messages is None:
        if fields.user_prompt is None or not fields.user_prompt.strip():
            raise _required("user_prompt")
        turns = [Message("user", fields.user_prompt)]
        system = system_prompt if fields.system_prompt is None else fields.system_prompt
    else:
        for other in ("user_prompt", "system_prompt"):
            if getattr(fields, other) is not None:
                raise QueryError(f"{other} cannot be combined with messages", field=other)
        turns = [_message(turn, f"messages[{at}]") for at, turn in enumerate(fields.messages)]
        _check_last(turns[-1])
        system = None if turns[0].role == "system" else system_prompt
    return with_system_prompt(tuple(turns), system)


def _check_last(message: Message) -> None:
    is_text = message.role in ("user", "assistant") and not message.tool_calls
    if message.role != "tool" and not (is_text and message.content.strip()):
        raise QueryError(
            "messages must end with a non-blank user message, the result of a tool, or a non-blank "
            "assistant message to continue",
            field="messages",
        )


def _continues(fields: QueryFields, messages: tuple[Message, ...]) -> bool:
    """Whether the answer continues the last message.

    It continues an assistant message unless `continue_final_message` is false.
    """
    is_assistants = bool(messages) and messages[-1].role == "assistant"
    if fields.continue_final_message and not is_assistants:
        message = "continue_final_message requires that the last message is the assistant's"
        raise QueryError(message, field="continue_final_message")
    return is_assistants and fields.continue_final_message is not False


def _message(turn: MessageFields, path: str) -> Message:
    if turn.content is None and not turn.tool_calls:
        path = f"{path}.content"
        raise QueryError(f"{path} is required", ErrorCode.MISSING_FIELD, path)
    check_calls(turn.role, turn.tool_calls, turn.tool_call_id, path)
    calls = parse_calls(turn.tool_calls)
    return Message(turn.role, turn.content or "", calls, turn.tool_call_id or "")


def _sampling(fields: QueryFields, defaults: Sampling) -> Sampling:
    given = {name: _hashable(getattr(fields, name)) for name in SAMPLING_FIELDS}
    values = {k: getattr(defaults, k) if v is None else v for k, v in given.items()}
    seed = fields.seed
    if seed is None or seed == DEFAULT_SEED:
        seed = derived_seed(defaults.seed, fields.chat_id)
    return Sampling(**values, seed=seed)


def _hashable(value: Any) -> Any:
    """Token ids and biases in a canonical order; biases of 0 have no effect."""
    if isinstance(value, dict):
        return tuple(sorted((token_id, bias) for token_id, bias in value.items() if bias))
    return tuple(sorted(set(value))) if isinstance(value, list) else value


def _metadata(metadata: dict[str, Any] | None, extra: dict[str, Any]) -> dict[str, Any] | None:
    return {**extra, **(metadata or {})} if extra else metadata


def _check_combination(fields: QueryFields, query: Query) -> None:
    """Reject fields that are valid by themselves but contradict each other."""
    if fields.top_logprobs and query.top_logprobs is None:
        raise QueryError("top_logprobs requires logprobs to be true", field="top_logprobs")
    if query.tools is not None and query.raw_prompt is not None:
        raise QueryError("tools cannot be combined with raw_prompt", field="tools")
    if query.echo and query.raw_prompt is None:
        raise QueryError("echo requires raw_prompt", field="echo")
    if fields.max_new_tokens == 0 and fields.prompt_logprobs is None and not fields.echo:
        message = "max_new_tokens 0 requires prompt_logprobs or echo"
        raise QueryError(message, field="max_new_tokens")
    if query.n > 1 and query.sampling.is_greedy:
        message = "n above 1 requires a temperature above 0: greedy answers are all equal"
        raise QueryError(message, field="n")


# Errors.


def _query_error(exc: ValidationError) -> QueryError:
    errors = exc.errors(include_url=False, include_context=False)
    error = next((f for f in errors if f["type"] == "extra_forbidden"), errors[0])
    field = str(error["loc"][0])
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        message = f"unknown field {shorten(field)!r}{did_you_mean(field, FIELDS)}"
        return QueryError(message, ErrorCode.UNKNOWN_FIELD, shorten(field))
    if field == "chat_id" and (error["type"] == "missing" or error["input"] in (None, "")):
        return _required("chat_id")
    where = json_path(error["loc"])
    is_nested = where != field and field in ("messages", "tools")
    detail = f" (at {where})" if is_nested else ""
    message = f"{field} must be {FIELDS[field].description}{detail}"
    return QueryError(message, ErrorCode.INVALID_VALUE, field)


def _required(field: str) -> QueryError:
    return QueryError(f"{field} is required and cannot be empty", ErrorCode.MISSING_FIELD, field)
