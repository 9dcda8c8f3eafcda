"""What OpenAI's APIs share: parameters of requests, token counts, log probabilities and errors."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from smolcli.errors import QueryError
from smolcli.protocol.answer_formats import (
    CHOICES_DESCRIPTION,
    FORMAT_DESCRIPTION,
    FORMAT_FIELDS,
    STRUCTURED_DESCRIPTION,
    ResponseFormat,
    SchemaOrText,
    StructuredOutputs,
)
from smolcli.protocol.field_rules import at_most_one, combination_rules
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
)
from smolcli.protocol.parameters import invalid_parameter
from smolcli.settings import QueryDefaults
from smolcli.types import ErrorCode, Usage


class RefusalPart(Lenient):
    """A refusal in an earlier answer; it counts as text."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        """See `TextPart`."""
        return self.refusal


class StreamOptions(Lenient):
    """What a stream reports besides the text."""

    include_usage: Flag = Field(False, description="true or false")
    include_obfuscation: Flag = Field(False, description="true or false; it has no effect")
    continuous_usage_stats: Flag = Field(
        False, description="true or false; usage is reported once, at the end"
    )


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
    *combination_rules(list(EMPTY), default_temperature=True),
    *at_most_one((*FORMAT_FIELDS, *OTHER_FORMAT_FIELDS), list(EMPTY)),
]

MODEL = "the name of the model, as listed by GET /v1/models; the default is the first one"
MUST_BE_FALSE = "false: it is not supported"
NO_EFFECT = "a string; it has no effect"
UNSUPPORTED = "empty: it is not supported"


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
    user: Text | None = Field(None, description=NO_EFFECT)

    # vLLM's parameters without an effect here.
    priority: Integer | None = Field(None, description="an integer; it has no effect")
    request_id: Text | None = Field(None, description=NO_EFFECT)
    cache_salt: Text | None = Field(None, description=NO_EFFECT)
    guided_decoding_backend: Text | None = Field(None, description=NO_EFFECT)
    spaces_between_special_tokens: Flag | None = Field(
        None, description="true or false; it has no effect"
    )

    # vLLM's parameters that are not supported.
    best_of: One | None = Field(None, description="1: it is not supported")
    use_beam_search: Literal[False] | None = Field(None, description=MUST_BE_FALSE)
    early_stopping: Literal[False] | None = Field(None, description=MUST_BE_FALSE)
    length_penalty: One | None = Field(None, description="1: it is not supported")
    logits_processors: None = Field(None, description=UNSUPPORTED)
    skip_special_tokens: Literal[True] | None = Field(
        None, description="true: special tokens are never part of an answer"
    )
    truncate_prompt_tokens: None = Field(None, description=UNSUPPORTED)
    prompt_logprobs: NumLogprobs | None = Field(
        None,
        description=f"an integer from 0 to {MAX_LOGPROBS}, and absent if stream is true; "
        "an extension",
    )
    return_tokens_as_token_ids: Literal[False] | None = Field(None, description=MUST_BE_FALSE)
    return_token_ids: Literal[False] | None = Field(None, description=MUST_BE_FALSE)
    guided_whitespace_pattern: None = Field(None, description=UNSUPPORTED)
    kv_transfer_params: None = Field(None, description=UNSUPPORTED)
    vllm_xargs: None = Field(None, description=UNSUPPORTED)


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


# OpenAI's clients recognize this code.
_OPENAI_CODES: dict[str, str] = {ErrorCode.PROMPT_TOO_LONG: "context_length_exceeded"}


def error_object(status: int, message: str, code: str, field: str | None) -> dict[str, Any]:
    """An error as OpenAI's clients read it.

    Args:
        status: HTTP status of the response.
        message: what is wrong, in a sentence.
        code: an `ErrorCode`, which is translated if OpenAI has a code of its own, or another code.
        field: path of the parameter, if any.
    """
    kind = "invalid_request_error" if status < 500 else "server_error"
    if field is None and code == ErrorCode.PROMPT_TOO_LONG:
        field = "messages"
    if field == "raw_prompt":
        field, message = "prompt", message.replace("raw_prompt", "prompt")
    return {
        "message": message,
        "type": kind,
        "param": field,
        "code": str(_OPENAI_CODES.get(code, code)),
    }


def error_code(name: str) -> ErrorCode:
    """The error code of an error object: the inverse of `error_object`.

    Raises:
        ValueError: it is not an error code.
    """
    names = {openai_code: code for code, openai_code in _OPENAI_CODES.items()}
    return ErrorCode(names.get(name, name))


def model_name(model: str) -> str:
    """The name that clients use for a model: its Hub id, or the name of its folder or file."""
    path = Path(os.path.expanduser(model))
    return path.resolve().name if path.exists() else model
