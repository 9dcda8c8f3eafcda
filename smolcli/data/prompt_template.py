"""Prompt templates, and the columns that they name."""

import json
from collections.abc import Container, Iterable, Mapping
from typing import Any

from smolcli.data.rows import LongestField
from smolcli.errors import QueryError, UsageError, closest
from smolcli.protocol.fields import did_you_mean
from smolcli.protocol.json_text import load_json
from smolcli.types import ErrorCode

PROMPT_NAMES = ("prompt", "question", "text", "input", "instruction", "query", "content")


class Template:
    """A prompt with placeholders for columns: `Translate {text}`.

    A placeholder contains the name of a column verbatim, including colons, exclamation marks and
    balanced braces. Any name can be written as a JSON string: `{"{odd}"}`. `{a.b}` is the member
    `b` of the column `a`, unless a column has the whole name. `{{` and `}}` are literal braces.

    Raises:
        UsageError: the text is not a template.
    """

    def __init__(self, text: str) -> None:
        self._parts = list(_parts(text))
        self.columns = list(dict.fromkeys(name for _, name in self._parts if name is not None))
        if not self.columns:
            raise UsageError(
                "--prompt names no column: write {text} where the text of column 'text' should go"
            )

    def render(self, values: Mapping[str, Any]) -> str:
        """The prompt of one row.

        Raises:
            QueryError: a column is missing, or all of them are blank.
        """
        return self._filled(self._texts(values))

    def longest_field(self, values: Mapping[str, Any]) -> LongestField:
        """The column with the longest text, for a row that `render` accepts."""
        texts = self._texts(values)
        longest = max(self.columns, key=lambda name: len(texts[name]))
        return LongestField(
            texts[longest], lambda replaced: self._filled(texts | {longest: replaced})
        )

    def _texts(self, values: Mapping[str, Any]) -> dict[str, str]:
        texts = {name: _text(cell(values, name)) for name in self.columns}
        if not any(text.strip() for text in texts.values()):
            names = " and ".join(repr(name) for name in self.columns)
            raise QueryError(f"{names} must not be empty", ErrorCode.MISSING_FIELD, self.columns[0])
        return texts

    def _filled(self, texts: Mapping[str, str]) -> str:
        return "".join(
            literal + (texts[name] if name is not None else "") for literal, name in self._parts
        )


def _parts(text: str) -> Iterable[tuple[str, str | None]]:
    """The pieces of a template: literal text, and the name of the column that follows it."""
    at, literal = 0, ""
    while at < len(text):
        character = text[at]
        if character in "{}" and text[at : at + 2] == character * 2:
            literal, at = literal + character, at + 2
        elif character == "}":
            raise UsageError("--prompt: unmatched '}'; write '}}' for a literal brace")
        elif character == "{":
            name, at = _name(text, at + 1)
            yield literal, name
            literal = ""
        else:
            literal, at = literal + character, at + 1
    if literal:
        yield literal, None


def _name(text: str, start: int) -> tuple[str, int]:
    """The name of the column in a placeholder, and where the text after it begins."""
    if text[start : start + 1] == '"':
        try:
            name, end = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            name, end = "", start
        if isinstance(name, str) and text[end : end + 1] == "}":
            return name, end + 1
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            break
    else:
        raise UsageError("--prompt: unmatched '{'; write '{{' for a literal brace")
    name = text[start:end].replace("{{", "{").replace("}}", "}")
    if not name:
        raise UsageError("--prompt: '{}' names no column; write {text}, or {{}} for literal braces")
    return name, end + 1


def column_of(name: str, columns: Container[str]) -> tuple[str, list[str]] | None:
    """The column that a name refers to, and the path of a member in it: `a` and `b` for `a.b`.

    A column with the whole name comes first, then the one with the longest name. None if there is
    no such column.
    """
    parts = name.split(".")
    for at in range(len(parts), 0, -1):
        if (column := ".".join(parts[:at])) in columns:
            return column, parts[at:]
    return None


def cell(values: Mapping[str, Any], name: str) -> Any:
    """The value of a row in a column, or of a member in it; null has only null members.

    Raises:
        QueryError: the row has no such column or member.
    """
    found = column_of(name, values)
    if found is None:
        raise QueryError(no_column(name, values), ErrorCode.MISSING_FIELD, name)
    column, path = found
    value = values[column]
    for key in path:
        value = _member(value, key, name)
    return value


def _member(value: object, key: str, name: str) -> object:
    """A member of an object, an element of an array, or either in JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = load_json(value.encode())
        except QueryError as exc:
            raise QueryError(f"{name!r}: {exc}", exc.code, name) from exc
    if value is None:
        return None
    if isinstance(value, dict) and key in value:
        return value[key]
    if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
        return value[int(key)]
    members = value if isinstance(value, dict) else ()
    raise QueryError(
        f"{name!r}: there is no member {key!r}{did_you_mean(key, members)}",
        ErrorCode.MISSING_FIELD,
        name,
    )


def no_column(column: str, columns: Iterable[str]) -> str:
    """An error message for a missing column that suggests the one that was meant, if any."""
    names = [name for name in columns if name]
    folded = {name.strip().casefold(): name for name in reversed(names)}
    near = closest(column.strip().casefold(), folded)
    hint = f"did you mean {folded[near]!r}?" if near else f"the columns are {', '.join(names[:20])}"
    return f"no column named {column!r}" + (f"; {hint}" if names else "")


def options_hint(columns: Iterable[str]) -> str:
    """A hint at the options for rows whose columns are not named like query fields."""
    names = [name for name in columns if name]
    likely = (name for name in names if name.strip().casefold() in PROMPT_NAMES)
    prompt = next(likely, None) or next(reversed(names), "text")
    hint = f"map the columns with --prompt '{_placeholder(prompt)}'"
    ids = [name for name in names if name.casefold().replace("_", "") in ("id", "key", "uid")]
    return hint + (f" --id-column {ids[0]}" if ids and ids[0] != prompt else "")


def _placeholder(column: str) -> str:
    try:
        is_plain = list(_parts(f"{{{column}}}")) == [("", column)]
    except UsageError:
        is_plain = False
    return f"{{{column}}}" if is_plain else f"{{{json.dumps(column, ensure_ascii=False)}}}"


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
