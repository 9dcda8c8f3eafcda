"""Prompt templates, and the mapping of columns to query fields."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

from smolcli.data.rows import Row
from smolcli.errors import QueryError, UsageError
from smolcli.protocol.query import FIELDS, QueryFields, load_json
from smolcli.settings import RowSettings
from smolcli.types import ErrorCode


class Template:
    """`Translate {text}` for any row; `{{` and `}}` stand for braces.

    Raises:
        UsageError: where the text cannot be read so.
    """

    def __init__(self, text: str) -> None:
        try:
            parts = list(Formatter().parse(text))
        except ValueError as exc:
            raise UsageError(f"--prompt: {exc}; a brace itself is {{{{ or }}}}") from exc
        if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
            raise UsageError("--prompt: braces hold the name of a column and nothing else")
        self._parts = [(literal, name) for literal, name, _, _ in parts]
        self.columns = list(dict.fromkeys(name for _, name in self._parts if name is not None))
        if not self.columns:
            raise UsageError("--prompt names no column: write {text} where column text is to stand")

    def render(self, values: Mapping[str, Any]) -> str:
        """The prompt of one row.

        Raises:
            QueryError: where a column is missing, or none of them holds anything.
        """
        texts = {name: _text(cell(values, name)) for name in self.columns}
        if not any(text.strip() for text in texts.values()):
            names = " and ".join(repr(name) for name in self.columns)
            raise QueryError(f"{names} must not be empty", ErrorCode.MISSING_FIELD, self.columns[0])
        return "".join(
            literal + (texts[name] if name is not None else "") for literal, name in self._parts
        )


def cell(values: Mapping[str, Any], column: str) -> Any:
    """What a row has in a column.

    Raises:
        QueryError: where it has no such column.
    """
    if column not in values:
        raise QueryError(no_column(column, values), ErrorCode.MISSING_FIELD, column)
    return values[column]


def no_column(column: str, columns: Iterable[str]) -> str:
    """That there is no such column, and which was meant perhaps."""
    names = [name for name in columns if name]
    near = difflib.get_close_matches(column, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names[:20])}"
    return f"there is no column {column!r}" + (f"; {hint}" if names else "")


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class RowMapper:
    """Makes queries of rows.

    Raises:
        UsageError: where the prompt cannot be read as a template.
    """

    def __init__(self, settings: RowSettings) -> None:
        self._template = Template(settings.prompt) if settings.prompt is not None else None
        self._id_column = settings.id_column
        self._fields = settings.fields
        in_prompt = self._template.columns if self._template else []
        in_id = [settings.id_column] if settings.id_column is not None else []
        self._needed = list(dict.fromkeys([*in_id, *in_prompt, *settings.fields]))
        self._json_fields = _json_fields()

    def choose(self, header: Sequence[str]) -> list[str]:
        """The columns of a table that matter.

        Raises:
            UsageError: where a column is missing that every row needs.
        """
        for column in self._needed:
            if column not in header:
                raise UsageError(no_column(column, header))
        if self._template is not None:
            return [name for name in header if name in (*self._needed, "chat_id")]
        if not {"user_prompt", "messages"} & set(header):
            example = next((name for name in reversed(header) if name), "text")
            raise UsageError(
                "there is no column user_prompt; "
                f"say what to ask: --prompt 'Summarize: {{{example}}}'"
            )
        return [name for name in header if name]

    def query_of_cells(self, row: Row) -> Row:
        """The query that a table's row makes: text is read as JSON where a field is no text."""
        if self._template is None and isinstance(row.value, dict):
            values = {name: self._typed(name, value) for name, value in row.value.items()}
            row = Row(row.number, values, row.fault)
        return self.query(row)

    def query(self, row: Row) -> Row:
        """The query that a row makes, and what goes from the row into its result.

        It always has a chat_id, so that no row of data is taken for one of OpenAI's requests.
        """
        if row.fault is not None:
            return Row(row.number, fault=row.fault)
        if not isinstance(row.value, dict):
            return row
        values = row.value
        carried = {name: values[name] for name in self._fields if name in values}
        query: dict[str, Any] = {"chat_id": self._chat_id(values, row.number)}
        try:
            query |= self._asked(values)
        except QueryError as exc:
            return Row(row.number, query, exc, carried or None)
        metadata = query.get("metadata") or {}
        if carried and isinstance(metadata, dict):  # another is the row's fault, told of it later
            query["metadata"] = metadata | carried
        return Row(row.number, query, None, carried or None)

    def _chat_id(self, values: Mapping[str, Any], number: int) -> object:
        if self._id_column is not None:
            return values.get(self._id_column)
        return values.get("chat_id", str(number))

    def _asked(self, values: Mapping[str, Any]) -> dict[str, Any]:
        for column in self._needed:
            cell(values, column)
        if self._id_column is not None and values[self._id_column] in (None, ""):
            message = f"{self._id_column!r} must not be empty"
            raise QueryError(message, ErrorCode.MISSING_FIELD, self._id_column)
        if self._template is not None:
            return {"user_prompt": self._template.render(values)}
        used_up = {self._id_column, *self._fields} - set(FIELDS) | {"chat_id"}
        return {name: value for name, value in values.items() if name not in used_up}

    def _typed(self, name: str, value: object) -> object:
        if name not in self._json_fields or not isinstance(value, str):
            return value
        try:
            return load_json(value.encode())
        except QueryError:
            return value  # the schema says what it must be


def _json_fields() -> set[str]:
    """The fields of a query that are never a string."""
    properties = QueryFields.model_json_schema()["properties"]
    return {
        name
        for name, schema in properties.items()
        if not any(kind.get("type") == "string" for kind in schema.get("anyOf", [schema]))
    }
