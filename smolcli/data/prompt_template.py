"""Prompt templates, and the mapping of rows to queries."""

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from smolcli.data.rows import LongestField, Row
from smolcli.errors import QueryError, UsageError, closest
from smolcli.protocol.bare_lines import CONTENTS, bare_id, is_bare, with_messages
from smolcli.protocol.fields import did_you_mean, float_to_int
from smolcli.protocol.json_text import load_json
from smolcli.protocol.query import FIELDS, QueryFields
from smolcli.settings import ALL_FIELDS, RowSettings
from smolcli.types import ErrorCode

_BOOLEANS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_PROMPT_NAMES = ("prompt", "question", "text", "input", "instruction", "query", "content")


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
    likely = (name for name in names if name.strip().casefold() in _PROMPT_NAMES)
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


def named_columns(settings: RowSettings) -> set[str]:
    """The columns that options name; `*` is one only if there is no template.

    Raises:
        UsageError: the prompt is not a template.
    """
    named = set(settings.fields)
    if settings.id_column is not None:
        named.add(settings.id_column)
    if settings.prompt is not None:
        named = named.difference(ALL_FIELDS) | set(Template(settings.prompt).columns)
    return named


class RowMapper:
    """Turns rows into queries.

    Args:
        settings: which columns are the prompt, the id and the metadata.
        id_prefix: prefix for ids that are made from row numbers.

    Raises:
        UsageError: the prompt is not a template.
    """

    def __init__(self, settings: RowSettings, id_prefix: str = "") -> None:
        self._id_prefix = id_prefix
        self._template = Template(settings.prompt) if settings.prompt is not None else None
        self._id_column = settings.id_column
        self._copies_all = settings.fields == ALL_FIELDS
        self._fields = () if self._copies_all else settings.fields
        self._truncates = settings.truncate_prompt
        in_prompt = self._template.columns if self._template else []
        in_id = [settings.id_column] if settings.id_column is not None else []
        self._needed = list(dict.fromkeys([*in_id, *in_prompt, *self._fields]))

    def choose(self, header: Sequence[str]) -> list[str]:
        """The columns of a table to read.

        Raises:
            UsageError: a column that every row needs is missing, or two have the same name.
        """
        needed = set()
        for name in self._needed:
            if (found := column_of(name, header)) is None:
                raise UsageError(no_column(name, header))
            needed.add(found[0])
        if self._template is None:
            if not {"user_prompt", "messages", "raw_prompt"} & set(header):
                raise UsageError(f"no column named 'user_prompt'; {options_hint(header)}")
            used, chosen = {*FIELDS, *needed}, [name for name in header if name]
        else:
            used = {*needed, *(["chat_id"] if self._id_column is None else [])}
            if self._copies_all:
                used |= {name for name in header if name}
            chosen = [name for name in header if name in used]
        for name in chosen:
            if name in used and header.count(name) > 1:
                raise UsageError(f"more than one column is named {name!r}")
        return list(dict.fromkeys(chosen))

    def query_of_cells(self, row: Row) -> Row:
        """The query of a table's row: cells are parsed as JSON where the field is not a string."""
        if self._template is None and isinstance(row.value, dict):
            values = {name: self._typed(name, value) for name, value in row.value.items()}
            row = Row(row.number, values, row.error)
        return self.query(row)

    def query(self, row: Row) -> Row:
        """The query of a row.

        It always has a chat_id, so that a row of data is never mistaken for an OpenAI request.
        """
        if row.error is not None:
            return Row(row.number, error=row.error)
        if not isinstance(row.value, dict):
            return row
        values = row.value
        carried = self._carried(values)
        query: dict[str, Any] = {"chat_id": self._chat_id(values, row.number)}
        try:
            query |= self._query_fields(values)
        except QueryError as exc:
            return Row(row.number, query, exc, carried or None)
        metadata = query.get("metadata") or {}
        if carried and isinstance(metadata, dict):  # the parser rejects any other
            query["metadata"] = metadata | carried
        longest = None
        if self._truncates and self._template is not None:
            longest = self._template.longest_field(values)
        return Row(row.number, query, None, carried or None, longest)

    def _carried(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values to copy to the result, without columns that the row lacks."""
        if self._copies_all:
            known = FIELDS if self._template is None else ["chat_id"][self._id_column is not None :]
            return {name: value for name, value in values.items() if name not in known}
        carried = {}
        for name in self._fields:
            with suppress(QueryError):
                carried[name] = cell(values, name)
        return carried

    def _chat_id(self, values: Mapping[str, Any], number: int) -> object:
        if self._id_column is not None:
            with suppress(QueryError):
                return cell(values, self._id_column)
            return None
        if self._template is None and is_bare(values):
            return bare_id(values, f"{self._id_prefix}{number}")
        return values.get("chat_id", f"{self._id_prefix}{number}")

    def _query_fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        for column in self._needed:
            cell(values, column)
        if self._id_column is not None and cell(values, self._id_column) in (None, ""):
            message = f"{self._id_column!r} must not be empty"
            raise QueryError(message, ErrorCode.MISSING_FIELD, self._id_column)
        if self._template is not None:
            return {"user_prompt": self._template.render(values)}
        named = [found[0] for name in self._needed if (found := column_of(name, values))]
        consumed = {*(values if self._copies_all else named)} - set(FIELDS) | {"chat_id"}
        if self._copies_all and is_bare(values):
            consumed -= {*CONTENTS, "system", "completion"}
        fields = {name: value for name, value in values.items() if name not in consumed}
        if not is_bare(values):
            return fields
        fields.pop("id", None)
        query, metadata = with_messages(fields)
        return query | ({"metadata": metadata} if metadata else {})

    def _typed(self, name: str, value: object) -> object:
        if name not in _json_fields():
            return value
        if name == "logprobs":  # true, TRUE or True, and what pandas makes of them
            return _BOOLEANS.get(str(float_to_int(value)).strip().casefold(), value)
        if not isinstance(value, str):
            return value
        try:
            return load_json(value.strip().encode())
        except QueryError:
            return value  # the parser reports it


@cache
def _json_fields() -> frozenset[str]:
    """The fields of a query that are never a string."""
    properties = QueryFields.model_json_schema()["properties"]
    return frozenset(
        name
        for name, schema in properties.items()
        if not any(kind.get("type") == "string" for kind in schema.get("anyOf", [schema]))
    )
