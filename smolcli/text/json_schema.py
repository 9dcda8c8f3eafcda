"""Rewrites JSON Schemas for llguidance, which rejects some keywords that constrain nothing."""

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

# The formats that llguidance enforces. In JSON Schema, all others are mere annotations.
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
)
_UUID = "[0-9a-f]{{8}}-[0-9a-f]{{4}}-{version}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}"
_ANNOTATIONS = frozenset(("type", "title", "description", "default", "examples", "format"))
_WITH_SCHEMA = ("items", "additionalProperties", "contains", "not", "if", "then", "else")
_WITH_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_WITH_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")


def rewrite_schema(schema: Schema) -> Schema:
    """Return an equivalent schema without the keywords that llguidance does not support.

    Unknown formats are dropped, and pydantic's formats for UUIDs and IP addresses are expressed
    with other keywords. `propertyNames` becomes `properties` or `patternProperties`. `uniqueItems`
    is dropped, because a grammar cannot compare items; parsers that want a set remove duplicates.

    Args:
        schema: a JSON Schema; not modified.
    """
    return _rewritten(schema, schema)


def close_objects(schema: Schema) -> Schema:
    """Return a schema whose objects have no properties but those that it names.

    Whatever follows the result also follows the schema. Objects stay open where another keyword
    may add properties, and a schema with allOf is returned as it is, because what one part names
    another may not.

    Args:
        schema: a JSON Schema; not modified.
    """
    return schema if _has_key(schema, "allOf") else _closed(schema)


_OPENING = {
    *("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames"),
    *("minProperties", "anyOf", "oneOf", "not", "if", "$ref", "dependentSchemas"),
}


def _closed(node: Schema) -> Schema:
    node = dict(node)
    properties = node.get("properties")
    if isinstance(properties, dict):
        is_named = set(_strings(node.get("required"))) <= properties.keys()
        if is_named and not node.keys() & _OPENING:
            node["additionalProperties"] = False
    for name in ("items", "additionalProperties"):
        if isinstance(node.get(name), dict):
            node[name] = _closed(node[name])
    for name in ("prefixItems", *(() if isinstance(properties, dict) else ("anyOf", "oneOf"))):
        if isinstance(node.get(name), list):
            node[name] = [_closed(v) if isinstance(v, dict) else v for v in node[name]]
    for name in ("properties", "$defs", "definitions"):
        if isinstance(node.get(name), dict):
            node[name] = {
                key: _closed(value) if isinstance(value, dict) else value
                for key, value in node[name].items()
            }
    return node


def _has_key(value: object, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_has_key(each, key) for each in value.values())
    return isinstance(value, list) and any(_has_key(each, key) for each in value)


def _strings(value: object) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _rewritten(node: Schema, root: Schema) -> Schema:
    node = dict(node)
    for name in _WITH_SCHEMA:
        if isinstance(node.get(name), dict):
            node[name] = _rewritten(node[name], root)
    for name in _WITH_SCHEMAS:
        if isinstance(node.get(name), list):
            node[name] = [_rewritten(v, root) if isinstance(v, dict) else v for v in node[name]]
    for name in _WITH_NAMED_SCHEMAS:
        if isinstance(node.get(name), dict):
            node[name] = {
                key: _rewritten(value, root) if isinstance(value, dict) else value
                for key, value in node[name].items()
            }
    node.pop("uniqueItems", None)
    if isinstance(node.get("format"), str):
        _rewrite_format(node)
    if isinstance(node.get("propertyNames"), dict):
        _rewrite_property_names(node, root)
    return node


def _rewrite_format(node: Schema) -> None:
    name = node["format"]
    if name in _FORMATS:
        return
    del node["format"]
    version = name.removeprefix("uuid")
    if name != version and version in set("12345678") and "pattern" not in node:
        node["pattern"] = f"^{_UUID.format(version=version)}$"
    elif name == "ipvanyaddress" and "anyOf" not in node:
        node["anyOf"] = [{"format": "ipv4"}, {"format": "ipv6"}]


def _rewrite_property_names(node: Schema, root: Schema) -> None:
    names = _resolved(node["propertyNames"], root)
    values = node.get("additionalProperties", {})
    if "properties" in node or "patternProperties" in node or values is False:
        return
    allowed = names.get("enum", [names["const"]] if "const" in names else None)
    pattern = names.get("pattern")
    if isinstance(allowed, list) and all(isinstance(name, str) for name in allowed):
        node["properties"] = dict.fromkeys(allowed, values)
    elif isinstance(pattern, str) and names.keys() <= {*_ANNOTATIONS, "pattern"}:
        node["patternProperties"] = {pattern: values}
    elif names.keys() <= _ANNOTATIONS:
        del node["propertyNames"]
        return
    else:
        return
    node["additionalProperties"] = False
    del node["propertyNames"]


def _resolved(schema: Schema, root: Schema) -> Schema:
    """The schema that a reference within the document points to."""
    for _ in range(10):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        target: Any = root
        for step in _steps(reference):
            target = target.get(step) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            break
        schema = target
    return schema


def _steps(reference: str) -> Iterator[str]:
    for step in reference.removeprefix("#/").split("/"):
        yield step.replace("~1", "/").replace("~0", "~")
