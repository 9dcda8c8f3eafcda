"""Turns the rows of an input into queries, or into error results if they are invalid."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

from smolcli.batch.chat_ids import ChatIds
from smolcli.data.prompt_template import PROMPT_NAMES, options_hint
from smolcli.data.rows import Row
from smolcli.errors import QueryError
from smolcli.protocol.json_text import shorten
from smolcli.protocol.line_formats import LineFormat, detect_format
from smolcli.protocol.query import FIELDS
from smolcli.settings import QueryDefaults
from smolcli.types import ErrorCode, Query, Result, failure

_OWN_FIELDS = {"user_prompt", "messages", "raw_prompt", "custom_id"}


class QueryReader:
    """Yields one query or error result for each row, in order.

    The first row with an id claims it, valid or not; later queries with that id are duplicates.

    Args:
        rows: rows to read, once.
        defaults: values for fields that a query leaves out.
        ids: ids already taken by earlier rows; extended while reading.
        format: the format of the rows; detected from the first rows if None.
        fit: makes the prompt of a row's query fit the model.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        defaults: QueryDefaults,
        ids: ChatIds,
        format: LineFormat | None = None,
        fit: Callable[[Query, Row], Query] | None = None,
    ) -> None:
        self._rows = rows
        self._defaults = defaults
        self._ids = ids
        self._format = format
        self._fit = fit

    @property
    def format(self) -> LineFormat:
        """The format of the rows; known once the first item has been yielded."""
        assert self._format is not None
        return self._format

    def __iter__(self) -> Iterator[Query | Result]:
        rows = iter(self._rows)
        sample: list[Row] = []
        if self._format is None:
            self._format = detect_format(_values(rows, sample), self._defaults)
        for row in chain(sample, rows):
            item = _parse(row, self._format, self._defaults)
            if item.chat_id and not self._ids.claim(item.chat_id) and isinstance(item, Query):
                item = _duplicate(item, self._format.for_line(row.number).id_field)
            if self._fit is not None and isinstance(item, Query):
                item = _fitted(item, row, self._fit)
            yield item


def _fitted(query: Query, row: Row, fit: Callable[[Query, Row], Query]) -> Query | Result:
    try:
        return fit(query, row)
    except QueryError as exc:
        return failure(query, str(exc), exc.code, exc.field)


def _values(rows: Iterator[Row], sample: list[Row]) -> Iterator[object]:
    """Yield the value of each row and append the row to `sample`."""
    for row in rows:
        sample.append(row)
        yield row.value


def _parse(row: Row, format: LineFormat, defaults: QueryDefaults) -> Query | Result:
    try:
        if row.error is not None:
            raise row.error
        return format.parse(row.value, defaults, row.number)
    except QueryError as exc:
        return Result(
            chat_id=format.id_of(row.value, row.number),
            error=f"{exc}{_hint(row, exc) if format.for_line(row.number).name == 'smol' else ''}",
            error_code=exc.code,
            field=exc.field,
            metadata=row.carried,
            line=row.number,
        )


def _hint(row: Row, exc: QueryError) -> str:
    """The end of an error message for a row whose columns are not named like query fields."""
    is_data = exc.code in (ErrorCode.MISSING_FIELD, ErrorCode.UNKNOWN_FIELD)
    values = row.value if is_data and row.error is None else None
    if not isinstance(values, dict) or _OWN_FIELDS & values.keys():
        return ""
    columns = [name for name in values if name not in FIELDS]
    if not columns or "did you mean" in str(exc):
        return ""
    if row.number == 1 and (name := _member_of_rows(values)):
        is_plain = name.isascii() and name.isidentifier()  # jq allows no other letters
        path = f".{name}" if is_plain else f".[{json.dumps(name, ensure_ascii=False)}]"
        return f"; if {shorten(name)!r} holds the rows, extract them first: jq -c '{path}[]'"
    return f"; {options_hint(columns)}"


def _member_of_rows(values: Mapping[str, object]) -> str | None:
    """The list of objects in `{"version": 1, "data": [...]}`, which is a whole file in one row."""
    if any(name.casefold() in ("id", *PROMPT_NAMES) for name in values):
        return None
    lists = {name: value for name, value in values.items() if isinstance(value, list) and value}
    names = [name for name, value in lists.items() if all(isinstance(v, dict) for v in value)]
    return names[0] if len(names) == 1 else None


def _duplicate(query: Query, id_field: str) -> Result:
    message = f"{id_field} {shorten(query.chat_id)!r} was already used on an earlier line"
    return failure(query, message, ErrorCode.DUPLICATE_CHAT_ID, id_field)
