"""The mapping of rows to queries."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from smolcli.data.prompt_template import Template, cell, column_of, no_column, options_hint
from smolcli.data.rows import Row
from smolcli.errors import QueryError, UsageError
from smolcli.protocol.bare_lines import CONTENTS, bare_id, is_bare, with_messages
from smolcli.protocol.fields import float_to_int
from smolcli.protocol.json_text import load_json
from smolcli.protocol.query import FIELDS, QueryFields
from smolcli.settings import ALL_FIELDS, RowSettings
from smolcli.types import ErrorCode

_BOOLEANS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


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
        self._default_id = {"chat_id"} if settings.id_column is None else set()
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
            used = needed | self._default_id
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
            known = FIELDS if self._template is None else self._default_id
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
