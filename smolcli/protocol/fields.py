"""The types of fields that queries and OpenAI's requests share."""

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema

from smolcli.errors import closest

MAX_CHOICES = 1000
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
MAX_BIAS = 100
MAX_LISTED = 1024  # biases, stop tokens and bad words
MAX_ALLOWED = 1 << 16  # allowed tokens
MAX_ANSWERS = 16
MAX_LOGPROBS = 20
MAX_EXACT_FLOAT = 2**53  # the largest integer up to which floats are exact


def float_to_int(value: object) -> object:
    """A whole float, which JSON does not distinguish from an integer, as an int."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT_FLOAT:
        return int(value)
    return value


def decimal_id(value: object) -> object:
    """An integer id as its decimal string; any other value unchanged."""
    value = float_to_int(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _one_or_many(value: object) -> object:
    """A single stop string as a list."""
    return [value] if isinstance(value, str) else value


_TOKEN_KEY = r"(0|[1-9][0-9]{0,8})"


def _token_key(value: object) -> object:
    """A token id that is written as a key of a JSON object, as an int."""
    if isinstance(value, str) and re.fullmatch(_TOKEN_KEY, value):
        return int(value)
    return value


def _short(value: object) -> object:
    """Reject a large object before its members are validated, each with an error of its own."""
    if isinstance(value, dict) and len(value) > MAX_LISTED:
        raise ValueError("too many members")
    return value


def _stripped(value: object) -> object:
    """Reject a choice with outer white space: answers are stripped, so none could match it."""
    if isinstance(value, str) and value != value.strip():
        raise ValueError("leading or trailing white space")
    return value


# What `str.strip` removes, spelled out for /openapi.json: `\s` differs between validators.
_WHITE_SPACE = r"\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
NOT_BLANK = f"[^{_WHITE_SPACE}]"

T = TypeVar("T")
# A list whose validation ends at the first error: there is room for millions in a request.
Items = Annotated[list[T], Field(fail_fast=True)]
Text = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
# Bounds must come before the validator; otherwise, /openapi.json would lack them.
FLOAT_TO_INT = BeforeValidator(float_to_int)
Integer = Annotated[int, Field(strict=True), FLOAT_TO_INT]
Count = Annotated[int, Field(strict=True, ge=1), FLOAT_TO_INT]
Temperature = Annotated[Number, Field(ge=0, le=100)]
TopP = Annotated[Number, Field(gt=0, le=1)]
TopK = Annotated[int, Field(strict=True, ge=0), FLOAT_TO_INT]
Penalty = Annotated[Number, Field(gt=0, le=100)]
MinP = Annotated[Number, Field(ge=0, le=1)]
OutputPenalty = Annotated[Number, Field(ge=-2, le=2)]
NumTokens = Annotated[int, Field(strict=True, ge=0), FLOAT_TO_INT]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31), FLOAT_TO_INT]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_LISTED)]
AllowedIds = Annotated[Items[TokenId], Field(max_length=MAX_ALLOWED)]
LogitBias = Annotated[
    dict[
        Annotated[int, Field(strict=True, ge=0), BeforeValidator(_token_key)],
        Annotated[Number, Field(ge=-MAX_BIAS, le=MAX_BIAS)],
    ],
    BeforeValidator(_short),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_LISTED,
            "propertyNames": {"pattern": rf"^{_TOKEN_KEY}(?![\s\S])"},
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
        }
    ),
]
Seed = Annotated[int, Field(strict=True, ge=MIN_SEED, le=MAX_SEED), FLOAT_TO_INT]
NumAnswers = Annotated[int, Field(strict=True, ge=1, le=MAX_ANSWERS), FLOAT_TO_INT]
NumLogprobs = Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS), FLOAT_TO_INT]
StopString = Annotated[str, Field(strict=True, min_length=1, max_length=1000)]
StopStrings = Annotated[list[StopString], Field(max_length=16)]
Stop = Annotated[
    StopStrings, BeforeValidator(_one_or_many, json_schema_input_type=StopStrings | StopString)
]
RawText = Annotated[str, Field(strict=True, min_length=1)]
PromptIds = Annotated[Items[TokenId], Field(min_length=1)]
RawPrompt = RawText | PromptIds
Id = Annotated[str, Field(strict=True, min_length=1)]
BadWord = Annotated[
    str, Field(strict=True, max_length=1000, pattern=NOT_BLANK)  # white space is not a word
]
BadWords = Annotated[list[BadWord], Field(max_length=MAX_LISTED)]
ChatId = Annotated[Id, BeforeValidator(decimal_id, json_schema_input_type=Id | int)]
# The lookahead is JSON Schema's portable way to say "end of text": $ also matches before "\n".
_CHOICE_PATTERN = rf"^{NOT_BLANK}(?:[\s\S]*{NOT_BLANK})?(?![\s\S])"
_ChoiceText = Annotated[
    str,
    Field(
        strict=True,
        min_length=1,
        max_length=1000,
        json_schema_extra={"pattern": _CHOICE_PATTERN},
    ),
]
Choice = Annotated[_ChoiceText, BeforeValidator(_stripped, json_schema_input_type=_ChoiceText)]
Choices = Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES)]


# Descriptions that a field has in both formats; they complete "<field> must be ...".

MIN_P = "a number from 0 (no minimum) to 1"
PENALTY = "a number from -2 to 2"
LOGIT_BIAS = (
    f"an object that maps up to {MAX_LISTED:,} token ids to numbers from -{MAX_BIAS} to {MAX_BIAS}"
)
MIN_TOKENS = "a non-negative integer"
FLAG = "true or false"
STOP_TOKEN_IDS = f"a list of up to {MAX_LISTED:,} token ids"
ALLOWED_TOKEN_IDS = f"a list of up to {MAX_ALLOWED:,} token ids; an empty one allows all"
BAD_WORDS = f"a list of up to {MAX_LISTED:,} non-blank strings"
SEED = "an integer from -2^63 to 2^63 - 1; -1 means the default"


# Objects whose empty members have no effect.

EMPTY: tuple[Any, ...] = (None, "", [], {})


def is_empty(value: object) -> bool:
    """Whether a value has no effect: it is empty, or an object of empty and false members."""
    if isinstance(value, dict):
        return all(member is False or _is_plain_empty(member) for member in value.values())
    return _is_plain_empty(value)


def _is_plain_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


_EMPTY_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": list(EMPTY)},
        {"type": "object", "additionalProperties": {"enum": [*EMPTY, False]}},
    ]
}


class Lenient(BaseModel):
    """An object whose empty members have no effect, whatever their names.

    Null, "", [], {} and objects whose members are all empty or false count as absent, except in
    required members and those in `KEPT`.
    """

    model_config = ConfigDict(extra="forbid")
    KEPT: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        return {k: v for k, v in values.items() if not is_empty(v) or k in cls._kept()}

    @classmethod
    def _kept(cls) -> set[str]:
        fields = cls.model_fields.items()
        required = {info.alias or name for name, info in fields if info.is_required()}
        return required | cls.KEPT

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, definition in schema["properties"].items():
            if name not in cls._kept():
                described = {k: definition.pop(k) for k in ("description",) if k in definition}
                schema["properties"][name] = described | {"anyOf": [definition, _EMPTY_SCHEMA]}
        schema["additionalProperties"] = _EMPTY_SCHEMA
        return schema


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name that resembles an unknown one, if any."""
    near = closest(name, known, cutoff=0.7)
    return f"; did you mean {near!r}?" if near else ""
