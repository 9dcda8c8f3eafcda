"""Prompt templates, and the mapping of rows to queries."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from smolcli.data.rows import Row
from smolcli.errors import QueryError, UsageError
from smolcli.protocol.bare_lines import bare_id, is_bare, with_messages
from smolcli.protocol.fields import float_to_int
from smolcli.protocol.query import FIELDS, QueryFields
from smolcli.protocol.strict_json import load_json
from smolcli.settings import RowSettings
from smolcli.types import ErrorCode

_BOOLEANS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_PROMPT_NAMES = ("prompt", "question", "text", "input", "instruction", "query", "content")


class Template:
    """A prompt with placeholders for columns: `Translate {text}`.

    A placeholder contains the name of a column verbatim, including colons, exclamation marks and
    balanced braces. Any name can be written as a JSON string: `{"{odd}"}`. `{{` and `}}` are
    literal braces.

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
        texts = {name: _text(cell(values, name)) for name in self.columns}
        if not any(text.strip() for text in texts.values()):
            names = " and ".join(repr(name) for name in self.columns)
            raise QueryError(f"{names} must not be empty", ErrorCode.MISSING_FIELD, self.columns[0])
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


def cell(values: Mapping[str, Any], column: str) -> Any:
    """The value of a row in a column.

    Raises:
        QueryError: the row has no such column.
    """
    if column not in values:
        raise QueryError(no_column(column, values), ErrorCode.MISSING_FIELD, column)
    return values[column]


def no_column(column: str, columns: Iterable[str]) -> str:
    """An error message for a missing column that suggests the one that was meant, if any."""
    names = [name for name in columns if name]
    folded = {name.strip().casefold(): name for name in reversed(names)}
    near = difflib.get_close_matches(column.strip().casefold(), folded, n=1)
    hint = (
        f"did you mean {folded[near[0]]!r}?" if near else f"the columns are {', '.join(names[:20])}"
    )
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


class RowMapper:
    """Turns rows into queries.

    Args:
        settings: which columns are the prompt, the id and the metadata.
        id_prefix: of the ids that are made from row numbers.

    Raises:
        UsageError: the prompt is not a template.
    """

    def __init__(self, settings: RowSettings, id_prefix: str = "") -> None:
        self._id_prefix = id_prefix
        self._template = Template(settings.prompt) if settings.prompt is not None else None
        self._id_column = settings.id_column
        self._fields = settings.fields
        in_prompt = self._template.columns if self._template else []
        in_id = [settings.id_column] if settings.id_column is not None else []
        self._needed = list(dict.fromkeys([*in_id, *in_prompt, *settings.fields]))
        self._json_fields = _json_fields()

    def choose(self, header: Sequence[str]) -> list[str]:
        """The columns of a table to read.

        Raises:
            UsageError: a column that every row needs is missing, or two have the same name.
        """
        for column in self._needed:
            if column not in header:
                raise UsageError(no_column(column, header))
        if self._template is None:
            if not {"user_prompt", "messages"} & set(header):
                raise UsageError(f"no column named 'user_prompt'; {options_hint(header)}")
            used, chosen = {*FIELDS, *self._needed}, [name for name in header if name]
        else:
            used = {*self._needed, *(["chat_id"] if self._id_column is None else [])}
            chosen = [name for name in header if name in used]
        for name in chosen:
            if name in used and header.count(name) > 1:
                raise UsageError(f"more than one column is named {name!r}")
        return list(dict.fromkeys(chosen))

    def query_of_cells(self, row: Row) -> Row:
        """The query of a table's row: cells are parsed as JSON where the field is not a string."""
        if self._template is None and isinstance(row.value, dict):
            values = {name: self._typed(name, value) for name, value in row.value.items()}
            row = Row(row.number, values, row.fault)
        return self.query(row)

    def query(self, row: Row) -> Row:
        """The query of a row.

        It always has a chat_id, so that a row of data is never mistaken for an OpenAI request.
        """
        if row.fault is not None:
            return Row(row.number, fault=row.fault)
        if not isinstance(row.value, dict):
            return row
        values = row.value
        carried = {name: values[name] for name in self._fields if name in values}
        query: dict[str, Any] = {"chat_id": self._chat_id(values, row.number)}
        try:
            query |= self._query_fields(values)
        except QueryError as exc:
            return Row(row.number, query, exc, carried or None)
        metadata = query.get("metadata") or {}
        if carried and isinstance(metadata, dict):  # the parser refuses any other
            query["metadata"] = metadata | carried
        return Row(row.number, query, None, carried or None)

    def _chat_id(self, values: Mapping[str, Any], number: int) -> object:
        if self._id_column is not None:
            return values.get(self._id_column)
        if self._template is None and is_bare(values):
            return bare_id(values, f"{self._id_prefix}{number}")
        return values.get("chat_id", f"{self._id_prefix}{number}")

    def _query_fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        for column in self._needed:
            cell(values, column)
        if self._id_column is not None and values[self._id_column] in (None, ""):
            message = f"{self._id_column!r} must not be empty"
            raise QueryError(message, ErrorCode.MISSING_FIELD, self._id_column)
        if self._template is not None:
            return {"user_prompt": self._template.render(values)}
        consumed = {self._id_column, *self._fields} - set(FIELDS) | {"chat_id"}
        fields = {name: value for name, value in values.items() if name not in consumed}
        if not is_bare(values):
            return fields
        fields.pop("id", None)
        query, metadata = with_messages(fields)
        return query | ({"metadata": metadata} if metadata else {})

    def _typed(self, name: str, value: object) -> object:
        if name not in self._json_fields:
            return value
        if name == "logprobs":  # true, TRUE or True, and what pandas makes of them
            return _BOOLEANS.get(str(float_to_int(value)).strip().casefold(), value)
        if not isinstance(value, str):
            return value
        try:
            return load_json(value.strip().encode())
        except QueryError:
            return value  # the parser reports it


def _json_fields() -> set[str]:
    """The fields of a query that are never a string."""
    properties = QueryFields.model_json_schema()["properties"]
    return {
        name
        for name, schema in properties.items()
        if not any(kind.get("type") == "string" for kind in schema.get("anyOf", [schema]))
    }
