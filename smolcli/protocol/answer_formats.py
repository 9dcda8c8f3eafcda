"""Answer formats: the fields of a query that ask for one, and `AnswerFormat`."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    model_validator,
)

from smolcli.errors import QueryError
from smolcli.protocol.field_rules import at_most_one, forbid_violations
from smolcli.protocol.fields import EMPTY, MAX_CHOICES, Choices, Flag, Lenient, Text, is_empty
from smolcli.protocol.json_text import load_json
from smolcli.types import AnswerFormat

JSON_OBJECT = '{"type": "object"}'
SCHEMA_NAME = "answer"  # OpenAI's format requires a name

FORMAT_FIELDS = ("response_format", "choices", "structured_outputs")
_STRUCTURES = ("json", "regex", "choice", "grammar", "json_object")
_WITHOUT_EFFECT = {
    *("disable_fallback", "disable_any_whitespace", "disable_additional_properties", "backend"),
}


class JsonSchemaFields(Lenient):
    """A schema in OpenAI's format; only the schema itself has an effect."""

    name: Text = SCHEMA_NAME
    description: Text | None = None
    strict: Flag | None = None
    definition: dict[str, Any] = Field(alias="schema", description="a JSON Schema")


class TextFormat(Lenient):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Lenient):
    """Any JSON object, or one that conforms to a schema, as in llama.cpp's API."""

    type: Literal["json_object"]
    definition: dict[str, Any] | None = Field(None, alias="schema", description="a JSON Schema")


class JsonSchemaFormat(Lenient):
    """JSON that conforms to a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaFields


class FlatJsonSchemaFormat(Lenient):
    """JSON that conforms to a schema, as in llama.cpp and OpenAI's Responses API.

    Only the schema itself has an effect.
    """

    type: Literal["json_schema"]
    definition: dict[str, Any] = Field(alias="schema", description="a JSON Schema")
    name: Text | None = None
    description: Text | None = None
    strict: Flag | None = None


def _format_tag(value: object) -> str | None:
    """The type of a format; "flat" for a schema without a wrapper."""
    if isinstance(value, BaseModel):
        value = value.model_dump(by_alias=True)
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return None
    is_flat = value.get("schema") is not None and is_empty(value.get("json_schema"))
    return "flat" if is_flat and value["type"] == "json_schema" else value["type"]


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("text")]
    | Annotated[JsonObjectFormat, Tag("json_object")]
    | Annotated[JsonSchemaFormat, Tag("json_schema")]
    | Annotated[FlatJsonSchemaFormat, Tag("flat")],
    Discriminator(_format_tag),
]


def _schema_of_text(value: object) -> object:
    """A JSON Schema that is given as text, parsed."""
    if not isinstance(value, str) or not value:
        return value
    try:
        return load_json(value.encode())
    except QueryError as exc:
        raise ValueError("not JSON") from exc


# /openapi.json does not mention text, because JSON Schema cannot say that it is JSON.
SchemaOrText = Annotated[
    dict[str, Any], BeforeValidator(_schema_of_text, json_schema_input_type=dict[str, Any])
]


class StructuredOutputs(Lenient):
    """An answer format in vLLM's shape: at most one of the first five members."""

    model_config = ConfigDict(
        json_schema_extra=forbid_violations(at_most_one(_STRUCTURES, [*EMPTY, False]))
    )

    definition: SchemaOrText | None = Field(
        None, alias="json", description="a JSON Schema, also as text"
    )
    regex: Text | None = Field(None, description="a string")
    choice: Choices | None = Field(None, description="a list of strings")
    grammar: Text | None = Field(None, description="a string")
    json_object: Flag | None = Field(None, description="true or false")
    disable_fallback: Flag | None = Field(None, description="true or false; it has no effect")
    disable_any_whitespace: Flag | None = Field(None, description="true or false; it has no effect")
    disable_additional_properties: Literal[False] | None = Field(None, description="false")
    backend: Text | None = Field(None, description="a string; it has no effect")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        names = [name for name in self.__pydantic_fields_set__ if name not in _WITHOUT_EFFECT]
        if sum(getattr(self, name) not in (None, False) for name in names) > 1:
            raise ValueError("more than one format")
        return self

    def format(self) -> AnswerFormat | None:
        """The format that it stands for; None if it has none."""
        if self.definition is not None:
            return schema_format(self.definition)
        if self.choice is not None:
            return AnswerFormat(choices=tuple(dict.fromkeys(self.choice)))
        if self.json_object:
            return AnswerFormat(schema=JSON_OBJECT)
        if self.regex or self.grammar:
            return AnswerFormat(regex=self.regex or "", grammar=self.grammar or "")
        return None


STRUCTURED_DESCRIPTION = (
    'an object with one of "json" (a JSON Schema), "regex", "choice", "grammar" and "json_object"'
)
FORMAT_DESCRIPTION = (
    '{"type": "text"}, {"type": "json_object"}, '
    'or {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
)
CHOICES_DESCRIPTION = (
    f"a list of 1 to {MAX_CHOICES:,} non-empty strings without leading or trailing white space"
)


def model_schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a pydantic model, or of any other type that pydantic can describe."""
    return TypeAdapter(kind).json_schema()


def schema_format(schema: dict[str, Any]) -> AnswerFormat:
    """The answer format of a JSON Schema."""
    return AnswerFormat(schema=json.dumps(schema, ensure_ascii=False))


def answer_format(
    response_format: ResponseFormat | None,
    choices: list[str] | None,
    structured_outputs: StructuredOutputs | None,
    default: AnswerFormat | None,
) -> AnswerFormat | None:
    """The answer format that a query asks for; None means any text.

    Args:
        response_format: the field of that name.
        choices: the field of that name.
        structured_outputs: the field of that name.
        default: the format of a query that has none of these fields.

    Raises:
        QueryError: more than one of the fields is given.
    """
    if structured_outputs is not None:
        for name, value in (("response_format", response_format), ("choices", choices)):
            if value is not None:
                message = f"structured_outputs cannot be combined with {name}"
                raise QueryError(message, field="structured_outputs")
        return structured_outputs.format() or default
    if choices is not None:
        if response_format is not None:
            raise QueryError("choices cannot be combined with response_format", field="choices")
        return AnswerFormat(choices=tuple(dict.fromkeys(choices)))
    return default if response_format is None else _response_format(response_format)


def _response_format(response_format: ResponseFormat) -> AnswerFormat | None:
    match response_format:
        case TextFormat():
            return None
        case JsonObjectFormat():
            definition = response_format.definition
            return schema_format(definition) if definition else AnswerFormat(schema=JSON_OBJECT)
        case JsonSchemaFormat():
            return schema_format(response_format.json_schema.definition)
        case FlatJsonSchemaFormat():
            return schema_format(response_format.definition)


def format_fields(answers: AnswerFormat | None) -> dict[str, Any]:
    """The query fields that ask for an answer format: the inverse of `answer_format`."""
    if answers is None:
        return {}
    if answers.choices:
        return {"choices": list(answers.choices)}
    for name in ("regex", "grammar"):
        if text := getattr(answers, name):
            return {"structured_outputs": {name: text}}
    if answers.schema == JSON_OBJECT:
        return {"response_format": {"type": "json_object"}}
    schema = {"name": SCHEMA_NAME, "schema": json.loads(answers.schema)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}
