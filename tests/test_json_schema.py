"""Schemas that pydantic generates, enforced by a grammar over bytes; no model is needed."""

from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import (
    UUID1,
    UUID4,
    UUID7,
    Base64Bytes,
    ByteSize,
    FilePath,
    HttpUrl,
    IPvAnyAddress,
    IPvAnyNetwork,
    Json,
    SecretStr,
    StringConstraints,
    TypeAdapter,
)

from smolcli.errors import QueryError
from smolcli.protocol.answer_formats import model_schema, schema_format
from smolcli.text.grammar import GrammarSpec, check_format, to_grammar
from smolcli.text.json_schema import rewrite_schema

TOKENIZER = LLTokenizer("byte")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


Code = Annotated[str, StringConstraints(pattern="^[A-Z]{2}$")]
SOME_UUID = "9b2e1f0c-58d4-4c39-8a51-0f6c2d7e3b11"


def allows(schema: dict[str, Any], text: str) -> bool:
    """Whether an answer constrained by a schema can be this text."""
    matcher = LLMatcher(TOKENIZER, to_grammar(GrammarSpec(schema_format(schema))), log_level=0)
    tokens = list(text.encode())
    if matcher.validate_tokens(tokens) < len(tokens):
        return False
    matcher.consume_tokens(tokens)
    return bool(matcher.is_accepting())


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (UUID, f'"{SOME_UUID}"', '"x"'),
        (UUID4, f'"{SOME_UUID}"', '"9b2e1f0c-58d4-1c39-8a51-0f6c2d7e3b11"'),
        (UUID1, '"9b2e1f0c-58d4-1c39-8a51-0f6c2d7e3b11"', f'"{SOME_UUID}"'),
        (UUID7, '"9b2e1f0c-58d4-7c39-8a51-0f6c2d7e3b11"', '"x"'),
        (IPvAnyAddress, '"10.0.0.1"', '"home"'),
        (IPvAnyAddress, '"2001:db8:0:0:0:0:0:1"', "1"),
        (IPv4Address, '"10.0.0.1"', '"x"'),
        (IPv6Address, '"2001:db8:0:0:0:0:0:1"', '"x"'),
        (IPvAnyNetwork, '"10.0.0.0/8"', "1"),
        (Path, '"a/b.txt"', "1"),
        (FilePath, '"a/b.txt"', "1"),
        (SecretStr, '"hunter2"', "1"),
        (bytes, '"abc"', "1"),
        (Base64Bytes, '"YWJj"', "1"),
        (HttpUrl, '"https://example.org/"', "1"),
        (str, '"a@example.org"', "1"),
        (ByteSize, "5", '"x"'),
        (Json[list[int]], '"[1]"', "1"),
        (Decimal, '"1.5"', "true"),
        (date, '"2024-02-29"', '"x"'),
        (datetime, '"2024-02-29T12:00:00Z"', '"x"'),
        (time, '"12:00:00Z"', '"x"'),
        (timedelta, '"P1D"', '"x"'),
        (set[str], '["a", "b"]', '["a", 1]'),
        (frozenset[Colour], '["red"]', '["green"]'),
        (dict[Colour, int], '{"red": 1}', '{"green": 1}'),
        (dict[Literal["a"], int], '{"a": 1}', '{"b": 1}'),
        (dict[Code, int], '{"AB": 1}', '{"AB": true}'),
        (dict[UUID, int], f'{{"{SOME_UUID}": 1}}', '{"a": "b"}'),
        (dict[date, list[UUID4]], f'{{"2024-02-29": ["{SOME_UUID}"]}}', '{"2024-02-29": ["x"]}'),
    ],
)
def test_ordinary_pydantic_types_are_supported(kind: Any, good: str, bad: str) -> None:
    """An unknown `format` is an annotation, but used to cause the schema to be rejected."""
    schema = model_schema(kind)
    check_format(schema_format(schema))
    assert allows(schema, good)
    assert not allows(schema, bad)
    if kind is not FilePath:
        TypeAdapter(kind).validate_json(good)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"format": {"type": "string"}, "propertyNames": {"type": "integer"}}},
        {"enum": [{"format": "path"}]},
        {"const": {"propertyNames": {"const": "a"}, "format": "x"}},
        {"properties": {"a": {"type": "string", "default": {"format": "x"}}}},
        {"type": "string", "format": "date"},
        {},
    ],
)
def test_only_keywords_are_rewritten(schema: dict[str, Any]) -> None:
    assert rewrite_schema(schema) == schema


def test_rewriting_leaves_the_schema_unchanged() -> None:
    schema: dict[str, Any] = {"items": {"type": "string", "format": "path"}}
    assert rewrite_schema(schema) == {"items": {"type": "string"}}
    assert schema == {"items": {"type": "string", "format": "path"}}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}},
        {"type": "string", "pattern": "^a$", "minLength": 5},
        {"type": "object", "propertyNames": {"minLength": 3}},
        {"type": "string", "enum": []},
    ],
)
def test_check_rejects_every_schema_that_a_run_rejects(schema: dict[str, Any]) -> None:
    """`--check` used to accept schemas that a run then rejected."""
    with pytest.raises(QueryError, match="unsupported schema"):
        check_format(schema_format(schema))
