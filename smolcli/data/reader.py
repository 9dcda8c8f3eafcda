"""The rows of any input, each as the fields of a query."""

from collections.abc import Iterator
from pathlib import Path

from smolcli.data.csv import read_csv
from smolcli.data.jsonl import MAX_LINE_BYTES, Line, read_lines
from smolcli.data.parquet import read_parquet
from smolcli.data.prompt_template import RowMapper
from smolcli.data.rows import Row, format_of
from smolcli.errors import QueryError, UsageError
from smolcli.protocol.query import load_json
from smolcli.settings import RowSettings
from smolcli.types import ErrorCode


def read_rows(path: Path, settings: RowSettings, after: int = 0) -> Iterator[Row]:
    """Yield the rows of a table, or of a file of JSON lines, as the fields of queries.

    Args:
        path: the file.
        settings: how a row becomes a query.
        after: the number of the last row that is not wanted.

    Raises:
        UsageError: where the input has not the columns that `settings` ask for.
        InputError: where the input cannot be read.
    """
    kind = format_of(path)
    if kind is None:
        rows = (load_row(line) for line in read_lines(path) if line.number > after)
        yield from rows if settings == RowSettings() else map(RowMapper(settings).query, rows)
        return
    mapper = RowMapper(settings)
    read = read_parquet if kind == ".parquet" else read_csv
    try:
        rows = (row for row in read(path, mapper.choose) if row.number > after)
        yield from map(mapper.query_of_cells, rows)
    except UsageError as exc:
        raise UsageError(f"{path}: {exc}") from exc


def row_numbers(path: Path, settings: RowSettings) -> Iterator[int]:
    """The numbers of the rows that `read_rows` yields; JSON lines are not parsed for them."""
    rows = read_lines(path) if format_of(path) is None else read_rows(path, settings)
    return (row.number for row in rows)


def load_row(line: Line) -> Row:
    """The JSON value that a line holds, or the line itself and what is wrong with it."""
    try:
        if line.data is None:
            message = f"the line is longer than {MAX_LINE_BYTES:,} bytes"
            raise QueryError(message, ErrorCode.LINE_TOO_LONG)
        return Row(line.number, load_json(line.data))
    except QueryError as exc:
        return Row(line.number, line.data, exc)
