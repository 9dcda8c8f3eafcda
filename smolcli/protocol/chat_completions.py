"""OpenAI's chat completions: the parser of a request, and the format of its answers.

The pydantic models here are the only description of a request: they parse it, and /openapi.json is
generated from them.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from smolcli.errors import QueryError
from smolcli.protocol.field_rules import forbid_violations
from smolcli.protocol.fields import (
    EMPTY,
    MAX_LOGPROBS,
    Count,
    Flag,
    Items,
    Lenient,
    Number,
    NumLogprobs,
    Text,
)
from smolcli.protocol.openai import (
    MUST_BE_FALSE,
    NO_EFFECT,
    SHARED_COMBINATIONS,
    STREAM_COMBINATIONS,
    UNSUPPORTED,
    GenerationFields,
    RefusalPart,
    check_stream,
    query_fields,
    rank_entries,
    usage_fields,
)
from smolcli.protocol.parameters import invalid_parameter, validated
from smolcli.protocol.query import parse_query
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


class TextPart(Lenient):
    """One part of a message's content; only text is supported."""

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: dict[str, Any] | None = Field(
        None, description="an object; it has no effect"
    )
    cache_control: dict[str, Any] | None = Field(None, description="an object; it has no effect")


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class ChatMessage(Lenient):
    """One message. Fields of an earlier answer that the official clients send back are accepted."""

    model_config = ConfigDict(
        json_schema_extra=message_rules(list(EMPTY), is_content_optional=True)
    )
    KEPT = frozenset({"content"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Items[Part] | None = Field(
        None, description="a string or a list of text parts; null only from the assistant"
    )
    name: Text | None = Field(None, description="a string; it has no effect")
    tool_calls: Items[CallFields] | None = Field(
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


Zero = Annotated[Number, Field(ge=0, le=0)]

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


class CompletionFields(GenerationFields):
    """The parameters of a chat completion; see `GenerationFields`."""

    model_config = ConfigDict(
        json_schema_extra=forbid_violations(
            [*SHARED_COMBINATIONS, *STREAM_COMBINATIONS, _CONTINUATION]
        )
    )

    messages: Annotated[Items[ChatMessage], Field(min_length=1)] = Field(
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
    safety_identifier: Text | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: Text | None = Field(None, description=NO_EFFECT)
    prompt_cache_retention: Text | None = Field(None, description=NO_EFFECT)
    prompt_cache_options: dict[str, Any] | None = Field(
        None, description="an object; it has no effect"
    )
    service_tier: Text | None = Field(None, description=NO_EFFECT)
    metadata: dict[str, Any] | None = Field(None, description="an object; it has no effect")
    prediction: dict[str, Any] | None = Field(None, description="an object; it has no effect")

    # OpenAI's parameters that are not supported.
    store: Literal[False] | None = Field(None, description="false: nothing is stored")
    modalities: Items[Literal["text"]] | None = Field(
        None, description='["text"]: others are not supported'
    )
    reasoning_effort: Literal["none"] | None = Field(
        None, description='"none": the model does not reason'
    )
    verbosity: Literal["medium"] | None = Field(
        None, description='"medium": others are not supported'
    )
    functions: None = Field(None, description="empty: use tools")
    function_call: Literal["none", "auto"] | None = Field(
        None, description='"none" or "auto": use tool_choice'
    )
    audio: None = Field(None, description=UNSUPPORTED)
    moderation: None = Field(None, description=UNSUPPORTED)
    web_search_options: None = Field(None, description=UNSUPPORTED)

    # vLLM's parameters.
    include_reasoning: Flag | None = Field(None, description="true or false; it has no effect")
    thinking_token_budget: Zero | None = Field(None, description="0: the model does not reason")
    echo: Literal[False] | None = Field(None, description=MUST_BE_FALSE)
    add_generation_prompt: Flag | None = Field(
        None, description="true, or false if and only if continue_final_message is true"
    )
    continue_final_message: Flag | None = Field(
        None,
        description="true or false: whether the answer continues the last message, which must be "
        "the assistant's",
    )
    add_special_tokens: Literal[False] | None = Field(None, description=MUST_BE_FALSE)
    documents: None = Field(None, description=UNSUPPORTED)
    chat_template: None = Field(None, description="empty: the model's own template is used")
    chat_template_kwargs: None = Field(None, description=UNSUPPORTED)
    mm_processor_kwargs: None = Field(None, description=UNSUPPORTED)


@dataclass(frozen=True, slots=True)
class Completion:
    """A chat completion request, and the JSON of its responses.

    Args:
        query: the query to answer.
        model: the requested model.
        is_stream: whether to stream the answers.
        includes_usage: whether a stream ends with the usage.
        created: creation time in seconds since 1970.
    """

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
            index: the answer's index.
            delta: the new part of its message.
            logprobs: entries for the tokens since its previous chunk.
            finish_reason: why the answer ended; only in its last chunk.
        """
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": list(logprobs)} if logprobs else None,
            "finish_reason": finish_reason,
        }
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self.includes_usage else chunk

    def usage_chunk(self, usage: Usage | None) -> dict[str, Any]:
        """The final chunk of a stream, if its usage was requested."""
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


def _answer_message(answer: Result) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.response}
    if answer.tool_calls:
        message["tool_calls"] = [call.record() for call in answer.tool_calls]
    return message


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
        chat_id: id for the query.
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
