"""How a query says what its answers are to be: JSON of a schema, or one of some strings."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from smolcli.errors import QueryError
from smolcli.types import AnswerFormat

JSON_OBJECT = '{"type": "object"}'
SCHEMA_NAME = "answer"  # OpenAI's shape wants one
MAX_CHOICES = 1000


def _bare(value: object) -> object:
    """Answers come without outer white space, so a choice cannot have any."""
    if isinstance(value, str) and value != value.strip():
        raise ValueError("outer white space")
    return value


Choice = Annotated[
    str, Field(strict=True, min_length=1, max_length=1000), BeforeValidator(_bare, str)
]


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JsonSchemaFields(_Exact):
    """A schema as OpenAI's API has it; only the schema itself changes anything."""

    name: Annotated[str, Field(strict=True)] = SCHEMA_NAME
    description: Annotated[str, Field(strict=True)] | None = None
    strict: Annotated[bool, Field(strict=True)] | None = None
    definition: dict[str, Any] = Field(alias="schema", description="a JSON Schema")


class TextFormat(_Exact):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(_Exact):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(_Exact):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaFields


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]
Choices = Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES)]

FORMAT_DESCRIPTION = (
    '{"type": "text"}, {"type": "json_object"}, '
    'or {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
)
CHOICES_DESCRIPTION = (
    f"a list of 1 to {MAX_CHOICES:,} strings, not empty and without white space around them"
)


def schema_format(schema: dict[str, Any]) -> AnswerFormat:
    """The format of answers that a schema allows."""
    return AnswerFormat(schema=json.dumps(schema, ensure_ascii=False))


def answer_format(
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None,
    choices: list[str] | None,
    default: AnswerFormat | None,
) -> AnswerFormat | None:
    """What a query's answers are to be; None: any text.

    Raises:
        QueryError: where it says two things.
    """
    if choices is not None:
        if response_format is not None:
            raise QueryError("choices cannot stand beside response_format", field="choices")
        return AnswerFormat(choices=tuple(dict.fromkeys(choices)))
    match response_format:
        case None:
            return default
        case TextFormat():
            return None
        case JsonObjectFormat():
            return AnswerFormat(schema=JSON_OBJECT)
        case JsonSchemaFormat():
            return schema_format(response_format.json_schema.definition)


def format_fields(answers: AnswerFormat | None) -> dict[str, Any]:
    """The fields of a query that say what its answers are to be."""
    if answers is None:
        return {}
    if answers.choices:
        return {"choices": list(answers.choices)}
    if answers.schema == JSON_OBJECT:
        return {"response_format": {"type": "json_object"}}
    schema = {"name": SCHEMA_NAME, "schema": json.loads(answers.schema)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}
