"""Rules between the fields of a request, as JSON Schemas for /openapi.json."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

ECHOES: dict[str, Any] = {"required": ["echo"], "properties": {"echo": {"const": True}}}
_SCORES: dict[str, Any] = {
    "required": ["prompt_logprobs"],
    "properties": {"prompt_logprobs": {"type": "number"}},
}


def forbid_violations(rules: list[dict[str, Any]]) -> dict[str, Any]:
    """A schema of the objects that satisfy all rules.

    Equivalent to `allOf`, but some test data generators expand the product of its alternatives.
    """
    return {"not": {"anyOf": [{"not": rule} for rule in rules]}}


def at_most_one(names: Sequence[str], absent: list[Any]) -> list[dict[str, Any]]:
    """Rules that together allow at most one of several fields.

    Args:
        names: the fields' names.
        absent: the values that count as absent.
    """
    empty = {"enum": absent}
    return [
        {"anyOf": [{"properties": {one: empty}}, {"properties": {other: empty}}]}
        for one, other in combinations(names, 2)
    ]


def zero_tokens_rule(name: str) -> dict[str, Any]:
    """The rule that a query which generates nothing echoes or scores its prompt.

    Args:
        name: the field that holds the number of tokens to generate.
    """
    return {"anyOf": [{"properties": {name: {"not": {"const": 0}}}}, ECHOES, _SCORES]}


def tool_choice_rule(absent: list[Any]) -> dict[str, Any]:
    """The rule that only a query with tools may require a call.

    Args:
        absent: the values that count as absent.
    """
    return {
        "anyOf": [
            {"properties": {"tool_choice": {"enum": [*absent, "none", "auto"]}}},
            {"required": ["tools"], "properties": {"tools": {"type": "array", "minItems": 1}}},
        ]
    }


def combination_rules(absent: list[Any], default_temperature: bool) -> list[dict[str, Any]]:
    """Rules on log probabilities, tools and several answers.

    Args:
        absent: the values of an optional field that count as absent.
        default_temperature: whether sampling is the default when n is above 1.
    """
    sampled: dict[str, Any] = {"type": "number", "exclusiveMinimum": 0}
    temperature: dict[str, Any] = {"required": ["temperature"]}
    if default_temperature:
        sampled, temperature = {"anyOf": [sampled, {"enum": absent}]}, {}
    logprobs = [
        {"properties": {"top_logprobs": {"enum": [*absent, 0]}}},
        {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}},
    ]
    answers = [
        {"properties": {"n": {"enum": [*absent, 1]}}},
        temperature | {"properties": {"temperature": sampled}},
    ]
    return [{"anyOf": logprobs}, tool_choice_rule(absent), {"anyOf": answers}]
